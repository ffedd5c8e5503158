"""The files that clusters are launched from, checked without a cloud."""

import re
import shlex
import threading
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def test_a_token_that_is_made_here_is_its_owners_alone(tmp_path, monkeypatch):
    from grape_ray.ray_backend import cluster

    made = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(
        "ray.init", lambda **options: made.append((tmp_path / ".ray" / "auth_token").read_text())
    )
    cluster.start_local(1)
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    cluster.start_local(1)
    assert len(made[0]) == 64
    assert made[0] == made[1]


def test_a_run_for_which_there_is_never_room_is_given_up(monkeypatch):
    from grape_ray.ray_backend import capacity

    over, nodes = (
        threading.Event(),
        [{"Alive": True, "Resources": {"CPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 8.0}}],
    )
    monkeypatch.setattr(capacity, "_POLL_S", 0.02)
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    began = time.monotonic()
    assert capacity.workers_that_fit(False) == 1
    assert capacity.workers_that_fit(True) == 0
    assert not capacity.call_within_capacity(over.wait, 2, False, 0.2)
    assert 0.2 < time.monotonic() - began < 5
    over.set()
    assert capacity.call_within_capacity(over.wait, 2, False, 0.2)  # it ended in time
    nodes[1]["Alive"] = True
    assert capacity.call_within_capacity(lambda: time.sleep(0.5), 2, False, 0.2)
    with pytest.raises(ValueError, match="its own"):
        capacity.call_within_capacity(lambda: int("its own"), 2, False, 0.2)


@pytest.fixture
def config():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_the_cluster_launcher_takes_the_file(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="colour"):
        validate_config(prepare_config({**config, "colour": "purple"}))


def test_the_head_trains_nothing_and_workers_come_and_go(config):
    head, worker = (config["available_node_types"][name] for name in ("head", "gpu_worker"))
    assert config["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0}
    assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
    assert worker["resources"]["GPU"] > 0
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_every_ray_process_asks_for_the_token(config):
    for part in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [c for c in config[part] if "ray start" in c]
        assert start.startswith("RAY_AUTH_MODE=token ")
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]


def test_the_versions_are_the_tested_ones(config):
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    job = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())
    assert f"ray:{pinned[1]}-py311" in config["docker"]["image"]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]


# What KubeRay's RayJob takes of the fields that are used here; its own definition is over a
# megabyte.
JOB = {
    "entrypoint",
    "runtimeEnvYAML",
    "backoffLimit",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
}
CLUSTER = {
    "rayVersion",
    "enableInTreeAutoscaling",
    "authOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
WORKERS = {"groupName", "minReplicas", "replicas", "maxReplicas", "rayStartParams", "template"}


def test_the_kuberay_job_is_well_formed():
    job = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    assert set(spec) <= JOB
    assert set(cluster) <= CLUSTER
    assert cluster["authOptions"] == {"mode": "token"}
    assert yaml.safe_load(spec["runtimeEnvYAML"])
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert all(isinstance(value, str) for value in head["rayStartParams"].values())
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_what_a_job_runs_are_words_that_the_program_takes():
    from click.testing import CliRunner

    from grape_ray.cli.main import main

    text = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())["spec"]["entrypoint"]
    words = shlex.split(text)
    known = CliRunner().invoke(main, [words[1], "--help"]).output
    assert all(word in known for word in words if word.startswith("--"))
