"""What importing a module brings along: `account` answers without torch, and engines are measured
without Ray.

Who may import whom is kept by import-linter (pyproject.toml)."""

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "grape_ray"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("grape_ray.engines", ["ray"]), ("grape_ray.config.schema", ["ray", "torch"]),
        ("grape_ray.accounting", ["ray", "torch"]), ("grape_ray.ledger.ledger", ["ray", "torch"]),
        ("grape_ray.cli.account", ["ray", "torch"]), ("grape_ray.training.run", ["ray"]),
        ("grape_ray.cli.main", ["ray", "torch", "dp_accounting", "transformers"]),
        ("grape_ray.tuning.page", ["ray", "matplotlib", "jinja2"]),
        ("grape_ray.ray_backend.train", ["ray"]), ("pipelines.digits_vit", ["ray", "transformers"]),
    ],
)  # fmt: skip
def test_importing_brings_no_more_than_it_needs(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "[]"
