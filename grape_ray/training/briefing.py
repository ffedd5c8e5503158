"""What a run is about to do, shown before it does it: records, mechanism, what it takes of the
dataset's budget, where everything will lie.
"""

from __future__ import annotations

import math

from grape_ray import checkpoint
from grape_ray.config.methods import METHODS
from grape_ray.errors import GrapeRayError
from grape_ray.ledger.ledger import Ledger
from grape_ray.storage import Json
from grape_ray.training.plan import Plan
from grape_ray.training.preflight import Report

_FAR, _ENOUGH = 3.0, 2.0  # signals to noise of a step


def brief(plan: Plan) -> Json:
    """The plan in plain values, JSON-ready; what is not known or does not apply is None.

    `signal_to_noise` is the largest that a step can have: a sum of expected_batch_size
    contributions of length C, all of one direction, over the length of its noise,
    expected_batch_size / (noise multiplier * sqrt(coordinates)). `longest_refresh` is for how many
    steps a projection may be kept whatever the gradients are, see `_longest_refresh`, and
    `better_rank` a rank with which a step of a projecting method loses less, see `_better_rank`.
    """
    config, performance, seen = plan.config, plan.config.performance, plan.dry_run
    noise = plan.noise_multiplier if plan.private else None
    ledger = (
        Ledger.open(plan.ledger_storage(), plan.dataset_id, create=False) if plan.ledger else None
    )
    signal = (
        config.privacy.expected_batch_size / (noise * math.sqrt(seen.report.coordinates))
        if noise and seen
        else None
    )
    return {
        "run": plan.run,
        "method": config.method.name,
        "records": plan.records,
        "unit": config.privacy.unit_name,
        "units": plan.units,
        "examples_per_unit": config.privacy.unit_limit,
        "sampling_prob": plan.sampling_prob,
        "expected_batch_size": config.privacy.expected_batch_size,
        "noise_multiplier": noise,
        "steps": config.privacy.steps,
        "epsilon": plan.target[0] if plan.target else None,
        "delta": plan.target[1] if plan.target else None,
        "delta_times_units": plan.target[1] * plan.units if plan.target else None,
        "coordinates": seen.report.coordinates if seen else None,
        "signal_to_noise": signal,
        "rank": config.method.rank if _projects(plan) else None,
        "refresh": config.method.refresh_steps if _projects(plan) else None,
        "longest_refresh": _longest_refresh(signal) if signal and _projects(plan) else None,
        "better_rank": (
            _better_rank(config.method.rank, seen.report, signal)
            if seen and signal and _projects(plan)
            else None
        ),
        "workers": performance.num_workers,
        "device": "cuda" if performance.use_gpu else "cpu",
        "folder": f"{plan.storage}/{plan.run}",
        "ledger": plan.ledger,
        "budget": _budget(plan, ledger) if ledger else None,
        "resumes": _resumed(plan, ledger) if ledger else None,
        "dry_run_seconds": round(seen.seconds, 3) if seen else None,
        "checkpoint_bytes": seen.checkpoint_bytes if seen else None,
        "gradient_norms": [round(norm, 4) for norm in seen.norms] if seen else [],
        "clip_norm": config.privacy.clip_norm,
    }


def _projects(plan: Plan) -> bool:
    return METHODS[plan.config.method.name].subspace == "gaussian"


def _longest_refresh(signal_to_noise: float) -> int:
    """The most steps for which a projection may be kept, so that its error, which adds up while it
    is, stays below a tenth of the noise (docs/choosing.md); at least 1.
    """
    return max(1, int(0.1 / signal_to_noise**2))


def _better_rank(rank: int, report: Report, signal_to_noise: float) -> int | None:
    """Where a step can tell more than its noise hides by far, what its projections lose is the
    larger part: the rank at which there are so many coordinates that it is not (docs/choosing.md,
    "Which rank"), or 0 where all parameters are not so many; None where the rank will do.
    """
    if signal_to_noise <= _FAR:
        return None
    more = (signal_to_noise / _ENOUGH) ** 2
    return math.ceil(rank * more) if report.coordinates * more < report.parameters else 0


