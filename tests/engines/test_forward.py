"""What a forward pass may do: no company, no memory, no shared luck, no ambient precision; each is
found by value in training mode.
"""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from grape_ray import make_engine
from grape_ray.config.schema import Method, Privacy
from grape_ray.errors import ConfigError, UnsupportedLayer
from grape_ray.training.preflight import preflight
from tests.engines.test_sensitivity import Weighted, cancelling, dictated
from tests.support.methods import GRADIENT

WIDTH = 6


def engine(model, method="ghost", clip_norm=1.0):
    return make_engine(model, method, clip_norm, key=b"k", rank=2, project_min_numel=50)


def loss(m, b):
    return 3 * m(b["x"]).float().flatten(1).sum(1)


def batch(rows=8, seed=1):
    return {"x": torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))}


def around(layer, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 16), layer, nn.Tanh(), nn.Linear(16, 1)).to(dtype).train()


class Do(nn.Module):
    """A function as a layer, told whether the model is in training mode."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x, self.training)


MIXING = {
    "batch statistics": lambda x, training: (
        (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt() if training else x
    ),
    "mixup": lambda x, training: 0.5 * x + 0.5 * x.roll(1, 0) if training else x,
    "functional batch norm": lambda x, training: (
        F.batch_norm(x, None, None, training=True) if training else x
    ),
    "a little of the mean": lambda x, training: x + 1e-5 * x.mean(0),
    "a detached mean": lambda x, training: x - 1e-4 * x.detach().mean(0),
    "the batch's size": lambda x, training: x / x.shape[0],
    "the batch's maximum": lambda x, training: x / x.detach().abs().max(),
}


@pytest.mark.parametrize("kind", MIXING)
@pytest.mark.parametrize("method", ["grape", "dp_adam"])
def test_company_is_refused(kind, method):
    model = around(Do(MIXING[kind]))
    with pytest.raises(UnsupportedLayer):
        engine(model, method).clipped_sum(loss, batch())
    with pytest.raises(UnsupportedLayer):
        preflight(
            model, loss, batch(4), Privacy(), Method(name=method, rank=2, project_min_numel=50)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_before_the_first_layer_is_refused_in_every_precision(dtype):
    model = nn.Sequential(Do(lambda x, training: x + 5e-2 * x.mean(0)), around(nn.Identity())).to(
        dtype
    )
    with pytest.raises(UnsupportedLayer, match="beside other examples"):
        engine(model).clipped_sum(lambda m, b: loss(m, {"x": b["x"].to(dtype)}), batch())


def test_batch_norm_without_statistics_of_its_own_is_refused_in_eval_mode():
    model = around(nn.BatchNorm1d(16, affine=False, track_running_stats=False)).eval()
    with pytest.raises(UnsupportedLayer):
        engine(model).clipped_sum(loss, batch())


def test_whole_numbers_mix_as_well_as_real_ones():
    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 1)

        def forward(self, ids):
            return self.head(self.table(ids).mean(1) / ids.max())

    ids = torch.randint(1, 9, (8, 5), generator=torch.Generator().manual_seed(0))
    ids[3, 2] = 19
    with pytest.raises(UnsupportedLayer):
        engine(Lengths()).clipped_sum(loss, {"x": ids})


class Keeps(nn.Module):
    """A model that keeps what it saw, in one of many ways."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.how = nn.Linear(WIDTH, 8), nn.Linear(8, 1), how
        self.plain, self.listed = torch.zeros(8), []
        self.register_buffer("kept", torch.zeros(8))
        self.register_buffer("unsaved", torch.zeros(8), persistent=False)
        self.frozen = nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, x):
        h = self.first(x)
        seen = h.detach().mean(0)
        if self.how == "buffer":
            self.kept.mul_(0.5).add_(seen)
        elif self.how == "replaced buffer":
            self.kept = 0.5 * self.kept + seen
        elif self.how == "data":
            self.kept.data.add_(seen)
        elif self.how == "numpy":
            self.kept.numpy()[:] += seen.numpy()
        elif self.how == "frozen weight":
            self.frozen.data.add_(seen)
        elif self.how == "trained weight":
            self.first.bias.data.add_(seen)
        elif self.how == "trained weight, by the book":
            with torch.no_grad():
                self.first.bias.add_(seen)
        elif self.how == "unsaved buffer":
            self.unsaved.add_(seen)  # pyright: ignore[reportCallIssue]
        elif self.how == "unsaved data":
            self.unsaved.data.add_(seen)  # pyright: ignore[reportCallIssue]
        elif self.how == "attribute, read":
            h, self.plain = h - self.plain, 0.5 * self.plain + seen
        elif self.how == "list, read":
            h = h - sum(self.listed[-4:], torch.zeros(8))
            self.listed.append(seen)
        return self.last(torch.tanh(h))


