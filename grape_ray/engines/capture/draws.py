"""Operations that draw random numbers, by name; dropout among them."""

from __future__ import annotations

DROPOUTS = {
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "dropout1d",
    "dropout2d", "dropout3d", "native_dropout",
}  # fmt: skip
# Layers that torch computes in one call -> the position of their dropout's probability.
DROPOUT_AT = {"multi_head_attention_forward": 10, "lstm": 5, "gru": 5, "rnn_tanh": 5, "rnn_relu": 5}
# Draws and, where they are bounded or usual, a low and a high value of theirs.
DRAWS: dict[str, tuple[float, float] | None] = {
    # a uniform ends at the last float below 1
    "rand": (0.0, 1 - 2**-24), "rand_like": (0.0, 1 - 2**-24), "bernoulli": (0.0, 1.0),
    "uniform": None, "randn": (-3.0, 3.0), "randn_like": (-3.0, 3.0), "normal": None,
    "randint": None, "randint_like": None, "randperm": None, "random": None, "binomial": None,
    "standard_gamma": None, "sample_dirichlet": None, "gumbel_softmax": None, "rrelu": None,
    "exponential": (2**-10, 8.0), "geometric": None, "cauchy": None, "log_normal": None,
    "poisson": None, "multinomial": None,
}  # fmt: skip


def is_draw(name: str) -> bool:
    """Whether an operation draws at random."""
    return name in DRAWS


def is_dropout(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a call draws a mask: a dropout in training whose probability is not 0."""
    if name not in DROPOUTS:
        return False
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(training) and p != 0


def may_mask(name: str, kwargs: dict | None) -> bool:
    """Whether an operation may lay a random mask over its arguments."""
    if name == "scaled_dot_product_attention":
        return bool(kwargs and kwargs.get("dropout_p"))
    return name in DROPOUTS or name in DROPOUT_AT
