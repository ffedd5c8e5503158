"""A sweep in mode select: a secret number of sealed trials, of which the best alone is released and
the rest destroyed.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions
from ray.tune.search.sample import Function

from grape_ray.accounting.selection import Selection
from grape_ray.distributed.comms import Comms
from grape_ray.errors import ConfigError, GrapeRayError
from grape_ray.ledger.entries import Study
from grape_ray.ledger.ledger import Ledger
from grape_ray.ledger.location import RUN_FILE
from grape_ray.ray_backend.ledger_client import open_ledgers
from grape_ray.storage import Json, Storage
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.planning import plan_run
from grape_ray.training.private_scores import Terms, described
from grape_ray.training.request import Places, Shared
from grape_ray.training.result import RESULT_FILE, read_result
from grape_ray.training.run import execute
from grape_ray.tuning import price, results
from grape_ray.tuning.folder import RUNS
from grape_ray.tuning.results import SweepResult, Winner
from grape_ray.tuning.spaces import Space, SweepStudy
from grape_ray.tuning.sweep import Sweep

WINNER = "winner"
_DRAW, _LEDGER, _SCORES = "draw.json", "ledger", "score-ledger"
_RETRIES = 3


@dataclass(frozen=True)
class Sealed:
    """One trial: its name, which is random so that it tells nothing of their number, and the values
    that were drawn for it.
    """

    name: str
    values: Json


def check_domains(space: Space) -> None:
    """Refuses what would make the trials anything but independent draws of one procedure. Raises
    ConfigError.
    """
    for name, domain in space.items():
        if isinstance(domain, Function):
            fix = "use tune.choice, tune.uniform or their like"
            raise ConfigError(
                f"mode select refuses the domain of {name}: a function may depend on anything",
                None,
                "one fixed distribution",
                fix,
            )


def check_draw(sweep: Sweep) -> None:
    """Refuses to resume a selection whose trials are no longer known. Raises ConfigError."""
    assert sweep.sealed is not None
    done = sweep.existing and results.load(sweep.folder()) is not None
    if sweep.existing and not done and not Storage(sweep.sealed).exists(_DRAW):
        fix = "begin a new sweep, which is paid for again"
        what = (
            "mode select refuses to resume without its sealed draw: drawing again would be a second"
            " selection"
        )
        raise ConfigError(what, sweep.sealed, f"a folder with {_DRAW}", fix)


def select(sweep: Sweep, at_once: int, say: Callable[[str], None]) -> SweepResult:
    """Runs or resumes a private selection on the connected cluster, `at_once` trials at a time.

    Returns:
        The winner and what was paid, and nothing of any other trial.

    Raises:
        GrapeRayError: the ledger refuses the selection or is held by another cluster, or a trial
            failed.
    """
    finished = results.load(sweep.folder()) if sweep.existing else None
    if finished is not None:
        return finished
    assert sweep.sealed is not None
    secret = Storage(sweep.sealed)
    trials = _drawn(sweep, secret)
    with open_ledgers(sweep):  # the whole cost is durable before the first trial begins
        say(
            f"sweep {sweep.name} in {sweep.storage}: the selection is paid for; its trials are"
            " sealed until the winner is known"
        )
    _open_sealed(sweep, secret, trials)
    performance = sweep.study.config.performance
    unit = {"num_gpus": 1} if performance.use_gpu else {"num_cpus": 1}
    task = ray.remote(_train)
    # a task a share: as many tasks as trials would show their number to the cluster
    shares = [trials[n::at_once] for n in range(at_once)]
    waiting = [
        task.options(**unit, max_retries=_RETRIES, name="sealed").remote(
            sweep.study, _parts(sweep), share
        )
        for share in shares
    ]
    try:
        ray.get(waiting)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", error)
        fix = f"see the cause, then continue with --resume {sweep.name}"
        raise GrapeRayError(
            "a sealed trial failed", type(cause).__name__, "trials that end", fix
        ) from None
    result = results.selected(sweep, _release(sweep, secret, trials))
    # durable before the draw goes: without either, the selection could neither end nor be resumed
    results.save(sweep.folder(), result)
    secret.remove(_DRAW)
    # the losers are no part of what the selection releases
    for part in (RUNS, _LEDGER, _SCORES):
        secret.remove(part)
    return result


def _drawn(sweep: Sweep, secret: Storage) -> list[Sealed]:
    """The trials of this sweep, drawn once: their number from the distribution that is paid
    for, their values from the space.
    """
    if not secret.exists(_DRAW):
        if secret.local:
            Path(secret.url).mkdir(parents=True, exist_ok=True, mode=0o700)
        count = sweep.options.distribution()
        # from no seed of the options: who knew it could draw the losers again
        generator = np.random.default_rng(secrets.randbits(256))
        values = [
            {name: _plain(d.sample(random_state=generator)) for name, d in sweep.space.items()}
            for _ in range(count.draw())
        ]
        secret.create(
            _DRAW,
            json.dumps([[secrets.token_hex(8), drawn] for drawn in values]).encode(),
            private=True,
        )
    return [Sealed(*pair) for pair in json.loads(secret.read(_DRAW))]


def _open_sealed(sweep: Sweep, secret: Storage, trials: Sequence[Sealed]) -> None:
    """A sealed ledger for each trial, so that none takes more steps than the selection paid for, or
    any noise twice.

    None is for several trials: whether it sufficed would tell their number.
    """
    for part, share in ((_LEDGER, sweep.steps), (_SCORES, sweep.scores)):
        if share is None:
            continue
        paid = share.paid
        assert isinstance(paid, Selection)
        cost = price.trial_epsilon(paid)
        for trial in trials:
            ledger = Ledger.open(
                secret.child(part).child(trial.name),
                share.dataset_id,
                cost,
                paid.delta,
                unit=paid.unit,
            )
            ledger.ensure_study(
                Study(trial.name, paid.mechanism, cost, paid.delta, paid.trial_tokens, paid.unit)
            )


@dataclass(frozen=True)
class _Parts:
    """What a sealed trial needs besides its values."""

    sealed: str
    key_path: str | None
    scores: bool


def _parts(sweep: Sweep) -> _Parts:
    assert sweep.sealed is not None
    return _Parts(sweep.sealed, sweep.options.key_path, sweep.scores is not None)


def _train(study: SweepStudy, parts: _Parts, trials: Sequence[Sealed]) -> None:
    """Trains some trials one after another, in a process of the cluster. What they come to is in
    the sealed folder alone.
    """
    secret = Storage(parts.sealed)
    for trial in trials:
        runs = secret.child(RUNS)
        # a task that was started again goes on with the trials that are left
        if runs.exists(f"{trial.name}/{RESULT_FILE}"):
            continue
        ledger = secret.child(_LEDGER).child(trial.name).url
        paid = Ledger.open(ledger, create=False).state.study(trial.name).study
        scores = secret.child(_SCORES).child(trial.name).url
        terms = _terms(study, scores, trial.name) if parts.scores else None
        plan = plan_run(
            study.with_values(trial.values),
            run=trial.name,
            places=Places(runs.url, ledger, parts.key_path),
            shared=Shared(paid, scores=terms),
        )
        execute(plan, Comms.local(), RunCallbacks(on_progress=lambda progress, epsilon: None))


def _terms(study: SweepStudy, ledger: str, name: str) -> Terms:
    """What a sealed trial may release about private validation records."""
    paid = Ledger.open(ledger, create=False).state.study(name).study
    return Terms(study.metric, paid.mechanism.noise_multiplier, ledger, name)


def _release(sweep: Sweep, secret: Storage, trials: Sequence[Sealed]) -> Winner | None:
    """Copies the best trial's model out of the sealed folder, under a name that tells nothing; None
    where none has a finite score.
    """
    runs, metric = secret.child(RUNS), sweep.study.metric
    scored = []
    for trial in trials:
        result = read_result(runs.child(trial.name))
        # NaN compares with nothing, and would win or lose by its place
        if math.isfinite(result.metrics.get(metric, math.nan)):
            scored.append((result.metrics[metric], trial, result))
    if not scored:
        return None
    score, trial, result = max(scored, key=lambda entry: entry[0])
    mine, out = runs.child(trial.name), sweep.folder().child(RUNS)
    name = result.checkpoint.rpartition(f"{trial.name}/")[2]
    for file in mine.list(f"{name}/"):
        data = mine.read(file)
        if file.endswith("manifest.json"):
            manifest = json.loads(data)
            # the trial's name, attempts and ledger stay sealed
            manifest["facts"] |= {"run": WINNER, "attempt": 1, "ledger_head": None}
            data = json.dumps(manifest, indent=1, sort_keys=True).encode()
        out.write(f"{WINNER}/{file}", data)
    facts = {
        "run": WINNER,
        "ledger": sweep.steps.ledger,
        "study": sweep.steps.paid.name,
        "validation": described(sweep.terms()),
    }
    description = {**json.loads(mine.read(RUN_FILE)), **facts}
    out.write(f"{WINNER}/{RUN_FILE}", json.dumps(description, indent=1, sort_keys=True).encode())
    paid, steps = sweep.steps.paid, result.steps
    naive = results.naive_epsilon(paid.mechanism, steps, paid.delta)
    return Winner(trial.values, score, WINNER, steps, naive)


def _plain(value: Any) -> object:
    """A sampled value as JSON has it."""
    return value.item() if hasattr(value, "item") else value
