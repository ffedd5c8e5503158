"""A sweep is checked and priced before any work, so that bad input costs nothing and leaves
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from grape_ray.accounting.selection import Selection
from grape_ray.config import cautions
from grape_ray.config.cautions import Consent
from grape_ray.config.description import describe, up_to_date
from grape_ray.config.schema import Config
from grape_ray.errors import ConfigError
from grape_ray.ledger.budget import made_for
from grape_ray.ledger.entries import Study, entry_name, selection_from
from grape_ray.ledger.ledger import Ledger
from grape_ray.ledger.location import absolute, home, ledger_place
from grape_ray.privacy import keys
from grape_ray.storage import Json, Storage
from grape_ray.tasks.task import Data, label, loaded
from grape_ray.training.checks import check_run_name, fresh_name
from grape_ray.training.dry_run import dry_run
from grape_ray.training.pricing import sampling_prob_of
from grape_ray.training.splits import check_splits
from grape_ray.tuning import price
from grape_ray.tuning.folder import SWEEP_FILE
from grape_ray.tuning.options import SELECT, Options, check_select_config
from grape_ray.tuning.spaces import PRIVATE, Space, SweepStudy
from grape_ray.tuning.sweep import BudgetShare, Sweep


def prepare(options: Options, space: Space, study: SweepStudy, name: str | None = None) -> Sweep:
    """Checks and prices a new sweep; when all is right, and not before, it makes the master key and
    the salt of the user's ledgers.

    Raises:
        GrapeRayError: one of its kinds for whatever is wrong; nothing was written then.
    """
    name = name or fresh_name(options.space.rpartition(".")[2])
    check_run_name(name)
    study = _priced_config(options, study)
    if options.mode == SELECT:
        check_select_config(study.config)
    privacy = study.config.privacy
    data = loaded(study.config.task, privacy.unit)
    sampling_prob = sampling_prob_of(study.config, data)
    consent = Consent(large_delta=options.allow_large_delta)
    counted = data.unit_count, privacy.units_name, consent
    cautions.check_delta("the sweep's delta", privacy.delta, *counted)
    cautions.warn(privacy)
    check_splits(data, study.score_source != PRIVATE, not data.public)
    storage = absolute(options.storage)
    _check_place(Storage(storage).child(name), name)
    steps = _steps(options, study, name, data, storage, sampling_prob)
    cautions.check_delta("the delta of the dataset's ledger", steps.budget[1], *counted)
    scores = (
        _scores(options, study, name, data, storage, steps.paid)
        if study.score_source == PRIVATE
        else None
    )
    keys.check_outside(options.key_path or keys.default_path(), storage, steps.ledger)
    for share in filter(None, (steps, scores)):
        share.check(options.second_ledger)
        if isinstance(share.paid, Selection):
            price.trial_epsilon(share.paid)  # before it is paid for
    sealed = _sealed(options, storage, name) if options.mode == SELECT else None
    public, noise = (
        data.public and study.score_source != PRIVATE,
        steps.paid.mechanism.noise_multiplier,
    )
    dry_run(study.config, data, Storage(storage), noise, public, study.metric)
    keys.master_key(options.key_path)
    steps = replace(
        steps,
        ledger=ledger_place(
            options.ledger, steps.dataset_id, data.public, storage, name, make=True
        ),
    )
    if scores is not None:
        scores = replace(
            scores,
            ledger=ledger_place(
                options.score_ledger, scores.dataset_id, False, storage, name, make=True
            ),
        )
    return Sweep(
        name, options, space, _frozen(study, steps.paid), storage, steps, scores, sealed, False
    )


def resume(described: Json, options: Options, space: Space, study: SweepStudy) -> Sweep:
    """A sweep to continue as it was begun; its price is what was registered."""
    name = described["sweep"]
    steps = _known(described, options.mode, study.config, lambda data: data.identity)
    scores = described["scores"] and _known(
        described["scores"], options.mode, study.config, lambda data: data.validation_identity
    )
    study = _frozen(_priced_config(options, study), steps.paid)
    mine = json.loads(json.dumps(describe(study.config)))
    theirs = up_to_date(described["config"], study.config)
    differing = sorted(key for key in mine if mine[key] != theirs.get(key)) + [
        key
        for key, value in (("fields", sorted(space)), ("score_source", study.score_source))
        if described[key] != value
    ]
    if differing:
        fix = "resume it with the space that it was begun with, or begin a new sweep"
        raise ConfigError(
            f"sweep {name} was begun with another {', '.join(differing)}",
            None,
            "the same tune space",
            fix,
        )
    # The description could name a key that its maker knows, so a key never lies in what may have
    # been copied.
    keys.check_outside(
        options.key_path or keys.default_path(), absolute(options.storage), steps.ledger
    )
    keys.master_key(options.key_path)
    return Sweep(
        name,
        options,
        space,
        study,
        absolute(options.storage),
        steps,
        scores or None,
        described["sealed"],
        True,
    )


def _known(
    described: Json, mode: str, config: Config, identity: Callable[[Data], tuple[str, ...]]
) -> BudgetShare:
    """A share as it was described; the data is read, for its fingerprints, only where the sweep was
    cut off before its ledger was made.
    """
    paid = (selection_from if mode == SELECT else Study.from_payload)(described["paid"])
    where, budget = described["ledger"], described["budget"]
    if Storage(where).exists(entry_name(0)):
        return BudgetShare(
            paid, where, Ledger.open(where, create=False).state.dataset_id, (budget[0], budget[1])
        )
    data = loaded(config.task, config.privacy.unit)
    found = identity(data)
    return BudgetShare(
        paid,
        where,
        found[0],
        (budget[0], budget[1]),
        found,
        data.public and found[0] == data.dataset_id,
    )


def _check_place(place: Storage, name: str) -> None:
    """Refuses a folder that cannot be written, or that holds a sweep. Raises StorageError,
    ConfigError.
    """
    place.check_writable()
    if place.exists(SWEEP_FILE):
        raise ConfigError("the sweep exists", name, "a new name", f"resume it with --resume {name}")


def _priced_config(options: Options, study: SweepStudy) -> SweepStudy:
    """The study with the sweep's budget, and with a checkpoint at each point of comparison."""
    privacy, performance = study.config.privacy, study.config.performance
    privacy = replace(
        privacy,
        epsilon=_given(options.epsilon, privacy.epsilon),
        delta=_given(options.delta, privacy.delta),
    )
    # In population-based training any checkpoint of a trial may be where another goes on.
    keep = 10**6 if options.scheduler == "pbt" else performance.keep_checkpoints
    # In mode select a trial has one score, at its end.
    every = 0 if options.mode == SELECT else performance.eval_every
    performance = replace(
        performance,
        checkpoint_every=performance.eval_every,
        eval_every=every,
        keep_checkpoints=keep,
    )
    return replace(study, config=replace(study.config, privacy=privacy, performance=performance))


