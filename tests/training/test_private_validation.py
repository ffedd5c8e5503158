"""Private validation records: a run says of them what its own description lets it say, whoever
launches, resumes or exports it.
"""

import dataclasses
import json

import pytest
from click.testing import CliRunner

from grape_ray.accounting import Mechanism
from grape_ray.cli.main import main
from grape_ray.data.fingerprints import fingerprint_records
from grape_ray.distributed.comms import Comms
from grape_ray.errors import ConfigError, DataError, LedgerError
from grape_ray.ledger import Ledger, Study
from grape_ray.ledger.registry import register
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.private_scores import Terms
from grape_ray.training.resume import plan_resume
from grape_ray.training.run import execute
from tests.support.plans import planned
from tests.support.tiny import Tiny, tiny

NOISE, RECORDS = 200.0, 50


@pytest.fixture
def scored(tmp_path):
    """(Terms of private scores, the ledger that pays for them: 5 tokens)."""
    records = fingerprint_records(Tiny().load().validation)
    ledger = Ledger.open(tmp_path / "scores", records, 9.0, 1e-4)
    ledger.ensure_study(Study("s", Mechanism("poisson_gaussian", 1.0, NOISE), 9.0, 1e-5, 5))
    return Terms("accuracy", NOISE, str(tmp_path / "scores"), "s"), ledger


def begun(tmp_path, terms):
    """A run that was stopped at its first evaluation, after 4 of 12 steps."""
    config = tiny().override(["performance.eval_every=4"])
    options = {"run": "r", "storage": str(tmp_path / "runs"), "key_path": str(tmp_path / "key")}
    execute(
        planned(config, scores=terms, **options),
        Comms.local(),
        RunCallbacks(should_continue=lambda progress: False),
    )
    return config, options


def told(folder):
    """All that a run's folder says of accuracy."""
    found = [json.loads((folder / "result.json").read_text())["metrics"]]
    found += [
        json.loads(path.read_text())["facts"]["metrics"]
        for path in folder.glob("checkpoints/*/manifest.json")
    ]
    return [metrics["accuracy"] for metrics in found if metrics]


def test_a_resumed_run_releases_noised_and_charged_scores_alone(tmp_path, scored):
    terms, ledger = scored
    begun(tmp_path, terms)
    assert ledger.state.study("s").used == 1
    result = execute(
        plan_resume(str(tmp_path / "runs/r"), key_path=str(tmp_path / "key")), Comms.local()
    )
    assert result.steps == 12
    assert ledger.state.study("s").used == 3  # at steps 8 and 12
    assert len(ledger.attempts("s", "r")) == 2  # with a key of its own
    for accuracy in told(tmp_path / "runs/r"):
        # no count of right answers
        assert abs(RECORDS * accuracy - round(RECORDS * accuracy)) > 1e-5


def test_without_a_token_left_nothing_is_released(tmp_path, scored):
    terms, ledger = scored
    ledger.charge("s", "other", ledger.begin_attempt("s", "other", "id"), 0, 4)
    begun(tmp_path, terms)
    result = execute(
        plan_resume(str(tmp_path / "runs/r"), key_path=str(tmp_path / "key")), Comms.local()
    )
    assert result.metrics == {}


def test_no_other_caller_may_say_more(tmp_path, scored):
    config, options = begun(tmp_path, scored[0])
    with pytest.raises(ConfigError, match="exists with another validation"):
        planned(config, **options)
    shown = CliRunner().invoke(
        main, ["resume", str(tmp_path / "runs/r"), "--key-file", str(tmp_path / "key")]
    )
    assert shown.exit_code == 0, shown.output
    assert all(abs(RECORDS * a - round(RECORDS * a)) > 1e-5 for a in told(tmp_path / "runs/r"))


@pytest.mark.parametrize("change", ["missing", "louder", "public"])
def test_a_description_that_does_not_say_it_is_refused(tmp_path, scored, change):
    begun(tmp_path, scored[0])
    path = tmp_path / "runs/r/run.json"
    described = json.loads(path.read_text())
    if change == "missing":
        del described["validation"]
    elif change == "public":
        described["validation"] = "public"
        register(
            (fingerprint_records(Tiny().load().validation),), scored[0].ledger, scored[1].ledger_id
        )
    else:
        described["validation"]["noise_multiplier"] = 1e-3
    path.write_text(json.dumps(described))
    with pytest.raises(
        (ConfigError, DataError, LedgerError),
        match=r"records are public|another noise|known as private",
    ):
        plan_resume(str(tmp_path / "runs/r"), key_path=str(tmp_path / "key"))


def test_a_metric_that_is_not_bounded_is_refused(tmp_path, scored):
    with pytest.raises(ConfigError, match="metric of private scores"):
        planned(
            tiny(),
            run="r",
            storage=str(tmp_path / "runs"),
            scores=dataclasses.replace(scored[0], metric="loss"),
        )
