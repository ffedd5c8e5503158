"""Whose row is it: every regular order of rows is understood, whatever else is refused, and a
record moves the sum by at most C.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from grape_ray import make_engine
from grape_ray.config.schema import Method, Privacy
from grape_ray.engines.capture import row_layout
from grape_ray.engines.capture.row_layout import Layout
from grape_ray.engines.verification.forward import VERIFY_EVERY
from grape_ray.errors import UnsupportedLayer
from grape_ray.training.preflight import preflight
from tests.support.methods import GRADIENT
from tests.support.oracle import expected, worst
from tests.support.zoo import VOCAB, lm_loss, text_batch

WIDTH = 8


def engine(model, method, clip_norm=1.0):
    return make_engine(model, method, clip_norm, key=b"k", rank=2, project_min_numel=50)


def moved(model, loss, batch, method, record):
    """|| S(D) - S(D minus a record) || / C."""
    made, rows = engine(model, method), len(next(iter(batch.values())))
    keep = torch.arange(rows) != record
    whole, rest = (
        made.clipped_sum(loss, b).tensors for b in (batch, {k: v[keep] for k, v in batch.items()})
    )
    return sum(float((whole[n] - rest[n]).double().square().sum()) for n in whole) ** 0.5


def network():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "a": nn.Linear(WIDTH, WIDTH),
            "b": nn.Linear(WIDTH, WIDTH),
            "norm": nn.LayerNorm(WIDTH),
            "c": nn.Linear(WIDTH, 1),
        }
    )


def score(m, x):
    return m["c"](m["norm"](torch.tanh(m["b"](torch.tanh(m["a"](x)))))).squeeze(-1)


def batch_of(rows, seed=1):
    g = torch.Generator().manual_seed(seed)
    sized = torch.where(torch.arange(rows) % 2 == 0, 50.0, 0.05)
    return {
        "chosen": torch.randn(rows, WIDTH, generator=g),
        "rejected": torch.randn(rows, WIDTH, generator=g),
        "text": torch.randn(rows, 4, WIDTH, generator=g),
        "w": sized,
    }


def preferences(m, b):
    chosen, rejected = score(m, torch.cat([b["chosen"], b["rejected"]])).chunk(2)
    return -F.logsigmoid(b["w"] * (chosen - rejected))


def copies(m, b):
    return b["w"] * score(m, b["chosen"].repeat(3, 1)).view(3, -1).sum(0)


def interleaved(m, b):
    return b["w"] * score(m, b["chosen"].repeat_interleave(3, 0)).view(-1, 3).sum(1)


def time_major(m, b):
    return b["w"] * score(m, b["text"].transpose(0, 1)).sum(0)


def time_major_flat(m, b):
    return b["w"] * score(m, b["text"].transpose(0, 1).flatten(0, 1)).view(4, -1).sum(0)


def views_of_tokens(m, b):
    both = torch.cat([b["text"], b["text"].flip(1)]).flatten(0, 1)
    return b["w"] * score(m, both).view(2, len(b["w"]), 4).sum((0, 2))


def one_by_one(m, b):
    return torch.stack([w * score(m, x).sum() for w, x in zip(b["w"], b["text"])])


REGULAR = [
    preferences,
    copies,
    interleaved,
    time_major,
    time_major_flat,
    views_of_tokens,
    one_by_one,
]


@pytest.mark.parametrize("loss", REGULAR)
@pytest.mark.parametrize("method", GRADIENT)
def test_every_regular_order_of_rows_is_right(loss, method):
    model, batch = network().double(), {k: v.double() for k, v in batch_of(6).items()}
    made = engine(model, method, 0.5)
    # other sizes follow from what the first has shown, or are verified anew
    for rows in (6, 4, 5, 1):
        part = {k: v[:rows] for k, v in batch.items()}
        assert worst(made.clipped_sum(loss, part).tensors, expected(made, loss, part, rows)) < 1e-9


@pytest.mark.parametrize("loss", [preferences, copies])
@pytest.mark.parametrize("method", GRADIENT)
def test_a_record_moves_the_sum_by_at_most_the_clip_norm(loss, method):
    assert (
        max(moved(network(), loss, batch_of(64), method, record) for record in (0, 1, 31, 40, 63))
        <= 1 + 1e-5
    )


def test_the_preflight_passes_what_is_right():
    for method in ("grape", "ghost", "randomized"):
        report = preflight(
            network(),
            preferences,
            batch_of(3),
            Privacy(),
            Method(name=method, rank=2, project_min_numel=20),
        )
        assert report.worst < 1e-4


def crossed(m, b):
    """Each loss is of its own example, but rows are in an order that none of size or place would
    tell.
    """
    order = torch.tensor([2, 0, 3, 1, 5, 4])[: len(b["w"])]
    return b["w"] * score(m, b["chosen"][order])[order.argsort()]


@pytest.mark.parametrize("method", GRADIENT)
def test_an_irregular_order_is_refused_by_name(method):
    with pytest.raises(
        UnsupportedLayer, match=r"'a\.weight'.*rows \(6,\) in which gradients of several"
    ):
        engine(network(), method).clipped_sum(crossed, batch_of(6))


def test_rows_that_change_places_later_are_refused_as_well():
    """The same operations, in an order that depends on a switch no signature shows: found at the
    stated rate.
    """
    model, batch, switch = network(), batch_of(6), [False]

    def loss(m, b):
        order = torch.tensor([2, 0, 3, 1, 5, 4]) if switch[0] else torch.arange(6)
        order = order[order < len(b["chosen"])]
        return score(m, b["chosen"][order])[order.argsort()]

    made = engine(model, "ghost")
    made.clipped_sum(loss, batch)
    switch[0] = True
    for _ in range(VERIFY_EVERY - 1):
        made.clipped_sum(loss, batch)
    with pytest.raises(UnsupportedLayer, match="gradients of several"):
        made.clipped_sum(loss, batch)


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_two_examples_that_change_places_are_found_every_time_among_few(rows):
    """Each loss is right, and no value tells: only gradients show that two rows belong to each
    other's example.
    """
    batch = batch_of(rows)
    for number in range(15):
        other = 1 + number % (rows - 1)
        order = [other if i == 0 else 0 if i == other else i for i in range(rows)]
        with pytest.raises(UnsupportedLayer, match="gradients of several"):
            engine(network(), "ghost").clipped_sum(
                lambda m, b, order=order: score(m, b["chosen"][torch.tensor(order)])[
                    torch.tensor(order)
                ],
                batch,
            )


def test_a_right_pass_stays_right_when_it_is_verified_again(monkeypatch):
    monkeypatch.setattr("grape_ray.engines.verification.forward.VERIFY_EVERY", 2)
    model, batch = network().double(), {k: v.double() for k, v in batch_of(6).items()}
    made = engine(model, "ghost", 0.5)
    for _ in range(5):
        assert (
            worst(
                made.clipped_sum(time_major_flat, batch).tensors,
                expected(made, time_major_flat, batch, 6),
            )
            < 1e-9
        )


def test_a_result_that_no_loss_needs_has_no_gradient_and_no_owner_to_find():
    def loss(m, b):
        m["b"](b["rejected"])
        return score(m, b["chosen"])

    model, batch = network().double(), {k: v.double() for k, v in batch_of(6).items()}
    made = engine(model, "ghost", 0.5)
    assert worst(made.clipped_sum(loss, batch).tensors, expected(made, loss, batch, 6)) < 1e-9


class Sorted(nn.Module):
    """Experts that take tokens in the order of their choice, as grouped products do."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        flat = x.flatten(0, -2)
        order = flat[:, 0].argsort()
        return self.experts(flat[order])[order.argsort()].view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_sorted_by_what_they_say_are_refused_in_every_precision(dtype):
    model = Sorted().to(dtype)
    with pytest.raises(UnsupportedLayer, match="picked across examples by their values"):
        engine(model, "dp_adam").clipped_sum(
            lambda m, b: m(b["text"].to(dtype)).float().square().sum((1, 2)), batch_of(4)
        )


