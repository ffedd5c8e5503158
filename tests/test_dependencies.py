"""Who may import whom, so that `account` answers without torch and the engines can be measured without Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "grape_ray"

# Layers from the ground up; a module may import its own layer and those below.
LAYERS = [
    ["errors", "methods", "config", "types", "storage", "places", "rng", "trust", "withheld", "cautions", "modules", "unexpected"],
    ["accounting", "registry"],
    ["comms", "subspace", "rules", "clipping", "data", "sharding"],
    ["engines"],
    ["noise", "optim", "task"],
    ["models", "checkpoint", "resolve"],
    ["step", "loop", "preflight", "trace", "scores", "splits", "build", "metrics", "cautions"],
    ["plan", "briefing", "dryrun", "evaluate", "notices", "rankstate", "saving", "journal", "session", "execute", "export", "resume"],
    ["report", "bench", "sweeps"],
    ["orchestrate"],
    ["commands", "cli"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> list[str]:
    """Absolute names of all modules that a file imports, in functions and under TYPE_CHECKING, too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def modules():
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in HEIGHT, f"name the layer of {part} in this test"
    for name in imports(path):
        head, _, rest = name.partition(".")
        if head == "grape_ray":
            below = rest.split(".")[0]
            assert HEIGHT[below] <= HEIGHT[part], f"{part} imports {below}, which stands above it"
        assert head not in ("pipelines", "tune_spaces", "tests"), f"{part} imports {name}"
        assert head != "ray" or part == "orchestrate", f"{part} imports ray"
        assert head != "torch" or part != "accounting", "accounting imports torch"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("grape_ray.engines", ["ray"]), ("grape_ray.config", ["ray", "torch"]), ("grape_ray.accounting", ["ray", "torch"]),
        ("grape_ray.accounting.ledger", ["ray", "torch"]), ("grape_ray.commands.account", ["ray", "torch"]), ("grape_ray.execute", ["ray"]),
        ("grape_ray.cli", ["ray", "torch", "dp_accounting", "transformers"]), ("grape_ray.orchestrate.train", ["ray"]),
        ("pipelines.digits_vit", ["ray", "transformers"]),
    ],
)  # fmt: skip
def test_importing_brings_no_more_than_it_needs(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"
