"""The rules of a chain of entries, each at its edge: what breaks one is refused and changes
nothing, its nearest neighbour is taken.
"""

import copy
import math
import random
from dataclasses import asdict, replace

import pytest

from grape_ray.accounting import Mechanism
from grape_ray.accounting.selection import Distribution, Selection
from grape_ray.errors import BudgetExceeded, GrapeRayError, LedgerError, NoiseReuse
from grape_ray.ledger import Study
from grape_ray.ledger.entries import FORMAT, GENESIS, Entry
from grape_ray.ledger.state import State

MECHANISM = Mechanism("poisson_gaussian", 1.0, 10.0)
RUN = {"study": "s", "run": "r", "attempt": 1}
OPEN = {"format": FORMAT, "ledger_id": "l", "dataset_id": "data", "epsilon": 8.0, "delta": 1e-5}


def extend(epsilon=9.0, delta=1e-5, reason="asked for by the board"):
    return "extend", {"epsilon": epsilon, "delta": delta, "reason": reason}


def study(name="s", epsilon=4.0, delta=4e-6, tokens=20):
    return "study", Study(name, MECHANISM, epsilon, delta, tokens).payload()


def selection(name="pick", epsilon=2.0, delta=2e-6):
    return "selection", Selection(
        name, MECHANISM, epsilon, delta, 5, Distribution("poisson", 3.0)
    ).payload()


def charge(chunk, first_step, steps, asked=None, **others):
    return "charge", {
        **RUN,
        "chunk": chunk,
        "first_step": first_step,
        "asked": steps if asked is None else asked,
        "steps": steps,
        **others,
    }


def refund(chunk, steps, **others):
    return "refund", {**RUN, "chunk": chunk, "steps": steps, **others}


def attempt(number, run="r", of="s"):
    return "attempt", {"study": of, "run": run, "attempt": number, "key_id": "k"}


def close(number=1):
    return "close", {**RUN, "attempt": number}


def epoch(number, holder="h"):
    return "epoch", {"epoch": number, "holder": holder}


def following(state, kind, payload):
    """The entry that comes next."""
    return Entry(state.next_seq, state.head, kind, payload, 0.0, "n")


def grown(*entries):
    state = State()
    for kind, payload in (("open", OPEN), *entries):
        state.apply(following(state, kind, payload))
    return state


BEGUN = (study(), epoch(1), attempt(1), charge(2, 10, 5))

