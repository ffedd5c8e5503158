"""A balanced draw of some examples a class, as few-shot experiments train on.

`python -m pipelines.parts.few_shots PLACE OUT.parquet --shots 512 --seed 13` writes the rows of
PLACE, which is named as `task.data` is, that were drawn; then `--set task.data=OUT.parquet --set
task.limit=0`.

For public data: a row that is removed makes room for another of its class, so that a guarantee
that adds or removes one row is one about the rows drawn, not about those of PLACE.
"""

from __future__ import annotations

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grape_ray.data.sources import Source
from grape_ray.errors import DataError


def balanced(table: pa.Table, column: str, shots: int, seed: int) -> pa.Table:
    """`shots` rows of each label in `column`, in the table's order.

    Raises:
        DataError: a label has fewer rows.
    """
    labels, rng = np.array(table[column].to_pylist()), np.random.default_rng(seed)
    drawn = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < shots:
            got = f"{len(rows)} of {label.item()!r}"
            raise DataError(
                f"rows of a label in '{column}'", got, f"at least {shots}", "ask for fewer"
            )
        drawn.append(rng.choice(rows, shots, replace=False))
    return table.take(np.sort(np.concatenate(drawn)))


@click.command()
@click.argument("place")
@click.argument("out")
@click.option("--label", default="label", show_default=True, help="The column of labels.")
@click.option("--shots", default=512, show_default=True, help="Rows a label.")
@click.option("--seed", default=13, show_default=True, help="Of the draw.")
@click.option("--config", default="", help="Of a dataset on the hub.")
@click.option("--split", default="train", show_default=True, help="Of a dataset on the hub.")
def main(place: str, out: str, label: str, shots: int, seed: int, config: str, split: str) -> None:
    """Write a balanced draw of PLACE to OUT."""
    batches = [batch for file in Source(place, config, split).batches(None) for batch in file]
    table = balanced(pa.Table.from_batches(batches), label, shots, seed)
    pq.write_table(table, out)
    click.echo(f"{out}: {len(table)} rows")


if __name__ == "__main__":
    main()
