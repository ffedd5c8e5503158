"""One attempt of a run: its number, durable in the ledger, and the keys derived for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from grape_ray.distributed.comms import Comms
from grape_ray.ledger.interface import LedgerClient
from grape_ray.ledger.ledger import Ledger
from grape_ray.privacy import keys
from grape_ray.privacy.rank_zero import on_rank_zero
from grape_ray.storage import Storage
from grape_ray.training.build import public_key
from grape_ray.training.plan import Plan


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run.

    Attributes:
        number: from 1; 0 for the non-private baseline, which draws no noise.
        sampling_key, dropout_key, noise_key, probe_key: 32 bytes each; never written anywhere. The
            baseline has only the first two, and they are public.
    """

    number: int
    sampling_key: bytes = field(repr=False)
    dropout_key: bytes = field(repr=False)
    noise_key: bytes | None = field(repr=False, default=None)
    probe_key: bytes | None = field(repr=False, default=None)


def open_ledger(plan: Plan) -> LedgerClient:
    """The ledger that a plan names."""
    assert plan.ledger is not None
    return Ledger.open(plan.ledger_storage(), plan.dataset_id, create=False)


def open_score_ledger(plan: Plan) -> LedgerClient:
    """The ledger of the plan's private validation records."""
    assert plan.scores is not None
    place = Storage(plan.scores.ledger, plan.config.performance.storage_timeout_s)
    return Ledger.open(place, create=False)


def begin_attempt(plan: Plan, comms: Comms, ledger: LedgerClient | None = None) -> Attempt:
    """A new attempt: the number is durable in the ledger before the keys are derived, so no attempt
    shares a key with another. Every rank calls it.

    Rank 0 derives the keys and sends them to the others: a part of them is fresh, so nobody can
    derive them again, from a copied ledger either.

    Args:
        ledger: of rank 0; None opens the one that the plan names.
    """
    if plan.ledger is None:
        return Attempt(0, public_key(plan.config, "sampling"), public_key(plan.config, "dropout"))
    return on_rank_zero(comms, partial(_begun, plan, ledger))


def _begun(plan: Plan, ledger: LedgerClient | None) -> Attempt:
    """`begin_attempt` on rank 0."""
    ledger = ledger or open_ledger(plan)
    master = keys.master_key(plan.key_path)
    # durable before any key exists: a number that was given out is never given again
    number = ledger.begin_attempt(
        plan.study, plan.run, keys.key_id(master), dataset_id=plan.dataset_id
    )
    own = keys.of_attempt(master, ledger.ledger_id, plan.study, plan.run, number)
    streams = [keys.derive(own, name) for name in ("sampling", "dropout", "noise", "probes")]
    return Attempt(number, *streams)