def _frozen(study: SweepStudy, paid: Study | Selection) -> SweepStudy:
    """The study with the noise that was paid for."""
    privacy = replace(study.config.privacy, noise_multiplier=paid.mechanism.noise_multiplier)
    return replace(study, config=replace(study.config, privacy=privacy))


def _given(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _steps(
    options: Options, study: SweepStudy, name: str, data: Data, storage: str, sampling_prob: float
) -> BudgetShare:
    """What pays for training steps."""
    privacy = study.config.privacy
    paid: Study | Selection
    if options.mode == SELECT:
        paid = price.select(
            study, name, sampling_prob, privacy.epsilon, privacy.delta, options.distribution()
        )
    else:
        tokens = options.tokens or price.planned_tokens(study, options.trials, options.scheduler)
        paid = price.compose(study, name, sampling_prob, privacy.epsilon, privacy.delta, tokens)
    asked = options.ledger_epsilon, options.ledger_delta
    budget = made_for((privacy.epsilon, privacy.delta), *asked)
    place = ledger_place(options.ledger, data.dataset_id, data.public, storage, name)
    return BudgetShare(
        paid,
        place,
        data.dataset_id,
        budget,
        data.identity,
        data.public,
        asked,
        label(study.config.task),
    )


def _scores(
    options: Options,
    study: SweepStudy,
    name: str,
    data: Data,
    storage: str,
    paid: Study | Selection,
) -> BudgetShare:
    """What pays for private scores."""
    records = data.validation_identity
    if isinstance(paid, Study):
        price_of: Study | Selection = price.scores(
            study, name, price.planned_scores(study, paid.tokens, options.trials)
        )
    else:
        price_of = price.select_scores(study, name, options.distribution())
    budget = (study.score_epsilon, study.score_delta)
    place = ledger_place(options.score_ledger, records[0], False, storage, name)
    return BudgetShare(
        price_of,
        place,
        records[0],
        budget,
        records,
        dataset=f"{label(study.config.task)}, validation records",
    )


def _sealed(options: Options, storage: str, name: str) -> str:
    """Where mode select keeps what nobody may see."""
    if options.sealed:
        return f"{absolute(options.sealed)}/{name}"
    if "://" in storage:
        fix = (
            "name a folder with --sealed that every machine of the cluster reaches, and nobody else"
        )
        raise ConfigError(
            "mode select has no place for its secrets", storage, "local storage, or --sealed", fix
        )
    return str(home() / "sealed" / name)
