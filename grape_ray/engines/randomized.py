"""DP-SGD with randomized clipping: norms of wide layers are estimated from fresh Gaussian probes,
small ones are exact.

Source: arXiv 2605.24879 (DP-SGD-RC); the accountant is `accounting.randomized`. An estimate may
exceed or undercut the norm, so the clipped contribution is bounded in distribution, not with
certainty: the noise multiplier must come from that accountant. Probes are secret by default, each
example with its own; `shared` ones serve the whole batch at a larger noise multiplier.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from grape_ray.config.schema import Method, Privacy
from grape_ray.engines.algebra import factor_pairs, sketch
from grape_ray.engines.algebra.factor_pairs import Index, Pair
from grape_ray.engines.collector import Collector, sum_dtype
from grape_ray.engines.ghost import Ghost, TwoPasses
from grape_ray.engines.norm_routes import norm_route, overridden
from grape_ray.errors import ConfigError
from grape_ray.privacy.random_streams import normals
from grape_ray.privacy.types import ClippedSum
from grape_ray.storage import Json

ESTIMATORS = {"hutchinson": sketch.hutchinson, "hutch++": sketch.hutch_plus_plus}


class ProbeStream:
    """Fresh Gaussian probes from a secret stream: a function of (key, step, number of draws so far
    in the step).

    In shared mode every micro-batch and rank of a step must see the same probes, so a draw depends
    on (step, weight) alone.
    """

    def __init__(self, key: bytes, probes: int, shared: bool, rank: int = 0):
        label = b"shared" if shared else b"secret|" + str(rank).encode()
        self._key = hashlib.sha256(key + b"|probes|" + label).digest()
        self.probes, self.shared = probes, shared
        self._step, self._used = -1, 0

    def at(self, step: int) -> None:
        """Turns to a step; the micro-batches of one step go on where the last one stopped."""
        if step != self._step:
            self._step, self._used = step, 0

    def draw(self, examples: int, side: int, name: str, like: Tensor) -> Tensor:
        """(rows, side, K), or (1, side, K) if shared, with entries N(0, 1/K)."""
        examples = 1 if self.shared else examples
        count = examples * side * self.probes
        key, start = self._key, self._used
        if self.shared:
            key, start = hashlib.sha256(self._key + f"|{name}".encode()).digest(), 0
        else:
            self._used += count
        flat = normals(key, self._step, start, count, like.device)
        return (
            flat.mul_(1 / math.sqrt(self.probes))
            .view(examples, side, self.probes)
            .to(sum_dtype(like))
        )


class Estimated(TwoPasses):
    """Norms by route: sketched where that is cheaper, else exact; the sum comes from the second
    pass.
    """

    stream: ProbeStream
    estimator: Callable[[list[Pair], sketch.Draw], Tensor]

    def _squared(self, name: str, uses: list[Pair], small: Tensor | None) -> Tensor:
        lookups = [left for left, _ in uses if isinstance(left, Index)]
        # an embedding alone is exact by segment sums
        if not uses or small is not None or (lookups and len(uses) == 1):
            return super()._squared(name, uses, small)
        left, right = uses[0]
        route = norm_route(
            factor_pairs.positions(uses),
            factor_pairs.width(left),
            right.shape[-1],
            self.stream.probes,
        )
        if (overridden(name, self.overrides) or route) != "sketch":
            return super()._squared(name, uses, small)
        number = count()
        estimate = sketch.hutchinson if lookups else self.estimator
        uses = [factor_pairs.wide(*use) for use in uses]
        found = estimate(
            uses,
            lambda side: self.stream.draw(
                self.examples, side, f"{name}|{next(number)}", self.params[name]
            ),
        )
        # zero bounds nothing, and must stay zero
        return sketch.upper_bound(found, uses) * (found > 0)


class Randomized(Ghost):
    """Ghost clipping's two passes with estimated norms.

    Args:
        probes: K a layer. shared_probes: one set of probes for the whole batch. estimator:
            `hutchinson` or `hutch++`.
    """

    collector_type = Estimated
    estimates_norms = True

    def __init__(
        self,
        model: nn.Module,
        *,
        probes: int = 32,
        shared_probes: bool = False,
        estimator: str = "hutchinson",
        **common: Any,
    ):
        super().__init__(model, **common)
        self.probes, self.shared_probes, self._estimator = (
            probes,
            shared_probes,
            ESTIMATORS[estimator],
        )
        # the lemmas are about one estimate for the whole of an example's gradient
        if self.clipping != "flat":
            raise ConfigError(
                "privacy.clipping with method `randomized`",
                self.clipping,
                "flat, which its accountant covers",
                "set privacy.clipping=flat",
            )
        # as a library, without a run's attempt, the engine has a secret of its own
        self.use_secret(os.urandom(32))

    @property
    def estimated(self) -> tuple[int, bool]:
        """See `ClippedSum`."""
        return self.probes, self.shared_probes

    @staticmethod
    def options(privacy: Privacy, method: Method) -> Json:
        return {
            "probes": privacy.probes,
            "shared_probes": privacy.shared_probes,
            "estimator": method.estimator,
        }

    def use_secret(self, key: bytes, rank: int = 0) -> None:
        """Draws probes from this attempt's secret `key` (32 bytes) from now on; ranks draw their
        own unless probes are shared.
        """
        self._stream = ProbeStream(key, self.probes, self.shared_probes, rank)

    def _make_collector(self, examples: int, step: int) -> Collector:
        collector = super()._make_collector(examples, step)
        assert isinstance(collector, Estimated)
        self._stream.at(step)
        collector.stream, collector.estimator = self._stream, self._estimator
        return collector

    def _finish(
        self, collector: Collector, losses: Tensor, mask: Tensor | None, step: int
    ) -> ClippedSum:
        done = super()._finish(collector, losses, mask, step)
        # estimates tell of secret probes
        return replace(done, unprotected={"losses": done.unprotected["losses"]})

    def _factors(
        self, collector: Collector, mask: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        weights, norms = super()._factors(collector, mask)
        seen = norms > 0  # an estimate of zero bounds nothing
        return {
            name: torch.where(seen, w, torch.zeros_like(w)) for name, w in weights.items()
        }, norms
