"""A Llama of about 230 thousand weights with grouped queries, trained for a moment on the made-up words it speaks."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BLOCKS = 6
POSITIONS = 128
WORDS = [first + last for first in ("ba", "di", "ko", "lu", "me", "na", "po", "ri") for last in ("t", "s", "n", "l")]
VOCABULARY = ["<unk>", "<s>", "</s>", *WORDS]


def write_tiny_llama(directory: Path, *, sharded: bool = False) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    _train(model, steps=60)
    model.save_pretrained(directory, max_shard_size="300KB" if sharded else "1GB")
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(directory)
    return directory


def _train(model: LlamaForCausalLM, steps: int) -> None:
    """Enough that cutting it loses something which tuning can give back."""
    tokens = torch.tensor([VOCABULARY.index(word) for word in made_up_text(steps * 512, seed=1).split()])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for rows in tokens.view(steps, 16, 32):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()


def made_up_text(words: int, seed: int = 0) -> str:
    """Words of which each is a little more likely after some than after others, so that there is something to lose."""
    source = random.Random(seed)
    text = [WORDS[0]]
    for _ in range(words - 1):
        near = WORDS.index(text[-1]) + source.choice((1, 2, 3, 5))
        text.append(WORDS[near % len(WORDS)] if source.random() < 0.8 else source.choice(WORDS))
    return " ".join(text)


def labelled_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of either half of the words, labelled with the half."""
    source, half = random.Random(seed), len(WORDS) // 2
    rows = []
    for index in range(count):
        own = WORDS[half:] if index % 2 else WORDS[:half]
        rows.append({"text": " ".join(source.choices(own, k=6)), "label": "late" if index % 2 else "early"})
    return rows