# What came before, an entry that breaks a rule, the error, and the nearest entry that breaks none.
EDGES = {
    "a share above what is left": (
        (study(),),
        study("t", 4.01, 1e-6),
        BudgetExceeded,
        study("t", 4.0, 1e-6),
    ),
    "a share of delta above what is left": (
        (study(),),
        study("t", 1.0, 6.1e-6),
        BudgetExceeded,
        study("t", 1.0, 6e-6),
    ),
    "a study beside a selection": (
        (selection(),),
        study("t", 6.01, 1e-6),
        BudgetExceeded,
        study("t", 6.0, 1e-6),
    ),
    "a selection beside a study": (
        (study(),),
        selection("p", 4.01, 1e-6),
        BudgetExceeded,
        selection("p", 4.0, 1e-6),
    ),
    "a selection beside a selection": (
        (selection(),),
        selection("p", 6.01, 1e-6),
        BudgetExceeded,
        selection("p", 6.0, 1e-6),
    ),
    "a share above by little": (
        (study(),),
        study("t", 4.0 * (1 + 1e-9), 1e-6),
        BudgetExceeded,
        study("t", 4.0 * (1 + 1e-13), 1e-6),
    ),
    "a study twice": ((study(epsilon=1.0),), study(epsilon=1.0), LedgerError, study("t", 1.0)),
    "a selection twice": ((selection(),), selection(), LedgerError, selection("p")),
    "a study named as a selection": ((selection("p"),), study("p"), LedgerError, study("t")),
    "a selection named as a study": ((study("p"),), selection("p"), LedgerError, selection("t")),
    "a share above a raised budget": (
        (study(), extend()),
        study("t", 5.01, 1e-6),
        BudgetExceeded,
        study("t", 5.0, 1e-6),
    ),
    "a share of a raised delta": (
        (study(), extend(8.0, 2e-5)),
        study("t", 1.0, 1.7e-5),
        BudgetExceeded,
        study("t", 1.0, 1.6e-5),
    ),
    "a selection above a raised budget": (
        (study(), extend()),
        selection("p", 5.01, 1e-6),
        BudgetExceeded,
        selection("p", 5.0, 1e-6),
    ),
    "a share before the raise that pays for it": (
        (study(),),
        study("t", 5.0, 1e-6),
        BudgetExceeded,
        extend(),
    ),
    "a lower epsilon": ((), extend(7.9, 2e-5), LedgerError, extend(8.0, 2e-5)),
    "a lower delta": ((), extend(9.0, 9e-6), LedgerError, extend(9.0, 1e-5)),
    "a raise by nothing": ((), extend(8.0, 1e-5), LedgerError, extend(8.0 + 1e-9, 1e-5)),
    "a raise below an earlier one": (
        (extend(),),
        extend(8.5, 1e-5),
        LedgerError,
        extend(9.5, 1e-5),
    ),
    "a raise beyond all budgets": ((), extend(1e5), LedgerError, extend(1e4)),
    "a raise to every delta": ((), extend(9.0, 1.0), LedgerError, extend(9.0, 0.9)),
    "a raise without a reason": ((), extend(reason=" "), LedgerError, extend(reason="x")),
    "a raise for a reason in two lines": (
        (),
        extend(reason="a\nb"),
        LedgerError,
        extend(reason="a b"),
    ),
    "an endless reason": ((), extend(reason="a" * 1001), LedgerError, extend(reason="a" * 1000)),
    "an epoch again": ((epoch(1),), epoch(1), LedgerError, epoch(2)),
    "an epoch left out": ((epoch(1),), epoch(3), LedgerError, epoch(2)),
    "an epoch of nobody": ((), epoch(1, ""), LedgerError, epoch(1, "h")),
    "an attempt left out": ((study(), attempt(1)), attempt(3), NoiseReuse, attempt(2)),
    "an attempt again": ((study(), attempt(1)), attempt(1), NoiseReuse, attempt(2)),
    "a first attempt that is not": ((study(),), attempt(0), NoiseReuse, attempt(1)),
    "a run without a name": ((study(),), attempt(1, ""), LedgerError, attempt(1)),
    "an attempt of no study": ((study(),), attempt(1, of="t"), LedgerError, attempt(1)),
    "a charge of no attempt": (BEGUN, charge(3, 15, 1, attempt=0), LedgerError, charge(3, 15, 1)),
    "a charge of an attempt to come": (
        BEGUN,
        charge(3, 15, 1, attempt=2),
        LedgerError,
        charge(3, 15, 1),
    ),
    "a charge of another run": (BEGUN, charge(3, 15, 1, run="q"), LedgerError, charge(3, 15, 1)),
    "a charge of another study": (
        BEGUN,
        charge(3, 15, 1, study="t"),
        LedgerError,
        charge(3, 15, 1),
    ),
    "a charge of nothing": (BEGUN, charge(3, 15, 0, 1), LedgerError, charge(3, 15, 1)),
    "a charge above what was asked": (BEGUN, charge(3, 15, 3, 2), LedgerError, charge(3, 15, 3, 3)),
    "a chunk again": (BEGUN, charge(2, 15, 1), LedgerError, charge(3, 15, 1)),
    "a first chunk below zero": (
        (study(), attempt(1)),
        charge(-1, 0, 1),
        LedgerError,
        charge(0, 0, 1),
    ),
    "a step again": (BEGUN, charge(3, 14, 1), NoiseReuse, charge(3, 15, 1)),
    "a step before the first": (BEGUN, charge(3, 0, 1), NoiseReuse, charge(3, 16, 1)),
    "a step again, two chunks on": (
        (*BEGUN, charge(3, 15, 1)),
        charge(4, 15, 1),
        NoiseReuse,
        charge(4, 16, 1),
    ),
    "a study overdrawn": (BEGUN, charge(3, 15, 16), BudgetExceeded, charge(3, 15, 15)),
    "a study overdrawn by two runs": (
        (*BEGUN, attempt(1, "q")),
        charge(0, 0, 16, run="q"),
        BudgetExceeded,
        charge(0, 0, 15, run="q"),
    ),
    "a study overdrawn by two attempts": (
        (*BEGUN, attempt(2)),
        charge(0, 0, 16, attempt=2),
        BudgetExceeded,
        charge(0, 0, 15, attempt=2),
    ),
    "more than is left after a refund": (
        (*BEGUN, refund(2, 3), attempt(2)),
        charge(0, 0, 19, attempt=2),
        BudgetExceeded,
        charge(0, 0, 18, attempt=2),
    ),
    "a charge of an attempt that was overtaken": (
        (*BEGUN, attempt(2)),
        charge(3, 15, 1),
        NoiseReuse,
        charge(0, 0, 1, attempt=2),
    ),
    "a refund by an attempt that was overtaken": (
        (*BEGUN, attempt(2)),
        refund(2, 1),
        NoiseReuse,
        attempt(3),
    ),
    "the end of an attempt that was overtaken": (
        (*BEGUN, attempt(2)),
        close(1),
        NoiseReuse,
        close(2),
    ),
    "a charge after the end": ((*BEGUN, close()), charge(3, 15, 1), NoiseReuse, attempt(2)),
    "a charge after a refund": ((*BEGUN, refund(2, 1)), charge(3, 15, 1), NoiseReuse, attempt(2)),
    "a refund after a refund": ((*BEGUN, refund(2, 1)), refund(2, 1), NoiseReuse, attempt(2)),
    "a refund after the end": ((*BEGUN, close()), refund(2, 1), NoiseReuse, attempt(2)),
    "a refund before any charge": (
        (study(), attempt(1)),
        refund(0, 1),
        LedgerError,
        charge(0, 0, 1),
    ),
    "a refund of a chunk before the last": (
        (*BEGUN, charge(3, 15, 1)),
        refund(2, 1),
        LedgerError,
        refund(3, 1),
    ),
    "a refund of a chunk that was not charged": (BEGUN, refund(3, 1), LedgerError, refund(2, 1)),
    "a refund above its charge": (BEGUN, refund(2, 6), LedgerError, refund(2, 5)),
    "a refund of nothing": (BEGUN, refund(2, 0), LedgerError, refund(2, 1)),
    "a second opening": ((), ("open", OPEN), LedgerError, study()),
}


