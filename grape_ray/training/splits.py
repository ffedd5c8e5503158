"""Whether the validation records may be spoken of: they must not be private training records, of
this run or of another.
"""

from __future__ import annotations

import warnings

from grape_ray.data.fingerprints import column_fingerprints, fingerprint_records, rows_in_common
from grape_ray.errors import Caution, DataError
from grape_ray.ledger import registry
from grape_ray.tasks.task import Data


def check_splits(data: Data, exact_metrics: bool, protects: bool) -> None:
    """Refuses validation records of which a run would say what it must not.

    Rows that are in both splits are warned of, with their count alone.

    Args:
        exact_metrics: whether metrics on the validation records are released without noise.
        protects: whether the training records are private and the method protects them.

    Raises:
        DataError: all validation records, or a whole column of them, are training records that are
            to be protected; or metrics are exact and the user's registry knows the records as
            private, training or validation records of whatever run.
    """
    columns = column_fingerprints(data.validation)
    if protects:
        _check_disjoint(data, columns)
    if exact_metrics and registry.known((fingerprint_records(data.validation), *columns)):
        fix = (
            "use other validation records, or a sweep with score_source='private', which pays for"
            " what it says"
        )
        raise DataError(
            "the validation records are known as private",
            None,
            "public ones, for metrics without noise",
            fix,
        )


def _check_disjoint(data: Data, columns: tuple[str, ...]) -> None:
    total, common = len(data.validation), rows_in_common(data.validation, data.train)
    if common == total or set(columns) & set(column_fingerprints(data.train)):
        what = "the validation records are the training records"
        raise DataError(
            what,
            f"{common} of {total} rows",
            "records that are not trained on",
            "hold other records out",
        )
    if common:
        text = (
            f"{common} of {total} validation records are training records, too: what is said of"
            " them is not protected by the guarantee"
        )
        # the count is said, the rows are not: which they are would be said of private records
        warnings.warn(text, Caution, stacklevel=4)
