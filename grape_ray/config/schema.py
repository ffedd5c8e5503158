"""The frozen configuration of a run, in three parts: what moves the mechanism, what moves the
model, what may move speed alone.
"""

from __future__ import annotations

import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any

from grape_ray.accounting.mechanism import MAX_NAME, RECORD
from grape_ray.config.methods import METHODS
from grape_ray.config.overrides import assign
from grape_ray.errors import ConfigError, nearest

# What underflows in single precision is below 1e-12 for the widest layers (docs/privacy.md, "Norms
# are upper bounds"): a millionth of the least clip norm. Gradients whose squares overflow,
# beyond 1e19, contribute nothing: far above the largest.
MIN_CLIP_NORM, MAX_CLIP_NORM = 1e-6, 1e12
# single precision holds up to 3e38, and Adam's first step multiplies by up to 10 or so
MAX_RATE = 1e36
# below it the rounding of losses in single precision would be much of a slope (docs/privacy.md)
MIN_SMOOTHING = 1e-4
MAX_EXAMPLES_PER_UNIT = 1 << 16  # they go through the model in one micro-batch
MAX_THREADS = 1024  # with very many, torch ends the process


def _require(ok: bool, what: str, got: object, expected: str, fix: str = "") -> None:
    if not ok:
        raise ConfigError(what, got, expected, fix or "set another value")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


@dataclass(frozen=True)
class Privacy:
    """Everything that changes the privacy mechanism.

    Attributes:
        epsilon, delta: the target for the whole run, adding or removing one privacy unit.
        unit: the column that names each record's privacy unit, such as a user, a patient or a
            document, with all of whose records the guarantee is; empty where it is one record.
        examples_per_unit: records of a sampled unit that a step takes at most, drawn anew for each
            step; their gradients are averaged before the clip. Of no meaning without `unit`.
        expected_batch_size: mean number of units in a Poisson batch; sampling_prob is this divided
            by the number of units.
        steps: optimizer steps planned.
        spare_steps: extra step tokens for the steps that a restart repeats.
        clip_norm: bound C on each example's contribution in L2 norm, from 1e-6 to 1e12.
        clipping: `flat` (one norm over all tensors), `automatic` (every example scaled to norm just
            under C) or `per_layer` (each tensor bounded by C / sqrt(number of tensors)); all three
            have sensitivity C.
        noise_multiplier: standard deviation of the noise in units of C; None calibrates it from the
            fields above.
        probes, shared_probes: of method `randomized`: probes a layer, and whether a batch shares
            them.
    """

    epsilon: float = 8.0
    delta: float = 1e-5
    expected_batch_size: int = 64
    steps: int = 100
    spare_steps: int = 0
    clip_norm: float = 1.0
    clipping: str = "flat"
    noise_multiplier: float | None = None
    probes: int = 32
    shared_probes: bool = False
    unit: str = ""
    examples_per_unit: int = 4

    def __post_init__(self) -> None:
        fix = "typical values lie between 0.5 and 10"
        _require(
            _number(self.epsilon) and self.epsilon > 0,
            "privacy.epsilon",
            self.epsilon,
            "a finite number > 0",
            fix,
        )
        fix = "choose it well below one over the number of records"
        _require(
            _number(self.delta) and 1e-11 <= self.delta < 1,
            "privacy.delta",
            self.delta,
            "a number in [1e-11, 1)",
            fix,
        )
        size, fix = self.expected_batch_size, "choose at most the number of records"
        _require(_count(size, 1), "privacy.expected_batch_size", size, "an integer >= 1", fix)
        _require(
            _count(self.steps, 1),
            "privacy.steps",
            self.steps,
            "an integer >= 1",
            "choose how many optimizer steps to take",
        )
        _require(
            _count(self.spare_steps, 0), "privacy.spare_steps", self.spare_steps, "an integer >= 0"
        )
        expected = f"a number from {MIN_CLIP_NORM:g} to {MAX_CLIP_NORM:g}"
        fix = "multiply the loss to bring its gradients into range"
        in_range = _number(self.clip_norm) and MIN_CLIP_NORM <= self.clip_norm <= MAX_CLIP_NORM
        _require(in_range, "privacy.clip_norm", self.clip_norm, expected, fix)
        _choice("privacy.clipping", self.clipping, ("flat", "automatic", "per_layer"))
        sigma = self.noise_multiplier
        _require(
            sigma is None or (_number(sigma) and sigma > 0),
            "privacy.noise_multiplier",
            sigma,
            "None or a finite number > 0",
        )
        _require(_count(self.probes, 1), "privacy.probes", self.probes, "an integer >= 1")
        self._check_unit()

    def _check_unit(self) -> None:
        unit, most = self.unit, self.examples_per_unit
        usable = (
            isinstance(unit, str) and len(unit) <= MAX_NAME and (not unit or unit.isprintable())
        )
        expected = f"a column's name of up to {MAX_NAME} printable characters, or nothing"
        _require(usable, "privacy.unit", unit, expected, "name the column")
        fix = "unset it: without it the unit is one record; or rename the column"
        expected = "a column of units that may have several records"
        _require(unit != RECORD, "privacy.unit", unit, expected, fix)
        _require(
            _count(most, 1) and most <= MAX_EXAMPLES_PER_UNIT,
            "privacy.examples_per_unit",
            most,
            f"an integer from 1 to {MAX_EXAMPLES_PER_UNIT}",
            "choose how many records of a sampled unit a step takes: 1 to 16 is usual",
        )

    @property
    def unit_name(self) -> str:
        """The privacy unit, as ledgers and results name it."""
        return self.unit or RECORD

    @property
    def units_name(self) -> str:
        """Many of them, in messages."""
        return f"units ({self.unit})" if self.unit else "records"

    @property
    def unit_limit(self) -> int | None:
        """Records of a sampled unit that a step takes at most; None where a unit is a record."""
        return self.examples_per_unit if self.unit else None


