"""The preflight passes what is right and names what is wrong."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from grape_ray.cli.main import main
from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Method, Privacy
from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.errors import ConfigError, UnsupportedLayer
from grape_ray.training.preflight import preflight
from tests.support import zoo


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_a_real_model_passes_under_every_method(method, clipping):
    if method == "randomized" and clipping != "flat":
        pytest.skip("refused by name, see test_randomized")
    model, loss, make_batch = zoo.build_family("GPT-2 (tied)")
    model.float().train()
    report = preflight(
        model,
        loss,
        make_batch(),
        Privacy(clip_norm=0.5, clipping=clipping),
        Method(name=method, rank=3, project_min_numel=100),
    )
    assert model.training
    assert report.examples == 3
    assert report.worst < 1e-4
    assert report.tensors == len(list(model.parameters()))
    assert (report.coordinates < report.parameters) == (method in ("grape", "dp_zero"))


class Leaky(nn.Module):
    """Subtracts the mean over the batch: each example's loss depends on the others."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        out = self.inner(x)
        return (out - out.mean(0)).square().flatten(1).sum(1)


@pytest.mark.parametrize("method", ["grape", "ghost", "randomized"])
def test_a_model_that_mixes_examples_is_refused_by_name(method):
    with pytest.raises(UnsupportedLayer, match=r"'inner\."):
        preflight(
            Leaky(), zoo.layer_loss, {"x": torch.randn(4, 6, 5)}, Privacy(), Method(name=method)
        )


def test_a_tap_that_lost_a_use_is_found(monkeypatch):
    model, loss, make_batch = zoo.build_family("GPT-2 (tied)")
    kept = CapturePass.dense

    def forgetful(self, node, grads):
        if node.root != "transformer.h.1.ln_1.bias":
            kept(self, node, grads)

    monkeypatch.setattr(CapturePass, "dense", forgetful)
    with pytest.raises(UnsupportedLayer, match=r"transformer\.h\.1\.ln_1\.bias"):
        preflight(model, loss, make_batch(), Privacy(clip_norm=1e3), Method(name="dp_adam"))


def test_a_clip_that_does_not_hold_is_found(monkeypatch):
    model, loss, make_batch = zoo.build_family("BERT")
    monkeypatch.setattr(
        "grape_ray.engines.engine.factors",
        lambda squared, *rest: {n: torch.ones_like(s) for n, s in squared.items()},
    )
    with pytest.raises(UnsupportedLayer):
        preflight(model, loss, make_batch(), Privacy(clip_norm=1e-3), Method(name="bookkeeping"))


def test_a_rank_above_a_side_is_told_before_training():
    model, loss, make_batch = zoo.build_family("BERT")
    with pytest.raises(ConfigError, match="rank"):
        preflight(model, loss, make_batch(), Privacy(), Method(rank=500, project_min_numel=100))


@pytest.fixture
def saved_model(tmp_path):
    model, _, _ = zoo.build_family("OPT (tied)")
    model.float().save_pretrained(tmp_path / "opt")
    return str(tmp_path / "opt")


def test_the_command_checks_a_folder_under_several_methods(saved_model):
    args = [
        "check",
        saved_model,
        "--method",
        "grape",
        "--method",
        "ghost",
        "--set",
        "method.rank=4",
        "--set",
        "method.project_min_numel=500",
    ]
    ran = CliRunner().invoke(main, [*args, "--json"])
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.output.splitlines()[-1])
    assert told["ok"]
    assert [r["method"] for r in told["reports"]] == ["grape", "ghost"]
    assert told["reports"][0]["projected"] > 8


def test_the_command_refuses_in_one_line(saved_model):
    for args in (
        ["check", saved_model, "--set", "method.rank=4000", "--set", "method.project_min_numel=9"],
        ["check", "./nowhere"],
    ):
        ran = CliRunner().invoke(main, args)
        assert ran.exit_code == 2
        assert len(ran.stderr.strip().splitlines()) == 1


def test_the_command_checks_a_pipeline():
    ran = CliRunner().invoke(main, ["check", "pipelines.digits_vit", "--method", "grape"])
    assert ran.exit_code == 0, ran.output
    assert "largest difference" in ran.output


@pytest.mark.parametrize("scale", [1e-7, 1.5e-6, 1.0])
def test_gradients_as_small_as_the_least_clip_norm_pass(scale):
    model = zoo.build_layer("Linear")

    def loss(model, batch):
        return scale * zoo.layer_loss(model, batch)

    report = preflight(model, loss, zoo.layer_batch(), Privacy(), Method(name="dp_adam"), b"k", 6)
    assert report.examples == 6
