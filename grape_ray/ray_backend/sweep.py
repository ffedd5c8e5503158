"""A sweep from its options to its result: checked and priced, then run on a cluster in its mode."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import fields

from grape_ray.config.trust import check_module, check_sweep
from grape_ray.errors import ConfigError
from grape_ray.ledger.location import absolute
from grape_ray.ray_backend.availability import find_cluster
from grape_ray.ray_backend.cluster import cluster, set_defaults
from grape_ray.storage import Json, Storage
from grape_ray.tuning.folder import read
from grape_ray.tuning.options import SELECT, Options
from grape_ray.tuning.results import SweepResult

_START_S = 300.0  # how long a group of workers may take to start


def run(options: Options, say: Callable[[str], None], name: str | None = None) -> SweepResult:
    """Runs a new sweep to its end.

    Raises:
        GrapeRayError: one of its kinds for whatever is wrong; what can be checked beforehand is
            checked before any work.
    """
    return _run(options, say, name, None)


def resume(
    storage: str,
    name: str,
    asked: Json,
    say: Callable[[str], None],
    trust: Iterable[str] = (),
    trust_state: bool = False,
) -> SweepResult:
    """Continues a sweep that was cut off; what it was charged stays charged.

    Args:
        asked: options that are given again; they must be those that it was begun with.
        trust: modules that the sweep's description may have imported for its tune space, beside
            this project's own and `asked`.
        trust_state: trust the sweep's description, and load Ray Tune's state (pickles), also where
            this user did not begin the sweep.
    """
    described = read(Storage(absolute(storage)).child(name))
    known = described["options"]
    differing = sorted(
        key for key, value in asked.items() if json.loads(json.dumps(value)) != known.get(key)
    )
    if differing:
        words = ", ".join(f"--{key.replace('_', '-')}" for key in differing)
        raise ConfigError(
            f"sweep {name} was begun with another {words}",
            None,
            "what it was begun with",
            "leave them out",
        )
    check_module(known["space"], [*trust, *filter(None, [asked.get("space")])], "tune space")
    check_sweep(f"{absolute(storage)}/{name}", described.get("mark", ""), trust_state)
    values = {field.name: known.get(field.name, field.default) for field in fields(Options)}
    options = Options(**{**values, "assignments": tuple(known["assignments"]), "storage": storage})
    return _run(options, say, name, described)


def _run(
    options: Options, say: Callable[[str], None], name: str | None, described: Json | None
) -> SweepResult:
    set_defaults(_START_S)  # before anything imports Ray, as a tune space does
    find_cluster(_START_S)
    from grape_ray.tuning import prepare, spaces

    domains, study = spaces.load(options.space, options.assignments)
    from grape_ray.ray_backend import private_selection, searcher, tuner

    searcher.check(options, domains, study)
    if options.mode == SELECT:
        private_selection.check_domains(domains)
    if described is None:
        sweep = prepare.prepare(options, domains, study, name)
    else:
        sweep = prepare.resume(described, options, domains, study)
    if options.mode == SELECT:
        private_selection.check_draw(sweep)
    with cluster(1, dashboard=study.config.performance.workers[1] > 0):
        # a cluster that is too small is refused before anything is registered
        at_once = tuner.concurrency(study, options)
        sweep.register()
        run_mode = private_selection.select if options.mode == SELECT else tuner.compose
        return run_mode(sweep, at_once, say)
