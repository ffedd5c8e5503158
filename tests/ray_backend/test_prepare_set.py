"""Prepared sets in shards: what is in them, who takes what, and that batches stay the same."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.data.shards import ShardedRagged
from grape_ray.distributed.comms import Comms
from grape_ray.errors import ConfigError, DataError, StorageError, TaskFailed
from grape_ray.optim import make_optimizer
from grape_ray.privacy.noise import NoiseStream
from grape_ray.privacy.random_streams import poisson_batch
from grape_ray.ray_backend.prepare_set import prepare_set
from grape_ray.ray_backend.train import train
from grape_ray.tasks.text_classification import TextClassification
from grape_ray.tasks.text_generation import TextGeneration
from grape_ray.training.build import build_engine
from grape_ray.training.step import Step
from tests.support.bucket import s3_bucket
from tests.support.grants import granted
from tests.support.tiny import Tiny
from tests.support.word_model import WORDS, save_decoder, save_encoder

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A task on a table, and the sets that were prepared of it by record and by user."""
    root = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    rows = [
        {
            "who": f"u{int(rng.integers(40))}",
            "text": " ".join(rng.choice(WORDS, size=int(rng.integers(1, 9)))) + f" {number}",
            "label": "ab"[number % 2],
        }
        for number in range(400)
    ]
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = TextClassification(
        str(save_encoder(root / "bert")), str(root / "t.jsonl"), held_out=0.2, held_out_public=True,
        labels=("a", "b"),
    )  # fmt: skip
    config = Config(
        task=task,
        privacy=Privacy(expected_batch_size=16, steps=2, delta=1e-4),
        method=Method(name="bookkeeping"),
        performance=Performance(micro_batch_size=8),
    )
    by_user = replace(config, privacy=replace(config.privacy, unit="who"))
    counts = prepare_set(config, str(root / "set"), 6), prepare_set(by_user, str(root / "users"), 6)
    return root, config, by_user, counts


def test_a_set_holds_what_the_file_does(world):
    root, config, _, counts = world
    whole, prepared = config.task.load(), replace(config.task, data=str(root / "set")).load()
    assert counts[0] == len(whole.train) == len(prepared.train)
    assert prepared.dataset_id == whole.dataset_id  # and so one ledger
    assert prepared.columns == whole.columns
    for name in ("train", "validation"):
        mine, theirs = getattr(whole, name), getattr(prepared, name)
        assert np.array_equal(mine.digests.rows, theirs.digests.rows)
        some = np.array([3, 0, len(mine) - 1])
        for one, other in zip(
            config.task.collate(mine, some).values(), config.task.collate(theirs, some).values()
        ):
            assert one.tolist() == other.tolist()
    assert prepared.train.extremes() == whole.train.extremes()


def test_a_unit_lies_in_one_shard(world):
    root, _, by_user, _ = world
    found = replace(by_user.task, data=str(root / "users")).load(unit="who")
    assert found.units is not None
    for world_size in (1, 2, 3, 5):
        owners = [
            set(found.train.owners(found.units.records_of(unit), world_size).tolist())
            for unit in range(len(found.units))
        ]
        assert all(len(mine) == 1 for mine in owners)
        assert set().union(*owners) == set(range(world_size))


@pytest.mark.parametrize("unit", ["", "who"])
def test_ranks_take_each_unit_once_whatever_their_number(world, unit):
    root, config, *_ = world
    data = replace(config.task, data=str(root / ("users" if unit else "set"))).load(unit=unit)

    class Rank:
        def __init__(self, rank, world_size):
            self.rank, self.world_size = rank, world_size

    for number in range(20):
        batch = poisson_batch(bytes(32), number, data.unit_count, 0.3)
        for world_size in (1, 2, 5):
            shares = []
            for rank in range(world_size):
                step = object.__new__(Step)
                own = {"records": data.train, "units": data.units, "comms": Rank(rank, world_size)}
                for name, value in own.items():
                    object.__setattr__(step, name, value)
                shares.append(step._mine(batch))
            assert sorted(np.concatenate(shares).tolist()) == batch.tolist()


def test_a_rank_fetches_its_own_shards_alone(world, tmp_path, monkeypatch):
    root, config, _, _ = world
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = replace(config.task, data=str(root / "set")).load()
    assert isinstance(data.train.columns["input_ids"], ShardedRagged)
    mine = np.flatnonzero(data.train.owners(np.arange(len(data.train)), 2) == 1)
    config.task.collate(data.train, mine)
    fetched = sorted(p.name for p in (tmp_path / "grape-ray" / "shards").rglob("train-*.arrow"))
    assert fetched == ["train-00003.arrow", "train-00004.arrow", "train-00005.arrow"]


def stepped(config, comms):
    """The weights after three private steps of this rank, with keys of the test's own."""
    task, unit = config.task, config.privacy.unit
    data, model = task.load(unit=unit), task.build_model(0)
    engine = build_engine(config, model)
    step = Step(
        task=task, loss=task.per_example_loss, model=model, engine=engine,
        optimizer=make_optimizer(model, engine, config.method, 3), records=data.train, comms=comms,
        device=torch.device("cpu"), noise=NoiseStream(b"n" * 32), sampling_prob=0.25,
        expected_batch_size=config.privacy.expected_batch_size, sampling_key=b"s" * 32,
        dropout_key=b"d" * 32, micro_batch_size=8, units=data.units,
        examples_per_unit=config.privacy.examples_per_unit,
    )  # fmt: skip
    for number in range(3):
        step(number, granted(0.7))
    return {name: param.detach() for name, param in model.named_parameters()}


