"""A small OPT whose weights are spread over real ranks (FSDP2) is trained as the whole one is."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers

from grape_ray import Config, Method, Performance, Privacy, checkpoint
from grape_ray.data.units import Units
from grape_ray.distributed import sharding
from grape_ray.distributed.comms import Comms
from grape_ray.engines import from_config
from grape_ray.errors import ConfigError, Interrupted
from grape_ray.optim import make_optimizer, round_stochastically
from grape_ray.privacy.noise import NoiseStream
from grape_ray.privacy.random_streams import public_bits, public_normals
from grape_ray.tasks.text_generation import TextGeneration
from grape_ray.training.callbacks import RunCallbacks
from grape_ray.training.export import export
from grape_ray.training.progress import Signal
from grape_ray.training.run import execute
from grape_ray.training.step import Step
from tests.support.grants import granted
from tests.support.plans import planned, same_streams

STEPS, CPU = 3, torch.device("cpu")
UNITS = Units.of(np.arange(16) ** 2 % 11)  # of the texts: 1, 1, 0, 2, 3, 3, 0, 0, 0, 3


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Sixteen texts of different lengths and a tied, random OPT."""
    root = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=259, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, ffn_dim=40,
        max_position_embeddings=64, word_embed_proj_dim=24, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, init_std=0.2,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(root / "opt")
    texts = ["".join(np.random.default_rng(i).choice(list("grape "), 4 + 2 * i)) for i in range(16)]
    pq.write_table(pa.table({"text": texts}), root / "texts.parquet")
    where = str(root / "texts.parquet")
    return TextGeneration(
        model=str(root / "opt"),
        data=where,
        validation=where,
        tokenizer="bytes",
        max_tokens=32,
        public=True,
    )


def run(
    task, comms, method, sharded=False, recompute=False, dtype=torch.float64, micro=3,
    by_unit=False, moments="transfer",
):  # fmt: skip
    """Three private steps; returns (whole weights, metrics, largest numel held of any parameter
    over the whole's).
    """
    model, records = task.build_model(0).to(dtype), task.load().train
    privacy = Privacy(clip_norm=0.7)
    config = Method(
        name=method,
        rank=4,
        refresh=2,
        learning_rate=0.01,
        weight_decay=0.1,
        project_min_numel=200,
        moments=moments,
    )
    trial = from_config(model, privacy, config, b"public")
    if sharded:
        layouts = trial.learn(task.per_example_loss, task.collate(records, np.array([0, 15])))
        sharding.shard(model, CPU, recompute=recompute)
        engine = from_config(model, privacy, config, b"public")
        engine.adopt(layouts)
    else:
        engine = trial
        if recompute:
            sharding.recompute_blocks(model)
    step = Step(
        task=task, loss=task.per_example_loss, model=model, engine=engine, records=records,
        comms=comms, device=CPU,
        optimizer=make_optimizer(model, engine, config, STEPS, b"rounding"),
        noise=NoiseStream(b"n" * 32), sampling_prob=0.3,
        expected_batch_size=5, sampling_key=b"s" * 32, dropout_key=b"d" * 32,
        micro_batch_size=micro, units=UNITS if by_unit else None, examples_per_unit=3,
    )  # fmt: skip
    for number in range(STEPS):
        step(number, granted(0.5))
    whole = {
        n: (p.full_tensor() if sharded else p).detach().clone() for n, p in model.named_parameters()
    }
    held = max(sharding.local(p).numel() / p.numel() for p in model.parameters())
    return whole, task.evaluate(model, records), held, comms.bytes_sent


def rank_main(rank, world, path, out, task, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    found = [run(task, Comms.distributed(), **case) for case in cases]
    torch.save(found, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world, tmp_path, task, cases):
    mp.spawn(rank_main, args=(world, tmp_path / "rendezvous", tmp_path, task, cases), nprocs=world)
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(world)]


BF16 = {"method": "grape", "dtype": torch.bfloat16, "micro": 1}
CASES = {  # on this many ranks
    1: [{"method": "grape"}],
    2: [
        {"method": "grape"},
        {"method": "grape", "recompute": True},
        {"method": "bookkeeping"},
        {"method": "dp_adam"},
        BF16,
        {"method": "grape", "by_unit": True},
        {"method": "grape", "moments": "lifted"},
    ],
    4: [{"method": "grape"}, {"method": "grape", "by_unit": True}],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, task):
    """World size -> rank -> case -> what `run` returned there."""
    cases = {world: [{**case, "sharded": True} for case in cases] for world, cases in CASES.items()}
    return {
        world: on_ranks(world, tmp_path_factory.mktemp(f"world{world}"), task, cases[world])
        for world in cases
    }


@pytest.mark.parametrize(
    ("world", "number"),
    [(w, n) for w, cases in CASES.items() for n, case in enumerate(cases) if case is not BF16],
)
def test_a_sharded_model_is_trained_as_a_whole_one(found, task, world, number):
    alone = ("method", "by_unit", "moments")
    case = {key: value for key, value in CASES[world][number].items() if key in alone}
    weights, metrics, _, _ = run(task, Comms.local(), **case)
    for theirs, their_metrics, held, _ in (answers[number] for answers in found[world]):
        assert theirs.keys() == weights.keys()
        for name in weights:
            torch.testing.assert_close(theirs[name], weights[name], rtol=0, atol=1e-9, msg=name)
        assert their_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-9)
        assert held <= 1.6 / world or world == 1


