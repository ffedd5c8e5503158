"""`ray job submit` against a real head on loopback: a sharded OPT on object storage, killed once
and resumed; nodes that come and go.
"""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from grape_ray.ledger.audit import verify
from grape_ray.storage import Storage
from grape_ray.training.export import export
from tests.support.faulty_s3 import FaultyS3

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
E2E = ROOT.parent / "shared" / "data" / "e2e"
STEPS = 16


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Head:
    """`ray start --head` in a process group of its own, ended with it; `run` calls programs that
    speak to it.

    Args:
        plain: as a person types it, in the mode of authentication that Ray takes by itself.
    """

    def __init__(
        self, environment: dict[str, str], *options: str, cpus: int = 2, plain: bool = False
    ):
        self.port, dashboard = free_port(), free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="gr")
        self.environment = {
            **os.environ, **environment, "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0",
        }  # fmt: skip
        self.environment.pop("RAY_ADDRESS", None)
        if plain:
            self.environment.pop("RAY_AUTH_MODE")
            self.environment["GRAPE_RAY_TEST_HEAD"] = self.environment.pop("RAY_AUTH_TOKEN")
        self._mark = (
            self.environment.get("GRAPE_RAY_TEST_HEAD") or self.environment["RAY_AUTH_TOKEN"]
        )
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            f"--port={self.port}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--num-cpus={cpus}",
            "--object-store-memory=200000000", f"--temp-dir={self._folder.name}",
            "--include-dashboard=true", *options,
        ]  # fmt: skip
        self._log = (Path(self._folder.name) / "head.log").open("w+")
        self.process = subprocess.Popen(
            command,
            env=self.environment,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)  # Ray drains for up to 30 s
        finally:
            # what the group has left, by its token alone
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if self._mark.encode() in (folder / "environ").read_bytes():
                        os.kill(int(folder.name), signal.SIGKILL)
                except OSError:
                    continue
            self._log.close()
            self._folder.cleanup()

    def run(self, *words: str, check: bool = True) -> str:
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
            cwd=ROOT,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, name: str, *words: str) -> None:
        deadline_s = time.monotonic() + 300  # until the node's agent takes jobs
        options = [
            "job",
            "submit",
            "--no-wait",
            "--submission-id",
            name,
            "--working-dir",
            ".",
            "--",
            *words,
        ]
        while "submitted successfully" not in (told := self.run(*options, check=False)):
            assert time.monotonic() < deadline_s, (
                Path(self._log.name).read_text()[-2000:] + told[-2000:]
            )
            time.sleep(2)

    def status(self, name: str) -> str:
        text = self.run("job", "status", name, check=False).lower()
        return next(
            (s for s in ("succeeded", "failed", "stopped", "running", "pending") if s in text),
            "unknown",
        )

    def wait(self, name: str, seconds: float = 400) -> str:
        deadline_s = time.monotonic() + seconds
        while (status := self.status(name)) in (
            "running",
            "pending",
            "unknown",
        ) and time.monotonic() < deadline_s:
            time.sleep(2)
        return status


def nodes_of(head: Head) -> int:
    """The worker nodes that are there, by what the autoscaler says."""
    return sum(map(int, re.findall(r"^\s*(\d+) worker$", head.run("status"), re.M)))


@pytest.fixture
def opt(tmp_path):
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=259, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
        max_position_embeddings=256, word_embed_proj_dim=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    return tmp_path / "opt"


def settings(opt: Path) -> list[str]:
    pairs = {
        "task.model": opt, "task.tokenizer": "bytes", "task.data": E2E / "train.parquet",
        "task.validation": E2E / "validation.parquet", "task.prompt_column": "mr",
        "task.text_column": "ref", "task.limit": 2000, "task.validation_limit": 32,
        "task.public": "true", "privacy.steps": STEPS, "privacy.spare_steps": 16,
        "privacy.expected_batch_size": 16, "method.rank": 8, "method.refresh": 10,
        "method.learning_rate": 0.003, "method.project_min_numel": 1000, "method.warmup_steps": 0,
        "performance.use_gpu": "false", "performance.precision": "fp32",
        "performance.checkpoint_every": 4, "performance.eval_every": 0,
        "performance.charge_chunk": 4, "performance.micro_batch_size": 8,
        "performance.threads_per_worker": 1,
    }  # fmt: skip
    return [word for key, value in pairs.items() for word in ("--set", f"{key}={value}")]


