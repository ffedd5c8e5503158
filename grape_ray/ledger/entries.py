"""The entries of a ledger: their schema, their canonical JSON and the hash that chains each to the
one before.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import cast

from grape_ray.accounting import calibration
from grape_ray.accounting.mechanism import (
    RECORD,
    Mechanism,
    check_count,
    check_delta,
    check_epsilon,
    check_name,
)
from grape_ray.accounting.selection import Distribution, Selection
from grape_ray.errors import ConfigError, GrapeRayError, LedgerError
from grape_ray.storage import Json

Payload = Json  # of an entry: JSON values of the fields of its kind
FORMAT = 1
GENESIS = "0" * 64
MAX_ENTRY_BYTES = 65536
MAX_REASON = 1000

# Fields of each kind of entry, with their JSON types; further fields, and missing ones, are errors.
# `unit` alone may be missing, and means `record` then.
# fmt: off
SCHEMA: dict[str, dict[str, type]] = {
    "open": {"format": int, "ledger_id": str, "dataset_id": str, "epsilon": float, "delta": float},
    "study": {"name": str, "mechanism": dict, "epsilon": float, "delta": float, "tokens": int},
    "selection": {"name": str, "mechanism": dict, "epsilon": float, "delta": float,
    "trial_tokens": int,
                  "law": str, "mean": float, "shape": float},
    "extend": {"epsilon": float, "delta": float, "reason": str},
    "epoch": {"epoch": int, "holder": str},
    "attempt": {"study": str, "run": str, "attempt": int, "key_id": str},
    "charge": {"study": str, "run": str, "attempt": int, "chunk": int, "first_step": int,
    "asked": int, "steps": int},
    "refund": {"study": str, "run": str, "attempt": int, "chunk": int, "steps": int},
    "close": {"study": str, "run": str, "attempt": int},
}
# fmt: on
_UNIT: dict[str, type] = {"unit": str}
_WITH_UNIT = ("open", "study", "selection")
_ENTRY: dict[str, type] = {
    "seq": int,
    "prev": str,
    "kind": str,
    "payload": dict,
    "time": float,
    "nonce": str,
    "hash": str,
}
_MECHANISM: dict[str, type] = {
    "name": str,
    "sampling_prob": float,
    "noise_multiplier": float,
    "probes": int,
    "probes_shared": bool,
}


def check_reason(value: object) -> str:
    """A reason in words, of up to 1000 printable characters, or ConfigError."""
    if (
        not isinstance(value, str)
        or not value.strip()
        or len(value) > MAX_REASON
        or not value.isprintable()
    ):
        expected = f"1 to {MAX_REASON} printable characters"
        fix = "say who wanted it and why, in one line: it stays in the ledger"
        raise ConfigError("a budget is raised for a stated reason alone", value, expected, fix)
    return value


@dataclass(frozen=True)
class Study:
    """A fixed mechanism and the number of its steps that a share of the dataset's budget buys.

    Guarantees: all steps of all runs of the study together are (epsilon, delta)-differentially
    private, whatever made which run stop, because every step is the same mechanism and there are at
    most ``tokens`` of them. Checked when the ledger takes the study in.

    Args:
        name: unique in its ledger.
        mechanism: what each step is.
        epsilon, delta: the study's share of the dataset's budget.
        tokens: how many steps all its runs may take together, repeats after a crash included.
        unit: the privacy unit, by the name of its column; ``record`` where there is none.

    Raises:
        ConfigError: a number is out of range.
    """

    name: str
    mechanism: Mechanism
    epsilon: float
    delta: float
    tokens: int
    unit: str = RECORD

    def __post_init__(self):
        check_name("study", self.name)
        check_name("unit", self.unit)
        object.__setattr__(self, "epsilon", check_epsilon(self.epsilon))
        object.__setattr__(self, "delta", check_delta(self.delta))
        object.__setattr__(self, "tokens", check_count("tokens", self.tokens))

    def payload(self) -> Json:
        """The study as an entry's payload."""
        return {k: v for k, v in asdict(self).items() if k != "unit" or v != RECORD}

    def epsilon_of(self, steps: int) -> float:
        """An upper bound on the epsilon, at the study's delta, of that many of its steps.

        For display: what is guaranteed is the study's `epsilon`, since its tokens can be spent.
        """
        if steps == 0:
            return 0.0
        return min(self.epsilon, calibration.epsilon(self.mechanism, steps, self.delta))

    @classmethod
    def from_payload(cls, payload: Json) -> Study:
        """The study that a payload holds."""
        fields = {**payload, "mechanism": mechanism_from(payload["mechanism"])}
        return cls(**cast(Json, fields))


