"""One private step of a large model at its true size, beside what `grape-ray plan` says of it.

The architecture is OPT's, with random weights in bfloat16; each block's input alone is kept for the
backward pass. `python -m grape_ray.bench.large` measures in a process of its own, whose resident
peak is the figure: building the model, its step and the library are all in it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grape_ray.bench.candidates import CANDIDATES, PrivateStep
from grape_ray.bench.memory import status_bytes
from grape_ray.bench.paid import NOISE_MULTIPLIER
from grape_ray.config.schema import Config, Method, Performance
from grape_ray.distributed import sharding
from grape_ray.errors import ConfigError, GrapeRayError, nearest
from grape_ray.models.hugging_face import load_language_model
from grape_ray.models.sample import made_up_batch, sample_loss
from grape_ray.privacy.types import ClippedSum
from grape_ray.storage import Json
from grape_ray.training.memory_plan import MemoryPlanner

_VOCABULARY = 50272
# width, blocks, heads; Zhang et al. 2022, table 1
SHAPES = {
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-2.7b": (2560, 32, 32),
    "opt-6.7b": (4096, 32, 32),
    "opt-tiny": (64, 2, 2),
}


@dataclass(frozen=True)
class Large:
    """What is measured; as a task, the model that a plan is made of.

    Attributes:
        model: a row of SHAPES. rows, max_tokens: B and T of the batch.
    """

    model: str
    method: str
    rank: int
    rows: int
    max_tokens: int

    name = "large"

    def build_model(self, seed: int) -> nn.Module:
        """OPT with a language-modelling head, bfloat16, random weights."""
        return load_language_model(opt_of(self.model), seed, weights="bf16")


def opt_of(model: str) -> str:
    """What `task.model` says of a row of SHAPES at random weights. Raises ConfigError: no row."""
    if model not in SHAPES:
        raise ConfigError("--model", model, "one of " + ", ".join(SHAPES), nearest(model, SHAPES))
    width, blocks, heads = SHAPES[model]
    shape = {
        "hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width,
        "num_hidden_layers": blocks, "num_attention_heads": heads, "vocab_size": _VOCABULARY,
        "max_position_embeddings": 2048, "dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return "scratch:opt?" + "&".join(f"{field}={value}" for field, value in shape.items())


def planned(case: Large) -> Json:
    """`planned_bytes` and `planned_by_category`."""
    performance = Performance(micro_batch_size=case.rows, recompute=True)
    method = Method(name=case.method, rank=case.rank)
    found = MemoryPlanner(Config(case, method=method, performance=performance), "cpu").plan(
        case.method
    )
    return {"planned_bytes": found.peak_bytes, "planned_by_category": dict(found.by_category)}


def measured(case: Large) -> Json:
    """The step's figures, from a process of its own.

    Raises:
        GrapeRayError: that process failed, as it does where there is too little memory.
    """
    command = [sys.executable, "-m", "grape_ray.bench.large", json.dumps(dataclasses.asdict(case))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        reason = ended.stderr.strip().rpartition("\n")[2]
        raise GrapeRayError(f"a step of {case.model}", f"status {ended.returncode}", "0", reason)
    return json.loads(ended.stdout.strip().rpartition("\n")[2])


def _measure(case: Large) -> Json:
    library = status_bytes("VmRSS")
    model = case.build_model(0)
    weights = sum(p.nbytes for p in model.parameters())
    built = status_bytes("VmHWM")
    sharding.recompute_blocks(model)
    batch = made_up_batch(model, case.rows, case.max_tokens)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return sample_loss(model, dict(batch))

    step = CANDIDATES[case.method].make(model, loss, batch, case.rank)
    assert isinstance(step, PrivateStep)
    seconds, begun = {}, time.perf_counter()

    def lap(part: str) -> None:
        nonlocal begun
        now = time.perf_counter()
        seconds[part], begun = now - begun, now

    summed: ClippedSum = step.engine.clipped_sum(loss, batch)
    losses = summed.unprotected["losses"]
    lap("clipped_sum_s")
    released = step.privatize(summed, step.stream, grant=step.grant, expected_batch_size=case.rows)
    lap("noise_s")
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in released.tensors.values()))
    begun = time.perf_counter()
    step.optimizer.step(released)
    lap("update_s")
    return {
        "weights_bytes": weights,
        "library_bytes": library,
        "built_bytes": built,
        "peak_bytes": status_bytes("VmHWM"),
        "loss": float(losses.mean()),
        "released_norm": norm,
        # what the noise alone has: the clipped sum adds at most a row's clip norm
        "noise_norm": NOISE_MULTIPLIER / case.rows * math.sqrt(step.engine.coordinates),
        **seconds,
        "step_s": sum(seconds.values()),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(_measure(Large(**json.loads(sys.argv[1])))))
