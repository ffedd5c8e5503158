"""Long texts with a decoder of the Llama family: DP-SGD with randomized clipping, whose norms cost
time linear in the length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.tasks.text_generation import TextGeneration
from pipelines.parts import tiny_data

_TINY = (
    "scratch:llama?vocab_size=259&hidden_size=64&intermediate_size=128&num_hidden_layers=2"
    "&num_attention_heads=4&num_key_value_heads=2"
)


def longcontext_llama(size: Literal["1b", "tiny"] = "1b") -> Config:
    """Llama-3.2-1B at 4,096 tokens and epsilon 2: the setting of the DP-SGD-RC paper (arXiv
    2605.24879), 32 secret probes a layer.

    Wide layers and long texts make exact norms dear: the Gram trick takes T^2 products and an
    instantiated gradient the size of the weight for each example. A text is one example, so the
    guarantee is for a whole document. Your own model and data:
    `--set task.model=FOLDER --set task.data=FILE --set task.validation=FILE`.

    Args:
        size: `1b`, or `tiny`: 400 bytes of generated texts and random weights in a minute.
    """
    config = Config(
        task=TextGeneration(
            name="longcontext-llama",
            model="meta-llama/Llama-3.2-1B",
            data="hf://datasets/ccdv/arxiv-summarization/document/train-*.parquet",
            validation="hf://datasets/ccdv/arxiv-summarization/document/validation-*.parquet",
            text_column="article",
            max_tokens=4096,
            validation_limit=256,
        ),
        privacy=Privacy(
            epsilon=2.0,
            delta=1e-6,
            expected_batch_size=128,
            steps=500,
            spare_steps=50,
            clip_norm=1.0,
            probes=32,
        ),
        method=Method(name="randomized", learning_rate=1e-4, warmup_steps=20, schedule="linear"),
        performance=Performance(
            num_workers=8, use_gpu=True, micro_batch_size=2, checkpoint_every=50, eval_every=100
        ),
    )
    if size == "1b":
        return config
    train, validation = tiny_data.articles("article", words=80)
    return replace(  # every number is ours
        config,
        task=replace(
            config.task, name="longcontext-tiny", model=_TINY, data=train, validation=validation,
            tokenizer="bytes", max_tokens=400, public=True,
        ),
        privacy=replace(
            config.privacy, epsilon=8.0, delta=1e-5, expected_batch_size=32, steps=20, spare_steps=0
        ),
        method=replace(config.method, learning_rate=3e-3, warmup_steps=0),
        performance=Performance(micro_batch_size=8, eval_every=10, threads_per_worker=1),
    )  # fmt: skip