def test_experts_that_choose_within_an_example_are_right():
    def loss(m, b):
        best = b["text"][..., :1].argmax(1, keepdim=True).expand(-1, -1, WIDTH)
        return score(m, b["text"].gather(1, best)).squeeze(1)

    model, batch = network().double(), {k: v.double() for k, v in batch_of(5).items()}
    made = engine(model, "grape", 0.1)
    assert worst(made.clipped_sum(loss, batch).tensors, expected(made, loss, batch, 5)) < 1e-9


def test_gradients_within_the_loss_are_refused():
    def penalty(m, b):
        x = b["chosen"].clone().requires_grad_()
        (slope,) = torch.autograd.grad(score(m, x).sum(), x, create_graph=True)
        return slope.square().sum(1)

    with pytest.raises(UnsupportedLayer, match="taken inside the loss"):
        engine(network(), "grape").clipped_sum(penalty, batch_of(4))


@pytest.mark.parametrize("rows", [2, 3, 4, 7, 12])
def test_layouts_are_told_from_evidence(rows):
    """Law: of all regular layouts the one that made the evidence is found, up to layouts that own
    every row alike.
    """
    groups = row_layout.every_pair(rows)
    for i in range(rows):
        for j in range(rows):
            assert i == j or bool((groups[:, i] & ~groups[:, j]).any())
    for lead in ((rows,), (rows, 3), (3, rows), (2 * rows,), (2 * rows * 3, 2)):
        for layout in row_layout.candidates(lead, rows):
            owner = layout.owners(lead, rows)
            shape = [1] * len(lead)
            if layout.only is None:
                shape[layout.axis] = -1
            evidence = groups[:, owner].view(len(groups), *shape).expand(-1, *lead)
            found = row_layout.consistent(evidence, groups)[0]
            assert row_layout.agrees(found, evidence, groups)
            if found.axis == layout.axis and found.only is None and layout.only is None:
                assert torch.equal(found.owners(lead, rows), owner)
            moved_rows = (
                evidence.roll(1, dims=layout.axis + 1) if layout.only is None else ~evidence
            )
            assert (
                layout.only is not None
                or rows == 1
                or not row_layout.agrees(layout, moved_rows, groups)
            )


