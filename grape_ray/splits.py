"""Whether the validation records may be spoken of: they must not be private training records, of this run or of another."""

from __future__ import annotations

import warnings

from grape_ray import registry
from grape_ray.data.identity import column_fingerprints, fingerprint_records, rows_in_common
from grape_ray.errors import DataError
from grape_ray.task import Data


def check_splits(data: Data, exact_metrics: bool) -> None:
    """Refuses validation records that are training records: what is said of them would be said of records that the guarantee protects.

    Rows that are in both splits are warned of, with their count alone. Public data has nothing to lose, and is not looked at.

    Args:
        exact_metrics: whether metrics on the validation records are released without noise.

    Raises:
        DataError: all validation records, or a whole column of them, are training records of this run or, where metrics are exact, of a
            dataset that the user's registry knows as private.
    """
    if data.public:
        return
    columns, fix = column_fingerprints(data.validation), "hold other records out"
    total, common = len(data.validation), rows_in_common(data.validation, data.train)
    if common == total or set(columns) & set(column_fingerprints(data.train)):
        what = "the validation records are the training records"
        raise DataError(what, f"{common} of {total} rows", "records that are not trained on", fix)
    if common:
        text = f"{common} of {total} validation records are training records, too: what is said of them is not protected by the guarantee"
        warnings.warn(text, stacklevel=3)
    if exact_metrics and registry.known((fingerprint_records(data.validation), *columns)):
        fix = "use other validation records, or a sweep with score_source='private', which pays for what it says"
        raise DataError("the validation records are known as private", None, "public ones, for metrics without noise", fix)
