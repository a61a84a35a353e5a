from __future__ import annotations

import csv
import math
import re
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from spinecli.demo.language import floor_perplexity, generate, vocabulary
from spinecli.demo.train import CONTEXT, HELD_OUT_SEED, build_tokenizer, story_loss

TINY = Path(str(resources.files("spinecli.demo"))) / "assets" / "tiny"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def test_shape_and_size(model: LlamaForCausalLM) -> None:
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (10, 128, 16)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert config.max_position_embeddings == CONTEXT
    assert config.vocab_size == len(vocabulary()) + 3
    assert (TINY / "model.safetensors").stat().st_size < 8.5e6


def test_tokenizer_is_the_one_of_the_language() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert tokenizer.get_vocab() == build_tokenizer(CONTEXT).get_vocab()
    text = generate(1, 6)[0].text
    assert tokenizer(text).input_ids == build_tokenizer(CONTEXT)(text).input_ids


def test_held_out_perplexity_is_what_the_model_card_says(model: LlamaForCausalLM) -> None:
    card = (TINY / "README.md").read_text(encoding="utf-8")
    claim = re.search(r"held-out perplexity of \*\*([\d.]+)\*\*", card)
    assert claim is not None
    stories = generate(100, HELD_OUT_SEED)[:40]
    ids = AutoTokenizer.from_pretrained(TINY).get_vocab()
    perplexity = math.exp(story_loss(model, ids, stories))
    assert floor_perplexity(stories) < perplexity
    assert perplexity == pytest.approx(float(claim.group(1)), rel=0.05)


def test_training_curve_ends_where_the_card_says() -> None:
    with (TINY / "training_curve.csv").open(encoding="utf-8") as file:
        points = list(csv.DictReader(file))
    assert list(points[0]) == ["step", "tokens", "loss", "held_out_loss", "floor"]
    assert int(points[-1]["tokens"]) == int(points[-1]["step"]) * 8 * CONTEXT
    assert float(points[0]["held_out_loss"]) > float(points[-1]["held_out_loss"]) > float(points[-1]["floor"])


def test_the_model_tells_a_story(model: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    start = tokenizer("at the harbour it was a", return_tensors="pt")
    output = model.generate(**start, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert re.match(r"at the harbour it was a \w+ \w+\. \w+ the \w+ had an? ", text)
