"""OPT on prompts and answers, its weights sharded over all workers: the multi-node run."""

from __future__ import annotations

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.tasks.text_generation import TextGeneration


def opt() -> Config:
    """OPT-6.7B on pairs of a meaning and a sentence (E2E NLG), epsilon 6, rank 64. Batches and
    steps are ours; the paper's own tasks are those of `pipelines.opt_tasks`.

    The loss is over the answer's tokens alone and an example is clipped whole, never a token. Any
    size from 125M to 66B goes by its hub name or folder, with the paper's ranks 16, 32 and 64 for
    1.3B, 2.7B and 6.7B; your own pairs by two columns of a Parquet file:
    `--set task.model=facebook/opt-1.3b --set method.rank=16 --set task.data=FILE --set
    task.prompt_column=question --set task.text_column=answer`.
    """
    return Config(
        task=TextGeneration(
            name="opt",
            model="facebook/opt-6.7b",
            data="hf://datasets/tuetschek/e2e_nlg@~parquet/default/train/*.parquet",
            validation="hf://datasets/tuetschek/e2e_nlg@~parquet/default/validation/*.parquet",
            prompt_column="meaning_representation",
            text_column="human_reference",
            max_tokens=256,
            validation_limit=512,
        ),
        privacy=Privacy(epsilon=6.0, delta=1e-5, expected_batch_size=256, steps=1000,
        spare_steps=100, clip_norm=1.0),
        method=Method(name="grape", rank=64, learning_rate=1e-4, warmup_steps=20,
        schedule="linear"), performance=Performance(
            num_workers=8, use_gpu=True, sharded=True, precision="bf16", recompute=True,
            micro_batch_size=8, checkpoint_every=50, eval_every=100, max_failures=20,
        ),
    )  # fmt: skip
