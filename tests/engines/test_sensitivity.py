"""Adversarial records and models: no rounding, buffer, mode or choice by value lets one example
move the sum by more than C.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from grape_ray import make_engine
from grape_ray.distributed.comms import Comms
from grape_ray.engines.algebra.rounding import squared
from grape_ray.engines.norm_routes import norm_route
from grape_ray.errors import UnsupportedLayer
from grape_ray.tasks.task import classification_metrics, evaluating
from grape_ray.training.attempt import begin_attempt
from grape_ray.training.dry_run import preflight_extremes
from tests.support.methods import GRADIENT
from tests.support.plans import planned
from tests.support.tiny import tiny

CLIP = 1.0


class Weighted(nn.Module):
    """One linear layer whose output gradients are dictated: the loss is sum(layer(x) * grads)."""

    def __init__(self, inputs=64, outputs=64):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(inputs, outputs, bias=False)

    def forward(self, batch):
        return (self.layer(batch["x"]) * batch["g"]).flatten(1).sum(1)


def dictated(model, batch):
    return model(batch).float()


def in_bf16(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return dictated(model, batch)


def contribution(engine, loss, batch):
    return torch.cat(
        [t.flatten().double() for t in engine.clipped_sum(loss, batch).tensors.values()]
    ).norm()


def cancelling(size, tokens=2, width=64):
    """Output gradients that cancel but for a hundred-thousandth, on nearly equal inputs of a given
    size.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, width, generator=generator).expand(tokens, -1) * size
    x = x + torch.randn(tokens, width, generator=generator)
    g = torch.randn(1, width, generator=generator) * torch.tensor([[1.0], [-1.0]]).repeat(
        tokens // 2, 1
    )
    return {"x": x[None], "g": g[None]}


@pytest.mark.parametrize("loss", [dictated, in_bf16])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e5, 1e8])
@pytest.mark.parametrize("route", ["gram", "instantiate"])
@pytest.mark.parametrize("method", GRADIENT)
def test_positions_that_cancel_hide_no_contribution(method, route, size, loss):
    engine = make_engine(
        Weighted(), method, CLIP, key=b"k", rank=4, project_min_numel=1, routes=(f"*:{route}",)
    )
    assert contribution(engine, loss, cancelling(size)) <= CLIP * (1 + 1e-3)


@pytest.mark.parametrize("method", ["ghost", "bookkeeping"])
def test_what_does_not_cancel_is_not_clipped_more_than_it_must(method):
    generator = torch.Generator().manual_seed(2)
    batch = {
        "x": torch.randn(1, 128, 64, generator=generator),
        "g": torch.randn(1, 128, 64, generator=generator),
    }
    engine = make_engine(Weighted(), method, CLIP, routes=("*:gram",))
    assert contribution(engine, dictated, batch) >= CLIP * (1 - 1e-4)


def test_norms_of_many_entries_do_not_come_out_small():
    stored = torch.randn(2, 4000, 2000, generator=torch.Generator().manual_seed(0))
    exact = stored.double().square().sum((1, 2))
    assert (exact <= squared(stored)).all()
    assert (squared(stored) <= exact * (1 + 1e-5)).all()


class Frozen(nn.Module):
    """A trainable head over a frozen batch normalisation that was set to eval mode, as our own
    error advises.
    """

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8).requires_grad_(False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.norm(x))


def test_a_frozen_layer_keeps_its_mode_through_an_evaluation():
    model = Frozen().train()
    model.norm.eval()
    with evaluating(model):
        assert not model.training
    assert model.training
    assert not model.norm.training
    engine = make_engine(model, "dp_adam", CLIP)
    model.train()
    with pytest.raises(UnsupportedLayer, match="'norm' in training mode"):
        engine.clipped_sum(lambda m, x: m(x).square().sum(1), torch.randn(4, 8))


