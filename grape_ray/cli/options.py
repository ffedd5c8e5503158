"""Options that several commands have, each with one meaning and one help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., object])
Decorator = Callable[[Command], Command]

trust_module = click.option(
    "--trust-module", "trust", multiple=True, metavar="MODULE",
    help="A module of yours, or its FILE.py, that the run's task may be imported from; repeatable.",
)  # fmt: skip
no_dry_run = click.option(
    "--no-dry-run", is_flag=True, help="Skip the dry run of everything that can fail late."
)
as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object as the last line."
)
results_file = click.option(
    "--out", type=click.Path(path_type=Path), help="Write the section into this results file."
)


def assignments(field: str) -> Decorator:
    """--set KEY=VALUE, repeatable.

    Args:
        field: what a value overrides, for the help.
    """
    return click.option(
        "--set", "assignments", multiple=True, metavar="KEY=VALUE",
        help=f"Override {field}; repeatable.",
    )  # fmt: skip


def dataset_budget(whose: str) -> Decorator:
    """The options about the dataset's ledger: a second one, its whole budget, a large delta.

    Args:
        whose: of what the budget is by default, for the help.
    """
    return _all(
        click.option(
            "--second-ledger", is_flag=True,
            help="Let a dataset that has a ledger get another, with a budget of its own.",
        ),
        click.option(
            "--ledger-epsilon", type=float,
            help=f"Whole budget of the dataset, where its ledger is made; by default {whose}.",
        ),
        click.option(
            "--ledger-delta", type=float,
            help=f"Its delta; by default {whose}, in proportion to --ledger-epsilon.",
        ),
        click.option(
            "--allow-large-delta", is_flag=True,
            help="Let delta be one over the number of records, or more.",
        ),
    )  # fmt: skip


def _all(*options: Decorator) -> Decorator:
    """Options in the order in which --help shows them."""

    def decorate(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