def test_a_layout_takes_apart_what_it_says():
    tensor = torch.arange(2 * 3 * 4 * 5.0).view(24, 5)
    by_hand = tensor.view(2, 3, 4, 5).permute(1, 0, 2, 3).reshape(3, 8, 5)
    layout = Layout(0, 2, 4)
    assert torch.equal(layout.by_example(tensor, 1, 3), by_hand)
    assert torch.equal(layout.summed(tensor, 1, 3), by_hand.sum(1))
    assert Layout(0, 1, 4).fitted((21, 9), 3) == Layout(0, 1, 7)
    longer = Layout(0, 1, 2).fitted((9,), 3)
    assert longer == Layout(0, 1, 3)
    assert longer.summed(torch.arange(9.0), 1, 3).tolist() == [3.0, 12.0, 21.0]
    # of one entry each it is not known which factor would grow
    assert Layout(0, 1, 1).fitted((6,), 3) is None
    assert Layout(0, 2, 1).fitted((9,), 3) is None
    assert Layout(0, 2, 1).fitted((6,), 3) == Layout(0, 2, 1)
    assert Layout(0, 2, 4).fitted((21,), 3) is None


class Asleep(nn.Module):
    """LoRA before its first step: through B = 0 no gradient of A comes back."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(WIDTH, 1).requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, 1, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("learns", [False, True])
def test_layouts_are_not_remembered_of_uses_through_which_no_gradient_came(learns):
    def pairs(m, b):
        chosen, rejected = m(torch.cat([b["chosen"], b["rejected"]])).squeeze(1).chunk(2)
        return b["w"] * (chosen - rejected)

    model, batch = Asleep().double(), {k: v.double() for k, v in batch_of(6).items()}
    made = engine(model, "dp_adam", 0.5)
    if learns:
        made.learn(pairs, batch)
        assert not model.b.weight.any()
        made.adopt(made.layouts)
    made.clipped_sum(pairs, batch)
    with torch.no_grad():
        model.b.weight.fill_(0.3)
    assert worst(made.clipped_sum(pairs, batch).tensors, expected(made, pairs, batch, 6)) < 1e-9


def test_an_order_in_which_no_gradient_came_is_checked_when_one_comes():
    """One layout alone fits the sizes, and it is wrong: while nothing comes back it must not be
    taken for granted.
    """

    def inside(m, b):
        order = torch.tensor([i for i in (2, 0, 3, 1, 5, 4) if i < len(b["w"])])
        hidden = torch.tanh(m.a(b["chosen"][order]))[order.argsort()]
        return b["w"] * m.b(hidden).squeeze(1)

    model = Asleep()
    made = engine(model, "dp_adam", 0.5)
    made.clipped_sum(inside, batch_of(6))
    with torch.no_grad():
        model.b.weight.fill_(0.3)
    with pytest.raises(UnsupportedLayer, match="gradients of several"):
        made.clipped_sum(inside, batch_of(6))


def test_one_active_example_of_many_settles_nothing():
    def hinge(m, b):
        chosen, rejected = score(m, torch.cat([b["chosen"], b["rejected"]])).chunk(2)
        return b["w"] * (b["margin"] + chosen - rejected).relu()

    model, batch = network().double(), {k: v.double() for k, v in batch_of(8).items()}
    made = engine(model, "ghost", 0.5)
    for active in ((3,), (0,), (1, 5), range(8)):
        batch["margin"] = torch.full((8,), -1e3).double()
        batch["margin"][list(active)] = 1e3
        assert worst(made.clipped_sum(hinge, batch).tensors, expected(made, hinge, batch, 8)) < 1e-9


def test_one_active_row_of_several_views_settles_nothing():
    """The first row of two views is the first example's in every order; the rest of them is not."""

    def switched(m, b):
        chosen, rejected = score(m, torch.cat([b["chosen"], b["rejected"]])).chunk(2)
        return b["on"][:, 0] * chosen + b["on"][:, 1] * rejected

    model, batch = network().double(), {k: v.double() for k, v in batch_of(4).items()}
    made = engine(model, "ghost", 0.5)
    for on in (torch.zeros(4, 2).long(), torch.ones(4, 2).long()):
        on[0] = torch.tensor([1, 0])
        batch["on"] = on  # a mask, and uneven in both
        assert (
            worst(made.clipped_sum(switched, batch).tensors, expected(made, switched, batch, 4))
            < 1e-9
        )


