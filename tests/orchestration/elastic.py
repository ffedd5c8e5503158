"""A run on a cluster that grows and shrinks under it: `python -m tests.orchestration.elastic FOLDER`, a program of its own.

Ray allows one cluster a process, and nodes are added by the main thread alone. The last line is JSON: the result, and the sizes met.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from grape_ray.orchestrate.cluster import OBJECT_STORE_BYTES, set_defaults
from grape_ray.orchestrate.train import train
from tests.tiny import tiny

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


def main(folder: Path) -> None:
    set_defaults(30)
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    ray.init(address=cluster.address, log_to_driver=False)
    config = tiny(STEPS, slow_s=0.1).override(
        ["performance.num_workers=1:2", "performance.micro_batch_size=200", "performance.resize_every_s=2", "performance.max_failures=5",
         f"privacy.spare_steps={STEPS}", "performance.start_timeout_s=15"]
    )  # fmt: skip
    found, over = {}, threading.Event()

    def run() -> None:
        try:
            found.update(train(config, run="r", storage=str(folder / "runs"), key_path=str(folder / "key")))
        finally:
            over.set()

    thread = threading.Thread(target=run)
    thread.start()
    wait("one worker", lambda: sizes(folder) == [1], over)
    node = cluster.add_node(**{k: v for k, v in small.items() if k != "include_dashboard"})
    wait("two workers", lambda: sizes(folder)[-1:] == [2], over)
    time.sleep(3)
    cluster.remove_node(node, allow_graceful=False)
    wait("one worker again", lambda: sizes(folder)[-1:] == [1] and len(sizes(folder)) >= 3, over)
    thread.join(200)
    print(json.dumps({**found, "sizes": sizes(folder)}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
