"""Delta checkpoints: a few percent of the bytes, and the weights that were saved within
rounding.
"""

import dataclasses
import json

import pytest
import torch
from torch import nn

from grape_ray import checkpoint
from grape_ray.checkpoint.coordinates import MAX_PERIODS, MAX_STEPS
from grape_ray.checkpoint.manager import CheckpointManager, Occasion
from grape_ray.checkpoint.manifest import MANIFEST
from grape_ray.config.schema import Config, Method, Performance
from grape_ray.distributed.comms import Comms
from grape_ray.engines import from_config
from grape_ray.errors import CheckpointError
from grape_ray.optim import make_optimizer
from grape_ray.privacy.noise import NoiseStream, privatize
from grape_ray.storage import Storage
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.export import export
from grape_ray.training.run import execute
from tests.support.grants import granted
from tests.support.plans import planned
from tests.support.tiny import tiny

METHOD = Method(rank=4, refresh=20, weight_decay=0.01, learning_rate=0.01, project_min_numel=1024)


class Trained:
    """A model of width 256 that takes private steps on nothing but noise, and its saver."""

    def __init__(self, folder, method=METHOD, dtype=torch.float32, layers=None, **performance):
        torch.manual_seed(0)
        self.model = (
            layers or nn.Sequential(nn.Embedding(256, 256), nn.Linear(256, 256), nn.LayerNorm(256))
        ).to(dtype)
        config = Config(
            task=None,
            method=method,
            performance=Performance(
                **{"delta_checkpoints": 99, "keep_checkpoints": 99, **performance}
            ),
        )
        self.engine = from_config(self.model, config.privacy, method, b"public")
        self.optimizer = make_optimizer(self.model, self.engine, method, 1000)
        self.noise, self.step = NoiseStream(bytes(32)), 0
        self.saver = CheckpointManager(config, Comms.local(), folder, self.model, self.optimizer)
        self.saver.begin_attempt(1)

    def take(self, steps):
        for _ in range(steps):
            released = privatize(
                self.engine.empty_sum(),
                self.noise,
                step=self.step,
                grant=granted(),
                expected_batch_size=10,
            )
            self.optimizer.step(released, self.step)
            self.step += 1

    def save(self, occasion=Occasion.URGENT):
        assert self.saver.save(self.step, {}, occasion)
        self.saver.flush()
        return checkpoint.read_manifest(self.saver._writer._storage, self.saver.newest)


def relative_error(model, other):
    return max(
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(other.state_dict().values(), model.state_dict().values())
    )


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_weights_of_a_delta_are_those_saved_within_rounding(tmp_path, optimizer):
    place = Storage(tmp_path)
    method = dataclasses.replace(METHOD, optimizer=optimizer, momentum=0.5)
    run, other = Trained(place, method), Trained(place, method)
    run.take(7)
    base = run.save()
    assert base.base is None
    for steps in (1, 5, 20, 30):  # within the period, across one refresh, across several
        run.take(steps)
        assert run.save().base == base.name
        assert other.saver.restore().step == run.step
        assert relative_error(run.model, other.model) <= 1e-6
        assert all(
            torch.equal(torch.as_tensor(t), torch.as_tensor(other.optimizer.state_dict()[n]))
            for n, t in run.optimizer.state_dict().items()
        )


def test_a_hundred_steps_of_one_period_stay_within_rounding(tmp_path):
    place = Storage(tmp_path)
    run, other = (Trained(place, dataclasses.replace(METHOD, refresh=200)) for _ in range(2))
    run.save()
    before = {n: t.clone() for n, t in run.model.state_dict().items()}
    run.take(100)
    assert run.save().base
    other.saver.restore()
    moved = float(
        (run.model[1].weight.detach() - before["1.weight"]).norm() / before["1.weight"].norm()  # pyright: ignore[reportCallIssue]
    )
    assert moved > 0.1  # or the test would prove nothing
    assert relative_error(run.model, other.model) <= 1e-6


