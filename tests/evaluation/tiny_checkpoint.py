"""A random Llama of a few thousand weights with a word tokenizer, and text in its words."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [a + b for a in ("ba", "di", "ko", "lu", "me", "na", "po", "ri") for b in ("t", "s", "n", "l", "r", "k")]
POSITIONS = 96


def write_tiny_checkpoint(
    directory: Path, *, seed: int = 0, blocks: int = 2, channels: int = 40, words: list[str] | None = None
) -> Path:
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *(words or WORDS)])}
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=channels,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


def random_words(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def write_task(folder: Path, name: str = "tiny_choice", rows: int = 12) -> Path:
    """A multiple-choice task whose data lies beside it under a relative name; returns the folder."""
    (folder / "data").mkdir(parents=True)
    lines = []
    for row in range(rows):
        context, *choices = (random_words(4, seed=100 * row + part) for part in range(4))
        quoted = ", ".join(f'" {choice}"' for choice in choices)
        lines.append(f'{{"context": "{context}", "choices": [{quoted}], "answer": {row % 3}}}')
    (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / f"{name}.yaml").write_text(
        f"""task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: data/{name}.jsonl
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
    )
    return folder
