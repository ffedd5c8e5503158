"""A run on a cluster that changes under it:
`python -m tests.support.elastic grow|drain FOLDER`, a program of its own.

`grow` adds a node and kills it later; `drain` begins with two nodes, one of which Ray is told to
drain. Ray allows one cluster a process, and nodes are added by the main thread alone. The last line
is JSON: the result, and the sizes met.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grape_ray.ray_backend.cluster import OBJECT_STORE_BYTES, set_defaults
from grape_ray.ray_backend.train import train
from tests.support.tiny import tiny

STEPS = 400


def sizes(folder: Path) -> list[int]:
    """The number of ranks of each attempt so far."""
    files = sorted(folder.glob("runs/r/logs/attempt-*-rank-0-part-000.jsonl"))
    first = [json.loads(f.read_text().splitlines()[0]) for f in files]
    return [event["world_size"] for event in first if event["event"] == "begun"]


def wait(what: str, condition: Callable[[], bool], over: threading.Event) -> None:
    deadline_s = time.monotonic() + 150
    while not condition():
        if over.is_set() or time.monotonic() > deadline_s:
            raise SystemExit(f"never came: {what}")
        time.sleep(0.2)


def drain(node: Any, address: str) -> None:
    """What a cloud's notice of preemption comes to."""
    words = [
        "--address",
        address,
        "--node-id",
        node.node_id,
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
    ]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "drain-node",
            *words,
            "--deadline-remaining-seconds",
            "15",
        ],
        check=True,
        capture_output=True,
    )


def saved_urgently(folder: Path) -> bool:
    texts = [file.read_text() for file in folder.glob("runs/r/logs/*-rank-0-*.jsonl")]
    return any('"occasion": "urgent"' in text for text in texts)


def main(mode: str, folder: Path) -> None:
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1" if mode == "drain" else "0"
    set_defaults(30)
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    other = {k: v for k, v in small.items() if k != "include_dashboard"}
    node = cluster.add_node(**other) if mode == "drain" else None
    ray.init(address=cluster.address, log_to_driver=False)
    resize_s = 2 if mode == "grow" else 60
    config = tiny(STEPS, slow_s=0.1).override(
        ["performance.num_workers=1:2", "performance.micro_batch_size=200",
        f"performance.resize_every_s={resize_s}",
         f"privacy.spare_steps={STEPS}", "performance.start_timeout_s=15",
         "performance.max_failures=5"]
    )  # fmt: skip
    found, over = {}, threading.Event()

    def run() -> None:
        try:
            found.update(
                train(
                    config, run="r", storage=str(folder / "runs"), key_path=str(folder / "key")
                ).as_dict()
            )
        finally:
            over.set()

    thread = threading.Thread(target=run)
    thread.start()
    if mode == "grow":
        wait("one worker", lambda: sizes(folder) == [1], over)
        node = cluster.add_node(**other)
    wait("two workers", lambda: sizes(folder)[-1:] == [2], over)
    time.sleep(3)
    if mode == "drain":
        drain(node, cluster.address)
        wait("a checkpoint at the notice", lambda: saved_urgently(folder), over)
    else:
        cluster.remove_node(node, allow_graceful=False)
    wait("one worker again", lambda: sizes(folder)[-1:] == [1] and 2 in sizes(folder), over)
    thread.join(200)
    print(json.dumps({**found, "sizes": sizes(folder)}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