def mechanism_from(payload: object) -> Mechanism:
    """The mechanism that a payload holds."""
    return Mechanism(**_shaped("mechanism", payload, _MECHANISM))


def selection_from(payload: Json) -> Selection:
    """The selection that a payload holds."""
    fields = dict(payload)
    distribution = Distribution(fields.pop("law"), fields.pop("mean"), fields.pop("shape"))
    fields["mechanism"] = mechanism_from(fields["mechanism"])
    return Selection(**fields, distribution=distribution)


@dataclass(frozen=True)
class Entry:
    """One line of a ledger; ``prev`` is the hash of the entry before, ``time`` is in seconds since
    1970.

    ``nonce`` is random, so that no two writers ever make the same bytes: storage tells by them
    whose entry it took.
    """

    seq: int
    prev: str
    kind: str
    payload: Json
    time: float
    nonce: str

    @property
    def name(self) -> str:
        """The entry's file."""
        return entry_name(self.seq)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of everything else."""
        return hashlib.sha256(_canonical(self._fields())).hexdigest()

    def encode(self) -> bytes:
        """The file's content."""
        return _canonical({**self._fields(), "hash": self.hash})

    def _fields(self) -> Json:
        return {name: getattr(self, name) for name in _ENTRY if name != "hash"}


def entry_name(seq: int) -> str:
    """``00000012.json`` for 12."""
    return f"{seq:08d}.json"


def decode(name: str, data: bytes) -> Entry:
    """The entry that a file holds, checked as far as one entry can be checked alone.

    Raises:
        LedgerError: not JSON, not the schema, a number that is NaN, infinite, negative or huge, or
            a hash that does not fit.
    """
    try:
        # before it is parsed: anyone may have made the file
        if len(data) > MAX_ENTRY_BYTES:
            raise LedgerError(
                "entry is too long", f"{len(data)} bytes", f"at most {MAX_ENTRY_BYTES}"
            )
        fields = _shaped("entry", _DECODER.decode(data.decode()), _ENTRY)
        if fields["kind"] not in SCHEMA:
            raise LedgerError("unknown kind", fields["kind"], ", ".join(SCHEMA))
        optional = _UNIT if fields["kind"] in _WITH_UNIT else {}
        _shaped(fields["kind"], fields["payload"], SCHEMA[fields["kind"]], optional)
        claimed = fields.pop("hash")
        entry = Entry(**fields)
        if entry.hash != claimed:
            raise LedgerError("its content does not fit its hash", claimed[:12], entry.hash[:12])
        return entry
    # deeply nested JSON exhausts the parser's recursion
    except (ValueError, RecursionError, GrapeRayError) as error:
        fix = (
            "the ledger was damaged or edited: restore it from a copy, and spend nothing from it"
            " until then"
        )
        raise LedgerError(
            f"ledger entry {name} cannot be used: {error}", None, "an entry as it was written", fix
        ) from error


def _canonical(value: Json) -> bytes:
    """The one JSON text of a value."""
    return _ENCODER.encode(value).encode()


def _refuse_constant(text: str) -> float:
    """NaN and Infinity are no JSON."""
    raise ValueError(f"{text} is not a number")


# one text for one value: the hash is of it
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _shaped(
    what: str, value: object, schema: Mapping[str, type], optional: Mapping[str, type] = {}
) -> Json:
    """The dict, if it has exactly the schema's fields, and such as may be missing, of their types,
    with numbers in range.
    """
    if not isinstance(value, dict):
        raise LedgerError(f"{what} is no object", type(value).__name__, str(sorted(schema)))
    found = cast(Json, value)
    if set(found) - set(optional) != set(schema):
        raise LedgerError(f"{what} has wrong fields", str(sorted(found)), str(sorted(schema)))
    schema = {**schema, **{field: kind for field, kind in optional.items() if field in found}}
    for field, kind in schema.items():
        item = found[field]
        accepted = (int, float) if kind is float else (kind,)
        # in Python True is an int
        if not isinstance(item, accepted) or (isinstance(item, bool) and kind is not bool):
            raise LedgerError(
                f"{what}.{field} has a wrong type", type(item).__name__, kind.__name__
            )
        if kind in (int, float) and not 0 <= item <= 1e12:  # false for NaN, too
            raise LedgerError(f"{what}.{field} is out of range", item, "a number from 0 to 1e12")
    return found
