"""From the folder of a run to the plan that resumes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from grape_ray import checkpoint
from grape_ray.config.cautions import Consent
from grape_ray.config.description import read_run, rebuild_config
from grape_ray.config.schema import Config
from grape_ray.errors import CheckpointError, LedgerError
from grape_ray.ledger.audit import verify
from grape_ray.ledger.ledger import Ledger
from grape_ray.ledger.location import RUN_FILE
from grape_ray.storage import Json, Storage
from grape_ray.training.plan import Plan
from grape_ray.training.planning import plan_run
from grape_ray.training.private_scores import Terms, rebuilt
from grape_ray.training.request import Payment, Places, Shared


def plan_resume(
    run: str,
    *,
    ledger: str | None = None,
    key_path: str | None = None,
    assignments: Iterable[str] = (),
    trust: Iterable[str] = (),
    second_ledger: bool = False,
    with_dry_run: bool = True,
    check_workers: Callable[[Config], None] = lambda config: None,
) -> Plan:
    """The plan of a run that was begun before, checked like a new one; it resumes from the newest
    whole checkpoint.

    Args:
        run: path or URL of the run's folder.
        ledger: where the dataset's ledger lies now, if it was moved since.
        key_path: file of the master key; None is the usual place. Another key than before is no
            harm: each attempt has its own.
        assignments: `performance.*=value`, what may change without changing the run.
        second_ledger, with_dry_run, check_workers: see `plan_run` and its Payment.
        trust: modules that the run's description may have imported, beside this project's own: a
            run is a folder that anyone may have made.

    Raises:
        CheckpointError: no run there. LedgerError: its ledger is gone, or the named one does not
            hold the run's charges.
        GrapeRayError: what `plan_run` finds wrong.
    """
    folder = Storage(run)
    known = read_run(folder)
    root, _, name = folder.url.rstrip("/").rpartition("/")
    if name != known["run"]:
        raise CheckpointError(
            "the run's folder was renamed", name, known["run"], "give the folder its name back"
        )
    config = rebuild_config(known, trust).override(assignments)
    scores = _terms(known)
    where, study, origin = known["ledger"], None, known.get("origin")
    if where is not None:
        where = ledger or where
        if not Storage(where).exists("00000000.json"):
            raise LedgerError(
                "the ledger of the run is gone",
                where,
                "the folder with its entries",
                "name its new place with --ledger",
            )
        opened = Ledger.open(where, create=False)
        if where != known["ledger"]:
            _check_moved(folder, opened, where, known["study"], name)
            folder.write(
                RUN_FILE, json.dumps({**known, "ledger": where}, indent=1, sort_keys=True).encode()
            )
        if known["study"] != name:
            study = opened.state.study(known["study"]).study
    given = Consent(large_delta=True, not_private=True)  # when the run was begun
    return plan_run(
        config,
        run=name,
        places=Places(root, where, key_path),
        payment=Payment(second_ledger=second_ledger, consent=given),
        shared=Shared(study, (origin[0], origin[1]) if origin else None, scores),
        with_dry_run=with_dry_run,
        check_workers=check_workers,
    )


def _terms(known: Json) -> Terms | None:
    """What the run may say of its validation records, as it was begun: nothing but what their
    ledger still knows and pays for.

    Raises:
        ConfigError: the description does not say it. LedgerError: the ledger of private ones is
            gone, or knows no such study.
    """
    terms = rebuilt(known.get("validation"))
    if terms is None:
        return None
    study = Ledger.open(terms.ledger, create=False).state.study(terms.study).study
    if study.mechanism.noise_multiplier != terms.noise_multiplier:
        got = terms.noise_multiplier
        expected = f"{study.mechanism.noise_multiplier!r}, which their ledger's study freezes"
        raise LedgerError(
            "the run's private scores have another noise",
            got,
            expected,
            "restore run.json from a copy",
        )
    return terms


def _check_moved(folder: Storage, opened: Ledger, where: str, study: str, run: str) -> None:
    """Refuses a ledger that is not the run's own, or an old copy of it."""
    heads = []
    for name in checkpoint.names(folder):
        try:
            heads.append(checkpoint.read_manifest(folder, name).metadata["ledger_head"])
            break
        except CheckpointError:
            continue
    problem = "" if run in opened.state.study(study).runs else "it knows no attempt of the run"
    for head in heads:
        report = verify(where, head)
        problem = problem or ("" if report.ok else report.problems[0])
    if problem:
        raise LedgerError(
            "the ledger is not the one that the run was charged to",
            where,
            "that ledger, moved whole",
            problem,
        )
