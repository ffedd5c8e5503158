"""Models that begin at random weights: `scratch:vit` names a family of transformers, and after a
question mark what of its configuration is another, `scratch:vit?hidden_size=192&patch_size=4`.

The name is all that there is: no file, no network, the same on every machine.
"""

from __future__ import annotations

import difflib
import json
from functools import lru_cache
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from grape_ray.errors import ConfigError
from grape_ray.models import conv_net

PREFIX = "scratch:"
# Ids of special tokens are those that RoBERTa's configuration has, but for the mask's.
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

conv_net.register()


def is_scratch(name: str) -> bool:
    """Whether a model's name means one that begins at random weights."""
    return name.startswith(PREFIX)


def scratch_config(name: str) -> Any:
    """The configuration of such a model.

    Raises:
        ConfigError: no such family, or a field that its configuration does not have.

    >>> scratch_config("scratch:vit?hidden_size=192&num_attention_heads=3").hidden_size
    192
    """
    family, _, said = name.removeprefix(PREFIX).partition("?")
    if family not in CONFIG_MAPPING:
        near = difflib.get_close_matches(family, CONFIG_MAPPING, n=3)
        fix = f"did you mean {' or '.join(near)}?" if near else "vit, gpt2, opt, llama are some"
        raise ConfigError("task.model", name, "scratch: and a family of transformers", fix)
    known = transformers.AutoConfig.for_model(family)
    changes = {}
    for text in filter(None, said.split("&")):
        key, sign, value = text.partition("=")
        if not sign or not hasattr(known, key):
            near = difflib.get_close_matches(key, vars(known), n=3)
            fix = f"did you mean {' or '.join(near)}?" if near else "see its documentation"
            expected = f"key=value, fields of the configuration of {family}, joined by &"
            raise ConfigError("task.model", text, expected, fix)
        changes[key] = _value(value)
    return transformers.AutoConfig.for_model(family, **changes)


@lru_cache(maxsize=1)
def byte_tokenizer() -> Any:
    """The tokenizer of such models: UTF-8 bytes (256 ids) and five special tokens, among them a
    mask, which no data had to be seen for.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: place for place, token in enumerate([*_SPECIAL, *alphabet])}
    rules = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    rules.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, ids[token]) for token in ("<s>", "</s>")],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token="<s>", pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>", mask_token="<mask>", cls_token="<s>", sep_token="</s>",
    )  # fmt: skip


def scratch_image_processor(name: str) -> Any:
    """An image processor that makes images of the model's size, values in [-1, 1].

    Raises:
        ConfigError: the model's configuration has no size of images.
    """
    side = getattr(scratch_config(name), "image_size", None)
    if not isinstance(side, int):
        fix = "name a folder that holds its image processor"
        raise ConfigError("task.model", name, "a family with an image_size", fix)
    return transformers.ViTImageProcessorPil(size={"height": side, "width": side})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
