"""What language models say: the same few words, continued greedily by each, for a person to read the difference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spinecli.checkpoints.tokenizer import has_tokenizer
from spinecli.errors import UserError
from spinecli.evaluation.models import Subject, default_text
from spinecli.evaluation.results import Continuation

NEW_TOKENS = 24

_PROMPTS = (
    "The first time that I saw the city",
    "In order to solve this problem, we",
    "The most important thing about water is",
)
_TINY_PROMPTS = ("at the harbour it was", "the teacher said that", "in the morning anna")


def prompts_for(subject: Subject) -> tuple[str, ...]:
    """What models are asked to continue: of the built-in model and its descendants, in the language that they know."""
    return _TINY_PROMPTS if default_text(subject) == "builtin:tiny-evaluation" else _PROMPTS


def continuations(subject: Subject, model: PreTrainedModel, prompts: Sequence[str]) -> tuple[Continuation, ...]:
    """How a loaded language model goes on after the prompts; nothing of a classifier or without a tokenizer."""
    if subject.classifies or not has_tokenizer(subject.path):
        return ()
    try:
        tokenizer = subject.tokenizer
    except UserError:  # a measure that needs the tokenizer says what is wrong with it
        return ()
    return tuple(
        Continuation(prompt=prompt, text=continued(model, tokenizer, prompt, subject.positions)) for prompt in prompts
    )


@torch.no_grad()
def continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, positions: int | None) -> str:
    """At most `NEW_TOKENS` tokens after `prompt`, each the likeliest; fewer where the model ends its text.

    Args:
        positions: longest sequence that the model was made for, if there is a limit.
    """
    ids = tokenizer(prompt)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]
    room = NEW_TOKENS if positions is None else min(NEW_TOKENS, positions - len(ids))
    if not ids or room < 1:
        return ""
    prompted = torch.tensor([ids], device=model.device)
    whole_ids = model.generate(
        prompted, attention_mask=torch.ones_like(prompted), do_sample=False, max_new_tokens=room
    )[0].tolist()
    whole = tokenizer.decode(whole_ids, skip_special_tokens=True)
    begun = tokenizer.decode(ids, skip_special_tokens=True)
    return str(whole).removeprefix(str(begun)).strip()
