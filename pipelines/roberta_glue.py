"""RoBERTa-Large on six classification tasks by prompts: the DP-GRAPE paper's second experiment
(arXiv 2506.15588), on 512 examples a class or on whole training sets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.storage import Json
from grape_ray.tasks.prompt_classification import PromptClassification
from pipelines.parts import tiny_data
from pipelines.parts.dp_grape import paper_projections

_TINY = (
    "scratch:roberta?vocab_size=261&hidden_size=64&num_hidden_layers=2&num_attention_heads=4"
    "&intermediate_size=128&max_position_embeddings=130"
)
_TINY_WORDS = ("a", "b", "c", "d", "e", "f")  # of bytes, a token is one letter
_SENTIMENT, _PAIR = "{%s} It was {mask}.", "{%s}? {mask}, {%s}"
_ENTAILMENT = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}


@dataclass(frozen=True)
class _Prompted:
    """A dataset on the hub and its prompt.

    Attributes:
        fields: of the task: where the records are. template: as `task.template`. words: the label
            word of each label. count: training records. label: the column of labels.
    """

    fields: Json
    template: str
    words: dict[str, str]
    count: int
    label: str = "label"


def _glue(config: str, validation: str = "validation") -> Json:
    return {"data": "nyu-mll/glue", "data_config": config, "validation": validation}


def _trec(split: str) -> str:
    return f"hf://datasets/CogComp/trec@~parquet/default/{split}/*.parquet"


# Templates and words are LM-BFF's (Gao et al. 2021), but that theirs also strip the first
# sentence's last mark and lower the second one's first letter. Labels are in the hub's order.
_DATASETS = {
    "sst2": _Prompted(
        _glue("sst2"),
        _SENTIMENT % "sentence",
        {"negative": "terrible", "positive": "great"},
        67_349,
    ),
    "sst5": _Prompted(
        {"data": "SetFit/sst5", "validation": "validation"},
        _SENTIMENT % "text",
        dict(zip("01234", ("terrible", "bad", "okay", "good", "great"))),
        8_544,
    ),
    "snli": _Prompted(
        # some pairs have no label
        {"data": "stanfordnlp/snli", "validation": "validation", "drop_bad_rows": True},
        _PAIR % ("premise", "hypothesis"),
        _ENTAILMENT,
        549_367,
    ),
    "mnli": _Prompted(
        _glue("mnli", "validation_matched"),
        _PAIR % ("premise", "hypothesis"),
        _ENTAILMENT,
        392_702,
    ),
    "rte": _Prompted(
        _glue("rte"),
        _PAIR % ("sentence1", "sentence2"),
        {"entailment": "Yes", "not_entailment": "No"},
        2_490,
    ),
    "trec": _Prompted(
        {"data": _trec("train"), "validation": _trec("test")},
        " {mask}: {text}",
        {
            "ABBR": "Expression", "ENTY": "Entity", "DESC": "Description", "HUM": "Human",
            "LOC": "Location", "NUM": "Number",
        },
        5_452,
        label="coarse_label",
    ),
}  # fmt: skip


def roberta_glue(
    size: Literal["large", "base", "tiny"] = "large",
    dataset: Literal["sst2", "sst5", "snli", "mnli", "rte", "trec"] = "sst2",
    shots: int = 512,
    paper: bool = False,
) -> Config:
    """RoBERTa-Large with 512 examples a class, or with all, epsilon 6.

    The paper's, with 512 a class: 1,000 steps of 64, rank 16, rate 5e-4, delta 1e-5, epsilon 6 (of
    2 and 6), clip norm 1 (of 0.1 to 20; the choice is ours). Ours: 1,000 validation records, and
    new projections at every step. Whole sets (`shots=0`) are not in the paper: SST-2 is trained as
    Li et al. 2022 do it with DP-Adam (3 epochs of batches of 1,000, rate 5e-4, clip norm 0.1, delta
    of half of one over the number of records), at epsilon 6; the other sets in the same way, but in
    at least 200 steps of at most a fifth of the records (ours).

    Args:
        size: `large`; `base`, which no paper has here; `tiny`, generated texts and random weights.
        dataset: of the hub; `tiny` generates texts in its columns, with as many labels.
        shots: examples a class; the first so many rows of the set, whatever their labels, unless
            `task.data` names a balanced draw, as `pipelines.parts.few_shots` writes it. 0 takes the
            whole set.
        paper: whether projections are the paper's: of the smaller side, new at every 100th step,
            moments kept, embeddings and head not projected.
    """
    prompted = _DATASETS[dataset]
    config = Config(
        task=PromptClassification(
            name=f"roberta-{dataset}",
            model=f"FacebookAI/roberta-{'base' if size == 'base' else 'large'}",
            template=prompted.template,
            labels=tuple(prompted.words),
            label_words=tuple(prompted.words.values()),
            label_column=prompted.label,
            limit=shots * len(prompted.words),
            validation_limit=1000,
            **prompted.fields,
        ),
        privacy=_privacy(prompted.count, shots),
        method=Method(
            name="grape",
            rank=16,
            learning_rate=5e-4,
            dense=("*embeddings*", "lm_head.*") if paper else (),
            **paper_projections(paper, 100),
        ),
        performance=Performance(
            num_workers=1, use_gpu=True, micro_batch_size=32, checkpoint_every=100, eval_every=100
        ),
    )
    return _tiny(config, prompted) if size == "tiny" else config


def _privacy(count: int, shots: int) -> Privacy:
    if shots:
        return Privacy(
            epsilon=6.0, delta=1e-5, expected_batch_size=64, steps=1000, spare_steps=50,
            clip_norm=1.0,
        )  # fmt: skip
    return Privacy(
        epsilon=6.0, delta=0.5 / count, expected_batch_size=min(1000, count // 5),
        steps=max(200, 3 * count // 1000), spare_steps=50, clip_norm=0.1,
    )  # fmt: skip


def _tiny(config: Config, prompted: _Prompted) -> Config:
    """The same prompt about generated texts; every number is ours."""
    task: PromptClassification = config.task
    labels = len(task.labels)
    train, validation = tiny_data.classified(task.input_columns.named, task.label_column, labels)
    return replace(
        config,
        task=replace(
            task, model=_TINY, data=train, data_config="", validation=validation, limit=0,
            label_words=_TINY_WORDS[:labels], public=True,
        ),
        privacy=Privacy(epsilon=8.0, delta=1e-5, expected_batch_size=128, steps=100),
        method=replace(config.method, learning_rate=3e-3, project_min_numel=1024),
        performance=Performance(micro_batch_size=64, eval_every=50, threads_per_worker=1),
    )  # fmt: skip