def _budget(plan: Plan, ledger: Ledger) -> dict[str, float]:
    """Epsilon of the dataset's ledger: whole, and what is left of it before and after this run's
    study has its share.
    """
    state = ledger.state
    mine = state.studies[plan.study].study.epsilon if plan.study in state.studies else 0.0
    left = state.left("epsilon")
    return {"epsilon": state.epsilon, "left_before": left + mine, "left_after": left}


def _resumed(plan: Plan, ledger: Ledger) -> dict[str, int] | None:
    """Of a run that was begun before, numbers of steps: the one it resumes at, those `charged` so
    far, those charged `again` because they are repeated, those `left`; None for a new run.
    """
    charged = sum(t.used for t in ledger.attempts(plan.study, plan.run))
    if not charged:
        return None
    try:
        step = max(
            (checkpoint.step_of(name) for name in checkpoint.names(plan.folder())), default=0
        )
    except GrapeRayError:  # the run itself says what is wrong with its storage
        step = 0
    return {
        "step": step,
        "charged": charged,
        "again": max(0, charged - step),
        "left": plan.tokens - charged,
    }


def lines(values: Json) -> list[str]:
    """What `brief` gave, in lines for a person."""
    where = f"{values['workers']} workers" if values["workers"] else "this process"
    shown = [
        f"run {values['run']} of {values['method']} in {values['folder']}, {where} on"
        f" {values['device']}"
    ]
    shown.append(
        f"{_records(values)}; sampling_prob"
        f" {values['sampling_prob']:.4g} (batches of {values['expected_batch_size']} on average),"
        f" {values['steps']} steps"
    )
    if values["epsilon"] is None:
        shown.append("no privacy guarantee")
    else:
        ratio = values["signal_to_noise"]
        signal = "" if ratio is None else f", signal to noise of a step at most {ratio:.3g}"
        shown.append(
            f"epsilon {values['epsilon']:g} at delta {values['delta']:g}"
            f" ({values['delta_times_units']:.2g} over the {_units(values)}), noise multiplier"
            f" {values['noise_multiplier']:.4g}{signal}"
        )
    longest = values["longest_refresh"]
    if longest and not 0 < values["refresh"] <= longest:
        kept = f"{values['refresh']} steps" if values["refresh"] else "all steps"
        shown.append(
            f"projections are kept for {kept}: beyond {longest} that may cost accuracy with this"
            " noise; method.refresh and docs/choosing.md"
        )
    if values["better_rank"] is not None:
        rank = f"rank {values['better_rank']}, or " if values["better_rank"] else ""
        shown.append(
            f"with so much signal, projections of rank {values['rank']} lose more than the noise"
            f" hides: {rank}bookkeeping may learn more; method.rank and docs/choosing.md"
        )
    if values["budget"]:
        budget = values["budget"]
        shown.append(
            f"ledger {values['ledger']}: epsilon {budget['epsilon']:g}, {budget['left_before']:.4g}"
            f" free before this run and {budget['left_after']:.4g} after it"
        )
    if values["resumes"]:
        known = values["resumes"]
        shown.append(
            f"resumes at step {known['step']}: {known['again']} steps that were paid for are"
            f" taken and paid for again; {known['charged']} steps are charged so far and"
            f" {known['left']} more can be"
        )
    if values["dry_run_seconds"] is not None:
        shown.append(
            f"dry run passed in {values['dry_run_seconds']:.1f} s;"
            f" {values['coordinates']:,} numbers are noised a step,"
            f" a checkpoint is {values['checkpoint_bytes'] / 2**20:.1f} MiB"
        )
    if values["gradient_norms"]:
        norms = ", ".join(f"{norm:.3g}" for norm in values["gradient_norms"])
        shown.append(
            f"gradient norms of public records at the start: {norms};"
            f" clip norm {values['clip_norm']:g}"
        )
    return shown


def _units(values: Json) -> str:
    return "records" if values["examples_per_unit"] is None else f"units ({values['unit']})"


def _records(values: Json) -> str:
    """How many records there are, and what the privacy unit is."""
    if values["examples_per_unit"] is None:
        return f"{values['records']} records, the unit is one record"
    return (
        f"{values['records']} records of {values['units']} {_units(values)}, all records of one of"
        f" which are protected; at most {values['examples_per_unit']} of them are used in a step"
    )
