"""What a sweep may vary, what it costs, what is refused by name, and what its private scores and
traces promise; no cluster needed.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from grape_ray.accounting import Mechanism, affords
from grape_ray.accounting.selection import Selection
from grape_ray.cli.main import main
from grape_ray.cli.tune import _summary
from grape_ray.config.description import describe
from grape_ray.errors import ConfigError, LedgerError
from grape_ray.ledger import Ledger, Study, verify
from grape_ray.ray_backend.private_selection import Sealed, _release
from grape_ray.ray_backend.trainable import comparable
from grape_ray.storage import Storage
from grape_ray.training.append_log import lines, process_log
from grape_ray.training.private_scores import PrivateScore, Terms
from grape_ray.tuning import SweepStudy, folder, page, plots, price, results, spaces, trials
from grape_ray.tuning.options import Options
from grape_ray.tuning.prepare import prepare, resume
from tests.support.tiny import Tiny, tiny

SPACE = "tests.support.tiny_space"
REPOSITORY = Path(__file__).parents[2]
SPACES = ["digits", "sst2", "roberta", "opt", "vit", "e2e"]
TINY = ["roberta", "opt", "vit", "e2e"]


@pytest.mark.parametrize(
    ("name", "words"), [(name, []) for name in SPACES] + [(name, ["size=tiny"]) for name in TINY]
)
def test_every_space_is_sound_and_its_trials_have_a_config(name, words):
    from grape_ray.ray_backend.searcher import check_domains

    domains, study = spaces.load(f"tune_spaces.{name}", [*words, "seed=5"])
    assert study.config.seed == 5
    assert getattr(study.config.task, "public", False) == bool(words)
    check_domains(domains, study)
    assert set(domains) <= set(study.tunable)
    for _ in range(5):
        config = study.with_values({field: domain.sample() for field, domain in domains.items()})
        assert config.privacy.expected_batch_size == study.config.privacy.expected_batch_size
    assert study.with_values(study.defaults(domains)) == study.config
    assert price.planned_tokens(study, 12, "asha") <= price.planned_tokens(study, 12, "none")


@pytest.mark.parametrize("field", sorted(spaces.FROZEN))
def test_what_a_study_freezes_no_trial_may_vary(field):
    with pytest.raises(ConfigError, match=f"cannot vary {field}"):
        SweepStudy(tiny(), (field,), "public")


def test_other_fields_are_refused_by_name():
    study = SweepStudy(tiny(), ("method.rank",), "public")
    with pytest.raises(ConfigError, match=r"cannot vary performance\.charge_chunk"):
        spaces.check_names(["performance.charge_chunk"], ["performance.charge_chunk"])
    with pytest.raises(ConfigError, match=r"no trial vary this field.*method\.rnk"):
        spaces.check_names(["method.rnk"], study.tunable)
    with pytest.raises(ConfigError, match="unknown key"):
        study.with_values({"method.rnk": 3})


@pytest.mark.parametrize("source", ["", "none", "validation", None])
def test_there_is_no_third_source_of_scores(source):
    with pytest.raises(ConfigError, match=r"'public'.*'private'"):
        SweepStudy(tiny(), (), source)
    with pytest.raises(TypeError):
        SweepStudy(tiny(), ())  # pyright: ignore[reportCallIssue]


def test_a_private_score_is_one_that_the_task_calls_bounded(monkeypatch):
    assert SweepStudy(tiny(), (), "private").metric == "accuracy"
    assert SweepStudy(tiny(), (), "public", metric="loss").metric == "loss"
    with pytest.raises(
        ConfigError, match=r"metric of private scores, got 'loss', expected accuracy"
    ):
        SweepStudy(tiny(), (), "private", metric="loss")  # its mean may lie in [0, 1], too
    monkeypatch.delattr(Tiny, "bounded_metrics")
    with pytest.raises(ConfigError, match=r"got 'accuracy', expected a bounded metric"):
        SweepStudy(tiny(), (), "private")


def test_methods_of_one_mechanism_alone_are_mixed():
    spaces.check_methods("grape", ["dp_adam", "ghost", "bookkeeping", "dp_galore", "dp_zero"])
    spaces.check_methods("randomized", ["randomized"])
    for base, other in (("grape", "randomized"), ("grape", "none"), ("randomized", "grape")):
        with pytest.raises(ConfigError, match="cannot mix mechanisms"):
            spaces.check_methods(base, [other])


def test_planned_tokens_follow_successive_halving():
    config = tiny(steps=90).override(["performance.eval_every=10", "privacy.spare_steps=7"])
    study = SweepStudy(config, ("method.rank",), "public")
    assert price.planned_tokens(study, 9, "none") == 9 * 90 + 7
    assert price.planned_tokens(study, 9, "asha") == int(1.5 * (9 * 10 + 3 * 20 + 1 * 60)) + 7
    assert price.planned_tokens(study, 1, "asha") == 90 + 7


def test_compose_prices_noise_for_tokens_or_tokens_for_noise():
    study = SweepStudy(tiny(), ("method.rank",), "public")
    paid = price.compose(study, "s", 0.25, 4.0, 1e-5, 60)
    assert paid.tokens == 60
    assert affords(paid.mechanism, 60, 4.0, 1e-5)
    loud = replace(study, config=study.config.override(["privacy.noise_multiplier=2.0"]))
    counted = price.compose(loud, "s", 0.25, 4.0, 1e-5, 10**6)
    assert affords(counted.mechanism, counted.tokens, 4.0, 1e-5)
    assert price.compose(loud, "s", 0.25, 4.0, 1e-5, 5).tokens == 5


REFUSED = [
    (
        {"scheduler": "asha"},
        "mode select refuses --scheduler asha: it stops a trial because of the scores of others",
    ),
    ({"scheduler": "median"}, "refuses --scheduler median"),
    (
        {"scheduler": "pbt"},
        "refuses --scheduler pbt: it continues one trial from the weights of another",
    ),
    (
        {"search": "optuna"},
        "refuses --search optuna: it proposes a trial because of the scores of earlier ones",
    ),
    ({"tokens": 5}, "refuses --tokens"),
    ({"trials": 1}, "mean number of trials"),
]


@pytest.mark.parametrize(("changes", "part"), REFUSED)
def test_select_refuses_by_name_what_breaks_its_theorem(changes, part):
    with pytest.raises(ConfigError) as caught:
        Options("s", **{"mode": "select", "scheduler": "none", **changes})
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "part"),
    [
        ("method.name=randomized", "refuses method randomized"),
        ("performance.num_workers=2", "refuses --workers"),
    ],
)
def test_select_refuses_default_runs_that_cannot_be_sealed(assignment, part, tmp_path):
    options = Options(SPACE, mode="select", scheduler="none", storage=str(tmp_path / "s"))
    domains, study = spaces.load(SPACE, [assignment])
    with pytest.raises(ConfigError, match=part):
        prepare(options, domains, study)
    assert list(tmp_path.iterdir()) == []


def test_a_selection_is_priced_for_whole_trials(tmp_path):
    options = Options(
        SPACE,
        mode="select",
        scheduler="none",
        storage=str(tmp_path / "s"),
        key_path=str(tmp_path / "k"),
    )
    sweep = prepare(options, *spaces.load(SPACE))
    paid = sweep.steps.paid
    assert isinstance(paid, Selection)
    assert (paid.trial_tokens, paid.distribution.mean, paid.epsilon) == (24, 10.0, 8.0)
    assert 7.9 < paid.cost() <= 8.0
    assert sweep.study.config.performance.eval_every == 0  # one score a trial, at its end


BY_USER = ["privacy.unit=user", "privacy.expected_batch_size=20"]


@pytest.mark.parametrize("words", [{}, {"mode": "select", "scheduler": "none"}])
def test_a_sweep_by_user_is_priced_paid_and_resumed_as_one(tmp_path, words):
    options = Options(
        SPACE, storage=str(tmp_path / "s"), key_path=str(tmp_path / "k"),
        ledger=str(tmp_path / "ledger"), ledger_epsilon=30.0, **words,
    )  # fmt: skip
    domains, study = spaces.load(SPACE, BY_USER)
    sweep = prepare(options, domains, study, "n")
    assert sweep.steps.paid.mechanism.sampling_prob == 20 / 101
    sweep.register()
    again = resume(folder.read(sweep.folder()), options, domains, study)
    assert again.steps == sweep.steps
    assert again.steps.paid.unit == "user"
    sweep.steps.open()
    ledger = Ledger.open(sweep.steps.ledger)
    paid = sweep.steps.paid
    (ledger.ensure_selection if isinstance(paid, Selection) else ledger.ensure_study)(paid)
    assert ledger.state.unit == "user"
    assert verify(sweep.steps.ledger).ok
    with pytest.raises(LedgerError, match="another privacy unit, got 'record', expected user"):
        prepare(options, *spaces.load(SPACE), name="m")


def test_no_trial_varies_the_unit_and_no_private_score_is_of_one(monkeypatch):
    with pytest.raises(ConfigError, match=r"cannot vary privacy\.unit"):
        spaces.check_names(["privacy.unit"], ["privacy.unit"])
    monkeypatch.setenv("TINY_SCORES", "private")
    with pytest.raises(ConfigError, match=r"private scores with privacy\.unit, got 'user'"):
        spaces.load(SPACE, BY_USER)


def test_the_description_of_a_sweep_holds_no_hash_of_the_data_and_is_resumed_without(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("TINY_SCORES", "private")
    options = Options(SPACE, storage=str(tmp_path / "s"), key_path=str(tmp_path / "k"))
    domains, study = spaces.load(SPACE, ["task.public=false"])
    sweep = prepare(options, domains, study, "n")
    sweep.register()
    described = folder.read(sweep.folder())
    assert sweep.scores is not None
    for share in (sweep.steps, sweep.scores):
        assert share.dataset_id not in json.dumps(described)
        assert Path(share.ledger).parent == tmp_path / "share" / "grape-ray" / "ledgers"
    for made in (False, True):  # cut off before its ledgers were made, and after
        again = resume(described, options, domains, study)
        assert (again.steps, again.scores) == (sweep.steps, sweep.scores)
        if not made:
            sweep.steps.open()
            sweep.scores.open()


@pytest.mark.parametrize(
    ("resources", "assignments", "concurrent", "wanted"),
    [
        ({"CPU": 2.0}, [], None, 2), ({"CPU": 2.0}, ["performance.num_workers=2"], None, 1),
        ({"CPU": 200.0}, [], None, 10), ({"CPU": 200.0}, [], 3, 3),
        ({"CPU": 2.0, "GPU": 200.0}, ["performance.use_gpu=true"], None, 10),
        ({"CPU": 64.0, "GPU": 8.0}, ["performance.use_gpu=true", "performance.num_workers=2:4"],
        None, 2),
        ({"CPU": 2.0}, ["performance.num_workers=3"], None, "'2 CPUs', expected at least 3"),
        ({"CPU": 2.0}, ["performance.use_gpu=true"], None, "'0 GPUs', expected at least 1"),
        ({}, [], None, "'0 CPUs'"),
    ],
)  # fmt: skip
def test_as_many_trials_at_a_time_as_the_cluster_holds(
    monkeypatch, resources, assignments, concurrent, wanted
):
    from grape_ray.ray_backend.tuner import concurrency

    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    _, study = spaces.load(SPACE, assignments)
    options = Options(SPACE, trials=10, concurrent=concurrent)
    if isinstance(wanted, int):
        assert concurrency(study, options) == wanted
        return
    with pytest.raises(ConfigError, match=f"the cluster is too small for one trial, got {wanted}"):
        concurrency(study, options)


def test_a_machine_too_small_for_one_trial_is_told_before_anything_is_registered(
    tmp_path, monkeypatch
):
    started = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: started.update(options))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": float(started["num_cpus"])})
    words = [
        "tune",
        SPACE,
        "--workers",
        "64",
        "--storage",
        tmp_path / "s",
        "--key-file",
        tmp_path / "key",
    ]
    result = CliRunner().invoke(main, [*map(str, words)])
    assert result.exit_code == 2
    assert "expected at least 64; lower --workers" in result.stderr
    assert started["num_cpus"] == os.cpu_count()
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_page_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("grape_ray.tuning.page.report", lambda url: ("page", b"table"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.parquet").mkdir()
    for out in ("/proc/x/y.html", tmp_path / "folder" / "x.html"):
        result = CliRunner().invoke(main, ["report", "sweep", "--out", str(out)])
        assert result.exit_code == 2
        (line,) = result.stderr.strip().splitlines()
        assert f"cannot write {out}" in line


def test_a_sweep_beyond_the_budget_is_refused_before_any_work(tmp_path):
    data = tiny().task.load()
    Ledger.open(tmp_path / "ledger", data.dataset_id, 5.0, 1e-4).ensure_study(
        Study("other", Mechanism("poisson_gaussian", 1.0, 50.0), 3.0, 1e-5, 10)
    )
    before = sorted(p.name for p in (tmp_path / "ledger").iterdir())
    words = [
        "tune",
        SPACE,
        "--storage",
        tmp_path / "s",
        "--ledger",
        tmp_path / "ledger",
        "--key-file",
        tmp_path / "k",
    ]
    result = CliRunner().invoke(main, [*map(str, words), "--budget-epsilon", "2.1", "--name", "n"])
    assert result.exit_code == 2
    assert "costs too much" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger"]
    assert sorted(p.name for p in (tmp_path / "ledger").iterdir()) == before


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["tune_spaces.digit"], "did you mean 'tune_spaces.digits'"),
        (["nosuch"], "known names: tune_spaces.digits"),
        (["pipelines.digits_vit"], "has no function space()"),
        ([SPACE, "--budget-epsilon", "nan"], "--budget-epsilon"),
        ([SPACE, "--trials", "0"], "--trials"),
        ([SPACE, "--resume", "nothing"], "there is no sweep"),
        ([SPACE, "--set", "method.rank=0"], "method.rank"),
        ([SPACE, "--scheduler", "pbt", "--search", "optuna"], "one of the two"),
        ([SPACE, "--mode", "select", "--scheduler", "asha"], "mode select refuses"),
        ([SPACE, "--set", "performance.eval_every=0"],
        "trials are compared at evaluations"),
        ([SPACE, "--mode", "select", "--storage", "memory://x"],
        "no place for its secrets"),
        *(([SPACE, f"--{name}", "0"], f"--{name} is out of range")
          for name in ("budget-epsilon", "budget-delta", "ledger-epsilon", "ledger-delta")),
        ([SPACE, "--budget-epsilon", "4", "--ledger-epsilon", "2"], "epsilon <= 2"),
        ([SPACE, "--ledger", "/proc/nope"], "cannot create"),
        ([SPACE, "--key-file", "/proc/nope"], "master key"),
        (["tests.support.wide_space", "--scheduler", "pbt"],
        "population-based training has nothing to vary"),
    ],
)  # fmt: skip
def test_bad_words_cost_one_line_and_leave_nothing(tmp_path, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.init", lambda *args, **options: pytest.fail("Ray is started"))
    result = CliRunner(env={"XDG_DATA_HOME": str(tmp_path / "share")}).invoke(
        main, ["tune", "--key-file", str(tmp_path / "key"), *words]
    )
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert part in line
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    def missing(*arguments, **options):
        raise AssertionError("optuna must be installed")

    monkeypatch.setattr("ray.tune.search.optuna.OptunaSearch", missing)
    words = [
        "tune",
        SPACE,
        "--search",
        "optuna",
        "--storage",
        tmp_path / "s",
        "--key-file",
        tmp_path / "key",
    ]
    result = CliRunner().invoke(main, [*map(str, words)])
    assert result.exit_code == 2
    assert "pip install optuna" in result.stderr
    assert list(tmp_path.iterdir()) == []


def row(run, score, steps=12):
    return trials.TrialRow(run, run, {"method.rank": 4}, steps, score, steps, steps, 1, (), True)


@pytest.mark.parametrize(
    "scores",
    [(math.nan, 0.3, 0.5), (0.5, math.nan, None), (math.inf, 0.5, -math.inf), (0.5, 0.5, math.nan)],
)
def test_a_score_that_is_not_finite_is_never_the_best(scores):
    best = trials.best([row(str(place), score, steps=place) for place, score in enumerate(scores)])
    assert best is not None
    assert best.score == 0.5
    assert trials.best([row("a", math.nan), row("b", None), row("c", -math.inf)]) is None
    # Neither does it keep Ray Tune's schedulers from comparing the others.
    told = [comparable(score) for score in scores if score is not None]
    assert np.isfinite(np.nanpercentile(told, 70))
    assert max(told) == 0.5


@pytest.fixture
def ended(tmp_path):
    """A sweep whose three runs have reported, some of them scores that are not finite."""
    options = Options(SPACE, storage=str(tmp_path / "s"), key_path=str(tmp_path / "k"))
    sweep = prepare(options, *spaces.load(SPACE), name="a")
    sweep.steps.open()
    ledger = Ledger.open(sweep.steps.ledger)
    ledger.ensure_study(sweep.steps.paid)
    sweep.register()
    told = {"x": [0.25, math.nan], "y": [math.nan, math.nan], "z": [math.nan, 0.125]}
    for run, scores in told.items():
        ledger.charge("a", run, ledger.begin_attempt("a", run, "id"), 0, 2)
        place = sweep.folder().child(folder.RUNS).child(run)
        config = describe(sweep.study.with_values({"method.rank": 4}))
        place.write("run.json", json.dumps({"run": run, **config}).encode())
        trace = process_log(place, folder.REPORTS)
        for step, score in enumerate(scores, 1):
            facts = {"step": step, "accuracy": score, "run": run, "time": float(step)}
            trace.line(json.dumps({**facts, "done": step == 2}))
        trace.close()
    return sweep


def test_a_sweep_of_scores_that_are_not_finite_has_no_best_and_says_why(ended):
    rows = {row.run: row for row in trials.rows(ended.folder(), folder.read(ended.folder()))}
    assert (rows["x"].score, rows["y"].score, rows["z"].score) == (None, None, 0.125)
    best = trials.best(list(rows.values()))
    assert best is not None
    assert best.run == "z"
    lines = _summary(replace(results.composed(ended), best=None))
    assert "no trial has a finite score" in lines[-1]


class Elements(HTMLParser):
    """The ids of a page, the ones that it refers to, and its words; each element must be closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.named, self.words = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.named += found.get("aria-labelledby", "").split()
        self.named += [found["href"][1:]] if "href" in found else []  # pyright: ignore[reportOptionalSubscript]
        self.named += re.findall(r"url\(#(.+?)\)", " ".join(map(str, found.values())))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_needs_nothing_else_and_says_its_plots_in_words(ended):
    described = ended.folder().read(folder.SWEEP_FILE).decode()
    strange = described.replace(f'"{SPACE}"', '"<script>x</script> & $y$"')
    ended.folder().write(folder.SWEEP_FILE, strange.encode())
    html, _ = page.report(f"{ended.storage}/a")
    assert html == page.report(f"{ended.storage}/a")[0]
    assert "http" not in html
    assert "<script" not in html
    found = Elements(html)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert set(found.named) <= set(found.ids)
    text = "".join(found.words)
    for part in ("<script>x</script> & $y$", "0.1250", "accuracy by rank", "z: 0.1250 after 2"):
        assert part in text
    # drawn in the page's colours, which are others on dark paper
    svg = html[html.index("<svg") :]
    assert "prefers-color-scheme: dark" in html
    assert not re.search("#[0-9a-f]{6}", svg)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        (["a$b$", True, None], ["None", "True", "a$b$"]),
        ([16, 4, 8], ["4", "8", "16"]),
        ([1e-4, 1e-2], ["0.0001", "0.001", "0.01"]),
        ([0.1, 0.2], ["0.10", "0.20"]),
        ([0.3], ["0.3"]),
    ],
)
def test_the_axis_of_a_plot_suits_its_values(values, ticks):
    rows = [replace(row(str(n), 0.5), values={"f": value}) for n, value in enumerate(values)]
    svg = plots.by_parameter("f", "f", "accuracy", rows, rows[0]).svg
    found = re.findall(r"<text [^>]*>(.*?)</text>", svg)
    assert [text for text in found if text in ticks] == ticks


