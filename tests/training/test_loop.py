"""The loop and the run around it, in one process: charge before noise, clean ends, resume, and
what nothing may depend on.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from grape_ray import checkpoint
from grape_ray.checkpoint.manager import Occasion
from grape_ray.config.schema import Config, Performance
from grape_ray.distributed.comms import Comms
from grape_ray.errors import ConfigError, DataError, GrapeRayError, LedgerError, StorageError
from grape_ray.ledger.audit import verify
from grape_ray.ledger.ledger import Ledger
from grape_ray.ledger.location import ledger_place
from grape_ray.privacy import keys
from grape_ray.ray_backend.train import train
from grape_ray.storage import Storage
from grape_ray.training.active_run import ActiveRun
from grape_ray.training.attempt import Attempt, begin_attempt
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.loop import run_loop
from grape_ray.training.progress import Progress, Signal
from grape_ray.training.result import read_result
from grape_ray.training.run import execute
from tests.support.plans import planned
from tests.support.tiny import Tiny, tiny

WANTED = ["run", "method", "epsilon", "epsilon_spent", "delta", "steps", "noise_multiplier",
"metrics", "seconds", "peak_bytes",
          "checkpoint", "ledger"]  # fmt: skip
NAN, INF = float("nan"), float("inf")
FIXED = Attempt(1, b"s" * 32, b"d" * 32, b"n" * 32, b"p" * 32)


def fixed_keys(plan, comms, ledger=None):
    """A real attempt in the ledger, with the streams of another: what only a test may do."""
    return dataclasses.replace(FIXED, number=begin_attempt(plan, comms, ledger).number)


@pytest.fixture
def run(tmp_path):
    """Runs a config, in one storage with one key."""

    def go(config: Config, **options):
        return train(
            config, storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"), **options
        )

    return go


def weights(tmp_path, name):
    found = checkpoint.latest(Storage(tmp_path / "runs" / name))
    assert found is not None
    return found


class Recorder(ActiveRun):
    """A run that writes down what the loop asks of it."""

    def __init__(self, budget=10**9, stop_at=None, busy_at=(), signals=None):
        self.budget, self.stop_at, self.busy_at = budget, stop_at, busy_at
        self.signals, self.calls, self.step = signals or {}, [], 0
        self.comms: Comms = Comms.local()

    def reserve(self, step, count):
        self.calls.append(("reserve", step, count))
        granted = min(count, self.budget)
        self.budget -= granted
        return granted

    evaluates_together = False  # pyright: ignore[reportAssignmentType]

    def evaluate(self):
        self.calls.append("evaluate")
        return {"accuracy": 0.5}

    def score(self, metrics):
        return {name: value / 2 for name, value in metrics.items()}

    def checkpoint(self, progress, occasion):
        if occasion is Occasion.DUE and progress.step in self.busy_at:
            return False
        self.calls.append(
            ("checkpoint", progress.step)
            if occasion is not Occasion.URGENT
            else ("urgent", progress.step)
        )
        return True

    def signal(self):
        return self.signals.get(self.step, Signal.NONE)

    def progressed(self, progress):
        pass

    def should_continue(self, progress):
        return progress.step != self.stop_at

    def take(self, step):
        self.calls.append(("step", step))
        self.step = step + 1


def test_every_step_is_reserved_before_it_is_taken():
    hooks = Recorder()
    outcome = run_loop(
        hooks.take, hooks, Performance(charge_chunk=3, checkpoint_every=4, eval_every=5), 2, 9
    )
    assert hooks.calls == [
        ("reserve", 2, 3), ("step", 2), ("step", 3), ("checkpoint", 4), ("step", 4), "evaluate",
        ("reserve", 5, 3), ("step", 5), ("step", 6), ("step", 7), ("checkpoint", 8),
        ("reserve", 8, 1), ("step", 8), ("checkpoint", 9), "evaluate",
    ]  # fmt: skip
    assert (outcome.exhausted, outcome.progress.step, outcome.progress.executed) == (False, 9, 7)


def test_the_end_of_the_budget_is_a_clean_end():
    hooks = Recorder(budget=4)
    outcome = run_loop(hooks.take, hooks, Performance(charge_chunk=3), 0, 9)
    assert outcome.exhausted
    assert outcome.progress.step == 4
    # no evaluation can lose what was trained
    assert hooks.calls[-2:] == [("checkpoint", 4), "evaluate"]
    again = Recorder(budget=0)
    run_loop(again.take, again, Performance(), 4, 9)
    # the checkpoint it began from is not written again
    assert again.calls == [("reserve", 4, 5), "evaluate"]


class Second(Comms):
    """Rank 1 of two, where all that rank 0 broadcasts is `told`."""

    def __init__(self, told):
        super().__init__(1, 2)
        self.told = told

    def broadcast_object(self, value):
        return self.told


def test_ranks_that_evaluate_together_have_one_score():
    hooks = Recorder()
    hooks.evaluates_together = True  # pyright: ignore[reportAttributeAccessIssue]
    outcome = run_loop(hooks.take, hooks, Performance(), 0, 0)
    assert outcome.progress.metrics == {"accuracy": 0.25}
    hooks.score = lambda metrics: pytest.fail("rank 1 asks for a score of its own")
    hooks.comms = Second(({"accuracy": 0.75}, None))
    outcome = run_loop(hooks.take, hooks, Performance(), 0, 0)
    assert outcome.progress.metrics == {"accuracy": 0.75}
    assert hooks.calls.count("evaluate") == 2
    hooks.comms = Second((None, LedgerError("away")))
    with pytest.raises(LedgerError, match="away"):
        run_loop(hooks.take, hooks, Performance(), 0, 0)


def test_a_checkpoint_left_out_is_made_at_the_end():
    hooks = Recorder(busy_at=(4, 6), budget=6)
    run_loop(hooks.take, hooks, Performance(checkpoint_every=2), 0, 9)
    assert [c for c in hooks.calls if c[0] == "checkpoint"] == [
        ("checkpoint", 2),
        ("checkpoint", 6),
    ]


def test_a_notice_brings_a_checkpoint_at_once_and_a_stop_ends_the_run_unevaluated():
    hooks = Recorder(signals={3: Signal.CHECKPOINT_NOW, 5: Signal.STOP})
    outcome = run_loop(hooks.take, hooks, Performance(charge_chunk=9), 0, 9)
    assert [c for c in hooks.calls if c[0] in ("urgent", "checkpoint")] == [
        ("urgent", 3),
        ("urgent", 5),
    ]
    assert (outcome.interrupted, outcome.progress.step, outcome.paid_until) == (True, 5, 9)
    assert "evaluate" not in hooks.calls


def test_a_run_that_is_told_to_stop_takes_no_further_step():
    hooks = Recorder(stop_at=4)
    outcome = run_loop(
        hooks.take, hooks, Performance(charge_chunk=3, checkpoint_every=4, eval_every=2), 0, 9
    )
    assert (outcome.stopped, outcome.exhausted, outcome.progress.step, outcome.paid_until) == (
        True,
        False,
        4,
        6,
    )
    # once each, though the loop ends here
    assert hooks.calls[-2:] == ["evaluate", ("checkpoint", 4)]
    assert ("step", 4) not in hooks.calls


def test_an_evaluation_that_fails_ends_nothing_and_asks_nobody():
    hooks = Recorder(stop_at=2)
    hooks.evaluate = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    outcome = run_loop(hooks.take, hooks, Performance(eval_every=2), 0, 6)
    assert (outcome.progress.step, outcome.stopped, outcome.progress.metrics_step) == (
        6,
        False,
        None,
    )
    assert hooks.calls[-1] == ("checkpoint", 6)


@pytest.mark.parametrize(
    ("values", "end"), [((0, 1, NAN, NAN), 8), ((0, NAN, 1, NAN, 1), 12), ((1, INF, NAN), 6)]
)
def test_a_metric_that_is_twice_not_finite_ends_the_run_before_more_is_paid(values, end):
    hooks, found = Recorder(), iter(values)
    hooks.score = lambda metrics: {"loss": float(next(found, 0)), "other": 1.0}
    outcome = run_loop(hooks.take, hooks, Performance(eval_every=2, charge_chunk=1), 0, 12)
    assert outcome.progress.step == end
    assert outcome.stopped == (end < 12)
    assert outcome.progress.diverged == (("loss",) if end < 12 else ())
    assert ("checkpoint", end) in hooks.calls
    assert max(call[1] for call in hooks.calls if call[0] == "reserve") == end - 1
    hooks.score = lambda metrics: {"loss": float("nan")}
    assert (
        run_loop(
            hooks.take, hooks, Performance(eval_every=2, stop_on_nan=False), 0, 12
        ).progress.step
        == 12
    )


def test_a_checkpoint_that_time_asks_for_is_made_in_the_background():
    hooks = Recorder(signals={3: Signal.CHECKPOINT_DUE, 5: Signal.CHECKPOINT_NOW}, busy_at=(3,))
    run_loop(hooks.take, hooks, Performance(), 0, 9)
    assert [c for c in hooks.calls if c[0] in ("urgent", "checkpoint")] == [
        ("urgent", 5),
        ("checkpoint", 9),
    ]


def test_a_stopped_run_gets_back_what_never_started(tmp_path):
    config = tiny().override(["performance.eval_every=4", "performance.charge_chunk=6"])
    taken = []
    around = RunCallbacks(on_step=taken.append, should_continue=lambda progress: progress.step != 8)
    plan = planned(config, run="a", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    result = execute(plan, Comms.local(), around)
    assert (result.stopped, result.steps, result.charged_steps) == (True, 8, 8)
    assert taken == list(range(8))
    assert plan.ledger is not None
    (attempt,) = Ledger.open(plan.ledger).attempts("a", "a")
    assert attempt.refunds == {1: 4}
    assert attempt.closed
    again = execute(plan, Comms.local())
    assert (again.stopped, again.steps, again.charged_steps, again.attempts) == (False, 12, 12, 2)


def test_a_run_begins_from_the_checkpoint_of_another_with_a_key_of_its_own(tmp_path):
    options = {
        "storage": str(tmp_path / "runs"),
        "ledger": str(tmp_path / "ledger"),
        "key_path": str(tmp_path / "key"),
    }
    first = planned(tiny(), run="a", **options)
    execute(first, Comms.local(), RunCallbacks(should_continue=lambda progress: False))
    assert first.ledger is not None
    study = Ledger.open(first.ledger).state.study("a").study
    config = tiny().override(["method.learning_rate=0.02"])
    second = planned(
        config,
        run="b",
        study=study,
        origin=(first.folder().url, checkpoint.folder_of(8)),
        **options,
    )
    taken = []
    result = execute(second, Comms.local(), RunCallbacks(on_step=taken.append))
    assert taken == [8, 9, 10, 11]
    assert (result.steps, result.charged_steps, second.study) == (12, 4, "a")
    # of all runs of the study
    assert 0 < result.epsilon_spent < result.epsilon == study.epsilon  # pyright: ignore[reportOperatorIssue]
    before, after = (
        weights(tmp_path, "a").model,
        checkpoint.load(second.folder(), checkpoint.folder_of(8)).model,
    )
    whole = checkpoint.load(first.folder(), checkpoint.folder_of(8)).model
    assert all(
        torch.equal(whole[n], after[n])
        and not torch.equal(before[n], weights(tmp_path, "b").model[n])
        for n in after
    )
    with pytest.raises(ConfigError, match="another sampling_prob than study 'a'"):
        planned(
            config.override(["privacy.expected_batch_size=40"]), run="c", study=study, **options
        )


def test_a_run_is_charged_for_its_steps_and_verifies(run, tmp_path):
    seen = []
    result = run(
        tiny(), run="a", on_progress=lambda progress, epsilon: seen.append((progress.step, epsilon))
    )
    assert set(WANTED) <= set(result.as_dict())
    assert (result.steps, result.charged_steps, result.executed_steps) == (12, 12, 12)
    # spare steps are unspent, and can still be
    assert 0 < result.epsilon_spent < result.epsilon == 8
    assert verify(result.ledger, weights(tmp_path, "a").metadata["ledger_head"]).ok
    assert [step for step, _ in seen] == list(range(1, 13))
    assert read_result(Storage(tmp_path / "runs" / "a")) == result
    assert not any(b"losses" in f.read_bytes() for f in (tmp_path / "runs").rglob("*.json"))


def test_two_attempts_share_no_key(run, tmp_path):
    plan = planned(tiny(), run="a", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    one, two = begin_attempt(plan, Comms.local()), begin_attempt(plan, Comms.local())
    secrets = [
        one.noise_key,
        one.sampling_key,
        one.probe_key,
        two.noise_key,
        two.sampling_key,
        two.probe_key,
    ]
    assert len(set(secrets)) == 6
    assert (one.number, two.number) == (1, 2)
    assert not any(
        key.hex() in repr(attempt) or repr(key) in repr(attempt)
        for key in secrets
        for attempt in (one, two)
    )
    master = keys.master_key(tmp_path / "key")
    stored = b"".join(f.read_bytes() for f in (tmp_path / "runs").rglob("*") if f.is_file())
    assert not any(key in stored or key.hex().encode() in stored for key in [*secrets, master])


@pytest.mark.parametrize("method", ["grape", "dp_galore", "dp_zero", "none"])
def test_resumed_weights_are_bitwise_those_of_an_uninterrupted_run(tmp_path, method):
    config = dataclasses.replace(
        tiny(dropout=0.1, slow_s=0.02), method=dataclasses.replace(tiny().method, name=method)
    )

    class Stop(BaseException):
        pass

    def interrupt(progress: Progress, epsilon):
        if progress.step == 10:
            raise Stop

    options = {"storage": str(tmp_path / "runs"), "key_path": str(tmp_path / "key")}
    begin = begin_attempt if method == "none" else fixed_keys
    whole = planned(config, run="whole", **options)
    execute(whole, Comms.local(), RunCallbacks(begin_attempt=begin))
    cut = planned(config, run="cut", **options)
    with pytest.raises(Stop):
        execute(cut, Comms.local(), RunCallbacks(begin_attempt=begin, on_progress=interrupt))
    result = execute(cut, Comms.local(), RunCallbacks(begin_attempt=begin))
    one, two = weights(tmp_path, "whole"), weights(tmp_path, "cut")
    assert all(torch.equal(one.model[name], two.model[name]) for name in one.model)
    assert all(
        torch.equal(torch.as_tensor(one.optimizer[n]), torch.as_tensor(two.optimizer[n]))
        for n in one.optimizer
    )
    if method != "none":  # 12 charged before the crash at step 10, then 8..12 again
        assert (result.attempts, result.charged_steps, result.executed_steps) == (2, 16, 12)
        assert verify(result.ledger).ok


def test_an_attempt_with_its_own_key_draws_other_noise(run, tmp_path):
    run(tiny(), run="a")
    run(tiny(), run="b")
    one, two = weights(tmp_path, "a").model, weights(tmp_path, "b").model
    assert not any(torch.equal(one[name], two[name]) for name in one)


def test_performance_moves_no_more_than_rounding(tmp_path):
    models = []
    for name, changes in {
        "a": {},
        "b": {"micro_batch_size": 7, "charge_chunk": 5, "checkpoint_every": 3, "eval_every": 2},
    }.items():
        config = dataclasses.replace(
            tiny(), performance=dataclasses.replace(tiny().performance, **changes)
        )
        execute(
            planned(
                config, run=name, storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key")
            ),
            Comms.local(),
            RunCallbacks(begin_attempt=fixed_keys),
        )
        models.append(weights(tmp_path, name).model)
    for name in models[0]:
        torch.testing.assert_close(models[0][name], models[1][name], rtol=0, atol=2e-4)


def test_exhausted_budget_keeps_what_was_trained(run, tmp_path):
    config = dataclasses.replace(
        tiny(),
        privacy=dataclasses.replace(tiny().privacy, noise_multiplier=1.0, epsilon=4.0, steps=500),
    )
    result = run(config, run="a")
    plan = planned(config, run="a", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    assert result.exhausted
    assert result.steps == result.charged_steps == plan.tokens < 500
    assert result.epsilon_spent <= result.epsilon == 4.0
    assert weights(tmp_path, "a").step == plan.tokens
    again = run(config, run="a")  # nothing left: it ends at once, and spends nothing
    assert (again.steps, again.charged_steps) == (plan.tokens, plan.tokens)


def test_empty_batches_are_steps_like_any_other(run):
    config = dataclasses.replace(
        tiny(), privacy=dataclasses.replace(tiny().privacy, expected_batch_size=1)
    )
    assert run(config).executed_steps == 12  # each is empty with probability 0.37


def test_a_run_name_with_another_config_is_refused(run):
    run(tiny(), run="a")
    with pytest.raises(ConfigError, match="another privacy"):
        run(
            dataclasses.replace(tiny(), privacy=dataclasses.replace(tiny().privacy, clip_norm=2.0)),
            run="a",
        )
    with pytest.raises(ConfigError, match="letters, digits"):
        run(tiny(), run="../a")


def test_a_ledger_that_was_rolled_back_is_refused_at_resume(run, tmp_path):
    result = run(tiny(), run="a")
    entries = sorted((tmp_path / "runs" / "a" / "ledger").glob("*.json"))
    for entry in entries[-3:]:
        entry.unlink()
    with pytest.raises(LedgerError, match="not the one that this run was charged to"):
        run(tiny(), run="a")
    assert verify(result.ledger).ok  # cut off cleanly: the checkpoint alone knows


def test_private_data_share_one_budget(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    first = run(tiny(public=False), run="a")
    assert first.ledger.startswith(str(tmp_path / "share"))
    salt = tmp_path / "share" / "grape-ray" / "ledgers" / "salt"
    assert (salt.stat().st_mode & 0o777, salt.stat().st_size) == (0o600, 32)
    with pytest.raises(GrapeRayError, match=r"epsilon|budget"):
        run(tiny(public=False), run="b")
    assert not (tmp_path / "runs" / "b").exists()
    assert Ledger.open(first.ledger, create=False).state.epsilon == 8.0


def test_no_hash_of_the_data_stands_beside_the_results(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    config = tiny(public=False)
    data = config.task.load()
    run(config, run="a")
    published = [f.read_bytes() for f in (tmp_path / "runs").rglob("*") if f.is_file()]
    assert len(published) > 5
    assert not any(data.dataset_id.encode() in content for content in published)
    changed = dataclasses.replace(data, dataset_id="0" * 32)
    monkeypatch.setattr(type(config.task), "load", lambda self: changed)
    options = {
        "storage": str(tmp_path / "runs"),
        "key_path": str(tmp_path / "key"),
        "second_ledger": True,
    }
    plan = planned(config, run="b", **options)
    monkeypatch.setattr(type(config.task), "load", lambda self: data)
    with pytest.raises(DataError, match="the training data changed") as caught:
        execute(plan, Comms.local())
    assert not any(name in str(caught.value) for name in (data.dataset_id, changed.dataset_id))
    with pytest.raises(LedgerError, match="another dataset_id") as refused:
        planned(config, run="c", ledger=plan.ledger, **options)
    assert not any(name in str(refused.value) for name in (data.dataset_id, changed.dataset_id))


def test_of_many_that_make_a_salt_all_find_one_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    for storage in (str(tmp_path / "runs"), f"memory://{tmp_path.name}"):
        before = ledger_place(None, "data", False, storage, "r")
        assert Storage(before).list() == []
        with ThreadPoolExecutor(8) as pool:
            found = list(
                pool.map(
                    lambda n, s=storage: ledger_place(None, "data", False, s, f"r{n}", make=True),
                    range(8),
                )
            )
        assert len(set(found)) == 1
        assert (
            ledger_place(None, "data", False, storage, "r")
            == found[0]
            != ledger_place(None, "datb", False, storage, "r")
        )
    (tmp_path / "share" / "grape-ray" / "ledgers" / "salt").write_bytes(b"short")
    with pytest.raises(StorageError, match=r"salt of the ledgers.*5 bytes"):
        ledger_place(None, "data", False, str(tmp_path / "runs"), "r")


@pytest.mark.parametrize(
    "make", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"short")]
)
def test_a_key_that_cannot_be_used_costs_no_budget(tmp_path, monkeypatch, make):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    make(tmp_path / "key")
    with pytest.raises(StorageError, match="master key"):
        planned(tiny(public=False), storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_model_that_only_trains_in_another_mode_costs_no_budget(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    layers = [torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 10)]
    monkeypatch.setattr(
        Tiny, "build_model", lambda self, seed: torch.nn.Sequential(*layers).train()
    )
    with pytest.raises(GrapeRayError, match="batch normalisation"):
        planned(tiny(public=False), storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    assert list(tmp_path.iterdir()) == []


def test_the_master_key_may_not_lie_with_the_runs(tmp_path):
    with pytest.raises(ConfigError, match="master key"):
        train(tiny(), storage=str(tmp_path), key_path=str(tmp_path / "key"))
    assert list(tmp_path.iterdir()) == []


def test_the_baseline_needs_no_ledger_and_is_reproducible(run, tmp_path):
    config = dataclasses.replace(tiny(), method=dataclasses.replace(tiny().method, name="none"))
    result = run(config, run="a")
    run(config, run="b")
    assert result.ledger is None
    assert result.epsilon is None
    one, two = weights(tmp_path, "a").model, weights(tmp_path, "b").model
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "key").exists()


def test_a_gpu_that_was_asked_for_is_used_without_workers(tmp_path, monkeypatch):
    plan = planned(tiny(), run="a", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    places = []
    monkeypatch.setattr("grape_ray.training.run._execute", lambda *args: places.append(args[-1]))
    for use_gpu in (False, True):
        performance = dataclasses.replace(plan.config.performance, use_gpu=use_gpu)
        config = dataclasses.replace(plan.config, performance=performance)
        execute(dataclasses.replace(plan, config=config), Comms.local())
    assert [place.type for place in places] == ["cpu", "cuda"]


def test_a_step_is_sampled_no_more_than_it_is_paid_for(tmp_path):
    plan = planned(tiny(), run="a", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    more = dataclasses.replace(plan, sampling_prob=1.5 * plan.sampling_prob)
    with pytest.raises(LedgerError, match="sampling of a step"):
        execute(more, Comms.local())
    assert execute(plan, Comms.local()).steps == 12
