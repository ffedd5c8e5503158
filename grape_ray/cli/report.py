"""``grape-ray report``: the page and the table of a sweep."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("sweep")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="sweep.html",
    show_default=True,
    help="The page to write.",
)
def command(sweep: str, out: Path) -> None:
    """Write one self-contained HTML page about SWEEP (a sweep's folder or URL), and beside it its
    runs as Parquet.
    """
    from grape_ray.errors import StorageError
    from grape_ray.tuning.page import report

    page, table = report(sweep)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
        out.with_suffix(".parquet").write_bytes(table)
    except OSError as error:
        raise StorageError(
            f"cannot write {out}", str(error), "a place for two files", "name another with --out"
        ) from error
    click.echo(f"{out} and {out.with_suffix('.parquet')}")
