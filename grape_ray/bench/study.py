"""A study: one pipeline trained with every combination of some settings, over seeds, each run in a
process of its own and under its own full budget.

The runs of a sweep share one budget, which is right for choosing; a study compares methods at equal
epsilon on PUBLIC data, where every run may have a budget of its own. Seeds come first, then
settings, so that what slows the machine down meets all settings alike. A study that was cut off
goes on with what is missing.
"""

from __future__ import annotations

import itertools
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from grape_ray.errors import ConfigError, GrapeRayError, nearest
from grape_ray.storage import Json

CASE = "case"
_LOG = "study.jsonl"
_PROGRAM = "from grape_ray.cli.main import main; main()"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        case: the settings that vary, in their order. metrics: on the validation records.
        cpu_s: CPU-seconds of the whole process: reading, checks, training, evaluation.
        peak_bytes: its resident peak. epsilon: what its steps cost; None without privacy.
    """

    case: tuple[str, ...]
    seed: int
    metrics: Mapping[str, float]
    cpu_s: float
    peak_bytes: int
    epsilon: float | None


def cases(varied: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """Every combination of the values of some fields.

    >>> cases({"method.rank": ["4", "16"], "method.refresh": ["1", "100"]})
    [('4', '1'), ('4', '100'), ('16', '1'), ('16', '100')]
    """
    return list(itertools.product(*varied.values()))


def study(
    pipeline: str,
    varied: Mapping[str, Sequence[str]],
    seeds: int,
    words: Sequence[str],
    folder: Path,
    tell: Callable[[str], None],
    named: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[StudyRun]:
    """The runs of a study, as they end; those that the folder has already come first.

    Args:
        pipeline: as `grape-ray train` takes it. varied: field -> values, as `--set` takes them.
        words: `key=value` texts for every run. folder: of the runs, and of the log of what ended.
        tell: given a line before each run.
        named: name -> `key=value` texts, settings of several fields at once; with it `varied` has
            an entry `CASE` with these names.

    Raises:
        GrapeRayError: a run failed; those before it are kept. ConfigError: the folder holds another
            study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about: Json = {"pipeline": pipeline, "varied": varied, "words": list(words)}
    done = _known(folder / _LOG, about | ({"named": named} if named else {}))
    yield from (run for run in done if run.seed < seeds)
    have = {(run.case, run.seed) for run in done}
    for seed, case in itertools.product(range(seeds), cases(varied)):
        if (case, seed) in have:
            continue
        settings = [
            word
            for name, value in zip(varied, case)
            for word in (named[value] if named and name == CASE else [f"{name}={value}"])
        ]
        tell(f"seed {seed}: {', '.join(settings) or pipeline}")
        run = _run(pipeline, case, seed, [*words, *settings], folder)
        with (folder / _LOG).open("a") as log:
            log.write(json.dumps(asdict(run)) + "\n")
        yield run


def _known(log: Path, about: Json) -> list[StudyRun]:
    """The runs that ended before; begins the log of a new study. The last line may be cut off."""
    if not log.exists():
        log.write_text(json.dumps(about) + "\n")
        return []
    lines = log.read_text().split("\n")[:-1]
    log.write_text("".join(f"{line}\n" for line in lines))
    # read back, so that tuples compare as the lists that they become
    if not lines or json.loads(lines[0]) != json.loads(json.dumps(about)):
        fix = "name another folder"
        raise ConfigError("the folder of the study", str(log.parent), "one of this study", fix)
    found = [json.loads(line) for line in lines[1:]]
    return [StudyRun(**{**line, "case": tuple(line["case"])}) for line in found]


def _run(
    pipeline: str, case: tuple[str, ...], seed: int, words: Sequence[str], folder: Path
) -> StudyRun:
    sets = [word for one in [*words, f"seed={seed}"] for word in ("--set", one)]
    command = [sys.executable, "-c", _PROGRAM, "train", pipeline, "--json", *sets]
    command += ["--storage", str(folder / "runs")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        reason = ended.stderr.strip().rpartition("\n")[2]
        expected = "one that trains to its end"
        raise GrapeRayError("a run of the study", f"status {ended.returncode}", expected, reason)
    result: Json = json.loads(ended.stdout.strip().rpartition("\n")[2])
    return StudyRun(
        case,
        seed,
        result["metrics"],
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        result["peak_bytes"],
        result["epsilon_spent"],
    )


def summary(
    runs: Sequence[StudyRun], varied: Mapping[str, Sequence[str]], metric: str
) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a table: of each case the metric's mean, standard deviation over
    seeds and values, the mean CPU-seconds and the largest peak.

    Raises:
        ConfigError: no run has such a metric.
    """
    rows = []
    for case in cases(varied):
        own = sorted((run for run in runs if run.case == case), key=lambda run: run.seed)
        if not own:
            continue
        known = own[0].metrics
        if metric not in known:
            expected = "one of " + ", ".join(known)
            raise ConfigError("--metric", metric, expected, nearest(metric, known))
        values = [run.metrics[metric] for run in own]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        rows.append(
            [
                *case,
                f"{statistics.mean(values):.4f}",
                spread,
                ", ".join(f"{value:.3f}" for value in values),
                f"{statistics.mean(run.cpu_s for run in own):.0f}",
                f"{max(run.peak_bytes for run in own) / 2**20:.0f}",
            ]
        )
    names = [name.rpartition(".")[2] for name in varied]
    return [*names, metric, "sd", "a seed each", "CPU-s", "peak MiB"], rows
