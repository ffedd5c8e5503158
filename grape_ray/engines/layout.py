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

    def check_contents(self, run: Callable[[int], None], rows: int) -> None:
        """Runs variants of single examples (`run(i)` for i < rows): entries an example owns may not depend on what it says.

        Raises:
            UnsupportedLayer: tokens are routed by their values, as in a mixture of experts.
        """
        first: dict[Key, list[tuple[int, ...]]] = {}
        for index in range(rows):
            self._seen = []
            try:
                run(index)
            finally:
                seen, self._seen = self._seen, None
            found: dict[Key, list[tuple[int, ...]]] = {}
            for key, shape, _ in seen:
                found.setdefault(key, []).append(shape)
            for key, shapes in found.items():
                known = first.setdefault(key, shapes)
                if len(known) == len(shapes) and known != shapes:
                    a, b = next((a, b) for a, b in zip(known, shapes) if a != b)
                    raise UnsupportedLayer(
                        f"operation '{key[1]}' on parameter {key[0]}",
                        f"shape {a} for one example and {b} for another of the same length",
                        "a first dimension that is the batch, whatever the examples say (no routing of tokens by their values)",
                        "freeze the parameter (requires_grad=False)",
                    )

    def _settle(self, two: list, three: list) -> bool:
        """Compares the passes; True where every provisional verdict was right."""
        stable = True
        for (key, a, guess), (other, b, _) in zip(two, three):
            if key != other:
                stable = False
                break
            verdict = _follows(key, a, b)
            kinds = self._kinds.setdefault(key, set())
            if verdict != guess and len(kinds) == 2:
                raise _ambiguous(key, a, SIZES[0])
            stable = stable and verdict == guess
            kinds.add(verdict)
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
    if probing:
        return True
    raise _ambiguous(key, shape, rows)


def _ambiguous(key: Key, shape: tuple[int, ...], rows: int) -> UnsupportedLayer:
    return UnsupportedLayer(
        f"operation '{key[1]}' on parameter {key[0]}, used with and without the batch",
        f"shape {shape} for {rows} examples, which could be either",
        "one reading",
        "use a batch size that does not divide it, or freeze the parameter",
    )
