"""A batch as the engine sees it: tensors with one entry an example, in any nest of dicts, lists and
tuples.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from grape_ray.errors import ConfigError

Batch = Any  # tensors with one entry an example, in any nest of dicts, lists and tuples


def plain(batch: Batch) -> Batch:
    """A mapping of another class (as tokenizers return) as a dict."""
    return dict(batch) if hasattr(batch, "keys") and not isinstance(batch, dict) else batch


def mapped(batch: Batch, change: Callable[[Tensor], Tensor] = lambda t: t) -> Batch:
    """The batch in new containers, with every tensor changed; what a forward pass does to its
    containers then ends with it.
    """
    # the loss may use what the mapping's own class offers, as the attributes of a BatchEncoding
    made = tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, plain(batch))
    return (
        made
        if isinstance(batch, (dict, list, tuple, Tensor)) or not hasattr(batch, "keys")
        else type(batch)(made)
    )


def tensors_of(batch: Batch) -> list[Tensor]:
    """The tensors of a batch, in order."""
    return [leaf for leaf in tree_flatten(plain(batch))[0] if isinstance(leaf, Tensor)]


def count_examples(batch: Batch) -> int:
    """Examples in a batch: the length of each of its tensors.

    Raises:
        ConfigError: a tensor has another length, or none, or there are numbers beside them. What is
            no example's own may be made from all of them, and nothing could tell.
    """
    tensors = tensors_of(batch)
    numbers = [
        leaf
        for leaf in tree_flatten(plain(batch))[0]
        # a truth value is a switch, as of the model's own options
        if isinstance(leaf, (Number, np.ndarray, np.generic)) and not isinstance(leaf, bool)
    ]
    lengths = {t.shape[0] if t.ndim else None for t in tensors}
    if len(lengths) != 1 or None in lengths or numbers:
        shapes = (
            ", ".join(
                [
                    *(str(tuple(t.shape)) for t in tensors[:4]),
                    *(type(n).__name__ for n in numbers[:2]),
                ]
            )
            or type(batch).__name__
        )
        fix = "keep what all examples share in the model or the task"
        raise ConfigError(
            "batch",
            shapes,
            "tensors, in a dict, list or tuple, with one entry an example in dimension 0",
            fix,
        )
    return tensors[0].shape[0]


def is_mask(leaf: Tensor) -> bool:
    """Whether a tensor of two or more dimensions holds zeros and ones alone, as attention masks
    do.
    """
    # in one dimension zeros and ones are as likely labels
    if leaf.ndim < 2 or leaf.is_floating_point() or leaf.is_complex():
        return False
    return leaf.dtype == torch.bool or bool(((leaf == 0) | (leaf == 1)).all())


def is_ragged(batch: Batch) -> bool:
    """Whether the examples of a batch have different numbers of masked entries."""
    sums = [mask.flatten(1).sum(1) for mask in tensors_of(batch) if is_mask(mask)]
    return any(bool((counts != counts[0]).any()) for counts in sums)
