"""Frozen weights in four bits (NF4 of Dettmers et al. 2023, "QLoRA"), through bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from grape_ray.models.extras import needed
from grape_ray.storage import Json

CLASSIFIERS = ("classifier", "score")  # the names that a head of labels has
COMPUTE = torch.bfloat16  # of products with such weights, and of all that is not quantised


def check_available() -> None:
    """Raises ConfigError where bitsandbytes is not installed."""
    _bitsandbytes()


def loading_options(classifies: bool) -> Json:
    """What `from_pretrained` is told: linear layers but the head in NF4, their scales quantised
    again. On the CPU, so that weights are the same bits on whatever device they train.

    Args:
        classifies: whether the head is a classifier's, which transformers does not know as one.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    check_available()
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=COMPUTE,
        llm_int8_skip_modules=list(CLASSIFIERS) if classifies else None,  # in spite of its name
    )
    return {"quantization_config": config, "device_map": {"": "cpu"}, "dtype": COMPUTE}


def settle(model: Any) -> None:
    """Does at once what bitsandbytes would do to a layer in its first forward pass, because a pass
    may change nothing: biases in the type of the product, and the layout of weights as it is.
    """
    nn = _bitsandbytes().nn
    for module in model.modules():
        if isinstance(module, nn.Linear4bit):
            if not isinstance(module.weight, nn.Params4bit):  # drawn, because the files lack it
                drawn = nn.Params4bit(module.weight.data, False, quant_type="nf4", module=module)
                module.weight = drawn.to("cpu")
            if module.bias is not None:
                module.bias.data = module.bias.data.to(COMPUTE)
            module.support_avx512bf16_for_cpu = False


def _bitsandbytes() -> Any:
    return needed("bitsandbytes", "task.weights=nf4", "quantized", "set task.weights=bf16")
