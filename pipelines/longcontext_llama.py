"""Long texts with a decoder of the Llama family: DP-SGD with randomized clipping, whose norms cost
time linear in the length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.storage import Json
from grape_ray.tasks.text_classification import TextClassification
from grape_ray.tasks.text_generation import TextGeneration
from pipelines.parts import tiny_data
from pipelines.parts.reading import Reading

_TINY = (
    "scratch:llama?vocab_size=%d&hidden_size=64&intermediate_size=128&num_hidden_layers=2"
    "&num_attention_heads=4&num_key_value_heads=2"
)
_ARXIV = "hf://datasets/ccdv/arxiv-summarization/document/%s-*.parquet"
_CLASSES = "hf://datasets/ccdv/arxiv-classification@~parquet/no_ref/%s/*.parquet"
_ARTICLES: Json = {"data": _ARXIV % "train", "validation": _ARXIV % "validation"}

_LEARNED: dict[str, tuple[type, Json]] = {
    "texts": (TextGeneration, {**_ARTICLES, "text_column": "article"}),
    "summaries": (
        TextGeneration,
        {**_ARTICLES, "prompt_column": "article", "text_column": "abstract"},
    ),
    "answers": (Reading, {"data": "rajpurkar/squad", "validation": "validation"}),
    "classes": (
        TextClassification,
        {"data": _CLASSES % "train", "validation": _CLASSES % "validation", "text_column": "text"},
    ),
}


def longcontext_llama(
    size: Literal["1b", "tiny"] = "1b",
    learned: Literal["texts", "summaries", "answers", "classes"] = "texts",
) -> Config:
    """Llama-3.2-1B at 4,096 tokens and epsilon 2: the setting of the DP-SGD-RC paper (arXiv
    2605.24879), 32 secret probes a layer.

    Wide layers and long texts make exact norms dear: the Gram trick takes T^2 products and an
    instantiated gradient the size of the weight for each example. A text is one example, so the
    guarantee is for a whole document. Your own model and data:
    `--set task.model=FOLDER --set task.data=FILE --set task.validation=FILE`.

    Args:
        size: `1b`, or `tiny`: 400 bytes of generated texts and random weights in a minute.
        learned: `texts`, articles of arXiv; `summaries`, their abstracts after them; `classes`,
            their fields by a head on the last token; `answers` to questions about a passage, of
            SQuAD, whose passages are short (longer ones are yours: columns `context`, `question`
            and `answers`).
    """
    kind, columns = _LEARNED[learned]
    config = Config(
        task=kind(
            name="longcontext-llama",
            model="meta-llama/Llama-3.2-1B",
            max_tokens=4096,
            validation_limit=256,
            **columns,
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
    return config if size == "1b" else _tiny(config)


def _tiny(config: Config) -> Config:
    """The same of generated texts; every number is ours."""
    task = config.task
    model = _TINY % 259  # bytes, and three marks
    changes: Json = {"tokenizer": "bytes", "max_new_tokens": 12}
    if isinstance(task, Reading):
        columns = {"passage": "context", "question": "question"}
        train, validation = tiny_data.questions(columns, task.answers)
    elif isinstance(task, TextClassification):
        train, validation = tiny_data.classified([task.text_column], task.label_column, 2)
        model, changes = _TINY % 261, {}  # whose own tokenizer has two more
    else:
        columns = [name for name in (task.prompt_column, task.text_column) if name]
        train, validation = tiny_data.articles(columns, words=80 // len(columns))
    return replace(
        config,
        task=replace(
            task, name="longcontext-tiny", model=model, data=train, validation=validation,
            max_tokens=400, public=True, **changes,
        ),
        privacy=replace(
            config.privacy, epsilon=8.0, delta=1e-5, expected_batch_size=32, steps=20, spare_steps=0
        ),
        method=replace(config.method, learning_rate=3e-3, warmup_steps=0),
        performance=Performance(micro_batch_size=8, eval_every=10, threads_per_worker=1),
    )  # fmt: skip