def test_a_delta_is_a_few_percent_of_the_model(tmp_path):
    layers = nn.Sequential(*(nn.Linear(512, 512) for _ in range(6)))
    # r/d = 1/64
    run = Trained(Storage(tmp_path), dataclasses.replace(METHOD, rank=8), layers=layers)
    full = run.save()
    run.take(1)
    delta = run.save()
    model = sum(p.bytes for p in full.pieces["model"])
    coordinates = sum(p.bytes for p in delta.pieces["coordinates"])
    assert coordinates == sum(p.numel() for p in run.model.parameters() if p.ndim == 2) * 4 // 64
    assert delta.bytes <= 0.06 * model  # with Adam's two moments and the dense tensors
    assert coordinates + sum(p.bytes for p in delta.pieces["model"]) <= 0.02 * model


def test_a_resumed_run_counts_on_from_the_same_full_checkpoint(tmp_path):
    place = Storage(tmp_path)
    run, other = Trained(place), Trained(place)
    run.take(3)
    base = run.save()
    run.take(9)
    run.save()
    other.saver.restore()
    other.step, other.noise._last = run.step, run.step - 1
    run.take(12)
    other.take(12)
    assert other.save().base == base.name
    other.saver.restore()
    assert relative_error(run.model, other.model) <= 1e-6


def test_a_full_checkpoint_follows_when_deltas_are_many_or_periods_pass_and_at_the_end(tmp_path):
    run = Trained(Storage(tmp_path), delta_checkpoints=2)
    bases = []
    for _ in range(5):
        run.take(1)
        bases.append(run.save().base)
    assert [base is None for base in bases] == [True, False, False, True, False]
    assert run.save(Occasion.LAST).base is None
    run.take(METHOD.refresh_steps * (MAX_PERIODS + 1))
    assert run.save().base is None
    run.take(1)
    assert run.save().base
    run.saver._coordinates._steps = MAX_STEPS
    run.take(1)
    assert run.save().base is None


def test_what_a_delta_cannot_hold_exactly_is_saved_in_full(tmp_path):
    for case, changes in enumerate(
        ({"dtype": torch.bfloat16}, {"method": dataclasses.replace(METHOD, name="dp_adam")})
    ):
        run = Trained(Storage(tmp_path / str(case)), **changes)
        run.save()
        run.take(1)
        assert run.save().base is None


def test_a_delta_whose_base_is_damaged_is_passed_over(tmp_path):
    place = Storage(tmp_path)
    run = Trained(place)
    old = run.save()
    run.take(1)
    run.save()
    place.remove(f"{old.name}/model-00001-of-00001.safetensors")
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoint.latest(place) is None


def test_a_delta_in_projections_of_another_version_gives_way_to_a_full_checkpoint(tmp_path):
    place = Storage(tmp_path)
    run = Trained(place)
    full = run.save()
    run.take(1)
    delta = run.save()
    manifest = f"{delta.name}/{MANIFEST}"
    for streams in ({"streams": 3}, {}):
        fields = json.loads(place.read(manifest))
        assert fields["counters"]["coordinates"].pop("streams") == 2
        fields["counters"]["coordinates"] |= streams
        place.write(manifest, json.dumps(fields).encode())
        with pytest.warns(UserWarning, match="passed over.*projections"):
            found = checkpoint.latest(place)
        assert found is not None
        assert found.step == full.step
        fields["counters"]["coordinates"]["streams"] = 2
        place.write(manifest, json.dumps(fields).encode())


def test_a_run_resumes_from_a_delta_and_exports_one(tmp_path):
    config = tiny(slow_s=0.02).override(
        [
            "performance.delta_checkpoints=3",
            "performance.checkpoint_every=2",
            "performance.keep_checkpoints=1",
        ]
    )
    plan = planned(config, run="r", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))

    class Stop(BaseException):
        pass

    def stop(progress, epsilon):
        if progress.step == 7:
            raise Stop

    with pytest.raises(Stop):
        execute(plan, Comms.local(), RunCallbacks(on_progress=stop))
    found = checkpoint.latest(plan.folder())
    assert found is not None
    assert (found.step, found.base) == (6, checkpoint.folder_of(2, 1))
    assert len(checkpoint.names(plan.folder())) == 2
    assert export(f"{plan.storage}/r", tmp_path / "model") == 6
    model = config.task.build_model(0)
    with pytest.raises(CheckpointError, match="is a delta"):
        checkpoint.restore(model, found)
    result = execute(plan, Comms.local())
    assert (result.steps, result.executed_steps) == (12, 12)
    assert checkpoint.latest(plan.folder()).base is None
