"""The results file: one section a benchmark, replaced when it is run again, each with its command,
hardware, versions and commit.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from grape_ray.storage import Json

RESULTS = Path(__file__).with_name("RESULTS.md")
_HEADER = (
    "# Results\n\nMade by `grape-ray bench`; a section is replaced when its benchmark is run again."
    " Ratios are to `none` of the same run.\n"
)
_PACKAGES = ("torch", "transformers", "opacus", "numpy", "cryptography")


def environment() -> Json:
    """Hardware, versions and commit of this process."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"hardware": _hardware(), "versions": versions, "commit": _commit()}


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} torch threads"


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def method_rows(rows: Sequence[Json]) -> list[list[str]]:
    """The rows of `measure` as text."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        [
            f"`{r['method']}`",
            shown(r["rank"], "d"),
            shown(r["seconds"], ".3f"),
            shown(r["time_ratio"], ".3f"),
            "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.0f}",
            shown(r["memory_ratio"], ".3f"),
            r.get("error", ""),
        ]
        for r in rows
    ]


METHOD_COLUMNS = ("method", "rank", "s/step", "time ratio", "peak MiB", "memory ratio", "")


def save(title: str, body: str, command: str, path: Path = RESULTS) -> None:
    """Puts a section into the results file in the place of an earlier one of the same title."""
    where = environment()
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    date = datetime.datetime.now(datetime.UTC).date()
    section = (
        f"## {title}\n\n`{command}`\n\n{where['hardware']}; {versions}; commit {where['commit']};"
        f" {date}.\n\n{body}\n"
    )
    text = path.read_text() if path.exists() else _HEADER
    parts = re.split(r"(?m)^(?=## )", text)
    kept = [part.rstrip("\n") + "\n" for part in parts[1:] if not part.startswith(f"## {title}\n")]
    path.write_text("\n".join([parts[0].rstrip("\n") + "\n", *kept, section]))
