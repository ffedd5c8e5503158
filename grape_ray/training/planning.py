"""How a run is planned: everything is checked and priced before the first step, so that bad input
costs nothing and leaves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

from grape_ray.config import cautions
from grape_ray.config.description import describe, read_run, up_to_date
from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Config
from grape_ray.errors import ConfigError
from grape_ray.ledger import registry
from grape_ray.ledger.entries import Study
from grape_ray.ledger.location import RUN_FILE, absolute, ledger_place
from grape_ray.privacy import keys
from grape_ray.privacy.redaction import run_redacted
from grape_ray.storage import Json, Storage
from grape_ray.tasks.task import Task, loaded, resolved
from grape_ray.training.checks import check_machine, check_run_name, fresh_name
from grape_ray.training.dry_run import dry_run, preflight_extremes
from grape_ray.training.plan import Plan
from grape_ray.training.pricing import check_mechanism, price, sampling_prob_of
from grape_ray.training.private_scores import check_metric, described
from grape_ray.training.request import Payment, Places, Shared
from grape_ray.training.run_budget import check_budget, open_budget
from grape_ray.training.splits import check_splits, warn_of_silence


def plan_run(
    config: Config,
    *,
    run: str | None = None,
    places: Places = Places(),  # noqa: B008  (frozen, as the next two)
    payment: Payment = Payment(),  # noqa: B008
    shared: Shared = Shared(),  # noqa: B008
    with_dry_run: bool = True,
    check_workers: Callable[[Config], None] = lambda config: None,
) -> Plan:
    """Checks a run whole: data, price, ledger, storage, cluster, and by a dry run all that it will
    do; then registers it.

    Args:
        run: name of the run; an existing one with the same config is resumed. None makes a new
            name.
        places: of its files. payment: of a study of its own. shared: with other runs.
        with_dry_run: whether the dry run is made; without it the preflight alone.
        check_workers: raises where the workers are not available.

    Raises:
        GrapeRayError: one of its kinds for whatever is wrong; nothing was written then.
    """
    task: Task = config.task
    run = run or fresh_name(f"{task.name}-{config.method.name}")
    root, study, scores = absolute(places.storage), shared.study, shared.scores
    check_run_name(run)
    check_machine(config)
    if scores is not None:
        check_metric(task, scores.metric, config.privacy.unit)
    data, unit = loaded(task, config.privacy.unit), config.privacy.unit_name
    config = replace(config, task=resolved(task, data))
    private, sampling_prob = METHODS[config.method.name].private, sampling_prob_of(config, data)
    # A run that shares a study, as a trial does, was checked when the study began: here and below.
    if study is None:
        public = data.public and not registry.known(data.identity)
        cautions.check(config, data.unit_count, public, payment.consent)
    if scores is None:
        warn_of_silence(data)
    exact, protects = scores is None and data.validation_public, private and study is None
    check_splits(data, exact, protects and not data.public)
    folder = Storage(root, config.performance.storage_timeout_s)
    folder.check_writable()
    plan = Plan(
        config,
        run,
        root,
        ledger=None,
        key_path=places.key_path,
        study=study.name if study else run,
        dataset_id=data.dataset_id,
        target=None,
        sampling_prob=sampling_prob,
        noise_multiplier=0.0,
        tokens=0,
        origin=shared.origin,
        scores=scores,
        public=data.public and scores is None,
        records=len(data.train),
        units=data.unit_count,
    )
    ledger_at = partial(ledger_place, places.ledger, data.dataset_id, data.public, root, run)
    budget = None
    if private:
        plan = _priced(plan, study, ledger_at())
        assert plan.ledger is not None
        if study is None:  # who shares one charges the ledger that holds it
            registry.check_only(plan.ledger, data.identity, payment.second_ledger)
        keys.check_outside(places.key_path or keys.default_path(), root, plan.ledger)
        if study is None:
            budget = check_budget(plan, data, payment)
        else:
            check_mechanism(plan.mechanism(), unit, study)
    elif study is not None:
        fix = "what a study releases is paid for, without exception"
        raise ConfigError("method.name", config.method.name, "a private method", fix)
    existing = _check_same_run(plan, folder)
    check_workers(config)
    # What is slow comes last, and what cannot be undone after it.
    if study is not None or not with_dry_run:  # a study's runs had theirs when that began
        run_redacted(partial(preflight_extremes, config, data), plan.public)
    else:
        metric = scores.metric if scores else None
        done = dry_run(config, data, folder, plan.noise_multiplier, plan.public, metric)
        plan = replace(plan, dry_run=done)
    if budget is not None:
        plan = open_budget(plan, budget, partial(ledger_at, make=True))
    if not existing:
        _register(plan, folder)
    return plan


def _priced(plan: Plan, study: Study | None, ledger: str) -> Plan:
    """The plan of a private run with its ledger, target, noise and number of steps: those of the
    study that it shares, or by its own config.
    """
    if study is not None:
        noise, tokens = study.mechanism.noise_multiplier, study.tokens
        target = (study.epsilon, study.delta)
    else:
        noise, tokens = price(plan.config, plan.sampling_prob)
        target = (plan.config.privacy.epsilon, plan.config.privacy.delta)
    return replace(plan, ledger=ledger, target=target, noise_multiplier=noise, tokens=tokens)


def _check_same_run(plan: Plan, root: Storage) -> bool:
    """Whether the run exists already. Raises ConfigError where it was begun with another config."""
    if not root.exists(f"{plan.run}/{RUN_FILE}"):
        return False
    known = read_run(root.child(plan.run))
    known = up_to_date(known, plan.config)
    mine = json.loads(_description(plan))
    differing = sorted(k for k in mine if k != "performance" and mine[k] != known.get(k))
    if differing:
        fix = "give the new run a name of its own"
        raise ConfigError(
            f"run {plan.run} exists with another {', '.join(differing)}",
            None,
            "the config that it was begun with",
            fix,
        )
    return True


def _register(plan: Plan, root: Storage) -> None:
    """Writes the run's description (`run.json`), from which it is resumed and exported."""
    try:
        root.create(f"{plan.run}/{RUN_FILE}", _description(plan))
    except FileExistsError:  # another process was faster: it must have begun the same run
        _check_same_run(plan, root)


def _description(plan: Plan) -> bytes:
    """The config and what else a resumed run must know, as JSON."""
    own: Json = {
        "run": plan.run,
        "unit": plan.config.privacy.unit_name,
        "ledger": plan.ledger,
        "study": plan.study,
        "validation": described(plan.scores),
    }
    if plan.origin is not None:
        own["origin"] = list(plan.origin)
    # `_check_same_run` leaves it out: a run may be resumed with other settings of speed
    own["performance"] = asdict(plan.config.performance)
    return json.dumps({**describe(plan.config), **own}, indent=1, sort_keys=True).encode()
