"""What a run is about to do, said before it does it: its data, its mechanism, what it costs of
which budget, where everything will lie.
"""

from __future__ import annotations

import math

from grape_ray import checkpoint
from grape_ray.errors import GrapeRayError
from grape_ray.ledger.ledger import Ledger
from grape_ray.storage import Json
from grape_ray.training.plan import Plan


def brief(plan: Plan) -> Json:
    """The plan in plain values, JSON-ready; what is not known or does not apply is None.

    `signal_to_noise` is the largest that a step can have: a sum of expected_batch_size
    contributions of length C, all of one direction, over the length of its noise,
    expected_batch_size / (noise multiplier * sqrt(coordinates)).
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
        "unit": "record",
        "sampling_prob": plan.sampling_prob,
        "expected_batch_size": config.privacy.expected_batch_size,
        "noise_multiplier": noise,
        "steps": config.privacy.steps,
        "epsilon": plan.target[0] if plan.target else None,
        "delta": plan.target[1] if plan.target else None,
        "delta_times_records": plan.target[1] * plan.records if plan.target else None,
        "coordinates": seen.report.coordinates if seen else None,
        "signal_to_noise": signal,
        "workers": performance.num_workers,
        "device": "cuda" if performance.use_gpu else "cpu",
        "folder": f"{plan.storage}/{plan.run}",
        "ledger": plan.ledger,
        "budget": _budget(plan, ledger) if ledger else None,
        "resumes": _resumed(plan, ledger) if ledger else None,
        "dry_run_seconds": round(seen.seconds, 3) if seen else None,
        "checkpoint_bytes": seen.checkpoint_bytes if seen else None,
    }


def _budget(plan: Plan, ledger: Ledger) -> dict[str, float]:
    """Epsilon of the dataset's ledger: whole, and what is left of it before and after this run's
    study has its share.
    """
    state = ledger.state
    mine = state.studies[plan.study].study.epsilon if plan.study in state.studies else 0.0
    left = state.left("epsilon")
    return {"epsilon": state.epsilon, "left_before": left + mine, "left_after": left}


def _resumed(plan: Plan, ledger: Ledger) -> dict[str, int] | None:
    """Of a run that was begun before: the step it resumes from, what was charged, and what is
    charged again; None for a new one.
    """
    charged = sum(t.used for t in ledger.attempts(plan.study, plan.run))
    if not charged:
        return None
    try:
        step = max(
            (checkpoint.step_of(name) for name in checkpoint.names(plan.folder())), default=0
        )
    except GrapeRayError:
        step = 0
    return {
        "step": step,
        "charged": charged,
        "again": max(0, charged - step),
        "left": plan.tokens - charged,
    }


def lines(facts: Json) -> list[str]:
    """The same for a person."""
    where = f"{facts['workers']} workers" if facts["workers"] else "this process"
    said = [
        f"run {facts['run']} of {facts['method']} in {facts['folder']}, {where} on"
        f" {facts['device']}"
    ]
    said.append(
        f"{facts['records']} records, the unit is one record; sampling_prob"
        f" {facts['sampling_prob']:.4g} (batches of {facts['expected_batch_size']} on average),"
        f" {facts['steps']} steps"
    )
    if facts["epsilon"] is None:
        said.append("no privacy guarantee")
    else:
        shown = facts["signal_to_noise"]
        signal = "" if shown is None else f", signal to noise of a step at most {shown:.3g}"
        said.append(
            f"epsilon {facts['epsilon']:g} at delta {facts['delta']:g}"
            f" ({facts['delta_times_records']:.2g} over the records), noise multiplier"
            f" {facts['noise_multiplier']:.4g}{signal}"
        )
    if facts["budget"]:
        budget = facts["budget"]
        said.append(
            f"ledger {facts['ledger']}: epsilon {budget['epsilon']:g}, {budget['left_before']:.4g}"
            f" free before this run and {budget['left_after']:.4g} after it"
        )
    if facts["resumes"]:
        known = facts["resumes"]
        said.append(
            f"resumes at step {known['step']}: {known['again']} steps that were paid for are"
            f" taken and paid for again; {known['charged']} steps are charged so far and"
            f" {known['left']} more can be"
        )
    if facts["dry_run_seconds"] is not None:
        said.append(
            f"dry run passed in {facts['dry_run_seconds']:.1f} s; {facts['coordinates']:,} numbers"
            f" are noised a step, a checkpoint is {facts['checkpoint_bytes'] / 2**20:.1f} MiB"
        )
    return said
