"""Layers that torch computes in one call, written out in operations that have rules: attention,
recurrent layers and their cells.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from grape_ray.engines.capture.capture_pass import CapturePass
from grape_ray.engines.capture.dispatch import general, shared
from grape_ray.engines.capture.shared_values import per_example
from grape_ray.engines.capture.torch_functions import Call, Result
from grape_ray.engines.capture.tracked import Tracked, tracked_in
from grape_ray.engines.rules.arguments import bind
from grape_ray.errors import UnsupportedLayer

# torch's own function, past its first question, which hands it over whole: its operations are then
# seen one by one.
_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.__dict__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
State = tuple[Tensor, ...]  # (hidden,) or (hidden, cell)
Step = Callable[[Tensor, Tensor, State], State]


def multi_head_attention(capture: CapturePass, call: Call) -> Result:
    """nn.MultiheadAttention, and with it torch's transformer layers."""
    if not capture.depends(call):
        return shared(capture, call)
    return _attention(*call.args, **call.kwargs)


def scaled_dot_product_attention(capture: CapturePass, call: Call) -> Result:
    """Attention with a learned bias (T5's relative positions) as its mask."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    given = dict(zip(names, call.args)) | call.kwargs
    mask = given.get("attn_mask")
    if len(tracked_in(call.args, call.kwargs)) != 1 or not isinstance(mask, Tracked):
        return general(capture, call)
    if not capture.depends(call):
        return shared(capture, call)
    shape = (*given["query"].shape[:-1], given["key"].shape[-2])
    return call.func(**(given | {"attn_mask": per_example(capture, mask, shape)}))


def _lstm_step(gates_x: Tensor, gates_h: Tensor, state: State) -> State:
    i, f, g, o = (gates_x + gates_h).chunk(4, 1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_step(gates_x: Tensor, gates_h: Tensor, state: State) -> State:
    (reset_x, update_x, new_x), (reset_h, update_h, new_h) = (
        gates_x.chunk(3, 1),
        gates_h.chunk(3, 1),
    )
    new = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
    return (new + (update_x + update_h).sigmoid() * (state[0] - new),)


def _plain_step(activation: Callable[[Tensor], Tensor]) -> Step:
    return lambda gates_x, gates_h, state: (activation(gates_x + gates_h),)


_STEPS: dict[str, Step] = {
    "lstm": _lstm_step, "gru": _gru_step, "rnn_tanh": _plain_step(torch.tanh),
    "rnn_relu": _plain_step(torch.relu),
}  # fmt: skip


def cell(capture: CapturePass, call: Call) -> Result:
    """One step of a recurrent layer; a state that the batch has no part in is made each example's
    own.
    """
    if not capture.depends(call):
        return shared(capture, call)
    x, state, w_ih, w_hh, b_ih, b_hh = bind(call, "input hx w_ih w_hh b_ih b_hh")
    state = tuple(
        _of_the_batch(s) for s in (state if isinstance(state, (tuple, list)) else (state,))
    )
    out = _STEPS[call.name.removesuffix("_cell")](
        F.linear(x, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state
    )
    return out[0] if len(out) == 1 else out


def recurrent(capture: CapturePass, call: Call) -> Result:
    """nn.LSTM, nn.GRU and nn.RNN of padded sequences: inputs of all steps in one product, states
    step by step.
    """
    packed = "data" in call.kwargs or "batch_sizes" in call.kwargs
    if packed or (
        len(call.args) > 1 and isinstance(call.args[1], Tensor) and call.args[1].ndim == 1
    ):
        label = ", ".join(t.node.label for t in tracked_in(call.args, call.kwargs)[:1])
        raise UnsupportedLayer(
            f"'{call.name}' of a packed sequence on parameter {label}",
            "rows in order of time",
            "padded sequences",
            "do not pack them",
        )
    if not capture.depends(call):
        return shared(capture, call)
    x, states, weights, biased, layers, dropout, training, bidirectional, batch_first = bind(
        call, "input hx params has_biases num_layers dropout train bidirectional batch_first"
    )
    states = states if isinstance(states, (tuple, list)) else (states,)
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    x, final = x if batch_first else x.transpose(0, 1), list[State]()
    for layer in range(layers):
        outs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * each : (number + 1) * each]
            out, last = _one_layer(
                call.name,
                x,
                tuple(_of_the_batch(s[number]) for s in states),
                own,
                biased,
                reverse=bool(direction),
            )
            outs.append(out)
            final.append(last)
        x = torch.cat(outs, 2) if directions > 1 else outs[0]
        if layer < layers - 1:
            # drawn in the order of torch's own
            x = F.dropout(x.transpose(0, 1).contiguous(), dropout, training).transpose(0, 1)
    return x if batch_first else x.transpose(0, 1), *(
        torch.stack([state[k] for state in final]) for k in range(len(states))
    )


def _one_layer(
    name: str, x: Tensor, state: State, weights: Sequence[Tensor], biased: bool, reverse: bool
) -> tuple[Tensor, State]:
    """x (B,T,I) through one direction of one layer: (B,T,H), and the last state."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if biased else (None, None)
    # an LSTM's projection of its output
    shrink = rest[2 if biased else 0] if len(rest) > (2 if biased else 0) else None
    gates, outs = F.linear(x, w_ih, b_ih), dict[int, Tensor]()
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        state = _STEPS[name](gates[:, t], F.linear(state[0], w_hh, b_hh), state)
        if shrink is not None:
            state = F.linear(state[0], shrink), *state[1:]
        outs[t] = state[0]
    return torch.stack([outs[t] for t in range(x.shape[1])], 1), state


def _of_the_batch(state: Tensor) -> Tensor:
    """A copy that `Dependence` has not seen made, and that therefore counts as the batch's: a state
    of zeros has a row for each example.
    """
    return state if isinstance(state, Tracked) else state.clone()