def test_only_coordinates_are_reduced(found):
    sent = {CASES[2][number]["method"]: answer[3] for number, answer in enumerate(found[2][0])}
    # at rank 4 of a width of 24
    assert sent["grape"] < 0.5 * sent["bookkeeping"] == 0.5 * sent["dp_adam"]


def test_recomputed_blocks_change_nothing(task):
    whole, again = (
        run(task, Comms.local(), "grape"),
        run(task, Comms.local(), "grape", recompute=True),
    )
    for name in whole[0]:
        torch.testing.assert_close(again[0][name], whole[0][name], rtol=0, atol=1e-12)


def test_bfloat16_weights_are_the_same_on_any_number_of_ranks(found, task):
    alone = run(task, Comms.local(), **BF16)
    theirs = found[2][0][CASES[2].index(BF16)][0]
    for name, mine in alone[0].items():
        assert theirs[name].dtype == torch.bfloat16
        # sums over ranks differ in the last bit, which a rounding may turn over
        assert (theirs[name] != mine).float().mean() < 0.02, name
        torch.testing.assert_close(theirs[name].float(), mine.float(), rtol=0.02, atol=2e-3)


def run_rank(rank, world, path, plan, stop_after):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    notices = iter([Signal.NONE] * (stop_after - 1) + [Signal.STOP]) if stop_after else None
    try:
        execute(
            plan,
            Comms.distributed(),
            RunCallbacks(
                begin_attempt=same_streams,
                agree_on_signal=lambda own: next(notices) if notices else Signal.NONE,
            ),
        )
    except Interrupted:
        assert stop_after
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_run_is_resumed_on_another_number_of_ranks(tmp_path, task):
    config = Config(
        task=task,
        privacy=Privacy(expected_batch_size=6, steps=4, spare_steps=8),
        method=Method(
            rank=4, refresh=3, learning_rate=0.01, project_min_numel=200, moments="lifted"
        ),
        performance=Performance(
            micro_batch_size=3, num_workers=2, sharded=True, recompute=True, charge_chunk=2
        ),
    )
    plan = planned(config, run="a", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    mp.spawn(run_rank, args=(2, tmp_path / "first", plan, 2), nprocs=2)
    half = checkpoint.latest(plan.folder())
    assert half is not None
    assert half.step == 2
    mp.spawn(run_rank, args=(3, tmp_path / "second", plan, 0), nprocs=3)
    found = checkpoint.latest(plan.folder())
    alone = config.override(["performance.sharded=false", "performance.num_workers=0"])
    whole = planned(alone, run="b", storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    result = execute(whole, Comms.local(), RunCallbacks(begin_attempt=same_streams))
    wanted = checkpoint.latest(whole.folder())
    assert found is not None
    assert wanted is not None
    assert found.step == wanted.step == result.steps == 4
    for name, tensor in wanted.model.items():
        torch.testing.assert_close(found.model[name], tensor, rtol=0, atol=2e-5, msg=name)
    for name in (n for n, t in wanted.optimizer.items() if isinstance(t, torch.Tensor)):
        torch.testing.assert_close(
            found.optimizer[name], wanted.optimizer[name], rtol=0, atol=1e-4, msg=name
        )
    export(str(tmp_path / "runs" / "a"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["method.name=none"], "one of grape"), (["performance.num_workers=0"], "0 workers")],
)
def test_what_cannot_be_sharded_is_refused(tmp_path, task, words, reason):
    config = Config(task=task, performance=Performance(num_workers=2, sharded=True)).override(words)
    with pytest.raises(ConfigError, match=reason):
        planned(config, storage=str(tmp_path / "runs"), key_path=str(tmp_path / "key"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.statistical
def test_stochastic_rounding_keeps_the_mean():
    """False-alarm rate 6e-5 (four standard errors)."""
    exact = torch.full((1000, 100), 1.0 + 0.3 * 2**-7)
    bits = public_bits(b"k", "w", 0, (1000, 100))
    rounded = round_stochastically(exact, bits).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    share = (rounded > 1).float().mean()
    assert abs(float(share) - 0.3) < 4 * (0.3 * 0.7 / 1e5) ** 0.5
    most = torch.tensor([32767], dtype=torch.int16)
    assert round_stochastically(torch.tensor([float("inf")]), most).isinf().all()


def test_rows_of_public_streams_are_the_same_alone():
    whole, bits = public_normals(b"k", "w", 3, (2500, 4)), public_bits(b"k", "w", 3, (2500, 4))
    for part in (
        slice(0, 10),
        slice(1000, 1030),
        slice(1023, 1025),
        slice(2048, 2500),
        slice(7, 7),
    ):
        assert (public_normals(b"k", "w", 3, (2500, 4), part) == whole[part]).all()
        assert (public_bits(b"k", "w", 3, (2500, 4), part) == bits[part]).all()
    assert abs(np.corrcoef(whole[:1024].ravel(), whole[1024:2048].ravel())[0, 1]) < 0.08
