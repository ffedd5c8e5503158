"""A ledger in plain values: its budget, what was taken of it and spent, its studies and their
runs.
"""

from __future__ import annotations

import math
from dataclasses import asdict

from grape_ray.ledger.ledger import Ledger
from grape_ray.storage import Json


def summary(ledger: Ledger) -> Json:
    """Everything that a person or a program would ask of it.

    ``epsilon_spent`` is what the steps charged so far cost, ``epsilon_left`` what no study has
    taken: a study's share is gone when it is registered, because its tokens can still be spent.

    Raises:
        LedgerError: out of reach or damaged.
    """
    state = ledger.state
    studies: dict[str, Json] = {}
    for name, known in state.studies.items():
        runs = {
            run: {"attempts": len(tries), "used": sum(t.used for t in tries)}
            for run, tries in known.runs.items()
        }
        counts = {
            "used": known.used,
            "left": known.left,
            "epsilon_spent": ledger.epsilon_spent(name),
            "runs": runs,
        }
        studies[name] = {**known.study.payload(), "unit": known.study.unit, **counts}
    selections = {
        name: {**selection.payload(), "unit": selection.unit}
        for name, selection in state.selections.items()
    }
    spent = math.fsum(
        [s["epsilon_spent"] for s in studies.values()] + [s["epsilon"] for s in selections.values()]
    )
    return {
        "dataset_id": state.dataset_id,
        "ledger_id": state.ledger_id,
        "unit": state.unit,
        "epsilon": state.epsilon,
        "delta": state.delta,
        "extensions": [asdict(extension) for extension in state.extensions],
        "epsilon_left": state.left("epsilon"),
        "delta_left": state.left("delta"),
        "epsilon_spent": spent,
        "entries": state.next_seq,
        "head": state.head,
        "epoch": state.epoch,
        "holder": state.holder,
        "studies": studies,
        "selections": selections,
    }
