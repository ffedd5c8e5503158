"""The pipelines of papers: their settings at every size and dataset without a network, and a few
steps of each at `size=tiny`.
"""

import fnmatch
import inspect
import itertools
import typing
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from grape_ray.cli.main import main
from grape_ray.config.description import describe_task, rebuild_task
from grape_ray.config.fields import fields_of
from grape_ray.config.pipelines import _in_module, pipeline, pipeline_parameters
from grape_ray.tasks.task import loaded, resolved

NAMES = ["vit_cifar10", "roberta_glue", "opt_tasks", "gpt2_e2e", "longcontext_llama", "conv_images"]
TINY = [
    ("vit_cifar10", ()), ("roberta_glue", ("dataset=snli",)),
    ("roberta_glue", ("dataset=trec", "paper=true")),
    ("opt_tasks", ("dataset=boolq", "paper=true")), ("opt_tasks", ("dataset=drop",)),
    ("gpt2_e2e", ()),
    ("longcontext_llama", ("learned=texts",)), ("longcontext_llama", ("learned=summaries",)),
    ("longcontext_llama", ("learned=answers",)), ("longcontext_llama", ("learned=classes",)),
]  # fmt: skip


def choices(name):
    """All combinations of the values that a pipeline's parameters list."""
    function = _in_module(f"pipelines.{name}")
    hints = typing.get_type_hints(function)
    values = {
        p: typing.get_args(hints[p]) if typing.get_origin(hints[p]) is typing.Literal
        else ("true", "false") if hints[p] is bool else ("512", "0")
        for p in inspect.signature(function).parameters
    }  # fmt: skip
    for combination in itertools.product(*values.values()):
        yield [f"{key}={value}" for key, value in zip(values, combination)]


@pytest.mark.parametrize("name", NAMES)
def test_every_combination_is_a_config_whose_fields_have_a_meaning(name):
    assert all(info.meaning for info in pipeline_parameters(f"pipelines.{name}"))
    for words in choices(name):
        config = pipeline(f"pipelines.{name}", words)
        assert rebuild_task(describe_task(config.task)) == config.task
        config.task.check_fields()
        assert config.task.data
        unsaid = [info.key for info in fields_of(config) if not info.meaning]
        assert set(unsaid) <= {"task.name"}, words
        assert config.method.refresh in (None, *((100, 250) if "paper=true" in words else ()))
        if "size=tiny" in words:
            assert config.task.public
            assert config.task.model.startswith("scratch:")
            assert Path(config.task.data).is_file()


@pytest.mark.parametrize(
    ("name", "words", "fields"),
    [  # (steps, batch, rate, rank) as the papers have them
        ("vit_cifar10", [], (1000, 1000, 1e-3, 64)),
        ("vit_cifar10", ["pretrained=false"], (3000, 1000, 1e-3, 64)),
        ("vit_cifar10", ["dataset=mnist"], (1200, 1000, 1e-3, 64)),
        ("roberta_glue", ["dataset=mnli"], (1000, 64, 5e-4, 16)),
        ("roberta_glue", ["shots=0"], (202, 1000, 5e-4, 16)),
        ("opt_tasks", [], (2000, 8, 1e-4, 16)),
        ("opt_tasks", ["size=2.7b", "dataset=squad"], (2000, 8, 1e-4, 32)),
        ("opt_tasks", ["size=6.7b", "dataset=drop"], (2000, 8, 1e-4, 64)),
        ("gpt2_e2e", [], (410, 1024, 2e-3, 16)),
    ],
)
def test_the_papers_settings(name, words, fields):
    config = pipeline(f"pipelines.{name}", words)
    privacy, method = config.privacy, config.method
    found = (privacy.steps, privacy.expected_batch_size, method.learning_rate, method.rank)
    assert found == fields
    assert (method.refresh, method.moments, method.side) == (None, "reset", "in")


@pytest.mark.parametrize(
    ("name", "refresh"), [("vit_cifar10", 250), ("roberta_glue", 100), ("opt_tasks", 100)]
)
def test_the_papers_projections_are_taken_at_a_word(name, refresh):
    method = pipeline(f"pipelines.{name}", ["paper=true"]).method
    assert (method.refresh, method.moments, method.side) == (refresh, "keep", "smaller")


@pytest.mark.parametrize(("name", "words"), TINY)
def test_a_tiny_one_has_records_a_model_and_a_loss_of_each_example(name, words, tmp_path):
    config = pipeline(f"pipelines.{name}", ["size=tiny", *words])
    data = loaded(config.task, "")
    task = resolved(config.task, data)
    assert len(data.train) > config.privacy.expected_batch_size
    model = task.build_model(0)
    names = [parameter for parameter, _ in model.named_parameters()]
    assert all(fnmatch.filter(names, pattern) for pattern in config.method.dense)
    indices = torch.arange(4).numpy()
    losses = task.per_example_loss(model, task.collate(data.train, indices))
    assert losses.shape == (4,)
    assert torch.isfinite(losses).all()
    task.save(model, tmp_path / "out")
    answers = task.predict(model, data.validation.take(indices[:2]))
    assert all(len(column) == 2 for column in answers.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), TINY)
def test_a_tiny_one_trains_exports_and_is_resumed(name, words, tmp_path):
    def call(*options):
        ran = CliRunner().invoke(main, [str(option) for option in options])
        assert ran.exit_code == 0, ran.output
        return ran.output

    sets = [f"--set={word}" for word in ("size=tiny", *words, "privacy.steps=4")]
    storage = ["--storage", tmp_path / "runs", "--key-file", tmp_path / "key"]
    call("train", f"pipelines.{name}", *sets, *storage, "--run", "r")
    assert "4 steps" in call("resume", tmp_path / "runs" / "r", "--key-file", tmp_path / "key")
    call("export", tmp_path / "runs" / "r", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