def test_running_statistics_are_refused_before_they_could_be_released():
    model = nn.Sequential(
        nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten(), nn.Linear(20, 2)
    ).train()
    engine = make_engine(model, "dp_adam", CLIP)
    with pytest.raises(UnsupportedLayer, match=r"0\.running_mean.*is written to"):
        engine.clipped_sum(lambda m, x: m(x).square().sum(1), torch.randn(3, 4, 5) + 7)


class Picks(nn.Module):
    """Sends the tokens that a mask picks through its layer: how many there are depends on what the
    examples say.
    """

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, batch):
        picked = self.layer(batch["x"][batch["mask"]]).square().sum(1)
        return torch.zeros(batch["mask"].shape).masked_scatter(batch["mask"], picked).sum(1)


@pytest.mark.parametrize("method", GRADIENT)
def test_tokens_picked_by_their_values_are_refused_as_soon_as_they_are_not_alike(method):
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, :3] = True
    engine = make_engine(Picks(), method, CLIP, rank=2, project_min_numel=1)
    # three of each, in order
    engine.clipped_sum(lambda m, b: m(b), {"x": torch.randn(4, 8, 4), "mask": mask})
    mask[0, 2], mask[1, 3] = False, True  # as many in all, and divisible by four
    with pytest.raises(UnsupportedLayer, match="picked across examples by their values"):
        engine.clipped_sum(lambda m, b: m(b), {"x": torch.randn(4, 8, 4), "mask": mask})


def test_whether_a_layer_is_estimated_does_not_depend_on_the_length():
    assert {norm_route(positions, 512, 512, 32) for positions in range(1, 5000, 7)} == {"sketch"}


@dataclasses.dataclass(frozen=True)
class LooksAtPadding:
    """A text classifier whose convolution sees the padding beside a text."""

    inner: object
    name: str = "looks-at-padding"

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "inner"), name)

    def build_model(self, seed):
        torch.manual_seed(seed)
        return nn.ModuleDict(
            {
                "table": nn.Embedding(16, 6),
                "mix": nn.Conv1d(6, 6, 3, padding=1),
                "head": nn.Linear(6, 2),
            }
        ).eval()

    def collate(self, records, indices):
        lengths = [2 + 3 * (int(i) % 3) for i in indices]
        ids = torch.zeros(len(indices), max(lengths), dtype=torch.int64)
        for row, (index, length) in enumerate(zip(indices, lengths)):
            ids[row, :length] = torch.arange(1, length + 1) + int(index) % 5
        return {
            "ids": ids,
            "mask": ids > 0,
            "labels": torch.from_numpy(records.array("labels")[indices] % 2),
        }

    def per_example_loss(self, model, batch):
        hidden = model["mix"](model["table"](batch["ids"]).transpose(1, 2) + 1).relu()
        pooled = (hidden * batch["mask"][:, None]).sum(2)
        return nn.functional.cross_entropy(model["head"](pooled), batch["labels"], reduction="none")


def test_a_model_that_looks_at_padding_is_found():
    config = tiny()
    task = LooksAtPadding(config.task)
    with pytest.raises(UnsupportedLayer, match="another value in a batch than alone"):
        preflight_extremes(dataclasses.replace(config, task=task), task.load())


def test_dropout_masks_come_from_a_secret_of_the_attempt(tmp_path):
    plan = planned(
        tiny(dropout=0.1), run="r", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key")
    )
    first, second = (begin_attempt(plan, Comms.local()) for _ in range(2))
    assert len({first.dropout_key, second.dropout_key, first.sampling_key, first.noise_key}) == 4


def test_metrics_leave_every_module_in_its_mode():
    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Frozen()

        def forward(self, x):
            return type("Output", (), {"logits": self.inner(x)})

    class Records:
        def __len__(self):
            return 3

    class Task:
        def collate(self, records, indices):
            return {
                "x": torch.ones(len(indices), 8),
                "labels": torch.zeros(len(indices), dtype=torch.int64),
            }

    model = Outputs().train()
    model.inner.norm.eval()
    classification_metrics(Task(), model, Records())  # pyright: ignore[reportArgumentType]
    assert model.training
    assert not model.inner.norm.training
    assert np.allclose(model.inner.norm.running_mean, 0)
