"""How a run is paid for: the dataset's ledger, made if need be, and the run's own study in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from grape_ray.config import cautions
from grape_ray.ledger.budget import check_share, made_for, open_registered
from grape_ray.ledger.entries import Study
from grape_ray.privacy import keys
from grape_ray.tasks.task import Data, label
from grape_ray.training.plan import Plan
from grape_ray.training.request import Payment


@dataclass(frozen=True)
class Budget:
    """The dataset's: as its ledger is made with (nothing, where there is one), and the fingerprints
    of private records (none of public ones)."""

    made: tuple[float | None, float | None]
    identity: tuple[str, ...]


def _study(plan: Plan) -> Study:
    """The run's own study."""
    assert plan.target is not None
    unit = plan.config.privacy.unit_name
    return Study(plan.study, plan.mechanism(), *plan.target, plan.tokens, unit)


def check_budget(plan: Plan, data: Data, payment: Payment) -> Budget:
    """The budget that pays for the run's own study. Raises what its ledger, there or to be made,
    would refuse.
    """
    assert plan.target is not None
    asked = payment.ledger_budget
    made = made_for(plan.target, *asked)
    what = "the delta of the dataset's ledger"
    units = plan.config.privacy.units_name
    cautions.check_delta(what, made[1], data.unit_count, units, payment.consent)
    existing = check_share(
        plan.ledger_storage().first_contact(), plan.dataset_id, made, _study(plan), asked
    )
    if not existing:
        cautions.warn_of_rest(made, plan.target)
    return Budget((None, None) if existing else made, () if data.public else data.identity)


def open_budget(plan: Plan, budget: Budget, ledger_at: Callable[[], str]) -> Plan:
    """Registers the run's own study in the dataset's ledger, which is made if need be at the place
    that `ledger_at` gives.

    Once a study is registered its budget is gone, so all that can be refused is refused before.
    """
    keys.master_key(plan.key_path)
    plan = replace(plan, ledger=ledger_at())
    study, storage, dataset = _study(plan), plan.ledger_storage(), label(plan.config.task)
    made, identity = budget.made, budget.identity
    ledger = open_registered(storage, plan.dataset_id, made, study.unit, identity, dataset)
    ledger.ensure_study(study)
    return plan
