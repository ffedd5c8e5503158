"""Whether the validation records may be spoken of: they must not be private training records, of
this run or of another.
"""

from __future__ import annotations

import warnings

from grape_ray.data.fingerprints import column_fingerprints, rows_in_common
from grape_ray.errors import Caution, DataError
from grape_ray.ledger import registry
from grape_ray.tasks.task import Data


def warn_of_silence(data: Data) -> None:
    """Says that no metric will be told, where the validation records are private."""
    if len(data.validation) and not data.validation_public:
        text = (
            "the held-out records are private, so no metric of them is told: say"
            " task.held_out_public=true if they are not, name public records with task.validation,"
            " or let a sweep with score_source='private' pay for its scores"
        )
        warnings.warn(text, Caution, stacklevel=3)


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
    if protects:
        _check_disjoint(data, column_fingerprints(data.validation))
    if exact_metrics and not data.validation_public:
        raise private_validation()
    if exact_metrics and registry.known(data.validation_identity):
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


def private_validation() -> DataError:
    """The error for an exact metric of records that are private."""
    return DataError(
        "the held-out records are private",
        None,
        "public ones, for metrics without noise",
        "say task.held_out_public=true if they are, or use score_source='private' in a sweep",
    )


def _check_disjoint(data: Data, columns: tuple[str, ...]) -> None:
    total, common = len(data.validation), rows_in_common(data.validation, data.train)
    if not total:
        return
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
