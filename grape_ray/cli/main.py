"""The ``grape-ray`` program: a table of commands, each imported only when it is called."""

from __future__ import annotations

import contextlib
import importlib
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from grape_ray.errors import Caution, GrapeRayError, nearest

# A command lives in grape_ray/cli/<name>.py as `command`; its line here is what --help shows, so
# that --help imports none.
COMMANDS = {
    "account": "Noise, epsilon or number of steps, each from the others.",
    "batches": "Batch sizes that cost the same, in compute and in privacy.",
    "ledger": "List, show, verify or extend the ledgers of datasets.",
    "check": "See whether a model or pipeline can be trained, before anything is paid for.",
    "plan": "Memory and work of a step by method, from shapes alone.",
    "init": "Write a run file for your data, with what is found in it.",
    "fields": "List the fields of a pipeline and what they mean.",
    "prepare": "Encode a dataset once, for a cluster.",
    "train": "Run a pipeline or run file, privately and paid for.",
    "resume": "Resume a run that was cut off.",
    "evaluate": "Evaluate a run's newest checkpoint again, free of privacy cost.",
    "tune": "Sweep a tune space under one privacy budget.",
    "report": "Make a page and a table of a sweep.",
    "bench": "Measure time, memory and traffic of every method.",
    "predict": "Let a trained model answer for new records.",
    "export": "Write a run's model as a folder that Hugging Face loads.",
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and helps, and imports a command on demand.

    An error raised on purpose, or by a task, becomes one line on stderr and exit status 2; any
    other becomes one line, too, and status 1. Tracebacks are shown with `--debug` alone: what they
    quote may be a record.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"grape_ray.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            ctx.fail(f"no such command {args[0]!r}; {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        try:
            with _cautions_told():
                return super().invoke(ctx)
        except GrapeRayError as error:
            _fail(ctx, error, error)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            from grape_ray.cli.unexpected import in_one_line

            found = in_one_line(error, f"grape-ray {ctx.invoked_subcommand}")
            _fail(ctx, found, error, found.status)


@contextlib.contextmanager
def _cautions_told() -> Iterator[None]:
    """For the time of a block, cautions are lines of the program's own, and other warnings are
    shown as ever.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", Caution)
        before = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, Caution):
                click.echo("warning: " + " ".join(str(message).split()), err=True)
            else:
                before(message, category, *where)

        warnings.showwarning = show
        yield


def _fail(ctx: click.Context, shown: GrapeRayError, error: Exception, status: int = 2) -> NoReturn:
    """Ends the command with one line, and with --debug the traceback before it.

    Args:
        shown: what the line says. error: what was raised, whose traceback it is.
    """
    if ctx.params.get("debug"):
        click.echo("".join(traceback.format_exception(error)), err=True)
    click.echo("error: " + " ".join(str(shown).split()), err=True)
    ctx.exit(status)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="grape-ray")
@click.option(
    "--debug", is_flag=True, help="Show the traceback of an error, with whatever it may quote."
)
def main(debug: bool) -> None:
    """Differentially private training on Ray."""