@dataclass(frozen=True)
class Method:
    """How gradients become updates; none of it enters epsilon.

    Attributes:
        name: a row of `grape_ray.config.methods.METHODS`.
        rank: coordinates kept of a projected weight's compressed side.
        side: `in` compresses a linear layer's inputs (kept projected from the forward pass on),
            `out` its outputs, `smaller` the smaller of the two (GaLore's rule, used by the DP-GRAPE
            paper).
        refresh: steps between new projections; 0 never refreshes. None is the method's own:
            every step for `grape`, because a direction that is drawn once a step is averaged over
            more of them (docs/choosing.md), and for `dp_zero`; every 100th for `dp_galore`.
        moments: at a refresh `reset` (the mean of gradients begins anew, as their coordinates have
            another meaning; the mean of their squares, whose law is the same, goes on), `keep` (the
            paper's: neither does), `transfer` (lift the old coordinates and project them again) or
            `lifted` (the mean is of updates lifted to the weight's shape, so that no projection
            ends it: momentum with a new projection each step, for one more copy of what is trained
            in memory and in checkpoints).
        scale: `unbiased` draws the projection from N(0, 1/r); `paper` from N(0, 1/r^2), as the
            authors' public code does.
        dense: name patterns (fnmatch) of tensors that are never projected.
        project_min_numel: tensors with fewer elements are kept in full.
        estimator: of method `randomized`: `hutchinson` or `hutch++`.
        directions: of method `dp_zero`: numbers that a step releases, each the slope of the loss
            along one random direction; each costs two forward passes.
        smoothing: of method `dp_zero`: half the distance of the two losses that a slope is taken
            from, along a direction with entries N(0, 1); from 1e-4 to 1.
        routes: `pattern:route` texts (fnmatch on names) that overrule how a layer's norm is
            computed: gram, instantiate or sketch.
        rates: `pattern:multiple` texts (fnmatch on names): the step size of such tensors, of the
            last pattern that matches, is so many times the learning rate. A head that begins at
            random usually wants ten times the rate of pretrained layers. Weight decay is by the
            plain rate.
        optimizer: `adam` or `sgd`. None is the method's own: `sgd` without momentum for `dp_zero`,
            which takes no other, `adam` for all others. learning_rate: its step size. betas, eps:
            of Adam. momentum: of SGD. weight_decay: decoupled, times the learning rate, a step.
        warmup_steps, schedule: linear warm-up, then `constant`, `linear` or `cosine` decay to zero
            at the last step.
        correct_noise_bias: subtract the known noise variance from Adam's second moment.
    """

    name: str = "grape"
    rank: int = 16
    side: str = "in"
    refresh: int | None = None
    moments: str = "reset"
    scale: str = "unbiased"
    dense: tuple[str, ...] = ()
    project_min_numel: int = 4096
    estimator: str = "hutchinson"
    directions: int = 1
    smoothing: float = 1e-3
    routes: tuple[str, ...] = ()
    optimizer: str | None = None
    learning_rate: float = 1e-3
    rates: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "constant"
    correct_noise_bias: bool = False

    def __post_init__(self) -> None:
        _choice("method.name", self.name, METHODS)
        _require(
            _count(self.rank, 1),
            "method.rank",
            self.rank,
            "an integer >= 1",
            "typical values lie between 8 and 64",
        )
        _choice("method.side", self.side, ("in", "out", "smaller"))
        _require(
            self.refresh is None or _count(self.refresh, 0),
            "method.refresh",
            self.refresh,
            "an integer >= 0, or None for the method's own",
        )
        _choice("method.moments", self.moments, ("keep", "reset", "transfer", "lifted"))
        _choice("method.scale", self.scale, ("unbiased", "paper"))
        _choice("method.estimator", self.estimator, ("hutchinson", "hutch++"))
        if self.optimizer is not None:
            _choice("method.optimizer", self.optimizer, ("adam", "sgd"))
        _choice("method.schedule", self.schedule, ("constant", "linear", "cosine"))
        _require(
            _count(self.project_min_numel, 0),
            "method.project_min_numel",
            self.project_min_numel,
            "an integer >= 0",
        )
        rate, most = self.learning_rate, f"a number > 0, at most {MAX_RATE:g}"
        _require(
            _number(rate) and 0 < rate <= MAX_RATE,
            "method.learning_rate",
            rate,
            most,
            "typical values lie between 1e-5 and 1",
        )
        for pattern, multiple in self.rate_multiples:
            _require(
                bool(pattern) and 0 < multiple * rate <= MAX_RATE,
                "method.rates",
                f"{pattern}:{multiple:g}",
                f"pattern:multiple, times the learning rate > 0 and at most {MAX_RATE:g}",
                "name the tensors and how many times the learning rate theirs is: classifier.*:10",
            )
        betas_ok = len(self.betas) == 2 and all(_number(b) and 0 <= b < 1 for b in self.betas)
        _require(betas_ok, "method.betas", self.betas, "two numbers in [0, 1)")
        _require(_number(self.eps) and self.eps > 0, "method.eps", self.eps, "a number > 0")
        _require(
            _number(self.momentum) and 0 <= self.momentum < 1,
            "method.momentum",
            self.momentum,
            "a number in [0, 1)",
        )
        decay = self.weight_decay
        most = f"a number >= 0, times the learning rate at most {MAX_RATE:g}"
        _require(
            _number(decay) and 0 <= decay * rate <= MAX_RATE, "method.weight_decay", decay, most
        )
        _require(
            _count(self.warmup_steps, 0),
            "method.warmup_steps",
            self.warmup_steps,
            "an integer >= 0",
        )
        self._check_directions()

    def _check_directions(self) -> None:
        fix = "1 is usual; each costs two forward passes"
        _require(
            _count(self.directions, 1), "method.directions", self.directions, "an integer >= 1", fix
        )
        fix = "1e-3 is usual; what rounding does to a loss is divided by twice it"
        _require(
            _number(self.smoothing) and MIN_SMOOTHING <= self.smoothing <= 1,
            "method.smoothing",
            self.smoothing,
            f"a number from {MIN_SMOOTHING:g} to 1",
            fix,
        )
        if METHODS[self.name].subspace == "directions":
            self.require_plain_sgd()

    def require_plain_sgd(self) -> None:
        """Raises ConfigError where the optimizer keeps means of the numbers that it is given."""
        _require(
            self.optimizer_name == "sgd" and not self.momentum,
            "method.optimizer along random directions",
            f"{self.optimizer_name}, momentum {self.momentum:g}",
            "sgd without momentum: a slope says nothing of the next direction's",
            "leave method.optimizer and method.momentum to the method",
        )

    @property
    def optimizer_name(self) -> str:
        """`adam` or `sgd`."""
        return METHODS[self.name].optimizer if self.optimizer is None else self.optimizer

    @property
    def rate_multiples(self) -> tuple[tuple[str, float], ...]:
        """Patterns and multiples of `rates`; not a number where a text has none."""
        pairs = [text.rpartition(":") for text in self.rates]
        return tuple((pattern, _float(multiple)) for pattern, _, multiple in pairs)

    @property
    def refresh_steps(self) -> int:
        """Steps between new projections, 0 for never."""
        return METHODS[self.name].refresh if self.refresh is None else self.refresh


