"""The small convolutional network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification

from grape_ray.engines import make_engine
from grape_ray.models.from_scratch import scratch_config


def _drawn(words: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(scratch_config(f"scratch:conv_net{words}"))


@pytest.mark.parametrize("size", [14, 28, 32])
def test_it_takes_images_of_its_size(size):
    model = _drawn(f"?image_size={size}&filters=[4,8]&num_labels=3")
    assert model(pixel_values=torch.zeros(2, 3, size, size)).logits.shape == (2, 3)


def test_the_auto_classes_load_it_as_it_was(tmp_path):
    model = _drawn("?filters=[4,8]")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_its_gradients_are_clipped_one_by_one():
    model = _drawn("?filters=[4,8]")
    engine = make_engine(model, "grape", 0.5, rank=4, project_min_numel=512, key=b"public")
    batch = {"pixels": torch.randn(6, 3, 28, 28), "labels": torch.tensor([0, 1, 0, 1, 1, 0])}

    def loss(model, batch):
        logits = model(pixel_values=batch["pixels"]).logits
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    whole = engine.clipped_sum(loss, batch, step=0).tensors
    for name, total in whole.items():
        parts = [
            engine.clipped_sum(loss, {k: v[i : i + 1] for k, v in batch.items()}, step=0).tensors
            for i in range(6)
        ]
        torch.testing.assert_close(sum(part[name] for part in parts), total)
