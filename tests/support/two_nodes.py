"""A run on a prepared set and two nodes, of which one is killed and replaced:
`python -m tests.support.two_nodes FOLDER URL`, a program of its own, because Ray allows one
cluster a process.

The driver prepares the set to URL. The last line is JSON: the result, the bytes of all shards, and
those that each node had fetched when one was killed.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from grape_ray.config.schema import Config, Method, Performance, Privacy
from grape_ray.ray_backend.cluster import OBJECT_STORE_BYTES, set_defaults
from grape_ray.ray_backend.prepare_set import prepare_set
from grape_ray.ray_backend.train import train
from grape_ray.storage import Storage
from grape_ray.tasks.text_classification import TextClassification
from tests.support.elastic import wait
from tests.support.word_model import WORDS, save_encoder

STEPS = 300


def prepared(folder: Path, url: str) -> Config:
    """The config of a task on 20,000 texts, prepared in 16 shards."""
    rng = np.random.default_rng(0)
    rows = (
        {"text": " ".join(rng.choice(WORDS, size=8)) + f" {n}", "label": "ab"[n % 2]}
        for n in range(20_000)
    )
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = TextClassification(
        str(save_encoder(folder / "bert")), str(folder / "t.jsonl"), held_out=0.01,
        held_out_public=True, labels=("a", "b"),
    )  # fmt: skip
    config = Config(
        task=task,
        privacy=Privacy(expected_batch_size=64, steps=STEPS, spare_steps=STEPS, delta=1e-6),
        method=Method(name="bookkeeping"),
        performance=Performance(
            micro_batch_size=8, num_workers=2, checkpoint_every=20, max_failures=5,
            threads_per_worker=1, charge_chunk=10,
        ),
    )  # fmt: skip
    prepare_set(config, url, 16)
    return config.override([f"task.data={url}"])


def shard_bytes(cache: Path) -> int:
    return sum(p.stat().st_size for p in (cache / "grape-ray" / "shards").rglob("train-*.arrow"))


def main(folder: Path, url: str) -> None:
    set_defaults(60)
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": OBJECT_STORE_BYTES, "num_cpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})

    def node(name: str) -> Any:
        return cluster.add_node(
            **small, resources={"trains": 1}, env_vars={"XDG_CACHE_HOME": str(folder / name)}
        )

    ray.init(address=cluster.address, log_to_driver=False)
    config = prepared(folder, url)
    # From here on the head has nothing to give, so that each worker has a node of its own.
    hold = ray.remote(num_cpus=1)(lambda: time.sleep(3600)).remote()
    time.sleep(5)
    node("a")
    lost = node("b")
    found, over = {}, threading.Event()

    def run() -> None:
        try:
            where = {"storage": str(folder / "runs"), "key_path": str(folder / "key")}
            found.update(train(config, run="r", **where).as_dict())
        finally:
            over.set()

    thread = threading.Thread(target=run)
    thread.start()
    saved = Storage(folder / "runs" / "r")
    done = lambda: any(n.endswith("manifest.json") for n in saved.list("checkpoints/"))  # noqa: E731
    wait("a checkpoint", done, over)
    fetched = [shard_bytes(folder / name) for name in "ab"]
    cluster.remove_node(lost, allow_graceful=False)
    node("c")
    thread.join(300)
    names = [name for name in Storage(url).list("") if "train-" in name]
    total = sum(Storage(url).size(name) for name in names)
    print(
        json.dumps(
            {**found, "fetched": fetched, "total": total, "later": shard_bytes(folder / "c")}
        )
    )
    ray.cancel(hold, force=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