def plain(state):
    return copy.deepcopy(asdict(state))


@pytest.mark.parametrize("edge", EDGES)
def test_a_rule_holds_at_its_edge(edge):
    before, wrong, error, right = EDGES[edge]
    state = grown(*before)
    held = plain(state)
    with pytest.raises(GrapeRayError) as refused:
        state.apply(following(state, *wrong))
    assert type(refused.value) is error
    assert plain(state) == held
    entry = following(state, *right)
    state.check(entry)
    assert plain(state) == held  # a check alone changes nothing either
    state.apply(entry)
    assert (state.next_seq, state.head) == (held["next_seq"] + 1, entry.hash)
    assert {**plain(state), "next_seq": 0, "head": ""} != {**held, "next_seq": 0, "head": ""}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", FORMAT + 1),
        ("dataset_id", ""),
        ("epsilon", 0.0),
        ("epsilon", 1e5),
        ("delta", 0.0),
        ("delta", 1.0),
    ],
)
def test_no_ledger_opens_on_what_none_may_hold(field, value):
    state = State()
    with pytest.raises(LedgerError):
        state.apply(following(state, "open", {**OPEN, field: value}))
    assert state == State()


def test_an_opening_comes_first_and_says_what_is_protected():
    with pytest.raises(LedgerError):
        State().apply(following(State(), *study()))
    state = grown()
    assert (state.ledger_id, state.dataset_id, state.epsilon, state.delta) == (
        "l",
        "data",
        8.0,
        1e-5,
    )


