"""How much memory, and how many operations, a step of each method takes, from shapes alone: the
model is built, and its step taken, on the meta device.

What is counted is every tensor of the step. What is not: the library itself, an allocator's waste,
kernels' scratch memory, the records, and noise, which is drawn by pieces of some MiB.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from grape_ray.config.schema import Config
from grape_ray.distributed import sharding
from grape_ray.engines import Engine
from grape_ray.engines.capture.tracked import Tracked
from grape_ray.engines.precision import assumed_autocast, autocast_dtype
from grape_ray.errors import ConfigError, GrapeRayError
from grape_ray.models.sample import made_up_batch, sample_loss
from grape_ray.optim import Optimizer, make_optimizer
from grape_ray.privacy.noise import nonprivate_mean
from grape_ray.training.build import build_engine, build_model
from grape_ray.training.live_bytes import LiveBytes
from grape_ray.training.roofline import DEVICES, Device, Roofline

META = torch.device("meta")
CATEGORIES = WEIGHTS, STATE, FORWARD, BACKWARD, UPDATE = (
    "weights",
    "optimizer state",
    "forward pass",
    "gradients and sums",
    "update",
)
_FEW, _MORE = 2, 4  # blocks that are counted of a deep model: the others add the same again


@dataclass(frozen=True)
class MethodPlan:
    """What one method takes.

    Attributes:
        method: its name. rows: of the micro-batch. peak_bytes: at once, of a step.
        by_category: the peak's parts, by what made them.
        reduced_bytes: that each rank gives to a reduction a step.
        checkpoint_bytes: of a full checkpoint. operations: of products, a micro-batch and the
            update. seconds: at least, of kernels alone (`roofline`).
        phases: of each phase of a step its peak, and what one row more adds to that.
    """

    method: str
    rows: int
    peak_bytes: int
    by_category: Mapping[str, int]
    reduced_bytes: int
    checkpoint_bytes: int
    operations: int
    seconds: float
    phases: Mapping[str, tuple[int, float]]

    @property
    def bytes_per_row(self) -> float:
        """What one row more adds, where rows are what decides."""
        return max(each for _, each in self.phases.values())

    def rows_within(self, memory_bytes: float) -> int:
        """How many rows a memory holds, if each adds what it adds at this size."""
        if any(not each and peak > memory_bytes for peak, each in self.phases.values()):
            return 0
        held = [
            self.rows + math.floor((memory_bytes - peak) / each)
            for peak, each in self.phases.values()
            if each
        ]
        return max(min(held), 0)


class MemoryPlanner:
    """Plans the methods of one model, on one worker that holds it whole.

    Args:
        config: of the run. device: `cpu` or `cuda`: some kernels differ. roof: what the device can
            do.

    Raises:
        ConfigError: no such model, it reads neither tokens nor pixels, or it cannot be built of
            shapes alone.
    """

    def __init__(self, config: Config, device: str, roof: Device = DEVICES["h100"]):
        self._config, self._roof = config, roof
        with META, _explained():
            self._model = build_model(config, device)
            made_up_batch(self._model, 1, self._tokens())
        stacks = sharding.stacks(self._model)
        self._depth = len(stacks[0]) if _alike(stacks) else 0
        if self._depth > _MORE:
            for stack in stacks:
                del stack[_MORE:]

    def _tokens(self) -> int:
        return getattr(self._config.task, "max_tokens", 0)

    def max_microbatch(self, found: MethodPlan, memory_bytes: float) -> int:
        """The largest micro-batch that fits into a memory, or a few rows less; 0 where none does.

        Args:
            found: a plan of the method.
        """
        rows = found.rows_within(memory_bytes)
        while rows:
            found = self.plan(found.method, rows)
            if found.peak_bytes <= memory_bytes:
                break
            rows = min(found.rows_within(memory_bytes), rows - 1)
        return rows

    def plan(self, method: str, rows: int | None = None) -> MethodPlan:
        """What a method takes.

        Args:
            rows: of a micro-batch; the config's own where there are none.

        Raises:
            GrapeRayError: one of its kinds: the method cannot train the model.
        """
        config = self._config.override([f"method.name={method}"])
        rows = rows or config.performance.micro_batch_size
        found, wider = self._counted(config, rows), self._counted(config, 2 * rows)
        parts = found.largest()
        return MethodPlan(
            method,
            rows,
            sum(parts.values()),
            parts,
            found.reduced_bytes,
            found.checkpoint_bytes,
            found.operations,
            found.seconds,
            {
                phase: (sum(held.values()), (sum(more.values()) - sum(held.values())) / rows)
                for phase, held, more in zip(
                    found.peaks, found.peaks.values(), wider.peaks.values()
                )
            },
        )

    def _counted(self, config: Config, rows: int) -> _Counted:
        if self._depth <= _MORE:
            return self._counted_of(config, rows, None)
        few, more = (self._counted_of(config, rows, blocks) for blocks in (_FEW, _MORE))
        return few.deeper(more, (self._depth - _FEW) / (_MORE - _FEW))

    def _counted_of(self, config: Config, rows: int, blocks: int | None) -> _Counted:
        """The figures of a step over so many rows, of a model cut to so many blocks a stack, or of
        all of it.
        """
        with META, _explained():
            model = copy.deepcopy(self._model)
            for stack in sharding.stacks(model) if blocks else ():
                del stack[blocks:]
            work = Roofline(self._roof)
            return _counted(config, model, made_up_batch(model, rows, self._tokens()), work)


def _alike(stacks: Sequence[nn.ModuleList]) -> bool:
    """Whether a model is as many equal blocks in each of its stacks."""
    shapes = [[[p.shape for p in block.parameters()] for block in stack] for stack in stacks]
    return bool(stacks) and all(
        len(stack) == len(shapes[0]) and all(block == stack[0] for block in stack)
        for stack in shapes
    )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What torch raises where an operation needs values becomes a ConfigError."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        if isinstance(error, GrapeRayError):
            raise
        reason = (str(error).splitlines() or [""])[0]
        expected, fix = "a step that is a function of shapes", "measure it: grape-ray bench methods"
        raise ConfigError("a model on the meta device", reason, expected, fix) from error


@dataclass(frozen=True)
class _Counted:
    """What was counted of a step: peaks as of `LiveBytes`, the bytes of a sum and a state, and the
    work of `Roofline`.
    """

    peaks: Mapping[str, Mapping[str, int]]
    reduced_bytes: int
    checkpoint_bytes: int
    operations: int
    seconds: float

    def deeper(self, other: _Counted, times: float) -> _Counted:
        """These figures, and `times` what `other`, of a deeper model, has more: each block adds the
        same to each part, so the largest part is not always that of a shallow model.
        """

        def grown(low: int, high: int) -> int:
            return round(low + (high - low) * times)

        peaks = {
            kind: {
                part: grown(self.peaks[kind].get(part, 0), parts.get(part, 0))
                for part in {**self.peaks[kind], **parts}
            }
            for kind, parts in other.peaks.items()
        }
        return _Counted(
            peaks,
            grown(self.reduced_bytes, other.reduced_bytes),
            grown(self.checkpoint_bytes, other.checkpoint_bytes),
            grown(self.operations, other.operations),
            self.seconds + (other.seconds - self.seconds) * times,
        )

    def largest(self) -> Mapping[str, int]:
        """The parts of the peak."""
        return max(self.peaks.values(), key=lambda parts: sum(parts.values()))


def _counted(
    config: Config, model: nn.Module, batch: dict[str, Tensor], work: Roofline
) -> _Counted:
    """The figures of one step on the meta device."""
    if config.performance.recompute:
        for block in sharding.blocks(model):  # what is made again has these kernels, too
            block.forward = _kernels(_half(config))(block.forward)
        sharding.recompute_blocks(model)
    live, held = LiveBytes(), [*model.parameters(), *model.buffers()]
    with live.of(WEIGHTS):
        live.hold(held)
    with live, torch.no_grad():
        engine = build_engine(config, model)
        with live.of(STATE):
            optimizer = make_optimizer(model, engine, config.method, config.privacy.steps)
        with work:
            _step(config, live, engine, optimizer, batch)
    state = [t for t in optimizer.state_dict().values() if isinstance(t, Tensor)]
    saved = sum(t.nbytes for t in (*held, *state))
    return _Counted(live.peaks, 4 * engine.coordinates, saved, work.operations, work.seconds)


def _step(
    config: Config, live: LiveBytes, engine: Engine, optimizer: Optimizer, batch: dict[str, Tensor]
) -> None:
    half = _half(config)

    def loss(model: nn.Module, some: Any) -> Tensor:
        with live.of(FORWARD), _kernels(half):
            return sample_loss(model, some).float()

    engine.take_shapes_alone()
    engine.use_secret(bytes(32))
    with live.of(BACKWARD):
        summed = engine.clipped_sum(loss, batch)
    with live.of(UPDATE):
        optimizer.step(nonprivate_mean(summed, batch_size=1.0))


def _half(config: Config) -> torch.dtype | None:
    return torch.bfloat16 if config.performance.precision == "bf16" else None


@contextlib.contextmanager
def _kernels(half: torch.dtype | None) -> Iterator[None]:
    """A block, or a function, as it would be under autocast to `half` on a device."""
    with assumed_autocast(half), _Kernels():
        yield


class _Kernels(TorchFunctionMode):
    """What torch does elsewhere and not on the meta device: fused attention, and autocast of what
    is computed beside parameters, which the engine itself does not see.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(arg, Tracked) for arg in args):
            return func(*args, **kwargs)
        if autocast_dtype("meta") and (dtype := _AUTOCAST.get(func)):
            given: Any = tree_map(lambda value: _cast(value, dtype), (args, kwargs))
            args, kwargs = given
        kernel = _fused_attention if func is F.scaled_dot_product_attention else func
        return kernel(*args, **(kwargs or {}))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention whose scores are never held whole; CPU's and CUDA's kernels keep the same."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(times, -3) for t in (key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, _ = kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)
    return out


_PRODUCTS: tuple[Any, ...] = (
    F.linear, F.scaled_dot_product_attention, F.conv1d, F.conv2d, F.conv3d, torch.matmul, torch.bmm,
    torch.baddbmm, torch.addmm, torch.mm, torch.einsum, Tensor.matmul, Tensor.__matmul__,
    Tensor.bmm,
)  # fmt: skip
_EXACT: tuple[Any, ...] = (
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, torch.softmax,
    Tensor.softmax,
)  # fmt: skip
_AUTOCAST: dict[Any, torch.dtype] = {
    function: dtype
    for functions, dtype in ((_PRODUCTS, torch.bfloat16), (_EXACT, torch.float32))
    for function in functions
}
