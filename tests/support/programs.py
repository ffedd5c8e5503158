"""Random small models: layers from a list of habits that real code has, in any order, on hidden
states h (B, T, D).

Each program obeys the contract: the loss of an example is a function of that example alone. Some
then pick rows by their values, keep state or draw shared numbers, which an engine may refuse; none
may be silently wrong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, VOCAB = 4, 7


class Piece(nn.Module):
    """One step of a program: a layer, and what is done around it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.vector = nn.Parameter(torch.randn(WIDTH) / 2)
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.register_buffer("seen", torch.zeros(WIDTH))
        self.last: Tensor | None = None


def linear(p, h, ids):
    return torch.tanh(p.layer(h))


def matmul_transposed(p, h, ids):
    return torch.tanh(h @ p.layer.weight.t() + p.layer.bias)


def from_the_left(p, h, ids):
    return torch.tanh(p.layer.weight @ h.transpose(1, 2)).transpose(1, 2)


def einsum(p, h, ids):
    return torch.einsum("bti,oi->bto", h, p.layer.weight)


def einsum_time_major(p, h, ids):
    return torch.einsum("tbi,oi->bto", h.transpose(0, 1), p.layer.weight)


def einsum_both(p, h, ids):
    return torch.einsum("bti,i->bti", h, p.vector)


def embed(p, h, ids):
    return h + p.table(ids)


def embed_by_index(p, h, ids):
    return h + p.table.weight[ids]


def positions(p, h, ids):
    return h + p.table(torch.arange(h.shape[1]) % VOCAB)


def positions_for_all(p, h, ids):
    return h + p.table((torch.arange(h.shape[1]) % VOCAB).expand(h.shape[0], -1))


def tied(p, h, ids):
    return F.linear(torch.tanh(F.linear(h + p.table(ids), p.table.weight)), p.table.weight.t())


def reused(p, h, ids):
    return p.layer(torch.tanh(p.layer(h)))


def layer_norm(p, h, ids):
    return F.layer_norm(h, (WIDTH,), p.vector, p.layer.bias)


def rms_norm(p, h, ids):
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-3) * (1 + p.vector)


def gated(p, h, ids):
    return h * (p.vector * 0.5).softmax(0) + p.vector.sigmoid()


def weight_norm(p, h, ids):
    return F.linear(h, p.layer.weight / p.layer.weight.norm(dim=1, keepdim=True), p.layer.bias)


def held_scale(p, h, ids):
    with torch.no_grad():
        size = p.layer.weight.norm()
    return F.linear(h, p.layer.weight / size)


def attention(p, h, ids):
    q = p.layer(h)
    return F.scaled_dot_product_attention(q, h, h + p.vector)


def relative(p, h, ids):
    n = torch.arange(h.shape[1])
    bias = p.table((n[:, None] - n[None, :]).abs() % VOCAB)[..., 0]
    return (h @ h.transpose(1, 2) / 4 + bias).softmax(-1) @ h


def convolution(p, h, ids):
    return torch.tanh(
        F.conv1d(h.transpose(1, 2), p.layer.weight.unsqueeze(2), p.layer.bias)
    ).transpose(1, 2)


def depthwise(p, h, ids):
    return F.conv1d(h.transpose(1, 2), p.vector.view(WIDTH, 1, 1), groups=WIDTH).transpose(1, 2)


def prefix(p, h, ids):
    return torch.cat([p.vector.expand(h.shape[0], 1, -1), h], 1)[:, 1:] + p.vector.repeat(
        h.shape[0], h.shape[1], 1
    )


def written(p, h, ids):
    h = h.clone()
    h[:, 0] = p.vector
    return h


def cloned(p, h, ids):
    weight = p.layer.weight.clone()
    weight[0] = 0.0
    weight += p.vector
    return F.linear(h, weight)


def two_views(p, h, ids):
    one, two = torch.tanh(p.layer(torch.cat([h, h.flip(1)]))).chunk(2)
    return one - 0.5 * two


def many_copies(p, h, ids):
    return torch.tanh(p.layer(h.repeat(3, 1, 1))).view(3, *h.shape).sum(0)


def interleaved_copies(p, h, ids):
    return torch.tanh(p.layer(h.repeat_interleave(2, 0))).unflatten(0, (-1, 2)).sum(1)


def time_major(p, h, ids):
    return torch.tanh(p.layer(h.transpose(0, 1)) * p.vector).transpose(0, 1)


def time_major_flat(p, h, ids):
    return (
        torch.tanh(p.layer(h.transpose(0, 1).flatten(0, 1)))
        .view(h.shape[1], h.shape[0], -1)
        .transpose(0, 1)
    )


