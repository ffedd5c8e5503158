"""The README's program runs as it stands."""

import re
import secrets
from pathlib import Path

import torch
from torch import nn

from grape_ray.ledger import Ledger, verify

README = Path(__file__).parents[1] / "README.md"


def programs():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def losses_of_shape_B(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def test_the_one_call_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    data = [{"x": torch.randn(8), "y": torch.tensor(number % 3)} for number in range(256)]
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    exec(programs()[0], {"model": model, "data": data, "losses_of_shape_B": losses_of_shape_B})
    assert 2.9 < float(capsys.readouterr().out.split()[0]) <= 3.0


def test_the_loop_of_ones_own_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = programs()[1]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    before = [p.detach().clone() for p in model.parameters()]

    def poisson_batch():
        size = int(torch.randint(0, 9, ()))
        return {"x": torch.randn(size, 64), "y": torch.randint(3, (size,))}

    names = {"model": model, "poisson_batch": poisson_batch, "secrets": secrets}
    exec(program, {**names, "losses_of_shape_B": losses_of_shape_B})
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert Ledger.open("ledger").state.study("first").used == 100
    assert verify("ledger").ok
