"""What a run needs of a ledger, so that the ledger itself and the client of a ledger actor are
interchangeable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from grape_ray.ledger.charges import Attempt
from grape_ray.ledger.grant import Grant


class LedgerClient(Protocol):
    """The calls of `ledger.ledger.Ledger` that a run makes; their guarantees, arguments and
    errors are described there.

    Whoever begins an attempt or charges steps says which records are really used, so that no run
    pays from another dataset's budget.
    """

    @property
    def ledger_id(self) -> str: ...

    @property
    def head(self) -> str: ...

    def begin_attempt(self, study: str, run: str, key_id: str, *, dataset_id: str) -> int: ...

    def charge(
        self,
        study: str,
        run: str,
        attempt: int,
        chunk: int,
        steps: int,
        first_step: int | None = None,
        *,
        dataset_id: str,
    ) -> Grant: ...

    def refund(self, study: str, run: str, attempt: int, chunk: int, steps: int) -> None: ...

    def close_attempt(self, study: str, run: str, attempt: int) -> None: ...

    def attempts(self, study: str, run: str) -> Sequence[Attempt]: ...

    def epsilon_spent(self, study: str) -> float: ...