def flat(p, h, ids):
    return torch.tanh(p.layer(h.flatten(0, 1)) + p.vector).view(h.shape)


def stacked(p, h, ids):
    both = torch.stack([h, -h])
    return torch.tanh(p.layer(both)).sum(0)


def sorted_within(p, h, ids):
    return p.layer(h.sort(1).values)


def gathered_within(p, h, ids):
    order = h[..., :1].argsort(1).expand(-1, -1, h.shape[2])
    return p.layer(h.gather(1, order))


def last_token(p, h, ids):
    last = h[torch.arange(len(h)), ids.argmax(1)]
    return h + p.layer(last).unsqueeze(1)


def masked(p, h, ids):
    return torch.where((ids > 2).unsqueeze(-1), p.layer(h), h * p.vector)


def one_by_one(p, h, ids):
    return torch.stack([torch.tanh(p.layer(x)) for x in h])


def recurrent(p, h, ids):
    state, out = torch.zeros_like(h[:, 0]), []
    for t in range(h.shape[1]):
        state = torch.tanh(p.layer(state) + h[:, t] * p.vector)
        out.append(state)
    return torch.stack(out, 1)


def checkpointed(p, h, ids):
    return torch.utils.checkpoint.checkpoint(  # pyright: ignore[reportAttributeAccessIssue]
        lambda x: torch.tanh(p.layer(x)) * p.vector, h, use_reentrant=False
    )


def cast(p, h, ids):
    return F.linear(h, p.layer.weight.to(torch.float64).type_as(h))


def by_mode(p, h, ids):
    return p.layer(h) if p.training else h * p.vector


def shows(p, h, ids):
    p.last = p.layer(h)
    return h + p.last


def squeezed_away(p, h, ids):
    return h + torch.tanh(p.layer(h.mean(1))).unsqueeze(1)


def outer_product(p, h, ids):
    return h + (h.unsqueeze(2) * p.vector.view(1, 1, -1, 1)).sum(3)


# What an engine may refuse.
def picked(p, h, ids):
    keep, out = ids > 1, torch.zeros_like(h)
    out[keep] = torch.tanh(p.layer(h[keep]))
    return out


def sorted_across(p, h, ids):
    rows = h.flatten(0, 1)
    order = rows[:, 0].argsort()
    return torch.tanh(p.layer(rows[order]))[order.argsort()].view(h.shape)


def turned(p, h, ids):
    order = torch.arange(len(h)).roll(1)
    return torch.tanh(p.layer(h[order]))[order.argsort()]


def remembers(p, h, ids):
    p.seen.add_(1)
    return p.layer(h)


def filled(p, h, ids):
    z = p.vector.expand(h.shape).clone()
    z[:, 0] = h[:, 0]
    return p.layer(z)


def straight_through(p, h, ids):
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            return grad * w, (grad * x).sum((0, 1))

    return Half.apply(h, p.vector)


STEPS = [
    linear, matmul_transposed, from_the_left, einsum, einsum_time_major, einsum_both, embed,
    embed_by_index, positions, positions_for_all, tied, reused, layer_norm, rms_norm, gated, cloned,
    weight_norm, held_scale, attention, relative, convolution, depthwise, prefix, written,
    two_views, many_copies, interleaved_copies, time_major, time_major_flat, flat, stacked,
    sorted_within, gathered_within, last_token, masked, one_by_one, recurrent, checkpointed, cast,
    by_mode, shows, squeezed_away, outer_product,
]  # fmt: skip
DOUBTFUL = [picked, sorted_across, turned, remembers, filled, straight_through]


class Program(nn.Module):
    """Steps in order; `shared` steps use the pieces of an earlier one."""

    def __init__(self, steps, shared):
        super().__init__()
        self.steps, self.pieces = list(steps), nn.ModuleList([Piece() for _ in steps])
        self.of = [
            int(s) if s is not None and s < i else i for i, s in zip(range(len(steps)), shared)
        ]

    def forward(self, batch):
        h, ids = batch["x"], batch["ids"]
        for step, number in zip(self.steps, self.of):
            h = step(self.pieces[number], h, ids)
        return (h.tanh() * batch["w"].view(-1, 1, 1)).sum((1, 2))


def batch_of(rows, length, seed, dtype):
    """Examples whose gradients differ in size by a thousand, so that some are clipped and some are
    not.
    """
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, length, WIDTH, generator=g, dtype=torch.float64).to(dtype),
        "ids": torch.randint(0, VOCAB, (rows, length), generator=g),
        "w": (10.0 ** torch.randint(-1, 3, (rows,), generator=g)).to(dtype),
    }