@dataclass(frozen=True)
class Performance:
    """What may change speed and memory but no result (beyond float rounding) and no guarantee.

    Attributes:
        micro_batch_size: examples in one forward and backward pass; of units of several records,
            as many whole units as have so many records together, or one.
        num_workers: Ray Train workers; 0 runs in this process, without Ray; `2:8` lets their number
            follow the cluster.
        use_gpu: one GPU a worker.
        charge_chunk: steps reserved in the ledger at a time; a crash loses at most one chunk.
        checkpoint_every, eval_every: steps; 0 only at the end. checkpoint_every_s: seconds, beside
            it; 0 counts steps alone.
        stop_on_nan: whether a metric that is not finite at two evaluations in a row ends the run,
            before more is paid for.
        keep_checkpoints: committed checkpoints kept.
        delta_checkpoints: of method `grape`: so many checkpoints between two full ones hold only
            coordinates, a few percent of the bytes; weights restored from one differ from those
            saved by rounding. With `sharded`, `moments=lifted`, or where projected weights are not
            fp32, all checkpoints are full ones.
        checkpoint_timeout_s: how long a checkpoint may take from its copy in memory to its
            manifest.
        storage_timeout_s: how long a call to remote storage is tried again.
        max_failures: worker failures that a run survives; each is a new attempt.
        start_timeout_s: how long to wait for the cluster's resources before giving up.
        resize_every_s: how often a run with a range of workers looks for free capacity; growing
            costs the steps since the last checkpoint.
        threads_per_worker: torch threads in a worker; 0 leaves torch's own choice.
        sharded: spread the model's weights over the workers (FSDP2), so that none holds it whole.
        precision: `fp32`, or `bf16` for products and activations; norms, coordinates and noise are
            fp32 in either.
        recompute: keep each block's input alone for the backward pass (activation checkpointing).
    """

    micro_batch_size: int = 32
    num_workers: int | str = 0
    use_gpu: bool = False
    charge_chunk: int = 25
    checkpoint_every: int = 0
    checkpoint_every_s: float = 300.0
    eval_every: int = 0
    stop_on_nan: bool = True
    keep_checkpoints: int = 2
    delta_checkpoints: int = 0
    checkpoint_timeout_s: float = 600.0
    storage_timeout_s: float = 120.0
    max_failures: int = 3
    start_timeout_s: float = 300.0
    resize_every_s: float = 60.0
    threads_per_worker: int = 0
    sharded: bool = False
    precision: str = "fp32"
    recompute: bool = False

    def __post_init__(self) -> None:
        for name, low in (("micro_batch_size", 1), ("charge_chunk", 1), ("checkpoint_every", 0),
        ("eval_every", 0), ("keep_checkpoints", 1),
                          ("delta_checkpoints", 0), ("max_failures", 0),
                          ("threads_per_worker", 0)):  # fmt: skip
            _require(
                _count(getattr(self, name), low),
                f"performance.{name}",
                getattr(self, name),
                f"an integer >= {low}",
            )
        threads = self.threads_per_worker
        _require(
            threads <= MAX_THREADS,
            "performance.threads_per_worker",
            threads,
            f"at most {MAX_THREADS}",
            "0 leaves torch's own choice",
        )
        _choice("performance.precision", self.precision, ("fp32", "bf16"))
        for name in (
            "start_timeout_s",
            "resize_every_s",
            "checkpoint_timeout_s",
            "storage_timeout_s",
        ):
            value = getattr(self, name)
            _require(
                _number(value) and value > 0,
                f"performance.{name}",
                value,
                "a number of seconds > 0",
            )
        every_s = self.checkpoint_every_s
        _require(
            _number(every_s) and every_s >= 0,
            "performance.checkpoint_every_s",
            every_s,
            "a number of seconds, 0 for never",
        )
        low, high = self.workers
        expected = "an integer >= 0, or MIN:MAX with MIN >= 1"
        fix = "0 trains in this process, 2:8 follows the cluster"
        _require(
            0 <= low <= high and (low > 0 or self.num_workers == 0),
            "performance.num_workers",
            self.num_workers,
            expected,
            fix,
        )

    @property
    def workers(self) -> tuple[int, int]:
        """The fewest and the most workers; (-1, -1) where `num_workers` is neither a count nor a
        range.
        """
        if _count(self.num_workers, 0):
            return int(self.num_workers), int(self.num_workers)
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", str(self.num_workers))
        return (int(found[1]), int(found[2])) if found else (-1, -1)


