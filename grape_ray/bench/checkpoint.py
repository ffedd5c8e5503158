"""What checkpoints cost training: steps with one every few steps beside steps without, in turns, in
one run against an object store.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from grape_ray import checkpoint
from grape_ray.bench.models import Setting, build
from grape_ray.bench.paid import paid_steps
from grape_ray.checkpoint.manager import CheckpointManager, Occasion
from grape_ray.config.schema import Config, Method, Performance
from grape_ray.distributed.comms import Comms
from grape_ray.engines import from_config
from grape_ray.errors import StorageError
from grape_ray.optim import make_optimizer
from grape_ray.privacy.noise import NoiseStream, privatize
from grape_ray.storage import Storage

_BUCKET = "bench"


@dataclass(frozen=True)
class Stall:
    """Seconds a step without and with checkpoints (medians over rounds), their ratio, and what was
    written.

    Attributes:
        rate: steps a second with checkpoints over that without, the median over rounds of
            neighbouring blocks.
        full_bytes, delta_bytes: of one checkpoint. copy_s: the longest that `save` held training
            up. written, skipped: checkpoints.
    """

    without_s: float
    with_s: float
    rate: float
    full_bytes: int
    delta_bytes: int
    copy_s: float
    written: int
    skipped: int


def measure(
    where: Setting, storage: str, rank: int, every: int, deltas: int, rounds: int, block: int
) -> Stall:
    """Takes `rounds` blocks of `block` steps without and as many with checkpoints, in turns.

    A checkpoint is begun before every `every` steps of its block, so that each is written while
    steps of that block are taken, as in a long run; an upload in flight at the block's end is
    waited for before the next block begins, and is not timed.
    """
    model, loss, batch = build(where)
    method = Method(rank=rank, refresh=10 * block)
    config = Config(
        task=None,
        method=method,
        performance=Performance(delta_checkpoints=deltas, keep_checkpoints=2),
    )
    engine = from_config(model, config.privacy, method, b"public")
    optimizer, noise = make_optimizer(model, engine, method, 10**6), NoiseStream(bytes(32))
    place = Storage(storage)
    saver = CheckpointManager(config, Comms.local(), place, model, optimizer)
    saver.begin_attempt(0)
    grant = paid_steps(engine.estimated)
    step, plain, saving, copies, written, sizes = 0, [], [], [0.0], 0, {True: 0, False: 0}
    for index in range(2 * rounds + 1):
        checkpoints, began = index % 2 == 0, time.monotonic()
        for done in range(block):
            if checkpoints and done % every == 0:
                asked = time.monotonic()
                written += saver.save(step, {}, Occasion.DUE)
                copies.append(time.monotonic() - asked)
            released = privatize(
                engine.clipped_sum(loss, batch, step=step),
                noise,
                grant=grant,
                expected_batch_size=where.rows,
            )
            optimizer.step(released)
            step += 1
        if index:  # the first block warms up
            (saving if checkpoints else plain).append((time.monotonic() - began) / block)
        saver.flush()
        if saver.newest:
            manifest = checkpoint.read_manifest(place, saver.newest)
            sizes[manifest.base is not None] = manifest.bytes
            if manifest.base:
                sizes[False] = checkpoint.read_manifest(place, manifest.base).bytes
    rate = statistics.median(a / b for a, b in zip(plain, saving))
    return Stall(
        statistics.median(plain),
        statistics.median(saving),
        rate,
        sizes[False],
        sizes[True],
        max(copies),
        written,
        saver.skipped,
    )


@contextlib.contextmanager
def object_store() -> Iterator[str]:
    """URL of a bucket on an S3-compatible server that runs, on the loopback interface, in a process
    of its own for the time of the block.

    Raises:
        StorageError: moto[server] is not installed, or does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _await_port(port, server)
        _make_bucket()
        yield f"s3://{_BUCKET}/run"
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _await_port(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise StorageError(
        "the object store of the benchmark does not start",
        None,
        "moto[server]",
        "pip install 'moto[server]', or pass --storage",
    )


def _make_bucket() -> None:
    import fsspec

    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(_BUCKET)