@pytest.mark.parametrize("change", [{"seq": 1}, {"seq": 3}, {"prev": GENESIS}, {"prev": ""}])
def test_an_entry_follows_the_one_before_it(change):
    state = grown(study())
    held = plain(state)
    entry = following(state, *epoch(1))
    with pytest.raises(LedgerError):
        state.apply(replace(entry, **change))
    assert plain(state) == held
    state.apply(entry)


def test_every_step_is_counted_where_it_was_charged():
    state = grown(
        study(),
        study("t", 1.0, 1e-6, 9),
        attempt(1),
        charge(0, 0, 4),
        refund(0, 3),
        attempt(2),
        attempt(1, "q"),
    )
    state.apply(following(state, *charge(5, 7, 6, run="q")))
    assert [a.used for a in state.studies["s"].runs["r"]] == [1, 0]
    assert [
        a.next_step
        for a in (
            state.attempt("s", "r", 1),
            state.attempt("s", "r", 2),
            state.attempt("s", "q", 1),
        )
    ] == [4, 0, 13]
    assert (state.study("s").used, state.study("s").left, state.study("t").left) == (7, 13, 9)
    assert state.attempt("s", "r", 1).key_id == "k"
    assert state.live_attempt("s", "r", 2).number == 2
    for study_name, run, number in (
        ("s", "r", 0),
        ("s", "r", 3),
        ("s", "nope", 1),
        ("nope", "r", 1),
    ):
        with pytest.raises(LedgerError):
            state.attempt(study_name, run, number)
    with pytest.raises(NoiseReuse, match="attempt 2 has begun"):
        state.live_attempt("s", "r", 1)


def resummed(state):
    """What each study has used and each attempt goes on from, added up from the charges; and the
    shares that are taken.
    """
    used, following_steps = {}, {}
    for name, known in state.studies.items():
        tries = [(run, a) for run, attempts in known.runs.items() for a in attempts]
        each = [
            sum(c.steps for c in a.charges.values()) - sum(a.refunds.values()) for _, a in tries
        ]
        used[name] = (sum(each), each)
        following_steps[name] = [
            max((c.first_step + c.steps for c in a.charges.values()), default=0) for _, a in tries
        ]
        assert all((a.last.chunk if a.last else -1) == max(a.charges, default=-1) for _, a in tries)
    shares = [*(known.study for known in state.studies.values()), *state.selections.values()]
    return (
        used,
        following_steps,
        {
            unit: math.fsum(getattr(share, unit) for share in shares)
            for unit in ("epsilon", "delta")
        },
    )


def kept(state):
    """The same from the sums that are kept with each entry."""
    tries = {
        name: [a for attempts in known.runs.values() for a in attempts]
        for name, known in state.studies.items()
    }
    used = {
        name: (known.used, [a.used for a in tries[name]]) for name, known in state.studies.items()
    }
    return (
        used,
        {name: [a.next_step for a in tries[name]] for name in tries},
        {u: float(n) for u, n in state.taken.items()},
    )