def test_a_selection_never_releases_a_score_that_is_not_finite(tmp_path):
    options = Options(
        SPACE,
        mode="select",
        scheduler="none",
        storage=str(tmp_path / "s"),
        key_path=str(tmp_path / "k"),
    )
    sweep = prepare(options, *spaces.load(SPACE), name="a")
    secret = Storage(tmp_path / "secret")
    sealed = [Sealed(name, {"method.rank": 4}) for name in "abc"]
    for trial, score in zip(sealed, (math.nan, 0.25, math.inf)):
        runs = secret.child(folder.RUNS)
        result = {
            "metrics": {"accuracy": score},
            "steps": 12,
            "checkpoint": f"x/{trial.name}/checkpoints/1",
        }
        runs.write(f"{trial.name}/result.json", json.dumps(result).encode())
        runs.write(f"{trial.name}/run.json", b"{}")
    best = _release(sweep, secret, sealed)
    assert best is not None
    assert best.score == 0.25
    assert _release(sweep, secret, [sealed[0], sealed[2]]) is None


def test_a_metric_with_a_slip_costs_nothing(tmp_path):
    domains, study = spaces.load(SPACE)
    options = Options(SPACE, storage=str(tmp_path / "s"), key_path=str(tmp_path / "k"))
    with pytest.raises(
        ConfigError, match=r"no such metric, got 'acuracy'.*did you mean 'accuracy'"
    ):
        prepare(options, domains, replace(study, metric="acuracy"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def scored(tmp_path):
    """(A function that makes a private score, the ledger that pays for it): 40 tokens, noise
    multiplier 30.
    """
    ledger = Ledger.open(tmp_path / "scores", "validation", 9.0, 1e-4)
    ledger.ensure_study(Study("s", Mechanism("poisson_gaussian", 1.0, 30.0), 9.0, 1e-5, 40))
    terms = Terms("accuracy", 30.0, str(tmp_path / "scores"), "s")
    return (
        lambda run: PrivateScore(lambda: ledger, terms, run, str(tmp_path / "key"), "validation"),
        ledger,
    )


@pytest.mark.statistical
def test_private_scores_are_noised_charged_and_end_with_their_budget(scored):
    make, ledger = scored
    one, two = make("a"), make("b")
    metrics = {"accuracy": 0.5, "loss": 1.25}
    found = [one(metrics, 100) for _ in range(20)] + [two(metrics, 100) for _ in range(20)]
    assert all(set(score) == {"accuracy"} for score in found)  # nothing else is released
    assert all(
        len(f"{score['accuracy']!r}".strip("-").split("e")[0].replace(".", "").lstrip("0")) <= 6
        for score in found
    )
    noise = np.array([100 * score["accuracy"] - 50 for score in found]) / 30
    assert len(set(noise)) == 40
    # A sum of 40 squares lies outside (16, 76) with probability 8e-4; at half the scale it lies
    # inside with probability 6e-3.
    assert 16 < (noise**2).sum() < 76
    assert ledger.state.study("s").left == 0
    assert one(metrics, 100) == {}
    assert verify(ledger._chain.storage).ok


@pytest.mark.parametrize(
    "metrics", [{}, {"loss": 0.5}, {"accuracy": 1.5}, {"accuracy": -0.1}, {"accuracy": math.nan}]
)
def test_a_score_whose_sensitivity_is_unknown_is_refused_and_not_told(scored, metrics):
    make, ledger = scored
    with pytest.raises(ConfigError, match="private score") as caught:
        make("a")(metrics, 100)
    assert str(metrics.get("accuracy")) not in str(caught.value)
    assert ledger.state.study("s").used == 0


def test_traced_lines_outlive_a_kill(tmp_path):
    code = (
        "import os, signal; from grape_ray.storage import Storage; from"
        " grape_ray.training.append_log import process_log; log ="
        f" process_log(Storage({str(tmp_path)!r}), 'executed'); [log.line(str(n)) for n in"
        " range(50)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)
    assert done.returncode == -signal.SIGKILL
    assert lines(Storage(tmp_path), "executed") == [str(n) for n in range(50)]


def test_traces_of_object_stores_are_written_whole():
    folder = Storage(f"memory://{os.getpid()}/x")
    one, two = process_log(folder, "executed"), process_log(folder, "executed")
    for trace in (one, two):
        for n in range(3):
            trace.line(json.dumps({"n": n}))
        trace.close()
    assert [json.loads(line)["n"] for line in lines(folder, "executed")] == [0, 1, 2] * 2