def rank_main(rank, world_size, place, config):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world_size
    )
    torch.save(stepped(config, Comms.distributed()), f"{place}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("unit", [pytest.param("", marks=pytest.mark.slow), "who"])
def test_two_ranks_end_at_the_weights_of_one(world, tmp_path, unit):
    """Each rank computes what lies in its shards; batches and noise are those of one rank."""
    root, config, by_user, _ = world
    config = by_user if unit else config
    # by plain descent: Adam would make differences of any size of gradients that are all but zero
    config = replace(config, method=replace(config.method, optimizer="sgd", learning_rate=0.5))
    config = replace(
        config, task=replace(config.task, data=str(root / ("users" if unit else "set")))
    )
    alone, start = stepped(config, Comms.local()), config.task.build_model(0)
    mp.spawn(rank_main, args=(2, tmp_path, config), nprocs=2)
    moved = max(
        float((param - alone[name]).detach().abs().max())
        for name, param in start.named_parameters()
    )
    assert moved > 0.01
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, param in alone.items():
            torch.testing.assert_close(found[name], param, rtol=0, atol=1e-5 * moved)


@pytest.mark.slow
def test_two_workers_train_on_a_prepared_set(world, tmp_path):
    root, _, by_user, _ = world
    task = replace(by_user.task, data=str(root / "users"))
    where = {"storage": str(tmp_path / "runs"), "key_path": str(tmp_path / "key")}
    config = replace(by_user, task=task, privacy=replace(by_user.privacy, delta=1e-3))
    config = config.override(["performance.num_workers=2"])
    result = train(config, run="t", **where)
    assert (result.steps, result.workers) == (2, 2)
    assert "accuracy" in result.metrics


def test_another_set_is_refused(world, tmp_path):
    root, config, *_ = world
    with pytest.raises(DataError, match="of another fields"):
        replace(config.task, data=str(root / "set"), max_tokens=5).load()
    with pytest.raises(DataError, match="of another unit"):
        replace(config.task, data=str(root / "set")).load(unit="who")
    with pytest.raises(StorageError, match="there already"):
        prepare_set(config, str(root / "set"))
    with pytest.raises(ConfigError, match="reads a dataset"):
        prepare_set(Config(task=Tiny()), str(tmp_path / "x"))
    with pytest.raises(DataError, match="another label"):
        prepare_set(
            replace(config, task=replace(config.task, labels=("x", "y"))), str(tmp_path / "x")
        )
    assert not (tmp_path / "x" / "index.json").exists()


def test_a_row_is_named_by_its_number_in_the_file(world, tmp_path):
    """Though rows were left out, and sorted by unit."""
    _, config, *_ = world
    rows = [{"who": f"u{n * 7 % 10}", "ask": "grape", "text": "wine"} for n in range(60)]
    rows[3]["text"] = ""  # left out, which moves no other's number
    rows[41]["ask"] = "grape " * 20
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = TextGeneration(
        str(save_decoder(tmp_path / "llama")), str(tmp_path / "t.jsonl"), held_out=0.2,
        prompt_column="ask", max_tokens=12, drop_bad_rows=True,
    )  # fmt: skip
    own = replace(config, task=task, privacy=replace(config.privacy, unit="who"))
    with pytest.raises(DataError, match=r"nothing to learn in row 41'"):
        prepare_set(own, str(tmp_path / "x"), 4)
    with pytest.raises(DataError, match=r"nothing to learn in row 41'"):
        task.load(unit="who")


@dataclass(frozen=True)
class Quoting(TextClassification):
    """Fails on a record, and quotes it."""

    def encode(self, table, facts):
        raise ValueError(f"ZQXJRECORD: {table.texts('text')[0]}")


def test_an_error_on_a_node_quotes_no_record(world, tmp_path):
    _, config, *_ = world
    fields = {f.name: getattr(config.task, f.name) for f in dataclass_fields(config.task)}
    with pytest.raises(TaskFailed, match="ValueError") as raised:
        prepare_set(replace(config, task=Quoting(**fields)), str(tmp_path / "x"), 2)
    assert raised.value.__cause__ is None
    assert "ZQXJRECORD" not in str(raised.value)


@pytest.mark.slow
def test_each_node_fetches_its_half_and_a_lost_one_is_replaced(tmp_path):
    with s3_bucket() as bucket:
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.two_nodes", str(tmp_path), f"{bucket}/set"],
            capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=500, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["steps"], result["workers"], result["attempts"]) == (300, 2, 2)
    shares = [fetched / result["total"] for fetched in result["fetched"]]
    assert sum(shares) == pytest.approx(1, abs=0.01)
    assert all(0.4 < share < 0.6 for share in shares)
    assert 0.4 < result["later"] / result["total"] < 0.6
