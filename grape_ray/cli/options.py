"""Options that several commands have, each with one meaning and one help."""

from __future__ import annotations

import click

trust_module = click.option(
    "--trust-module", "trust", multiple=True, metavar="MODULE",
    help="A module of yours, or its FILE.py, that the run's task may be imported from; repeatable.",
)  # fmt: skip
no_dry_run = click.option(
    "--no-dry-run", is_flag=True, help="Skip the dry run of everything that can fail late."
)
