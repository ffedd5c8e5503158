"""A run whose privacy unit has several records: sampled, cut, clipped, paid for, named, resumed."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from grape_ray import checkpoint
from grape_ray.accounting import calibration
from grape_ray.cli.main import main
from grape_ray.data.arrays import Ragged, Records
from grape_ray.data.units import Units
from grape_ray.distributed.comms import Comms
from grape_ray.errors import ConfigError, DataError, Interrupted, LedgerError, UnsupportedLayer
from grape_ray.ledger.ledger import Ledger
from grape_ray.privacy.random_streams import poisson_batch
from grape_ray.storage import Storage
from grape_ray.tasks.task import loaded
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.dry_run import preflight_extremes
from grape_ray.training.export import PRIVACY_FILE, export
from grape_ray.training.micro_batches import micro_batches, share_of
from grape_ray.training.progress import Signal
from grape_ray.training.result import from_dict, read_result
from grape_ray.training.resume import plan_resume
from grape_ray.training.run import execute
from grape_ray.training.step import Step
from tests.support.plans import planned
from tests.support.tiny import Tiny, tiny

KEY, UNITS = b"s" * 32, 101  # of Tiny with a unit


def by_user(steps=4, expected_batch_size=20, examples_per_unit=3, method="grape", **task):
    config = tiny(steps, **task)
    privacy = dataclasses.replace(
        config.privacy,
        unit="user",
        expected_batch_size=expected_batch_size,
        examples_per_unit=examples_per_unit,
    )
    return dataclasses.replace(
        config, privacy=privacy, method=dataclasses.replace(config.method, name=method)
    )


@pytest.fixture
def plan(tmp_path):
    def make(config=None, run="r", **options):
        place = {"storage": str(tmp_path / "runs"), "key_path": str(tmp_path / "key"), **options}
        return planned(config or by_user(), run=run, **place)

    return make


def pieces(units, records, step, size, views=1, world=1):
    """(unit, its records) of every micro-batch of every rank."""
    batch, found = poisson_batch(KEY, step, len(units), 0.3), []
    for rank in range(world):
        share = share_of(batch[rank::world], records, units, KEY, step, 4)
        for part in micro_batches(share, size, views, True, None):
            rows = part.groups.numpy()
            assert part.mask is None
            assert len(rows) == views * len(part.records)
            assert len(rows) <= size or part.units == 1
            owners = rows[::views]
            assert (np.repeat(owners, views) == rows).all()
            found.append([part.records[owners == unit] for unit in range(part.units)])
    return found


def of_unit(units, part):
    """Whose the records are, with the records in order."""
    owner = np.empty(len(units.order), dtype=int)
    owner[units.order] = np.repeat(np.arange(len(units)), np.diff(units.offsets))
    (unit,) = set(owner[part].tolist())
    return unit, tuple(sorted(part.tolist()))


def test_the_batch_is_the_same_at_any_world_size_and_no_unit_is_split():
    generator = np.random.default_rng(0)
    units = Units.of(generator.integers(0, 60, 500) ** 2 // 30, 200)
    texts = Ragged.of([np.zeros(n, dtype=int) for n in generator.integers(1, 90, 500)])
    records = Records({"ids": texts})
    for step in range(5):
        whole = None
        for size, views, world in ((8, 1, 1), (1, 1, 1), (1000, 1, 1), (8, 3, 1), (8, 1, 2),
                                   (5, 2, 3)):  # fmt: skip
            found = [
                of_unit(units, part)
                for micro_batch in pieces(units, records, step, size, views, world)
                for part in micro_batch
            ]
            assert len({unit for unit, _ in found}) == len(found)
            assert whole in (None, sorted(found))
            whole = sorted(found)
        sampled = poisson_batch(KEY, step, 200, 0.3)
        sizes = {u: min(4, s) for u, s in zip(sampled.tolist(), units.sizes(sampled)) if s}
        assert {unit: len(records) for unit, records in whole} == sizes


def test_units_of_short_records_go_together():
    units = Units.of(np.array([0, 1, 2, 3, 0, 1, 2, 3]))
    lengths = [9, 2, 30, 4, 8, 3, 1, 5]
    records = Records({"ids": Ragged.of([np.zeros(n, dtype=int) for n in lengths])})
    share = share_of(np.arange(4), records, units, KEY, 0, 2)
    assert share.records.tolist() == [1, 5, 3, 7, 0, 4, 2, 6]


def step_of(task, comms=None, size=8, units=None, method="grape"):
    from grape_ray import Method, Privacy
    from grape_ray.engines import from_config
    from grape_ray.optim import make_optimizer
    from grape_ray.privacy.noise import NoiseStream

    model = task.build_model(0).double()
    private = method != "none"
    method = Method(name=method, rank=4, project_min_numel=200, optimizer="sgd", learning_rate=1.0)
    engine = from_config(model, Privacy(clip_norm=0.5), method, b"public")
    return Step(
        task=task, loss=lambda m, b: task.per_example_loss(m, {**b, "x": b["x"].double()}),
        model=model, engine=engine, optimizer=make_optimizer(model, engine, method, 3),
        records=task.load().train, comms=comms or Comms.local(), device=torch.device("cpu"),
        noise=NoiseStream(b"n" * 32) if private else None,
        sampling_prob=0.3, expected_batch_size=20,
        sampling_key=KEY, dropout_key=b"d" * 32, micro_batch_size=size, units=units,
        examples_per_unit=3,
    )  # fmt: skip


def sum_of(step, number=1):
    batch = poisson_batch(KEY, number, step._size(), 0.3)
    return step._summed(batch, number).tensors


def close(one, other):
    return all(torch.allclose(one[name], other[name], rtol=0, atol=1e-10) for name in one)


def test_the_sum_of_a_step_is_the_same_by_any_micro_batches_and_ranks():
    task, units = Tiny(), Tiny().load("user").units
    whole = sum_of(step_of(task, size=1000, units=units))
    for size in (1, 5, 32):
        assert close(sum_of(step_of(task, size=size, units=units)), whole)
    ranks = [sum_of(step_of(task, Comms(rank, 3), units=units)) for rank in range(3)]
    assert close({name: sum(part[name] for part in ranks) for name in whole}, whole)
    single = Units.of(np.arange(200))
    assert close(sum_of(step_of(task, units=single)), sum_of(step_of(task)))


SEEDS: list[int] = []


class Seeds(Tiny):
    """Notes the seed of each micro-batch."""

    def collate(self, records, indices):
        SEEDS.append(torch.initial_seed())
        return super().collate(records, indices)


def test_no_two_micro_batches_of_any_rank_draw_the_same_masks():
    SEEDS.clear()
    for rank in range(3):
        step = step_of(Seeds(), Comms(rank, 3), size=4, units=Tiny().load("user").units)
        for number in (1, 2):
            sum_of(step, number)
    assert len(set(SEEDS)) == len(SEEDS) > 20


def test_the_baseline_is_divided_by_the_number_of_sampled_units():
    step = step_of(Tiny(), units=Tiny().load("user").units, method="none")
    before = {name: p.detach().clone() for name, p in step.engine.params.items()}
    summed, count = sum_of(step), len(poisson_batch(KEY, 1, UNITS, 0.3))
    step(1)
    for name, param in step.engine.params.items():
        assert torch.allclose(param, before[name] - summed[name] / count, rtol=0, atol=1e-9)


@dataclasses.dataclass(frozen=True)
class Views(Tiny):
    """Each image as it is, shifted, and mirrored."""

    views: int = 3
    name: str = "views"

    def collate(self, records, indices):
        batch = super().collate(records, indices)
        x = batch["x"].view(-1, 8, 8)
        views = torch.stack([x, x.roll(1, 2), x.flip(2)], 1)[:, : self.views]
        return {"x": views.flatten(0, 1).flatten(1), "labels": batch["labels"].repeat_interleave(3)}


def test_views_of_a_record_are_averaged_before_the_clip():
    task, step = Views(), step_of(Views())
    records, batch = task.load().train, poisson_batch(KEY, 1, 200, 0.3)
    wanted = None
    for record in batch:
        rows = task.collate(records, np.array([record]))
        alone = step.engine.clipped_sum(
            step.loss, rows, groups=torch.zeros(3, dtype=torch.int64), units=1, step=1
        )
        wanted = alone if wanted is None else wanted + alone
    assert close(sum_of(step), wanted.tensors)
    # with units, all rows of a unit are averaged
    units = Units.of(np.arange(200) // 2)
    both = dataclasses.replace(step, units=units)
    assert close(sum_of(both), sum_of(dataclasses.replace(both, micro_batch_size=1)))
    preflight_extremes(dataclasses.replace(tiny(), task=task), task.load())


def test_a_task_with_other_rows_than_its_views_is_refused(tmp_path):
    task = Views(views=2)
    with pytest.raises(ConfigError, match=r"per_example_loss|batch|groups"):
        sum_of(step_of(task))
    with pytest.raises(ConfigError, match=r"task\.views, got 0"):
        planned(dataclasses.replace(tiny(), task=Views(views=0)), storage=str(tmp_path))


def test_a_run_by_user_from_its_plan_to_its_export(plan, tmp_path):
    made = plan(by_user(public=False))
    assert (made.units, made.records, made.sampling_prob) == (UNITS, 200, 20 / UNITS)
    assert made.dry_run is not None
    sigma = calibration.noise_multiplier(8.0, 1e-5, 20 / UNITS, 4 + 12)
    assert made.noise_multiplier == pytest.approx(sigma)
    result = execute(made, Comms.local())
    assert (result.unit, result.examples_per_unit) == ("user", 3)
    assert read_result(Storage(tmp_path / "runs" / "r")) == result
    ledger = Ledger.open(made.ledger, create=False)
    assert (ledger.state.unit, ledger.state.study("r").study.unit) == ("user", "user")
    known = json.loads((tmp_path / "runs" / "r" / "run.json").read_text())
    assert (known["unit"], known["privacy"]["examples_per_unit"]) == ("user", 3)
    export(str(tmp_path / "runs" / "r"), tmp_path / "out", ("tests.support.tiny",))
    said = json.loads((tmp_path / "out" / PRIVACY_FILE).read_text())
    assert (said["unit"], said["examples_per_unit"]) == ("user", 3)
    assert "all training records of one unit (user)" in said["statement"]
    shown = CliRunner().invoke(main, ["ledger", "show", str(tmp_path / "runs" / "r")])
    assert "privacy unit user" in shown.output


@pytest.mark.parametrize("method", ["dp_adam", "ghost", "bookkeeping", "randomized", "dp_galore",
                                    "dp_zero", "none"])  # fmt: skip
def test_every_method_trains_by_user(plan, method):
    result = execute(plan(by_user(2, method=method)), Comms.local())
    assert result.steps == 2
    assert result.unit == "user"


def test_a_run_by_user_is_resumed(plan, tmp_path):
    signals = iter([Signal.NONE, Signal.STOP])
    with pytest.raises(Interrupted):
        execute(plan(), Comms.local(), RunCallbacks(agree_on_signal=lambda own: next(signals)))
    again = plan_resume(str(tmp_path / "runs" / "r"), key_path=str(tmp_path / "key"),
                        trust=("tests.support.tiny",))  # fmt: skip
    assert (again.units, again.config.privacy.unit_limit) == (UNITS, 3)
    result = execute(again, Comms.local())
    assert (result.steps, result.attempts, result.unit) == (4, 2, "user")
    assert checkpoint.latest(Storage(tmp_path / "runs" / "r")) is not None


def test_a_ledger_of_one_unit_refuses_another(plan, tmp_path):
    options = {"ledger": str(tmp_path / "ledger"), "ledger_budget": (20.0, 1e-4)}
    plan(by_user(public=False), **options)
    before = sorted((tmp_path / "ledger").iterdir())
    for unit in ("", "hospital"):
        config = by_user(public=False)
        other = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, unit=unit))
        got = unit or "record"
        with pytest.raises(LedgerError, match=f"another privacy unit, got '{got}', expected user"):
            plan(other, run="other", ledger=options["ledger"])
    assert sorted((tmp_path / "ledger").iterdir()) == before
    assert not (tmp_path / "runs" / "other").exists()
    again = plan(by_user(public=False, examples_per_unit=1), run="s", ledger=options["ledger"])
    assert again.ledger == options["ledger"]


def test_a_study_of_another_unit_pays_for_no_run(plan):
    made = plan(tiny(4))
    study = Ledger.open(made.ledger, create=False).state.study("r").study
    with pytest.raises(ConfigError, match="another "):
        plan(by_user(), run="t", study=study, ledger=made.ledger)
    same = dataclasses.replace(
        study, mechanism=dataclasses.replace(study.mechanism, sampling_prob=20 / UNITS)
    )
    config = by_user()
    privacy = dataclasses.replace(config.privacy, noise_multiplier=1.0)
    with pytest.raises(ConfigError, match=r"another privacy unit than study 'r', got 'user'"):
        plan(dataclasses.replace(config, privacy=privacy), run="t", study=same, ledger=made.ledger)


def test_a_worker_that_sees_other_units_is_refused(plan):
    with pytest.raises(DataError, match="the training data changed"):
        execute(dataclasses.replace(plan(), units=UNITS - 1), Comms.local())


def test_what_counts_are_units(plan, tmp_path):
    with pytest.raises(ConfigError, match=r"150 of 101 units \(user\).*choose at most 101"):
        plan(by_user(expected_batch_size=150))
    config = by_user(public=False)
    large = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, delta=0.0098))
    with pytest.raises(ConfigError, match=r"over the number of units \(user\).*below 1 / 101"):
        plan(dataclasses.replace(large, privacy=dataclasses.replace(large.privacy, delta=0.01)))
    plan(large, run="below", ledger=str(tmp_path / "ledger"))


class NoUnits(Tiny):
    """A task that knows no columns."""

    def load(self):
        return super().load()


class Careless(Tiny):
    """A task that takes a unit and gives other units than it was asked for."""

    def load(self, unit=""):
        given = super().load("user")
        if unit == "none":
            return dataclasses.replace(given, units=None)
        return dataclasses.replace(given, units=Units.of(np.arange(7)))


def test_a_task_must_give_the_units_that_were_asked_for():
    assert len(loaded(Tiny(), "user").units) == UNITS
    with pytest.raises(ConfigError, match=r"privacy\.unit.*NoUnits\.load takes no unit"):
        loaded(NoUnits(), "user")
    with pytest.raises(ConfigError, match=r"gives, got 'no units', expected those of column"):
        loaded(Careless(), "none")
    with pytest.raises(ConfigError, match=r"units, got 'of 7 records', expected of the 200"):
        loaded(Careless(), "user")
    with pytest.raises(ConfigError, match=r"gives, got 'units', expected none"):
        loaded(Careless())


@pytest.mark.parametrize(
    ("words", "message"),
    [(["privacy.unit=record"], "privacy.unit, got 'record'"),
     (["privacy.unit=a\x00b"], "printable"),
     (["privacy.examples_per_unit=0"], "an integer from 1"),
     (["privacy.examples_per_unit=1.5"], "examples_per_unit")],
)  # fmt: skip
def test_other_units_are_refused_by_the_config(words, message):
    with pytest.raises(ConfigError, match=message):
        tiny().override(words)


def test_without_a_unit_the_records_of_one_do_not_matter(plan, tmp_path):
    config = tiny(2)
    plan(config)
    privacy = dataclasses.replace(config.privacy, examples_per_unit=9)
    plan(dataclasses.replace(config, privacy=privacy))  # the same run
    file = tmp_path / "runs" / "r" / "run.json"
    known = json.loads(file.read_text())
    assert known.pop("unit") == "record"
    for field in ("unit", "examples_per_unit"):
        del known["privacy"][field]
    file.write_text(json.dumps(known))  # as an earlier version wrote it
    assert plan(config).run == "r"
    result = execute(plan(config), Comms.local())
    assert (result.unit, result.examples_per_unit) == ("record", None)
    old = result.as_dict()
    del old["unit"], old["examples_per_unit"]
    assert from_dict(old) == result
    opened = json.loads((tmp_path / "runs" / "r" / "ledger" / "00000000.json").read_text())
    assert "unit" not in opened["payload"]  # as every earlier ledger of records


def test_a_dry_run_compares_averages(monkeypatch):
    from grape_ray.engines import grouping

    config = by_user()
    assert preflight_extremes(config, loaded(config.task, "user"))[2].worst < 1e-3
    # rows that are summed in the place of averaged, as a lost share would
    made = grouping.Groups.__init__

    def sums(self, *args):
        made(self, *args)
        self.shares = torch.ones_like(self.shares)

    monkeypatch.setattr(grouping.Groups, "__init__", sums)
    with pytest.raises(UnsupportedLayer, match="away from a backward pass an example"):
        preflight_extremes(config, loaded(config.task, "user"))
