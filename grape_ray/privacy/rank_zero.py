"""What rank 0 alone does, and every rank gets the result of; errors travel redacted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from grape_ray.distributed.comms import Comms
from grape_ray.privacy.redaction import redacted

_Result = TypeVar("_Result")


def on_rank_zero(comms: Comms, call: Callable[[], _Result]) -> _Result:
    """The result of `call` on rank 0, on every rank; every rank calls it.

    Raises:
        What `call` raises, on every rank, so that none waits for a broadcast that never comes.
    """
    answer, own = None, None
    if comms.rank == 0:
        try:
            answer = call()
        except Exception as caught:
            own = caught
    both: tuple[_Result | None, Exception | None] = (answer, own and redacted(own))
    answer, error = comms.broadcast_object(both)
    if error is not None:
        # rank 0 keeps the original, with its traceback
        raise own or error
    return cast(_Result, answer)
