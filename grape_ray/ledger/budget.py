"""The budget of a dataset: what its ledger is made with, and whether a share of it would be
granted.
"""

from __future__ import annotations

from collections.abc import Iterable

from grape_ray.accounting.selection import Selection
from grape_ray.ledger import registry
from grape_ray.ledger.entries import Study, entry_name
from grape_ray.ledger.ledger import Ledger
from grape_ray.ledger.state import State
from grape_ray.storage import Storage


def made_for(
    share: tuple[float, float], epsilon: float | None, delta: float | None
) -> tuple[float, float]:
    """(epsilon, delta) as asked for, when a ledger is made for its first share; what was not asked
    for is the share's own.

    Where epsilon alone was asked for, delta grows in proportion: with the share's own, nothing of
    it would be left for a second one.
    """
    if epsilon is not None and delta is None:
        # three times 1e-5 is to be written as 3e-5
        delta = float(f"{min(0.5, share[1] * max(1.0, epsilon / share[0])):.14g}")
    return share[0] if epsilon is None else epsilon, share[1] if delta is None else delta


def check_share(
    storage: Storage,
    dataset_id: str,
    budget: tuple[float, float],
    share: Study | Selection,
    asked: tuple[float | None, float | None] = (None, None),
) -> bool:
    """Refuses, and writes nothing, what the dataset's ledger, or one made with `budget`, would
    refuse.

    Args:
        asked: the budget in the user's own words, with which an existing ledger is compared.

    Returns:
        Whether there is a ledger already.

    Raises:
        StorageError, LedgerError, BudgetExceeded: no ledger can be made there, it is another's or
            of another privacy unit, or the share exceeds what is left.
    """
    existing = storage.exists(entry_name(0))
    if existing:
        state = Ledger.open(storage, dataset_id, *asked, create=False).state
    else:
        storage.check_writable()
        state = State(epsilon=budget[0], delta=budget[1], unit=share.unit)
    state.check_unit(share.unit)
    # one that is registered already was checked then, and is compared when it is opened
    if share.name not in state.studies and share.name not in state.selections:
        state.check_share(share)
    return existing


def open_registered(
    storage: Storage,
    dataset_id: str,
    made: tuple[float | None, float | None],
    unit: str,
    identity: Iterable[str],
    dataset: str,
) -> Ledger:
    """The dataset's ledger, made if need be, and known to the user's registry from now on.

    Args:
        made: (epsilon, delta) that it is made with; None takes a ledger that exists as it is.
        unit: the privacy unit that it protects.
        identity: all fingerprints of the records; none of public ones, which may have many ledgers.
        dataset: what the user calls the records.

    Raises:
        LedgerError: it is of another dataset, budget or unit, damaged, or out of reach.
        StorageError: the registry cannot be written.
    """
    ledger = Ledger.open(storage, dataset_id, *made, unit=unit)
    if identity:
        registry.register(identity, storage.url, ledger.ledger_id, dataset)
    return ledger
