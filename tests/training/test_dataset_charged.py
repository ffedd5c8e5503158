"""Steps and scores are paid for by the records that are really used, whichever ledger a run was
told to charge.
"""

from dataclasses import dataclass, replace

import pytest

from grape_ray.accounting import Mechanism
from grape_ray.data.arrays import Records
from grape_ray.data.fingerprints import fingerprint_arrays, fingerprint_records
from grape_ray.distributed.comms import Comms
from grape_ray.errors import LedgerError
from grape_ray.ledger import Ledger, Study
from grape_ray.tasks.task import Data
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.private_scores import PrivateScore, Terms
from grape_ray.training.run import execute
from tests.support.plans import planned
from tests.support.tiny import Tiny, tiny


@dataclass(frozen=True)
class Turned(Tiny):
    """As many records as Tiny has, but others: what a tunable field of a task may do."""

    turn: int = 0

    def load(self) -> Data:
        data = super().load()
        x, labels = (
            (
                data.train.array(n)
                if n == "labels"
                else data.train.array(n)[:, :: -1 if self.turn else 1]
            )
            for n in ("x", "labels")
        )
        flipped = data.validation.array("x")[:, :: -1 if self.turn else 1].copy()
        validation = Records({"x": flipped, "labels": data.validation.array("labels")})
        return Data(
            Records({"x": x.copy(), "labels": labels}),
            validation,
            fingerprint_arrays(x, labels),
            self.public,
        )


def config(turn):
    return replace(tiny(), task=Turned(turn=turn))


@pytest.fixture
def shared(tmp_path):
    """(Ledger of the records of turn 0, the study there, options of `planned`)."""
    ledger = Ledger.open(tmp_path / "ledger", Turned().load().dataset_id, 8.0, 1e-5)
    study = Study("s", Mechanism("poisson_gaussian", 0.25, 4.0), 8.0, 1e-5, 60)
    ledger.ensure_study(study)
    options = {
        "storage": str(tmp_path / "runs"),
        "ledger": str(tmp_path / "ledger"),
        "key_path": str(tmp_path / "key"),
        "study": study,
    }
    return ledger, options


def test_a_trial_on_other_records_is_refused_before_it_draws_a_key(shared):
    ledger, options = shared
    # as a sweep gives its trials the book to be charged
    given = RunCallbacks(open_ledger=lambda plan: ledger)
    execute(planned(config(0), run="same", **options), Comms.local(), given)
    with pytest.raises(LedgerError, match="of another dataset"):
        execute(planned(config(1), run="other", **options), Comms.local(), given)
    assert set(ledger.state.study("s").runs) == {"same"}


def test_the_ledger_refuses_attempts_and_charges_for_other_records(shared):
    ledger, _ = shared
    with pytest.raises(LedgerError, match="of another dataset"):
        ledger.begin_attempt("s", "r", "id", dataset_id="another")
    attempt = ledger.begin_attempt("s", "r", "id", dataset_id=ledger.state.dataset_id)
    with pytest.raises(LedgerError, match="of another dataset") as caught:
        ledger.charge("s", "r", attempt, 0, 1, dataset_id="another")
    assert ledger.state.dataset_id not in str(caught.value)
    assert ledger.state.study("s").used == 0


def test_private_scores_of_other_validation_records_are_refused(shared, tmp_path):
    _, options = shared
    scores = Ledger.open(
        tmp_path / "scores", fingerprint_records(Turned().load().validation), 8.0, 1e-4
    )
    scores.ensure_study(Study("s", Mechanism("poisson_gaussian", 1.0, 30.0), 8.0, 1e-5, 5))
    terms = Terms("accuracy", 30.0, str(tmp_path / "scores"), "s")
    with pytest.raises(LedgerError, match="of another dataset"):
        PrivateScore(lambda: scores, terms, "r", options["key_path"], "another")(
            {"accuracy": 0.5}, 50
        )
    flipped = Ledger.open(tmp_path / "flipped", Turned(turn=1).load().dataset_id, 8.0, 1e-5)
    flipped.ensure_study(options["study"])
    with pytest.raises(LedgerError, match="of another dataset"):
        execute(
            planned(
                config(1), run="r", scores=terms, **{**options, "ledger": str(tmp_path / "flipped")}
            ),
            Comms.local(),
        )
    assert scores.state.study("s").used == 0


@pytest.mark.ray
def test_the_ledger_actor_refuses_other_records(shared):
    actors = pytest.importorskip("grape_ray.ray_backend.ledger_actor")
    actor = actors.LedgerActor(shared[1]["ledger"], "c", 0.1)
    try:
        for call in (("begin_attempt", "s", "r", "id"), ("charge", "s", "r", 1, 0, 1)):
            with pytest.raises(LedgerError, match="of another dataset"):
                actor.call(*call, dataset_id="another")
    finally:
        actor._lease.release()
