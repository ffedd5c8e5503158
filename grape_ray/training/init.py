"""A first run file for a dataset: what is found in its columns, and settings that fit its size."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from grape_ray.config.kinds import KINDS, task_class
from grape_ray.data.columns import Table, is_list, is_number, is_text
from grape_ray.data.readers import are_names
from grape_ray.data.sources import Source
from grape_ray.data.tables import read_table
from grape_ray.errors import ConfigError, DataError, nearest
from grape_ray.storage import Json
from grape_ray.training.recipes import recipe

# Names that columns of each role go by, the likelier first.
_ROLES = {
    "text_column": (
        "text", "sentence", "body", "content", "message", "review", "question", "document",
    ),
    "pair_column": ("text_pair", "sentence2", "hypothesis"),
    "label_column": (
        "label", "labels", "category", "class", "topic", "intent", "sentiment", "target",
    ),
    "prompt_column": ("prompt", "instruction", "question", "input", "source"),
    "messages_column": ("messages", "conversations", "conversation", "chat"),
    "source_column": ("source", "input", "article", "document", "text", "mr"),
    "target_column": ("target", "summary", "output", "answer", "translation", "ref"),
    "tokens_column": ("tokens", "words"),
    "tags_column": ("tags", "ner_tags", "labels"),
    "image_column": ("image", "img", "picture"),
    "chosen_column": ("chosen",),
    "rejected_column": ("rejected",),
    "number_column": ("score", "rating", "label", "value", "target"),
}  # fmt: skip
_UNITS = ("user", "patient", "customer", "author", "person", "client", "document", "conversation")
_MODELS = {  # a small public model a kind, to begin with
    "text-generation": "facebook/opt-125m", "preference": "facebook/opt-125m",
    "seq2seq": "google/flan-t5-small", "image-classification": "google/vit-base-patch16-224-in21k",
    "prompt-classification": "distilroberta-base",
}  # fmt: skip
_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_MOST_LABELS = 200


@dataclass(frozen=True)
class Found:
    """What a look at a dataset found.

    Attributes:
        records: N. fields: of the task, by what the columns hold. unit: a column that seems to name
            the privacy unit, and units: how many it names; empty and N where there is none.
        labels: the different labels, as they would be read.
    """

    records: int
    fields: Json
    unit: str
    units: int
    labels: tuple[str, ...]


def look(kind: str, data: str) -> Found:
    """Looks at the columns of a dataset for a task.

    Raises:
        ConfigError: no such task. DataError: nothing there, or no column for what the task needs.
    """
    wanted = [f.name for f in dataclasses.fields(task_class(kind)) if f.name in _ROLES]
    with tempfile.TemporaryDirectory(prefix="grape-ray-") as scratch:
        source = Source(data)
        rows = read_table(source, None, Path(scratch))
        fields: Json = {}
        for role in wanted:
            column = _column(rows, role, [str(name) for name in fields.values()])
            if column is not None:
                fields[role] = column
        if "messages_column" in fields:  # a chat has no other columns
            fields = {"messages_column": fields["messages_column"]}
        _check_complete(kind, wanted, fields, rows)
        if "template" in (f.name for f in dataclasses.fields(task_class(kind))):
            text = _column(rows, "text_column", [str(name) for name in fields.values()])
            fields["template"] = json.dumps(f"{{{text}}} It was {{mask}}.")
        labels = ()
        if "label_column" in fields and not is_list(rows.schema.field(fields["label_column"]).type):
            column = fields["label_column"]
            table = Table(rows.filter(pc.call_function("is_valid", [rows[column]])), data)
            labels = source.label_names(column) or table.label_names(column)
        unit, units = _unit(rows, [str(name) for name in fields.values()])
        return Found(rows.num_rows, fields, unit, units, labels)


def run_file(kind: str, data: str, model: str, found: Found, epsilon: float) -> str:
    """A commented run file for what was found."""
    units = found.units
    model = model or _MODELS.get(kind, _ENCODER)
    chosen = recipe(kind, model, units)
    steps = chosen.steps(units)
    delta = 10.0 ** -(math.floor(math.log10(max(units, 10))) + 1)
    what = f"the column {found.unit}: {units} different" if found.unit else "one record"
    declared = len(found.labels) <= _MOST_LABELS and found.labels
    lines = [
        f"# {found.records} records were found in {data}; the privacy unit is {what}.",
        "# `grape-ray fields THIS_FILE` lists every field, `grape-ray train THIS_FILE` trains.",
        "task:",
        f"  kind: {kind}",
        f"  model: {model}  # public: not made from these records",
        f"  data: {data}",
        *(f"  {name}: {column}" for name, column in found.fields.items()),
    ]
    if "template" in found.fields:
        lines.append("  label_words: [terrible, great]  # one for each label, in their order")
    if declared:
        lines.append(f"  labels: {_listed(found.labels)}  # written here, they are public")
    lines += [
        *(f"  {name}: {value}" for name, value in chosen.task.items()),
        "  held_out: 0.1  # a tenth is not trained on",
        "  held_out_public: false  # true tells metrics of it, which are not protected then",
        "privacy:",
    ]
    if found.unit:
        lines += [
            f"  unit: {found.unit}  # all records of one are protected together",
            "  examples_per_unit: 4  # of those of a sampled unit, in a step",
        ]
    else:
        lines.append("  # unit: user_id  # a column, if several records belong to one person")
    lines += [
        f"  epsilon: {epsilon:g}  # smaller is safer: 1 to 8 are usual",
        f"  delta: {delta:.0e}  # below 1 / {units}",
        f"  expected_batch_size: {chosen.batch(units)}  # large batches drown the noise",
        f"  steps: {steps}",
        *(f"  {name}: {value}" for name, value in chosen.privacy.items()),
        f"method:  # {chosen.why}",
        *(f"  {name}: {value}" for name, value in chosen.method.items()),
        "performance:",
        "  micro_batch_size: 32",
        f"  eval_every: {max(steps // 4, 1)}",
        *(f"  {name}: {value}" for name, value in chosen.performance.items()),
    ]
    return "\n".join(lines) + "\n"


def _column(rows: pa.Table, role: str, taken: Sequence[str]) -> str | None:
    """The column that plays a role: by its name, or else, of texts and labels, by what it holds."""
    free = [name for name in rows.column_names if name not in taken and _fits(rows, name, role)]
    by_name = [n for known in _ROLES[role] for n in free if n.lower() == known]
    if by_name:
        return by_name[0]
    if role in ("text_column", "source_column"):
        return max(free, key=lambda name: _mean_length(rows[name]), default=None)
    if role == "label_column":
        few = [(len(pc.call_function("unique", [rows[n]])), n) for n in free if not _is_id(n)]
        few = [
            (count, n) for count, n in few if 2 <= count <= min(_MOST_LABELS, rows.num_rows // 2)
        ]
        return min(few)[1] if few else None
    return None


def _fits(rows: pa.Table, name: str, role: str) -> bool:
    kind = rows.schema.field(name).type
    if role in ("messages_column", "tokens_column", "tags_column"):
        return is_list(kind)
    if role == "number_column":
        return is_number(kind)
    if role == "label_column":
        return not pa.types.is_floating(kind) and not pa.types.is_struct(kind)
    return True if role == "image_column" else is_text(kind)


def _mean_length(column: pa.ChunkedArray) -> float:
    lengths = pc.call_function("binary_length", [column.slice(0, 1000)])
    return float(pc.call_function("mean", [lengths]).as_py() or 0.0)


def _is_id(name: str) -> bool:
    return name.lower() in ("id", "idx", "index") or name.lower().endswith("_id")


def _unit(rows: pa.Table, taken: Sequence[str]) -> tuple[str, int]:
    """A column named like a unit, of which some value stands in several rows."""
    for name in rows.column_names:
        words = name.lower().removesuffix("_id").removesuffix("id").strip("_")
        kind = rows.schema.field(name).type
        if name in taken or words not in _UNITS or not (is_text(kind) or pa.types.is_integer(kind)):
            continue
        count = len(pc.call_function("unique", [rows[name]]))
        if count < rows.num_rows:
            return name, count
    return "", rows.num_rows


def _check_complete(kind: str, wanted: Sequence[str], fields: Json, rows: pa.Table) -> None:
    """Refuses a dataset without a column that the task cannot do without."""
    optional = {"pair_column", "prompt_column", "messages_column"}
    if "messages_column" in fields:
        optional |= {"text_column"}
    for role in wanted:
        if role not in fields and role not in optional:
            got = f"{rows.num_columns} columns"
            if are_names(rows.column_names):
                got = ", ".join(
                    f"{name} ({rows.schema.field(name).type})" for name in rows.column_names
                )
            fix = f"rename one to {_ROLES[role][0]!r}, or write task.{role} yourself"
            raise DataError(f"no column for task.{role} of {kind}", got, "one of its kind", fix)


def check_kind(kind: str) -> None:
    """Refuses a task that is not in the table. Raises ConfigError."""
    if kind not in KINDS:
        expected = "one of " + ", ".join(KINDS)
        raise ConfigError("the task to begin", kind, expected, nearest(kind, KINDS))


def _listed(names: Sequence[str]) -> str:
    """The names as a YAML list in one line."""
    return "[" + ", ".join(json.dumps(name, ensure_ascii=False) for name in names) + "]"
