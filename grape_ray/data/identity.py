"""What tells datasets apart: fingerprints of records in memory."""

from __future__ import annotations

from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.tables import fingerprint_arrays


def fingerprint_records(records: Records) -> str:
    """32 hexadecimal digits that depend on every column's content and on the rows' order (SHA-256)."""
    columns = records.columns.values()
    return fingerprint_arrays(*(part for c in columns for part in ((c.values, c.offsets) if isinstance(c, Ragged) else (c,))))