def driver_of(token: str, words: str) -> int | None:
    """The process of a job's own program, by its environment and its words."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_text().split("\0")
            if (
                token.encode() in (folder / "environ").read_bytes()
                and "bin/grape-ray" in " ".join(line[:2])
                and words in line
            ):
                return int(folder.name)
        except OSError:
            continue
    return None


@pytest.mark.skipif(
    not E2E.is_dir(), reason="the E2E files are not beside the repository (../shared/data/e2e)"
)
def test_a_sharded_opt_run_is_submitted_killed_and_resumed(opt, tmp_path, monkeypatch):
    store = FaultyS3()
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    program = [str(Path(sys.executable).with_name("grape-ray"))]
    words = [
        "--storage",
        "s3://bucket/runs",
        "--run",
        "opt",
        "--key-file",
        str(tmp_path / "key"),
        "--json",
    ]
    with Head(store.environment, cpus=3) as head:
        head.submit(
            "first", *program, "train", "pipelines.opt", "--workers", "2", *words, *settings(opt)
        )
        run, deadline_s = Storage("s3://bucket/runs/opt"), time.monotonic() + 300
        while not any(n.endswith("manifest.json") for n in run.list("checkpoints/")):
            assert time.monotonic() < deadline_s, head.run("job", "logs", "first", check=False)[
                -3000:
            ]
            assert head.status("first") in ("pending", "running"), head.run(
                "job", "logs", "first", check=False
            )[-3000:]
        driver = driver_of(head.environment["RAY_AUTH_TOKEN"], "pipelines.opt")
        assert driver is not None
        os.kill(driver, signal.SIGKILL)
        assert head.wait("first") == "failed"
        head.submit(
            "second",
            *program,
            "resume",
            "s3://bucket/runs/opt",
            "--key-file",
            str(tmp_path / "key"),
            "--json",
        )
        assert head.wait("second") == "succeeded", head.run("job", "logs", "second", check=False)[
            -3000:
        ]
        logs = head.run("job", "logs", "second")
    result = json.loads(next(line for line in reversed(logs.splitlines()) if line.startswith("{")))
    assert result["steps"] == STEPS
    assert result["attempts"] == 2
    assert result["charged_steps"] >= result["executed_steps"] >= STEPS
    report = verify(result["ledger"])
    assert report.ok, report.problems
    export("s3://bucket/runs/opt", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (
        model.generate(input_ids=torch.tensor([[1, 70]]), max_new_tokens=2, do_sample=False).shape[  # pyright: ignore[reportAttributeAccessIssue]
            1
        ]
        <= 4
    )


def test_a_job_waits_for_nodes_that_come_and_go(tmp_path, monkeypatch):
    port = free_port()
    nodes = {
        "cluster_name": "grape", "max_workers": 2, "idle_timeout_minutes": 0.5,
        "upscaling_speed": 10,
        # as the fake provider calls the head: under another name it would look for one for ever
        "head_node_type": "ray.head.default",
        "provider": {
            "type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True,
            "disable_launch_config_check": True, "launch_multiple": True,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0,
            "max_workers": 2},
        },
        "auth": {}, "setup_commands": [], "initialization_commands": [], "file_mounts": {},
        "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [],
        "rsync_filter": [], "head_setup_commands": [], "worker_setup_commands": [],
        "head_start_ray_commands": [], "worker_start_ray_commands": [],
    }  # fmt: skip
    (tmp_path / "as.yaml").write_text(yaml.safe_dump(nodes))
    monkeypatch.setattr(sys.modules[__name__], "free_port", iter([port, free_port()]).__next__)
    fake = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    with Head(fake, f"--autoscaling-config={tmp_path / 'as.yaml'}", cpus=0) as head:
        program = str(Path(sys.executable).with_name("grape-ray"))
        words = [
            "--workers",
            "2",
            "--storage",
            str(tmp_path / "runs"),
            "--run",
            "r",
            "--key-file",
            str(tmp_path / "key"),
            "--json",
        ]
        head.submit(
            "job", program, "train", "pipelines.digits_vit", *words, "--set", "privacy.steps=6"
        )
        deadline_s, most = time.monotonic() + 400, 0
        while (status := head.status("job")) in (
            "running",
            "pending",
            "unknown",
        ) and time.monotonic() < deadline_s:
            most = max(most, nodes_of(head))
            time.sleep(1)
        assert status == "succeeded", head.run("job", "logs", "job", check=False)[-3000:]
        assert json.loads((tmp_path / "runs" / "r" / "result.json").read_text())["steps"] == 6
        assert most == 2
        deadline_s = time.monotonic() + 120
        while (alive := nodes_of(head)) and time.monotonic() < deadline_s:
            time.sleep(3)
        assert alive == 0, head.run("status")


@pytest.mark.parametrize(
    "token", [False, True], ids=["no token at home", "a token that the cluster does not ask for"]
)
def test_a_cluster_that_was_plainly_started_is_used_by_address_and_by_job(tmp_path, token):
    home, away = tmp_path / "home", tmp_path / "away"
    for folder in (home / "cluster", home / "own" / ".ray", away):
        folder.mkdir(parents=True)
    if token:
        (home / "own" / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    options = [
        "--storage",
        str(tmp_path / "runs"),
        "--key-file",
        str(tmp_path / "key"),
        "--workers",
        "1",
    ]
    with Head(
        {
            "HOME": str(home / "cluster"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        plain=True,
    ) as head:
        head.submit(
            "job", "grape-ray", "train", "tests.support.tiny:tiny", "--run", "job", *options
        )
        deadline_s = time.monotonic() + 200
        while head.status("job") not in ("succeeded", "failed"):
            assert time.monotonic() < deadline_s
            time.sleep(1)
        assert head.status("job") == "succeeded", head.run("job", "logs", "job", check=False)[
            -3000:
        ]
        own = {
            **head.environment,
            "HOME": str(home / "own"),
            "RAY_ADDRESS": f"127.0.0.1:{head.port}",
        }
        program = [
            sys.executable,
            "-c",
            "from grape_ray.cli.main import main; main()",
            "train",
            "tests.support.tiny:tiny",
            "--run",
            "own",
            *options,
        ]
        done = subprocess.run(
            program, env=own, cwd=away, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("job", "own"):
        assert (
            json.loads((tmp_path / "runs" / name / "result.json").read_text())["charged_steps"]
            == 12
        )


def test_a_wrong_token_and_a_dead_cluster_are_told_before_anything_is_registered(tmp_path):
    program = [
        sys.executable,
        "-c",
        "from grape_ray.cli.main import main; main()",
        "train",
        "tests.support.tiny:tiny",
        "--workers",
        "1",
        "--run",
        "a",
    ]
    program += [
        "--storage",
        str(tmp_path / "runs"),
        "--key-file",
        str(tmp_path / "key"),
        "--set",
        "performance.start_timeout_s=20",
    ]
    with Head({}) as head:
        head.submit("up", "true")  # by now it answers
        for address in (f"127.0.0.1:{head.port}", f"127.0.0.1:{free_port()}"):
            own = {
                **head.environment,
                "RAY_ADDRESS": address,
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            }
            done = subprocess.run(
                program, env=own, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
            )
            assert done.returncode == 2, done.stderr[-3000:]
            (line,) = done.stderr.strip().splitlines()
            assert f"no Ray cluster can be used at RAY_ADDRESS, got \"'{address}'" in line
    assert list(tmp_path.iterdir()) == []