WAYS = [
    "buffer", "replaced buffer", "data", "numpy", "frozen weight", "unsaved buffer", "unsaved data",
    "attribute, read", "list, read", "trained weight", "trained weight, by the book",
]  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("rows", [1, 5])
def test_memory_is_refused(how, rows):
    with pytest.raises(UnsupportedLayer, match=r"written to|remembers"):
        engine(Keeps(how).train()).clipped_sum(loss, batch(rows))


def test_what_all_examples_share_is_no_part_of_a_batch():
    torch.manual_seed(0)
    model, shared = nn.Linear(WIDTH, 3), torch.randn(8, 3)

    def nearest(m, b):
        return torch.cdist(m(b["x"]), b["table"]).square().sum(1)

    # though it happens to have a row for each
    with pytest.raises(UnsupportedLayer, match="beside other examples"):
        engine(model).clipped_sum(nearest, {**batch(8), "table": shared})
    with pytest.raises(ConfigError, match="one entry an example"):
        engine(model).clipped_sum(nearest, {**batch(8), "table": shared[:5]})


def test_an_attribute_that_a_pass_rebinds_is_put_back():
    class Shows(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = nn.Linear(WIDTH, 1), None

        def forward(self, x):
            self.seen, self.new = x, x
            return self.inner(x)

    model = Shows()
    engine(model).clipped_sum(loss, batch())
    assert model.seen is None
    assert not hasattr(model, "new")


def drop_path(mode):
    def drop(x, training):
        shape = (x.shape[0], 1) if mode == "row" else (1, 1)
        return x * x.new_empty(shape).bernoulli_(0.8) / 0.8 if training else x

    return Do(drop)


class DropConnect(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)


def layer_drop(p):
    return Do(lambda x, training: x if training and torch.rand([]) < p else torch.tanh(x))


SHARED_LUCK = {
    "stochastic depth by batch": lambda: drop_path("batch"),
    "layer drop": lambda: layer_drop(0.1),
    "drop connect": lambda: DropConnect(16, 16),
    "noise of one position": lambda: Do(lambda x, training: x + torch.randn(16)),
    "one permutation": lambda: Do(lambda x, training: x[:, torch.randperm(16)]),
    "Python's generator": lambda: Do(lambda x, training: x * float(np.random.rand() < 2)),
    "one mask of the batch's size": lambda: Do(
        lambda x, training: x * F.dropout(torch.ones(16), 0.5)
    ),
}
OWN_LUCK = {
    "stochastic depth by row": lambda: drop_path("row"),
    "layer drop that never drops": lambda: layer_drop(0.0),
    "dropout": lambda: nn.Dropout(0.3),
    "noise of each example": lambda: Do(lambda x, training: x + torch.randn_like(x)),
    "a masked input": lambda: Do(lambda x, training: x.masked_fill(torch.rand(x.shape) < 0.2, 0.0)),
}


@pytest.mark.parametrize("kind", SHARED_LUCK)
def test_luck_that_examples_share_is_refused(kind):
    with pytest.raises(
        UnsupportedLayer, match=r"random|several examples share|all examples of a pass share"
    ):
        engine(around(SHARED_LUCK[kind]())).clipped_sum(loss, batch(8))


@pytest.mark.parametrize("kind", OWN_LUCK)
def test_luck_of_each_example_is_trained(kind):
    model, made = around(OWN_LUCK[kind]()), None
    for seed in range(5):
        torch.manual_seed(seed)
        made = engine(model)
        made.clipped_sum(loss, batch(8))
    torch.manual_seed(7)
    once = made.clipped_sum(loss, batch(8)).tensors
    torch.manual_seed(7)
    # verified now, and yet the same masks
    again = engine(model).clipped_sum(loss, batch(8)).tensors
    assert all(torch.equal(once[name], again[name]) for name in once)


@contextlib.contextmanager
def medium():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("around_it", [lambda: torch.autocast("cpu", torch.bfloat16), medium])
@pytest.mark.parametrize("method", GRADIENT)
def test_precision_outside_does_not_reach_norms_and_sums(around_it, method):
    for size in (1.0, 1e2, 1e5):
        for route in ("gram", "instantiate"):
            b = cancelling(size, 2, 64)
            b["x"] = (
                b["x"] + torch.randn(b["x"].shape, generator=torch.Generator().manual_seed(0)) * 0.1
            )
            made = make_engine(
                Weighted(64, 64),
                method,
                1.0,
                key=b"k",
                rank=4,
                project_min_numel=1,
                routes=(f"*:{route}",),
            )
            with around_it():
                before = torch.get_float32_matmul_precision()
                summed = made.clipped_sum(dictated, b)
                assert torch.get_float32_matmul_precision() == before
            assert (
                sum(float(t.double().square().sum()) for t in summed.tensors.values()) ** 0.5
                <= 1 + 1e-3
            )


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


LOST = {
    "a Function of one's own": lambda m, x: Custom.apply(x, m.inner.weight),
    "vmap over a parameter": lambda m, x: torch.vmap(lambda row: x @ row)(m.inner.weight).T,
    "a trace": lambda m, x: torch.jit.trace(lambda a, w: a @ w.t(), (x, m.inner.weight.detach()))(  # pyright: ignore[reportCallIssue]
        x, m.inner.weight
    ),
    "a reference kept elsewhere": lambda m, x: F.linear(x, m.hoard[0], m.inner.bias),
    "reentrant checkpointing": lambda m, x: checkpoint(
        m.inner, x + 0 * m.scale, use_reentrant=True
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("method", ["dp_adam", "ghost"])
def test_a_gradient_that_would_be_lost_is_refused(kind, method):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.Linear(WIDTH, 4), nn.Parameter(torch.ones(WIDTH))
            self.hoard = [self.inner.weight]

        def forward(self, x):
            return LOST[kind](self, x)

    with pytest.raises(UnsupportedLayer, match=r"inner|'scale'"):
        engine(Model(), method).clipped_sum(loss, batch())


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_layer_is_refused_and_a_compiled_one_runs_as_it_was_written():
    with pytest.raises(UnsupportedLayer, match="not seen"):
        engine(nn.Sequential(torch.jit.script(nn.Linear(WIDTH, 4)), nn.Linear(4, 1))).clipped_sum(
            loss, batch()
        )
    plain = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, 1))
    compiled = nn.Sequential(torch.compile(plain[0], backend="eager"), plain[1])
    one, two = (
        engine(plain).clipped_sum(loss, batch()).tensors,
        engine(compiled).clipped_sum(loss, batch()).tensors,
    )
    assert all(torch.equal(a, b) for a, b in zip(one.values(), two.values()))


def test_complex_parameters_are_refused_by_name():
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(3, dtype=torch.cfloat))})
    with pytest.raises(UnsupportedLayer, match="view_as_complex"):
        make_engine(model, "dp_adam", 1.0)


