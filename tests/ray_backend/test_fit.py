"""Any model, any dataset, one call."""

import pytest
import torch
from torch import nn

from grape_ray import Method, fit
from grape_ray.errors import ConfigError, DataError


def items(count=200, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(count, 8)
    return [(row, (row.sum() > 0).long()) for row in x]


def make_items():
    return items()


def net():
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))


def losses(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


@pytest.fixture
def where(tmp_path):
    return {"storage": str(tmp_path / "runs"), "key_path": str(tmp_path / "key")}


BUDGET = {"epsilon": 8.0, "delta": 1e-3, "expected_batch_size": 50}


def test_a_model_of_ones_own_learns_and_stays_as_it_was(where):
    torch.manual_seed(1)
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    method = Method(name="bookkeeping", learning_rate=0.02)
    done = fit(
        model, items(), losses, validation=items(100, 1), method=method, steps=40, **BUDGET, **where
    )
    assert done.result.metrics["loss"] < 0.5
    assert done.result.epsilon_spent == pytest.approx(8.0, abs=0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    x, y = (torch.stack(part) for part in zip(*items(100, 1)))
    assert (done.model(x).argmax(-1) == y).float().mean() > 0.8


def test_items_may_be_dicts_or_tensors_and_need_no_validation(where):
    found = [{"x": x, "y": y} for x, y in items()]
    done = fit(
        net(), found, lambda m, b: losses(m, (b["x"], b["y"])), steps=2, method="dp_adam",
        run="dicts", **BUDGET, **where,
    )  # fmt: skip
    assert done.result.metrics == {}
    alone = [x for x, _ in items(seed=5)]
    done = fit(
        net(), alone, lambda m, b: m(b).square().sum(1), steps=2, method="dp_adam", run="tensors",
        **BUDGET, **where,
    )  # fmt: skip
    assert done.result.steps == 2


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_import_what_they_train(where):
    done = fit(net, make_items, losses, steps=2, method="dp_adam", workers=2, **BUDGET, **where)
    assert (done.result.workers, done.result.steps) == (2, 2)


def test_what_cannot_be_trained_is_refused(where):
    with pytest.raises(ConfigError, match="a function of a module"):
        fit(net(), make_items, losses, steps=2, workers=2, **BUDGET, **where)
    ragged = [torch.zeros(n) for n in (2, 3)]
    with pytest.raises(DataError, match="2 shapes in 2 of 2 items"):
        fit(net(), ragged, losses, steps=2, **BUDGET, **where)
    with pytest.raises(DataError, match="empty"):
        fit(net(), [], losses, steps=2, **BUDGET, **where)
    with pytest.raises(ConfigError, match=r"torch\.nn\.Module"):
        fit(make_items, items(), losses, steps=2, **BUDGET, **where)