@pytest.mark.parametrize("loss", [views_of_tokens, time_major_flat, time_major])
def test_a_pass_of_one_token_does_not_say_how_many_tokens_lie(loss):
    model, made = network().double(), None
    made = engine(model, "dp_adam", 0.5)
    for length in (1, 4, 2):
        batch = {k: v.double() for k, v in batch_of(4).items()}
        batch["text"] = batch["text"][:, :length]

        def sized(m, b, length=length):
            if loss is time_major:
                return time_major(m, b)
            tokens = (
                b["text"].transpose(0, 1).flatten(0, 1)
                if loss is time_major_flat
                else torch.cat([b["text"]] * 2).flatten(0, 1)
            )
            scores = score(m, tokens)
            return b["w"] * (
                scores.view(length, -1).sum(0)
                if loss is time_major_flat
                else scores.view(2, -1, length).sum((0, 2))
            )

        assert worst(made.clipped_sum(sized, batch).tensors, expected(made, sized, batch, 4)) < 1e-9


@pytest.mark.parametrize("rows", [9, 64])
def test_one_swapped_pair_of_many_is_found_at_once(rows):
    """Where halves tell two examples apart only every other time, weights do always."""
    for number in range(10):
        first = number % (rows - 1)  # and its neighbour, whose weight is nearest
        order = [*range(first), first + 1, first, *range(first + 2, rows)]
        with pytest.raises(UnsupportedLayer, match="gradients of several"):
            engine(network(), "ghost").clipped_sum(
                lambda m, b, order=order: score(m, b["chosen"][torch.tensor(order)])[
                    torch.tensor(order)
                ],
                batch_of(rows),
            )


