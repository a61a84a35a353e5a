"""A tokenizer with a chat template."""

from __future__ import annotations

from copy import deepcopy

from families import tokenizer
from transformers import PreTrainedTokenizerBase

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerBase:
    """The tokenizer of the made families with `template`; `<s>` begins a text and `</s>` ends it."""
    made = deepcopy(tokenizer())
    made.chat_template = template
    return made
