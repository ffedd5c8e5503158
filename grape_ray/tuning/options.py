"""The options of a sweep, and the combinations of them that are refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from grape_ray.accounting.mechanism import check_delta, check_epsilon
from grape_ray.accounting.selection import NEGATIVE_BINOMIAL, POISSON, Distribution
from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Config
from grape_ray.errors import ConfigError, nearest
from grape_ray.storage import Json

COMPOSE, SELECT = "compose", "select"
SCHEDULERS = ("asha", "median", "pbt", "none")
SEARCHES = ("random", "optuna")
DISTRIBUTIONS = {
    "logarithmic": (NEGATIVE_BINOMIAL, 0.0),
    "geometric": (NEGATIVE_BINOMIAL, 1.0),
    "poisson": (POISSON, 0.0),
}


@dataclass(frozen=True)
class Options:
    """The options of `grape-ray tune`.

    Attributes:
        space: module of the tune space. assignments: overrides of its default run.
        mode: `compose` (every step of every trial is paid for) or `select` (private selection: the
            winner alone is released).
        trials: how many; in mode select the mean of their secret number. law: the distribution
            that this number is drawn from (one of DISTRIBUTIONS).
        scheduler, search: who stops trials, who proposes them. seed: of the proposals; None draws
            one.
        epsilon, delta: the sweep's share of the dataset's budget; None takes the space's.
        tokens: step tokens of the sweep; None plans them.
        storage: of sweeps. ledger, score_ledger: of the training and of private validation records;
            None is their usual place.
        ledger_epsilon, ledger_delta: the dataset's whole budget, where its ledger is made; None
            makes it the sweep's.
        key_path: file of the master key. concurrent: trials at a time; None is as many as fit.
        sealed: folder for what must stay secret in mode select; None is one of the user's own,
            where storage is local.
        second_ledger: whether records that are known to have a ledger may get another one.
        allow_large_delta: whether delta may be one over the number of records or more.
    """

    space: str
    assignments: tuple[str, ...] = ()
    mode: str = COMPOSE
    trials: int = 10
    scheduler: str = "asha"
    search: str = "random"
    seed: int | None = None
    law: str = "logarithmic"
    epsilon: float | None = None
    delta: float | None = None
    tokens: int | None = None
    storage: str = "sweeps"
    ledger: str | None = None
    score_ledger: str | None = None
    ledger_epsilon: float | None = None
    ledger_delta: float | None = None
    key_path: str | None = None
    concurrent: int | None = None
    sealed: str | None = None
    second_ledger: bool = False
    allow_large_delta: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("mode", (COMPOSE, SELECT)),
            ("scheduler", SCHEDULERS),
            ("search", SEARCHES),
            ("law", tuple(DISTRIBUTIONS)),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"--{name}",
                    getattr(self, name),
                    "one of " + ", ".join(known),
                    nearest(str(getattr(self, name)), known),
                )
        for name in ("trials", "tokens", "concurrent"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"--{name}", value, "an integer >= 1", f"raise --{name}, or leave it out"
                )
        for name, check in (("epsilon", check_epsilon), ("delta", check_delta)):
            for prefix, value in (
                ("budget", getattr(self, name)),
                ("ledger", getattr(self, f"ledger_{name}")),
            ):
                if value is not None:
                    check(value, f"--{prefix}-{name}")
        if self.scheduler == "pbt" and self.search == "optuna":
            raise ConfigError(
                "--scheduler pbt with --search optuna",
                None,
                "one of the two",
                "pbt proposes new values by itself",
            )
        if self.scheduler == "pbt" and self.trials < 2:
            raise ConfigError(
                "--scheduler pbt",
                f"{self.trials} trial",
                "a population of at least 2",
                "raise --trials",
            )
        if self.mode == SELECT:
            self._check_select()

    def distribution(self) -> Distribution:
        """The distribution of the number of trials in mode select."""
        name, shape = DISTRIBUTIONS[self.law]
        return Distribution(name, float(self.trials), shape)

    def as_json(self) -> Json:
        """The fields as JSON values."""
        return {**asdict(self), "assignments": list(self.assignments)}

    def _check_select(self) -> None:
        """The theorem is about independent trials of one fixed procedure, of which nothing but the
        best is seen.
        """
        reasons = {
            "asha": "it stops a trial because of the scores of others",
            "median": "it stops a trial because of the scores of others",
            "pbt": "it continues one trial from the weights of another",
        }
        if self.scheduler in reasons:
            self._refuse(
                f"--scheduler {self.scheduler}", reasons[self.scheduler], "--scheduler none"
            )
        if self.search == "optuna":
            self._refuse(
                "--search optuna",
                "it proposes a trial because of the scores of earlier ones",
                "--search random",
            )
        if self.tokens is not None:
            self._refuse("--tokens", "the whole selection is paid for at once", "nothing")
        self.distribution()

    @staticmethod
    def _refuse(what: str, reason: str, expected: str) -> None:
        raise ConfigError(
            f"mode select refuses {what}: {reason}",
            None,
            expected,
            "or use --mode compose, where every step is paid for",
        )


def check_select_config(config: Config) -> None:
    """Refuses a default run that mode select cannot keep sealed or pay for. Raises ConfigError."""
    if not METHODS[config.method.name].exact:
        fix = "use a method with exact norms, or --mode compose"
        raise ConfigError(
            f"mode select refuses method {config.method.name}: its steps have no Renyi bound",
            None,
            "exact norms",
            fix,
        )
    if config.performance.num_workers:
        fix = "take --workers away, or use --mode compose"
        raise ConfigError(
            "mode select refuses --workers: Ray Train would show each trial's metrics",
            None,
            "one process a trial",
            fix,
        )
