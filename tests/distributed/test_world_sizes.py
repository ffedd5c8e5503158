"""Real ranks over gloo: the same batch, the same noise and the same update at world size 1, 2 and
4.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grape_ray import Method, make_engine
from grape_ray.distributed.comms import Comms
from grape_ray.optim import make_optimizer
from grape_ray.privacy.noise import NoiseStream, nonprivate_mean, privatize
from grape_ray.privacy.random_streams import poisson_batch
from tests.support import zoo
from tests.support.grants import granted
from tests.support.oracle import worst

SAMPLING, NOISE = b"s" * 32, b"n" * 32


def train(comms, method, steps=3):
    """Three steps on this rank's share; returns released gradients and final weights."""
    model, data = zoo.build_layer("bare parameters"), zoo.layer_batch(rows=40)
    engine = make_engine(model, method, 0.8, key=b"w", rank=3, project_min_numel=100, refresh=2)
    optimizer = make_optimizer(
        model, engine, Method(name=method, rank=3, learning_rate=0.05), steps
    )
    stream, released, batches = NoiseStream(NOISE), [], []
    for step in range(steps):
        # the first batch is empty or nearly so on every rank
        chosen = poisson_batch(SAMPLING, step, 40, 0.1 if step else 1e-3)
        mine = chosen[comms.rank :: comms.world_size]
        summed = engine.clipped_sum(
            zoo.layer_loss, {"x": data["x"][torch.from_numpy(mine)]}, step=step
        )
        if engine.private:
            gradient = privatize(
                summed, stream, step=step, grant=granted(0.7), expected_batch_size=4, comms=comms
            )
        else:
            gradient = nonprivate_mean(summed, step=step, batch_size=4, comms=comms)
        released.append({n: t.clone() for n, t in gradient.tensors.items()})
        batches.append(chosen)
        optimizer.step(gradient, step)
    return released, {n: p.detach() for n, p in model.named_parameters()}, batches


def noise_alone(comms, method):
    engine = make_engine(
        zoo.build_layer("bare parameters"), method, 1.0, rank=3, project_min_numel=100
    )
    if not engine.private:
        return {}
    return dict(
        privatize(
            engine.empty_sum(),
            NoiseStream(NOISE),
            step=5,
            grant=granted(1),
            expected_batch_size=3,
            comms=comms,
        ).tensors
    )


def rank_main(rank, world, path, method, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    comms = Comms.distributed()
    torch.save(
        (*train(comms, method), noise_alone(comms, method), comms.bytes_sent), f"{out}/{rank}.pt"
    )
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world", "method"),
    [
        (2, "grape"),
        (2, "dp_adam"),
        (2, "dp_zero"),
        (2, "none"),
        pytest.param(4, "grape", marks=pytest.mark.slow),
        pytest.param(4, "dp_adam", marks=pytest.mark.slow),
    ],
)
def test_world_size_changes_nothing(world, method, tmp_path):
    released, weights, batches = train(Comms.local(), method)
    noise = noise_alone(Comms.local(), method)
    mp.spawn(rank_main, args=(world, tmp_path / "rendezvous", method, tmp_path), nprocs=world)
    for rank in range(world):
        theirs, their_weights, their_batches, their_noise, sent = torch.load(
            tmp_path / f"{rank}.pt", weights_only=False
        )
        assert all((a == b).all() for a, b in zip(batches, their_batches))
        assert all((noise[n] == their_noise[n]).all() for n in noise)  # bitwise
        for mine, other in zip(released, theirs):
            assert worst(other, mine) < 1e-12  # the sum over ranks is associative up to rounding
        assert worst(their_weights, weights) < 1e-10
        total = sum(t.numel() for t in released[0].values())
        share = -(-total // world) * (world - 1)
        steps = 3 if method == "none" else 4  # a reduction and a gather of fp64 each, no more
        assert sent == steps * 2 * share * 8


def test_each_rank_draws_only_the_slice_it_owns():
    drawn = []

    class Watching(NoiseStream):
        def normals(self, step, start, count, device):
            drawn.append((start, count))
            return super().normals(step, start, count, device)

    class Second(Comms):
        """Rank 1 of 3 without its peers."""

        def reduce_slice(self, flat):
            low, high = self.slice_of(flat.numel())
            return flat[low:high]

        def gather_slices(self, mine, length):
            return torch.zeros(length, dtype=mine.dtype)

    engine = make_engine(zoo.build_layer("Linear"), "dp_adam", 1.0)
    total = sum(p.numel() for p in engine.params.values())
    privatize(
        engine.empty_sum(),
        Watching(NOISE),
        step=0,
        grant=granted(1),
        expected_batch_size=1,
        comms=Second(1, 3),
    )
    share = -(-total // 3)
    assert drawn == [(share, min(share, total - share))]
    assert np.isclose(
        sum(Comms(r, 3).slice_of(total)[1] - Comms(r, 3).slice_of(total)[0] for r in range(3)),
        total,
    )
