"""No program is silently wrong: its clipped sum is that of separate backward passes, and no record
moves it by more than C, or it is refused by name."""

import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from grape_ray import make_engine
from grape_ray.errors import GrapeRayError
from tests.support.methods import GRADIENT
from tests.support.oracle import averages, clipped, expected, median_norm
from tests.support.programs import DOUBTFUL, STEPS, Program, batch_of

_AGREES = {torch.float64: 1e-6, torch.float32: 2e-3}

programs = st.fixed_dictionaries(
    {
        "steps": st.lists(
            st.one_of(
                st.sampled_from(STEPS), st.sampled_from(STEPS), st.sampled_from(STEPS + DOUBTFUL)
            ),
            min_size=1,
            max_size=4,
        ),
        "shared": st.lists(st.one_of(st.none(), st.integers(0, 2)), min_size=4, max_size=4),
        "rows": st.integers(1, 5),
        "length": st.integers(1, 4),
        "seed": st.integers(0, 2**16),
        "method": st.sampled_from(GRADIENT),
        "training": st.booleans(),
        "dtype": st.sampled_from([torch.float64, torch.float64, torch.float32]),
    }
)


def off(got, want) -> float:
    return max(float((got[name] - want[name]).abs().max()) for name in want)


def check(program) -> bool:
    """Whether a program was trained; False where it was refused by name. Fails where it is neither
    right nor refused.
    """
    torch.manual_seed(program["seed"])
    dtype = program["dtype"]
    model = Program(program["steps"], program["shared"]).to(dtype).train(program["training"])
    batch, rows = (
        batch_of(program["rows"], program["length"], program["seed"], dtype),
        program["rows"],
    )
    loss = lambda m, b: m(b)  # noqa: E731
    clip_norm = max(median_norm(model, loss, batch, rows), 1e-3)
    engine = make_engine(
        model, program["method"], clip_norm, key=b"k", rank=2, project_min_numel=20
    )
    try:
        whole = engine.clipped_sum(loss, batch).tensors
    except GrapeRayError:
        return False
    wanted = expected(engine, loss, batch, rows)
    assert off(whole, wanted) < _AGREES[dtype] * clip_norm
    # some rows as one unit's, and a unit without rows
    groups = torch.randint(0, 3, (rows,), generator=torch.Generator().manual_seed(program["seed"]))
    summed = engine.clipped_sum(loss, batch, groups=groups, units=4).tensors
    wanted = clipped(averages(engine, loss, batch, groups), clip_norm)
    assert off(summed, wanted) < _AGREES[dtype] * clip_norm
    bound = clip_norm * (1 + (1e-6 if dtype is torch.float64 else 1e-3))
    for record in range(rows):
        keep = torch.arange(rows) != record
        try:
            rest = engine.clipped_sum(loss, {k: v[keep] for k, v in batch.items()}).tensors
        except GrapeRayError:
            return False
        assert (
            sum(float((whole[n] - rest[n]).double().square().sum()) for n in whole) ** 0.5 <= bound
        )
    return True


@hypothesis.settings(
    max_examples=120,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(programs)
def test_programs_are_right_or_refused(program):
    check(program)


@pytest.mark.slow
def test_five_thousand_programs_are_right_or_refused_and_most_are_trained():
    counts = {True: 0, False: 0}

    @hypothesis.settings(
        max_examples=int(os.environ.get("FUZZ", "5000")),
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        database=None,
    )
    @hypothesis.seed(1)
    @hypothesis.given(programs)
    def run(program):
        counts[check(program)] += 1

    run()
    print(counts)
    assert counts[True] >= counts[False]


@pytest.mark.parametrize("step", STEPS)
def test_each_habit_alone_is_trained(step):
    for rows, length in ((4, 3), (3, 3), (2, 4), (1, 3)):
        for method in ("grape", "ghost"):
            program = {
                "steps": [step],
                "shared": [None] * 4,
                "rows": rows,
                "length": length,
                "seed": rows,
                "method": method,
            }
            assert check({**program, "training": True, "dtype": torch.float64}), (
                f"{rows} x {length}, {method}"
            )


@pytest.mark.parametrize("step", DOUBTFUL)
def test_each_doubtful_habit_alone_is_refused(step):
    program = {
        "steps": [step],
        "shared": [None] * 4,
        "rows": 4,
        "length": 3,
        "seed": 1,
        "method": "ghost",
    }
    assert not check({**program, "training": True, "dtype": torch.float64})