@dataclass(frozen=True)
class Config:
    """A whole run: a task (model and data) and how to train it.

    Attributes:
        task: a frozen dataclass with the methods of `grape_ray.tasks.task.Task`; its fields can be
            overridden as `task.<field>`.
        seed: public seed of initialisation and projections; noise and sampling come from the secret
            master key instead.
    """

    task: Any
    privacy: Privacy = field(default_factory=Privacy)
    method: Method = field(default_factory=Method)
    performance: Performance = field(default_factory=Performance)
    seed: int = 0

    def override(self, assignments: typing.Iterable[str], place: str = "--set") -> Config:
        """This config with `key=value` assignments applied, such as `method.rank=8`.

        Args:
            place: where they were written, for errors.

        Raises:
            ConfigError: an unknown key (with the nearest names), a value of the wrong type, or a
                value out of range.

        >>> Config(task=None).override(["method.rank=8", "privacy.epsilon=3"]).method.rank
        8
        >>> Config(task=None).override(["method.rnk=8"])
        Traceback (most recent call last):
        grape_ray.errors.ConfigError: --set: unknown key, got 'method.rnk', expected ...rank...
        """
        config = self
        for text in assignments:
            key, sign, value = text.partition("=")
            _require(bool(sign), place, text, "key=value, such as method.rank=8")
            config = assign(config, key.strip().split("."), value.strip(), key.strip(), place)
        return config


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _choice(what: str, got: str, known: typing.Iterable[str]) -> None:
    if got not in known:
        raise ConfigError(what, got, "one of " + ", ".join(known), nearest(str(got), known))
