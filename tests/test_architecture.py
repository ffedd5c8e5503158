"""The page that guides a reader says what the code does."""

import ast
import re
from pathlib import Path

import grape_ray

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGE = ROOT / "grape_ray"


def imported(module):
    """All modules that a module imports, in functions, too."""
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_walk_of_a_config_is_the_codes_and_short():
    table = PAGE.partition("## The walk of a config")[2].partition("## The walk of a batch")[0]
    steps = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|", table, re.M)
    assert (steps[0][0], steps[-1][1]) == ("cli.train", "optim")
    seen, returns = [steps[0][0]], 0
    for begin, end in steps:
        assert begin in seen, f"{begin} was not reached before"
        assert f"grape_ray.{end}" in imported(begin), f"{begin} does not import {end}"
        returns += begin != seen[-1]
        seen.append(end)
    assert len(set(seen)) <= 18
    assert returns <= 12


def test_the_page_names_every_room_and_every_file_that_it_names_exists():
    rooms = {p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    listed = set(re.findall(r"`(\w+(?:/|\.py))`", PAGE.partition("## A reading order")[0]))
    listed -= {"capture/", "rules/", "verification/", "algebra/"}
    assert {name.rstrip("/") for name in listed} == rooms - {"__init__.py"}
    assert len(list(PACKAGE.glob("[!_]*"))) + 1 <= 20
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", PAGE):
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name


def test_public_names_are_there():
    assert all(getattr(grape_ray, name) is not None for name in grape_ray.__all__)
