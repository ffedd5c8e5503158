"""Models that begin at random weights, by a name that says all of them."""

import pytest
import torch
import transformers

from grape_ray.errors import ConfigError
from grape_ray.models.from_scratch import byte_tokenizer
from grape_ray.models.hugging_face import load_classifier, load_config, load_language_model
from grape_ray.models.image_processors import image_processor_of, output_size
from grape_ray.tasks.preference import Preference

SIZE = "hidden_size=16&num_hidden_layers=1&num_attention_heads=2&intermediate_size=32"


def test_weights_are_a_function_of_the_seed_and_the_head_has_the_classes():
    name = f"scratch:vit?{SIZE}&image_size=8&patch_size=4"
    one, same, other = (
        load_classifier(name, 3, seed, of="ImageClassification") for seed in (0, 0, 1)
    )
    weights = [torch.nn.utils.parameters_to_vector(m.parameters()) for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one(pixel_values=torch.zeros(2, 3, 8, 8)).logits.shape == (2, 3)
    assert output_size(image_processor_of(name)) == (8, 8)


def test_defaults_are_those_of_the_family():
    config = load_config("scratch:vit")
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size) == (768, 12, 16)
    assert load_config("scratch:gpt2?n_layer=4").n_layer == 4


def test_bf16_and_no_four_bits():
    name = f"scratch:roberta?{SIZE}&vocab_size=261"
    model = load_language_model(name, 0, "MaskedLM", "bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match=r"task\.weights, got 'nf4'"):
        load_language_model(name, 0, "MaskedLM", "nf4")


def test_bytes_are_tokens_and_a_saved_tokenizer_reads_the_same(tmp_path):
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 261
    text = "Zoë's <mask>.\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Zoë's .\n"
    assert ids.count(tokenizer.mask_token_id) == 1
    tokenizer.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scratch:vitt", "did you mean vit"),
        ("scratch:", "a family of transformers"),
        ("scratch:vit?hiden_size=3", "did you mean hidden_size"),
        ("scratch:vit?hidden_size", "key=value"),
        ("scratch:vit?hidden_size=wide", "cannot be loaded"),
        ("scratch:gpt2", "cannot be loaded"),
    ],
)
def test_a_wrong_name_is_told(name, message):
    with pytest.raises(ConfigError, match=message):
        load_classifier(name, 2, 0, of="ImageClassification")


def test_preferences_have_no_reference_in_random_weights():
    with pytest.raises(ConfigError, match="pretrained weights"):
        Preference(model="scratch:gpt2", data="x")