def some_entry(draw, state):
    """An entry that may or may not be allowed: what would follow, or a little beside it."""
    name, run = draw.choice("stu"), draw.choice("qr")
    known = state.studies[name].runs.get(run, []) if name in state.studies else []
    number = max(1, len(known) - (draw.random() < 0.1))
    where = {"study": name, "run": run, "attempt": number}
    last, step = (max(known[-1].charges, default=-1), known[-1].next_step) if known else (-1, 0)
    likely = {
        "attempt": 2,
        "charge": 9,
        "refund": 1,
        "close": 1,
        "study": 1,
        "selection": 1,
        "extend": 0.3,
    }
    return {
        "study": lambda: study(
            name, draw.choice((0.1, 0.7, 3.3)), draw.choice((1e-7, 3e-6)), draw.choice((40, 400))
        ),
        "selection": lambda: selection(draw.choice(("pick", "s")), draw.choice((0.2, 2.0)), 1e-7),
        "attempt": lambda: attempt(len(known) + 1, run, name),
        "charge": lambda: charge(
            last + draw.choice((0, 1, 1, 1, 3)),
            step + draw.choice((-1, 0, 0, 0, 5)),
            draw.randint(0, 9),
            8,
            **where,
        ),
        "refund": lambda: refund(last, draw.randint(0, 5), **where),
        "close": lambda: ("close", where),
        "extend": lambda: extend(state.epsilon + draw.choice((-1, 1)), state.delta),
    }[draw.choices([*likely], [*likely.values()])[0]]()


def test_sums_that_grow_with_each_entry_are_those_over_all_entries():
    taken_in = refused = 0
    for seed in range(30):
        draw, state = random.Random(seed), grown()
        for _ in range(150):
            before = plain(state)
            try:
                state.apply(following(state, *some_entry(draw, state)))
                taken_in += 1
            except GrapeRayError:
                refused += 1
                assert plain(state) == before
            assert kept(state) == resummed(state)
    assert taken_in > 800
    assert refused > 800


class NoWalk(dict):
    """A dict that can be asked for single items, and for its newest, alone."""

    def __iter__(self):
        raise AssertionError("an entry's cost grows with the entries before it")

    keys = values = items = __iter__


def test_an_entry_costs_the_same_whatever_came_before():
    state = grown(
        study(tokens=30), study("t", 1.0, 1e-6), *[attempt(n) for n in (1, 2)], attempt(1, "q")
    )
    known = state.studies["s"]
    known.runs = NoWalk(known.runs)
    for tries in (known.runs["r"], known.runs["q"]):
        for one in tries:
            one.charges, one.refunds = NoWalk(), NoWalk()
    state.studies, state.selections = NoWalk(state.studies), NoWalk(state.selections)
    for entry in (
        charge(0, 0, 4, attempt=2),
        charge(1, 4, 6, attempt=2),
        charge(7, 0, 9, run="q"),
        refund(1, 5, attempt=2),
        study("u", 1.0, 1e-6),
    ):
        state.apply(following(state, *entry))
    with pytest.raises(BudgetExceeded):
        state.apply(following(state, *charge(8, 9, 17, run="q")))
    assert (known.used, known.left, state.attempt("s", "r", 2).next_step) == (14, 16, 10)


def test_a_budget_is_what_the_last_raise_made_it_and_each_is_kept():
    state = grown(epoch(1), extend(9.0, 1e-5, "one"), extend(9.0, 3e-5, "two"))
    assert (state.epsilon, state.delta, state.left("epsilon")) == (9.0, 3e-5, 9.0)
    assert [(e.seq, e.epsilon, e.delta, e.reason) for e in state.extensions] == [
        (2, 9.0, 1e-5, "one"),
        (3, 9.0, 3e-5, "two"),
    ]


def test_the_holder_is_the_one_of_the_last_epoch():
    state = grown(epoch(1, "first"), epoch(2, "second"))
    assert (state.epoch, state.holder) == (2, "second")


def test_records_of_another_dataset_are_not_paid_for_and_not_quoted():
    state = grown()
    state.check_dataset("data")
    state.check_dataset(None)
    with pytest.raises(LedgerError) as refused:
        state.check_dataset("another-fingerprint")
    assert "another-fingerprint" not in str(refused.value)
    assert "data'" not in str(refused.value)