def test_many_examples_in_half_precision_are_right():
    """Weights would be rounded by more than they differ."""
    torch.manual_seed(0)
    model, batch = nn.Linear(WIDTH, 1).bfloat16(), {"x": batch_of(200)["chosen"].bfloat16()}
    engine(model, "dp_adam").clipped_sum(lambda m, b: m(b["x"]).squeeze(1), batch)


def by_length(order_of):
    def loss(m, b):
        order = order_of(b["size"])
        scores = (
            [score(m, b["chosen"][i : i + 1]) for i in order]
            if isinstance(order, range)
            else score(m, b["chosen"][order])
        )
        return scores[torch.as_tensor(order).argsort()]

    return loss


ORDERS = {
    "a list": lambda size: size.argsort().tolist(),
    "an array": lambda size: size.argsort().numpy(),
    "a tensor of numbers": lambda size: torch.tensor([int(i) for i in size.argsort()]),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_an_order_that_left_torch_is_followed_all_the_same(kind):
    made, batch = engine(network(), "ghost"), batch_of(6)
    batch["size"] = torch.arange(6)
    with pytest.raises(UnsupportedLayer):  # noqa: PT012
        made.clipped_sum(by_length(ORDERS[kind]), batch)  # sorted already
        batch["size"] = torch.tensor([4, 1, 5, 0, 3, 2])
        made.clipped_sum(by_length(ORDERS[kind]), batch)


def test_a_reading_that_is_still_open_refuses_no_right_training():
    """Preferences of which one side of one pair alone is active: views could follow one another in
    two ways, of equal sums.
    """

    class Preferences(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(5, 1)

        def forward(self, batch):
            chosen, rejected = (
                self.score(torch.cat([batch["chosen"], batch["rejected"]])).squeeze(1).chunk(2)
            )
            return torch.relu(batch["m0"] + chosen) + torch.relu(batch["m1"] + rejected)

    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        batch = {name: torch.randn(4, 5, generator=generator) for name in ("chosen", "rejected")}
        batch |= {"m0": torch.tensor([100.0, -100, -100, -100]), "m1": torch.full((4,), -100.0)}
        model = Preferences()
        summed = (
            make_engine(model, "dp_adam", 1e9)
            .clipped_sum(lambda model, batch: model(batch), batch)
            .tensors
        )
        wanted = torch.autograd.grad(model(batch).sum(), list(model.parameters()))
        assert all(
            torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in zip(summed.values(), wanted)
        )


def test_what_cancels_in_a_row_is_no_gradient_of_another_example():
    """The first token attends to itself alone: its query's gradient is zero but for rounding, which
    is another under other weights of the losses.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64}
    config = transformers.OPTConfig(
        **sizes, num_attention_heads=4, max_position_embeddings=80, word_embed_proj_dim=32
    )
    model, batch = transformers.OPTForCausalLM(config).eval(), text_batch(16, 64, padded=False)
    engine = make_engine(model, "bookkeeping", 1.0)
    summed = engine.clipped_sum(lm_loss, batch).tensors
    assert worst(summed, expected(engine, lm_loss, batch, 16)) < 1e-4
