"""The plan of a run: everything checked and priced before the first step, so that bad input costs
nothing and leaves nothing.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from grape_ray.accounting import calibration
from grape_ray.accounting.mechanism import GAUSSIAN, RANDOMIZED, Mechanism
from grape_ray.config import cautions
from grape_ray.config.cautions import Consent
from grape_ray.config.description import read_run
from grape_ray.config.methods import METHODS
from grape_ray.config.pipelines import describe
from grape_ray.config.schema import Config
from grape_ray.errors import BudgetExceeded, ConfigError, DataError
from grape_ray.ledger import registry
from grape_ray.ledger.budget import foresee, made_for
from grape_ray.ledger.entries import Study
from grape_ray.ledger.ledger import Ledger
from grape_ray.ledger.location import RUN_FILE, absolute, ledger_place
from grape_ray.privacy import keys
from grape_ray.privacy.redaction import told
from grape_ray.storage import Storage
from grape_ray.tasks.task import Data, Task, label, loaded
from grape_ray.training import private_scores as validation
from grape_ray.training.dry_run import DryRun, dry_run, try_out
from grape_ray.training.private_scores import Terms
from grape_ray.training.splits import check_splits

RESULT_FILE, PROGRESS_FILE = "result.json", "progress.json"


@dataclass(frozen=True)
class Plan:
    """A run that was checked; plain values, so that it can be sent to workers. It holds no key.

    Attributes:
        run: name of the run, of its folder below `storage` and, unless `study` says otherwise, of
            its study in the ledger.
        storage: URL of the folder of runs. ledger: URL of the dataset's ledger; None for the
            non-private yardstick.
        key_path: file of the master key, on the machine of rank 0; None for the usual place.
        dataset_id: fingerprint of the training records; the ledger alone may keep it.
        promise: (epsilon, delta) of the run's study; None for the yardstick.
        sampling_prob: chance of each record to be in a batch. noise_multiplier: noise standard
            deviation over the sensitivity.
        tokens: steps that the run's study may take, repeats included; 0 for the yardstick.
        origin: (URL of a run's folder, name of its checkpoint) that a new run begins from; None
            begins from the task's own model.
        scores: what may be said of private validation records; None where they are public.
        public: whether all records are public, so that errors may quote them.
        records: N. rehearsal: what the dry run has seen; None where there was none.
    """

    config: Config
    run: str
    storage: str
    ledger: str | None
    key_path: str | None
    study: str
    dataset_id: str
    promise: tuple[float, float] | None
    sampling_prob: float
    noise_multiplier: float
    tokens: int
    origin: tuple[str, str] | None = None
    scores: Terms | None = None
    public: bool = False
    records: int = 0
    rehearsal: DryRun | None = None

    @property
    def private(self) -> bool:
        """Whether the method carries a guarantee."""
        return METHODS[self.config.method.name].private

    def folder(self) -> Storage:
        """The run's own folder."""
        return Storage(self.storage, self.config.performance.storage_timeout_s).child(self.run)

    def ledger_storage(self) -> Storage:
        """The ledger's folder; not of a run without one."""
        assert self.ledger is not None
        return Storage(self.ledger, self.config.performance.storage_timeout_s)

    def mechanism(self) -> Mechanism:
        """What each step costs."""
        return Mechanism(
            **mechanism_kind(self.config),
            sampling_prob=self.sampling_prob,
            noise_multiplier=self.noise_multiplier,
        )


def prepare(
    config: Config,
    *,
    run: str | None = None,
    storage: str = "runs",
    ledger: str | None = None,
    key_path: str | None = None,
    study: Study | None = None,
    origin: tuple[str, str] | None = None,
    scores: Terms | None = None,
    second_ledger: bool = False,
    rehearse: bool = True,
    reach: Callable[[], None] = lambda: None,
    ledger_budget: tuple[float | None, float | None] = (None, None),
    consent: Consent = Consent(),  # noqa: B008  (frozen)
) -> Plan:
    """Checks a run whole: data, price, ledger, storage, cluster, and by a dry run all that it will
    do; then registers it.

    Args:
        run: name of the run; an existing one with the same config is resumed. None makes a new
            name.
        storage: path or URL of the folder of runs.
        ledger: path or URL of the dataset's ledger; None is the user's own ledger of this dataset
            (`places.ledger_place`).
        key_path: file of the master key; None is `accounting.keys.default_path()`.
        study: one that the ledger holds already, whose tokens the run shares with others; None
            registers a study of the run's own.
        origin, scores: see Plan.
        second_ledger: whether a dataset that is known to have a ledger may get another one, with a
            budget of its own.
        rehearse: whether the dry run is made; without it the preflight alone. reach: raises where
            the workers cannot be had.
        ledger_budget: (epsilon, delta) of the dataset over all runs, where its ledger is made by
            this one; None is the run's own (of delta, in proportion to epsilon). A ledger that
            exists must have it.
        consent: what is done only where the user has said so.

    Raises:
        GrapeRayError: one of its kinds for whatever is wrong; nothing was written then.
    """
    task: Task = config.task
    run, root = run or fresh_name(f"{config.task.name}-{config.method.name}"), absolute(storage)
    check_run_name(run)
    _check_machine(config)
    if scores is not None:
        validation.check_metric(task, scores.metric)
    data = loaded(task)
    private, sampling_prob = METHODS[config.method.name].private, sampling_prob_of(config, data)
    if study is None:  # who shares one was checked when that began, here and below
        cautions.check(
            config, len(data.train), data.public and not registry.known(data.identity), consent
        )
    check_splits(data, scores is None, private and study is None and not data.public)
    place = Storage(root, config.performance.storage_timeout_s)
    place.check_writable()
    if study is not None and not private:
        raise ConfigError(
            "method.name",
            config.method.name,
            "a private method",
            "what a study releases is paid for, without exception",
        )
    noise, tokens, where, promise = 0.0, 0, None, None
    settle = partial(ledger_place, ledger, data.dataset_id, data.public, root, run)
    if private:
        noise, tokens = (
            (study.mechanism.noise_multiplier, study.tokens)
            if study
            else _price(config, sampling_prob)
        )
        where = settle()
        promise = (
            (study.epsilon, study.delta)
            if study
            else (config.privacy.epsilon, config.privacy.delta)
        )
        if study is None:  # who shares one charges the ledger that holds it
            registry.check_only(where, data.identity, second_ledger)
        keys.check_outside(key_path or keys.default_path(), root, where)
    name, public = study.name if study else run, data.public and scores is None
    plan = Plan(
        config, run, root, where, key_path, name, data.dataset_id, promise, sampling_prob, noise,
        tokens, origin, scores, public, len(data.train),
    )  # fmt: skip
    if study is not None:
        check_mechanism(plan.mechanism(), study)
    budget = _foresee(plan, data, ledger_budget, consent) if private and study is None else None
    _check_same_run(plan, place)
    reach()
    if study is not None or not rehearse:  # the runs of a study were rehearsed when that began
        told(partial(try_out, config, data), public)
    else:
        plan = replace(
            plan,
            rehearsal=dry_run(
                config, data, place, noise, public, scores.metric if scores else None
            ),
        )
    if budget is not None:
        plan = _open_budget(plan, budget, lambda: settle(make=True))
    _register(plan, place)
    return plan


def check_mechanism(mechanism: Mechanism, study: Study) -> None:
    """Refuses a run whose steps are not those that the study's tokens pay for. Raises ConfigError,
    naming what differs.
    """
    frozen = asdict(study.mechanism)
    for field, value in asdict(mechanism).items():
        if value != frozen[field]:
            fix = "all runs of a study share one mechanism: vary what does not change it"
            raise ConfigError(
                f"the run has another {field} than study {study.name!r}",
                value,
                f"{frozen[field]!r}",
                fix,
            )


@dataclass(frozen=True)
class _Budget:
    """The dataset's: as its ledger is made with (nothing, where there is one), and the fingerprints
    of private records (none of public ones)."""

    made: tuple[float | None, float | None]
    identity: tuple[str, ...]


def _study(plan: Plan) -> Study:
    """The run's own study."""
    assert plan.promise is not None
    return Study(plan.study, plan.mechanism(), *plan.promise, plan.tokens)


def _foresee(
    plan: Plan, data: Data, asked: tuple[float | None, float | None], consent: Consent
) -> _Budget:
    """The budget that pays for the run's own study. Raises what its ledger, there or to be made,
    would refuse.
    """
    assert plan.promise is not None
    made = made_for(plan.promise, *asked)
    cautions.check_delta("the delta of the dataset's ledger", made[1], len(data.train), consent)
    existing = foresee(
        plan.ledger_storage().first_contact(), plan.dataset_id, made, _study(plan), asked
    )
    if not existing:
        cautions.warn_of_rest(made, plan.promise)
    return _Budget((None, None) if existing else made, () if data.public else data.identity)


def _open_budget(plan: Plan, budget: _Budget, settle: Callable[[], str]) -> Plan:
    """Registers the run's own study in the dataset's ledger, which is made if need be at the place
    that `settle` gives.

    Once a study is registered its budget is gone, so all that can be refused is refused before.
    """
    keys.master_key(plan.key_path)
    plan = replace(plan, ledger=settle())
    book = Ledger.open(plan.ledger_storage(), plan.dataset_id, *budget.made)
    if budget.identity:
        registry.register(
            budget.identity, plan.ledger_storage().url, book.ledger_id, label(plan.config.task)
        )
    book.ensure_study(_study(plan))
    return plan


def fresh_name(kind: str) -> str:
    """A name that no other run or sweep has: its kind, the time in UTC and random digits."""
    return f"{kind}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def check_run_name(run: str) -> None:
    if (
        not run
        or run in (".", "..")
        or not all(c.isalnum() or c in "._-" for c in run)
        or not run.isascii()
    ):
        raise ConfigError(
            "run", run, "letters, digits, dots, dashes and underscores", "choose another name"
        )


def _check_machine(config: Config) -> None:
    """Refuses what this machine, or the method, cannot do. Raises ConfigError."""
    if (
        config.performance.use_gpu
        and config.performance.workers[1] == 0
        and not torch.cuda.is_available()
    ):
        raise ConfigError(
            "performance.use_gpu",
            "no GPU in this process",
            "a machine with one",
            "unset it, or ask for --workers on a cluster",
        )
    _check_sharding(config)


def _check_sharding(config: Config) -> None:
    """Whether the method trains weights that no worker holds whole."""
    if not config.performance.sharded:
        return
    if config.performance.workers[1] == 0:
        fix = "set performance.num_workers, or --workers"
        raise ConfigError("performance.sharded", "0 workers", "at least one Ray Train worker", fix)
    known = [name for name, info in METHODS.items() if info.shards]
    if config.method.name not in known:
        raise ConfigError(
            "method.name with performance.sharded",
            config.method.name,
            "one of " + ", ".join(known),
            "unset performance.sharded",
        )


def sampling_prob_of(config: Config, data: Data) -> float:
    """expected_batch_size over the number of records, if that is a probability."""
    for split in ("train", "validation"):
        if len(getattr(data, split)) == 0:
            raise DataError(
                f"the {split} split is empty", 0, "at least one record", "check the data"
            )
    size, records = config.privacy.expected_batch_size, len(data.train)
    if size > records:
        got = f"{size} of {records} records, a sampling_prob of {size / records:g}"
        raise ConfigError(
            "privacy.expected_batch_size",
            got,
            "a sampling_prob of at most 1",
            f"choose at most {records}",
        )
    return size / records


def mechanism_kind(config: Config) -> dict[str, Any]:
    """The name and the probes of a step's mechanism."""
    if METHODS[config.method.name].exact:
        return {"name": GAUSSIAN}
    return {
        "name": RANDOMIZED,
        "probes": config.privacy.probes,
        "probes_shared": config.privacy.shared_probes,
    }


def _price(config: Config, sampling_prob: float) -> tuple[float, int]:
    """(noise multiplier, steps that the budget buys): the noise calibrated to the steps, or the
    steps counted for a given noise.
    """
    privacy, kind = config.privacy, mechanism_kind(config)
    if privacy.noise_multiplier is None:
        tokens, method = privacy.steps + privacy.spare_steps, kind.pop("name")
        return (
            calibration.noise_multiplier(
                privacy.epsilon, privacy.delta, sampling_prob, tokens, method=method, **kind
            ),
            tokens,
        )
    mechanism = Mechanism(
        **kind, sampling_prob=sampling_prob, noise_multiplier=privacy.noise_multiplier
    )
    tokens = calibration.steps_within(mechanism, privacy.epsilon, privacy.delta)
    if tokens == 0:
        fix = "raise privacy.noise_multiplier or privacy.epsilon"
        raise BudgetExceeded(
            "privacy.noise_multiplier is too small",
            privacy.noise_multiplier,
            "enough for one step",
            fix,
        )
    return privacy.noise_multiplier, tokens


def _check_same_run(plan: Plan, root: Storage) -> bool:
    """Whether the run exists already. Raises ConfigError where it was begun with another config."""
    if not root.exists(f"{plan.run}/{RUN_FILE}"):
        return False
    known = read_run(root.child(plan.run))
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
    """Keeps the description of the run, from which it is resumed and exported."""
    if not _check_same_run(plan, root):
        root.create(f"{plan.run}/{RUN_FILE}", _description(plan))


def _description(plan: Plan) -> bytes:
    facts: dict[str, Any] = {
        "run": plan.run,
        "ledger": plan.ledger,
        "study": plan.study,
        "validation": validation.described(plan.scores),
    }
    if plan.origin is not None:
        facts["origin"] = list(plan.origin)
    # not compared: a run may be resumed with another
    facts["performance"] = asdict(plan.config.performance)
    return json.dumps({**describe(plan.config), **facts}, indent=1, sort_keys=True).encode()