class Scaled(torch.autograd.Function):
    """Looks the same going forward; going backward it divides by the largest gradient of the
    batch.
    """

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.abs().max()


def hooked(x, training):
    x = x.clone()
    x.register_hook(lambda grad: grad / grad.norm().clamp(min=1e-3))
    return x


def straight_through(x, training):
    scaled = x / x.detach().abs().mean()
    return x.detach() + scaled - scaled.detach()


BACKWARD_COMPANY = {
    "a backward that scales by the batch": lambda x, training: Scaled.apply(x),
    "a hook that normalises": hooked,
    "a scale of the batch, straight through": straight_through,
    "a scale by the number of entries": (
        lambda x, training: x.detach() + (x - x.detach()) / x.numel() ** 0.5
    ),
}


@pytest.mark.parametrize("kind", BACKWARD_COMPANY)
def test_company_on_the_way_back_alone_is_refused(kind):
    with pytest.raises(UnsupportedLayer, match="of an example"):
        engine(around(Do(BACKWARD_COMPANY[kind]))).clipped_sum(loss, batch(6))


class ByTheBatch(torch.autograd.Function):
    """Exactly the same going forward; going backward it multiplies by what the whole batch has
    said.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.scale = x.abs().mean()
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale


def test_company_on_the_way_back_is_found_where_values_repeat_only_in_the_same_place_in_memory():
    """A part of a wider tensor: exchanged examples lie together, and losses may round otherwise
    there.
    """
    wide = torch.randn(6, 2 * WIDTH, generator=torch.Generator().manual_seed(0))
    # luck, so that no smaller batch is compared
    model = around(Do(lambda x, training: ByTheBatch.apply(x) + 0 * torch.rand_like(x)))
    with pytest.raises(UnsupportedLayer, match="another gradient beside other examples"):
        engine(model).clipped_sum(
            lambda m, b: loss(m, b) * (1 + 1e-6 * b["x"].is_contiguous()), {"x": wide[:, :WIDTH]}
        )


def test_company_of_gradients_that_no_value_changes_is_refused():
    """Linear losses: what goes back is the same whatever the others are, and yet each example's
    share depends on their number.
    """
    model = nn.Sequential(
        nn.Linear(WIDTH, 1), Do(lambda x, training: hooked(x + 0 * torch.rand_like(x), training))
    )
    with pytest.raises(UnsupportedLayer, match="where the losses of others go backward with it"):
        engine(model).clipped_sum(loss, batch(6))


POISONED = {
    "losses that are dropped together": lambda losses: (
        losses if torch.isfinite(losses).all() else losses * 0
    ),
    "a little of all": lambda losses: losses + 1e-12 * losses.detach().abs().sum(),
    "a branch on the largest": lambda losses: (
        losses / 2 if losses.detach().abs().max() > 1e6 else losses
    ),
}


@pytest.mark.parametrize("kind", POISONED)
def test_company_that_waits_for_one_extreme_record_is_refused(kind):
    with pytest.raises(UnsupportedLayer, match="beside other examples"):
        engine(nn.Linear(WIDTH, 1)).clipped_sum(lambda m, b: POISONED[kind](loss(m, b)), batch(6))


def test_examples_in_one_row_under_a_mask_are_refused():
    """Attention multiplies what is masked by zero, which one undefined record makes undefined for
    all.
    """
    model = nn.Linear(WIDTH, WIDTH)

    def packed(m, b):
        row, rows = m(b["x"]).unsqueeze(0), len(b["x"])
        return F.scaled_dot_product_attention(row, row, row, attn_mask=torch.eye(rows).bool())[
            0
        ].sum(1)

    with pytest.raises(UnsupportedLayer, match="beside other examples"):
        engine(model).clipped_sum(packed, batch(6))


def trimmed(m, b):
    longest = int(b["mask"].sum(1).max())
    return m(b["text"][:, :longest]).sum(2).mean(1)


@pytest.mark.parametrize("equal_first", [False, True])
def test_a_loss_that_ends_where_the_longest_ends_is_refused(equal_first):
    g = torch.Generator().manual_seed(0)
    uneven = torch.arange(9) < torch.tensor([[2], [9], [4], [5]])
    made = engine(nn.Linear(WIDTH, 2))
    if equal_first:
        made.clipped_sum(
            trimmed,
            {"text": torch.randn(4, 9, WIDTH, generator=g), "mask": torch.ones(4, 9).long()},
        )
    with pytest.raises(UnsupportedLayer):
        made.clipped_sum(
            trimmed, {"text": torch.randn(4, 9, WIDTH, generator=g), "mask": uneven.long()}
        )


@pytest.mark.parametrize("number", [4.0, np.float32(4.0), np.array([1.0, 2.0]), torch.tensor(4.0)])
def test_numbers_beside_the_examples_are_refused(number):
    with pytest.raises(ConfigError, match="one entry an example"):
        engine(nn.Linear(WIDTH, 1)).clipped_sum(
            lambda m, b: loss(m, b) / b["items"].sum(), {**batch(6), "items": number}
        )


def test_what_a_loss_does_to_its_batch_ends_with_the_pass():
    def stores(m, b):
        if "z" not in b:
            b["z"] = b["x"] / b["x"].abs().max()
        return 3 * m(b.pop("z")).sum(1)

    given = batch(6)
    with pytest.raises(UnsupportedLayer, match="beside other examples"):
        engine(nn.Linear(WIDTH, 1)).clipped_sum(stores, given)
    assert given.keys() == {"x"}
    popped = engine(nn.Linear(WIDTH, 1))
    popped.clipped_sum(lambda m, b: loss(m, {"x": b.pop("x")}), given)
    popped.clipped_sum(lambda m, b: loss(m, {"x": b.pop("x")}), given)


class Waits(Keeps):
    """State that is kept at once and read much later, so that no pass that looks at losses would
    notice.
    """

    def forward(self, x):
        h = self.first(x)
        if self.how == "a bank":
            self.listed.append(h.detach().mean(0))
        elif self.how == "a tensor in place":
            self.plain.add_(h.detach().mean(0))
        elif self.how == "an array":
            self.array += h.detach().mean(0).numpy()
        return self.last(torch.tanh(h))


@pytest.mark.parametrize("how", ["a bank", "a tensor in place", "an array"])
def test_state_that_is_read_much_later_is_refused_when_it_is_kept(how):
    model = Waits(how)
    model.array = np.zeros(8, dtype=np.float32)
    with pytest.raises(UnsupportedLayer, match="written to"):
        engine(model).clipped_sum(loss, batch(6))


def test_state_that_modules_add_to_what_is_saved_is_refused():
    class History(nn.Linear):
        def get_extra_state(self):
            return torch.zeros(3)

    with pytest.raises(UnsupportedLayer, match="get_extra_state"):
        engine(History(4, 2))


def test_ghost_draws_the_same_on_both_ways_back():
    class Drawn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 10 ** torch.randint(-2, 3, (len(grad), 1)).float()

    model = around(Do(lambda x, training: Drawn.apply(x) if torch.is_grad_enabled() else x))
    made = engine(model, "ghost")
    for seed in range(20):
        torch.manual_seed(seed)
        summed = made.clipped_sum(loss, batch(1, seed))
        assert sum(float(t.square().sum()) for t in summed.tensors.values()) ** 0.5 <= 1 + 1e-5


def test_parameters_may_not_be_unfrozen_between_passes():
    model = around(nn.Identity())
    model[0].weight.requires_grad_(False)
    made = engine(model)
    model[0].weight.requires_grad_()
    with pytest.raises(UnsupportedLayer, match="trainable parameters"):
        made.clipped_sum(loss, batch())


def test_a_recurrent_layers_own_dropout_is_trained():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.LSTM(WIDTH, 8, num_layers=2, dropout=0.4), nn.Linear(8, 1)

        def forward(self, x):
            noise = torch.randn_like(x.transpose(0, 1))
            return self.last(self.inner(x.transpose(0, 1) + noise)[0][-1])

    engine(Text().train()).clipped_sum(loss, {"x": torch.randn(5, 4, WIDTH)})
