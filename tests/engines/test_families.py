"""Hugging Face's families as they are, under every method, against one backward pass an example;
writes docs/models.md when asked.
"""

import os
import pathlib

import pytest
import torch

from grape_ray import make_engine
from grape_ray.config.methods import METHODS
from tests.support import zoo
from tests.support.methods import GRADIENT
from tests.support.oracle import example_gradients, expected, median_norm, norm_of, worst

_CELLS: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="module", autouse=True)
def matrix():
    """`GRAPE_RAY_WRITE_DOCS=1 pytest tests/engines/test_families.py` rewrites the matrix from
    what the tests found.
    """
    yield
    if os.environ.get("GRAPE_RAY_WRITE_DOCS"):
        _write(pathlib.Path(__file__).parents[2] / "docs" / "models.md")


def _write(path):
    methods = [m for m in METHODS if m in {*GRADIENT, "randomized"}]
    lines = [
        "# Models and methods",
        "",
        (
            "Each cell is the largest difference of the clipped sum from one ordinary backward pass"
            " an example, in float64 and relative to"
        ),
        (
            "the largest entry, on today's transformers and the unpatched model. For `randomized`"
            " the reference takes the factors that its"
        ),
        "estimates gave. Made by",
        "`GRAPE_RAY_WRITE_DOCS=1 pytest tests/engines/test_families.py`.",
        "",
        "| family | " + " | ".join(f"`{m}`" for m in methods) + " |",
        "|---" * (len(methods) + 1) + "|",
    ]
    lines += [
        f"| {family} | " + " | ".join(_CELLS.get((family, m), "not run") for m in methods) + " |"
        for family in zoo.FAMILIES
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_is_right_under_every_method(family):
    model, loss, make_batch = zoo.build_family(family)
    clip = median_norm(model, loss, make_batch(), zoo.ROWS)
    for method in GRADIENT:
        engine = make_engine(model, method, clip, key=b"f", rank=3, project_min_numel=100)
        worst_error = 0.0
        for batch in (
            make_batch(),
            make_batch(rows=zoo.LENGTH, length=zoo.LENGTH, seed=1, padded=False),
            make_batch(rows=1),
        ):
            rows = len(batch["labels"])
            got = engine.clipped_sum(loss, batch).tensors
            worst_error = max(worst_error, worst(got, expected(engine, loss, batch, rows)))
        _CELLS[family, method] = f"{worst_error:.0e}"
        assert worst_error < 1e-9, method


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_is_right_under_randomized_clipping(family, monkeypatch):
    """The sum must be that of each example's own gradient, weighted by the factor that its estimate
    gave.
    """
    model, loss, make_batch = zoo.build_family(family)
    clip = median_norm(model, loss, make_batch(), zoo.ROWS)
    engine = make_engine(model, "randomized", clip, probes=4, routes=("*weight:sketch",))
    used = []
    own = engine._factors

    def remember(*args):
        weights, norms = own(*args)
        used.append(next(iter(weights.values())))
        return weights, norms

    monkeypatch.setattr(engine, "_factors", remember)
    got = engine.clipped_sum(loss, make_batch()).tensors
    grads = example_gradients(model, loss, make_batch(), zoo.ROWS)
    want = {name: sum(float(f) * g[name] for f, g in zip(used[0], grads)) for name in got}
    _CELLS[family, "randomized"] = f"{worst(got, want):.0e}"
    assert worst(got, want) < 1e-6
    exact = torch.tensor([min(1.0, clip / norm_of(g)) for g in grads])
    assert not torch.allclose(used[0].float(), exact)  # the estimate was used
    assert torch.allclose(used[0].float().log(), exact.log(), atol=1.5)


@pytest.mark.parametrize("family", ["BERT", "OPT (tied)", "Llama"])
@pytest.mark.parametrize("method", GRADIENT)
def test_activation_checkpointing_and_autocast(family, method):
    model, loss, make_batch = zoo.build_family(family)
    model.float()
    batch = make_batch()
    engine = make_engine(model, method, 0.5, key=b"f", rank=3, project_min_numel=100)
    plain = engine.clipped_sum(loss, batch).tensors
    with torch.autocast("cpu", torch.bfloat16):
        half = engine.clipped_sum(loss, batch).tensors
    assert worst(half, plain) < 0.1  # bfloat16 keeps eight bits
    model.train()  # Hugging Face checkpoints in training mode alone
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert worst(engine.clipped_sum(loss, batch).tensors, plain) < 1e-5


def test_the_model_object_stays_the_users():
    model, loss, make_batch = zoo.build_family("GPT-2 (tied)")
    before = type(model), model.lm_head.weight is model.transformer.wte.weight
    make_engine(model, "grape", 1.0, rank=3).clipped_sum(loss, make_batch())
    assert (type(model), model.lm_head.weight is model.transformer.wte.weight) == before
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
