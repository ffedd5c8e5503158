"""Which uses of a parameter carry the batch in their first dimension, learned from shapes at two batch sizes.

A (T, T) table of relative positions and a (B, T) batch look alike whenever B = T. Guessing wrong would credit one example's
gradient to another, so nothing is guessed: the model runs once on 2 and once on 3 copies of some rows, and a first dimension that
follows the number of rows is the batch; one that stays is shared by all examples; anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

from grape_ray.errors import UnsupportedLayer

Key = tuple[str, ...]
SIZES = (2, 3)


class UnseenUse(Exception):
    """A use of a parameter that the last probe did not meet; the engine probes again and repeats the pass."""


class Layouts:
    """What is known of every use, keyed by (parameters, operation, number of dimensions)."""

    def __init__(self) -> None:
        self._kinds: dict[Key, set[bool]] = {}
        self._seen: list[tuple[Key, tuple[int, ...], bool]] | None = None

    def batched(self, key: Key, shape: tuple[int, ...], rows: int) -> bool:
        """Whether the first dimension of `shape` is `rows` examples, each with shape[0] / rows consecutive entries.

        Raises:
            UnseenUse: no probe has met this use. UnsupportedLayer: the shape contradicts the probe or leaves two readings.
        """
        kinds = self._kinds.get(key)
        if self._seen is not None:
            verdict = _decide(kinds or {True, False}, key, shape, rows, probing=True)
            self._seen.append((key, shape, verdict))
            return verdict
        if kinds is None:
            raise UnseenUse(key)
        return _decide(kinds, key, shape, rows)

    def probe(self, run: Callable[[int], None]) -> None:
        """Learns every use from `run(n)`, a forward pass on n copies of the same rows; repeats until no verdict changes.

        A wrong first guess may make a pass fail; what it met until then still corrects the guess.
        """
        for _ in range(8):
            passes, failure = [], None
            for size in SIZES:
                self._seen = []
                try:
                    run(size)
                except Exception as error:
                    failure = error
                finally:
                    passes.append(self._seen)
                    self._seen = None
            if self._settle(*passes):
                if failure is not None:
                    raise failure
                return
        raise UnsupportedLayer("the model's use of its parameters does not settle", None, "a forward pass that is a function of shapes")

    def _settle(self, two: list, three: list) -> bool:
        """Compares the passes; True where every provisional verdict was right."""
        stable = True
        for (key, a, guess), (other, b, _) in zip(two, three):
            if key != other:
                stable = False
                break
            verdict = _follows(key, a, b)
            stable = stable and verdict == guess
            self._kinds.setdefault(key, set()).add(verdict)
        return stable


def _follows(key: Key, two: tuple[int, ...], three: tuple[int, ...]) -> bool:
    if two == three:
        return False
    if two and two[1:] == three[1:] and two[0] * SIZES[1] == three[0] * SIZES[0]:
        return True
    raise UnsupportedLayer(
        f"operation '{key[1]}' on parameter {key[0]}",
        f"shapes {two} and {three} for {SIZES[0]} and {SIZES[1]} times as many examples",
        "a first dimension that is the batch (batch-first, no routing of tokens by their values)",
        "freeze the parameter (requires_grad=False) or make the layer batch-first",
    )


def _decide(kinds: set[bool], key: Key, shape: tuple[int, ...], rows: int, probing: bool = False) -> bool:
    fits = bool(shape) and shape[0] % rows == 0
    if kinds == {True} and not fits:
        raise UnsupportedLayer(
            f"operation '{key[1]}' on parameter {key[0]}", f"shape {shape} for {rows} examples", "a first dimension divisible by them"
        )
    if len(kinds) == 1:
        return next(iter(kinds))
    if not fits or (shape[0] == 1 and rows > 1):
        return False
    if probing or shape[0] == rows:
        return True
    raise UnsupportedLayer(
        f"operation '{key[1]}' on parameter {key[0]}, used with and without the batch",
        f"shape {shape} for {rows} examples, which could be either",
        "one reading",
        "use a batch size that does not divide it, or freeze the parameter",
    )
