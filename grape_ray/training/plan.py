"""The plan of a run: what was checked and priced, in plain values that can be sent to workers."""

from __future__ import annotations

from dataclasses import dataclass

from grape_ray.accounting.mechanism import Mechanism
from grape_ray.config.methods import METHODS
from grape_ray.config.schema import Config
from grape_ray.storage import Storage
from grape_ray.training.dry_run import DryRun
from grape_ray.training.pricing import mechanism_kind
from grape_ray.training.private_scores import Terms


@dataclass(frozen=True)
class Plan:
    """A run that was checked; plain values, so that it can be sent to workers. It holds no key.

    Attributes:
        run: name of the run, of its folder below `storage` and, unless `study` says otherwise, of
            its study in the ledger.
        storage: URL of the folder of runs. ledger: URL of the dataset's ledger; None for the
            non-private baseline.
        key_path: file of the master key, on the machine of rank 0; None for the usual place.
        dataset_id: fingerprint of the training records; the ledger alone may keep it.
        target: (epsilon, delta) of the run's study; None for the baseline.
        sampling_prob: chance of each privacy unit to be in a batch. noise_multiplier: noise
            standard deviation over the sensitivity.
        tokens: steps that the run's study may take, repeats included; 0 for the baseline.
        origin: (URL of a run's folder, name of its checkpoint) that a new run begins from; None
            begins from the task's own model.
        scores: what may be said of private validation records; None where they are public.
        public: whether all records are public, so that errors may quote them.
        records: N. units: U, the number of privacy units that they belong to.
        dry_run: what the dry run has seen; None where there was none.
    """

    config: Config
    run: str
    storage: str
    ledger: str | None
    key_path: str | None
    study: str
    dataset_id: str
    target: tuple[float, float] | None
    sampling_prob: float
    noise_multiplier: float
    tokens: int
    origin: tuple[str, str] | None = None
    scores: Terms | None = None
    public: bool = False
    records: int = 0
    units: int = 0
    dry_run: DryRun | None = None

    @property
    def private(self) -> bool:
        """Whether the method carries a guarantee."""
        return METHODS[self.config.method.name].private

    def folder(self) -> Storage:
        """The run's own folder."""
        return Storage(self.storage, self.config.performance.storage_timeout_s).child(self.run)

    def ledger_storage(self) -> Storage:
        """The ledger's folder; not of a run without one."""
        assert self.ledger is not None
        return Storage(self.ledger, self.config.performance.storage_timeout_s)

    def mechanism(self) -> Mechanism:
        """What each step costs."""
        return Mechanism(
            **mechanism_kind(self.config),
            sampling_prob=self.sampling_prob,
            noise_multiplier=self.noise_multiplier,
        )
