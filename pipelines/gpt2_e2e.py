"""Sentences about restaurants (E2E NLG) with GPT-2: the setting of Li et al. 2022, "Large Language
Models Can Be Strong Differentially Private Learners".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.tasks.text_generation import TextGeneration
from pipelines.parts import tiny_data

_RECORDS = 42_061
_PLACE = "hf://datasets/tuetschek/e2e_nlg@~parquet/default"
_SMALL = "scratch:gpt2?vocab_size=259&n_embd=256&n_layer=4&n_head=4&n_positions=512"
_TINY = "scratch:gpt2?vocab_size=259&n_embd=64&n_layer=2&n_head=4&n_positions=160"


def gpt2_e2e(size: Literal["base", "medium", "large", "small", "tiny"] = "base") -> Config:
    """All weights of GPT-2 on pairs of a meaning and a sentence, epsilon 8.

    The paper's: DP-Adam in full (here by book-keeping, which releases the same), 10 epochs of
    batches of 1,024 (410 steps), rate 2e-3 without decay, clip norm 0.1, delta 8e-6, epsilon 8 (or
    3: `privacy.epsilon=3`), 100 tokens. Ours: spare steps. `method.name=grape` trains the same in
    rank 16. BLEU and ROUGE-L: `task.evaluate_generations=200`.

    Args:
        size: `base`, `medium` or `large` of GPT-2; `small`, a GPT of 4 layers of 256 from scratch
            that reads bytes, in 200 steps of 256 with clip norm 1 (all ours), for your own pairs
            with `task.data`, `task.validation`, `task.prompt_column` and `task.text_column`;
            `tiny`, generated pairs in a minute.
    """
    base = Config(
        task=TextGeneration(
            name="gpt2-e2e",
            model="openai-community/gpt2" + ("" if size == "base" else f"-{size}"),
            data=f"{_PLACE}/train/*.parquet",
            validation=f"{_PLACE}/validation/*.parquet",
            prompt_column="meaning_representation",
            text_column="human_reference",
            max_tokens=100,
            validation_limit=512,
        ),
        privacy=Privacy(
            epsilon=8.0,
            delta=8e-6,
            expected_batch_size=1024,
            steps=10 * _RECORDS // 1024,
            spare_steps=25,
            clip_norm=0.1,
        ),
        method=Method(name="bookkeeping", learning_rate=2e-3),
        performance=Performance(
            num_workers=1, use_gpu=True, micro_batch_size=64, checkpoint_every=50, eval_every=50
        ),
    )
    if size == "small":
        return replace(
            base,
            task=replace(
                base.task, name="gpt-e2e", model=_SMALL, tokenizer="bytes", max_tokens=512,
                validation_limit=256,
            ),
            privacy=replace(base.privacy, expected_batch_size=256, steps=200, clip_norm=1.0),
            performance=Performance(
                micro_batch_size=32, checkpoint_every=50, eval_every=50, threads_per_worker=1
            ),
        )  # fmt: skip
    return _tiny(base) if size == "tiny" else base


def _tiny(base: Config) -> Config:
    """Generated pairs; every number is ours."""
    train, validation = tiny_data.restaurants()
    return replace(
        base,
        task=replace(
            base.task, name="gpt-tiny", model=_TINY, data=train, validation=validation,
            tokenizer="bytes", max_tokens=160, max_new_tokens=60, public=True,
        ),
        privacy=Privacy(epsilon=8.0, delta=1e-5, expected_batch_size=64, steps=80),
        method=Method(
            name="bookkeeping", rank=16, learning_rate=2e-3, project_min_numel=1024
        ),
        performance=Performance(micro_batch_size=32, eval_every=40, threads_per_worker=1),
    )  # fmt: skip
