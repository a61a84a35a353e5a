"""Instructions as prompts, and prompts with answers as tokens."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from spinecli.data.conversations import Turn, render
from spinecli.data.examples import Dataset, Example
from spinecli.data.rows import opening_of
from spinecli.errors import DataError


@dataclass(frozen=True)
class Instructions:
    """Prompts, each with its answer, as token ids."""

    rows: list[list[int]]
    prompt_lengths: list[int]
    """Tokens of each row that belong to the prompt."""
    shortened: int
    """Rows that lost tokens."""


def render_prompt(example: Example) -> str:
    """The prompt of an instruction: the headings of the Alpaca format, without its preamble."""
    given = f"### Input:\n{example.pair}\n\n" if example.pair else ""
    return f"### Instruction:\n{example.text}\n\n{given}### Response:\n"


def _render_chat(example: Example, tokenizer: PreTrainedTokenizerBase, reference: str) -> tuple[str, str]:
    """The conversation up to the answer, and the answer with what the template ends it by."""
    answer = example.answer or ""
    prompt = render(example.conversation, tokenizer, reference, add_generation_prompt=True)
    whole = render((*example.conversation, Turn("assistant", answer)), tokenizer, reference)
    # a template may write past answers otherwise than it has a model begin one
    return prompt, whole[len(prompt) :].rstrip() if whole.startswith(prompt) else answer


def _shortened(prompt: list[int], opening: list[int], room: int) -> list[int]:
    """The end of a prompt behind what opens it."""
    kept = opening if prompt[: len(opening)] == opening and len(opening) < room else []
    return kept + prompt[len(prompt) - (room - len(kept)) :]


def encode_instructions(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, start: int = 0
) -> Instructions:
    """Prompts with the tokenizer's special tokens, then answers with an end token if the tokenizer has one.

    Conversations are written by the chat template, which has all special tokens in it and may end the answer by itself.

    Too long a row first loses the beginning of its prompt, but for the special tokens that open it, down to half of
    `max_length`, then the end of its answer, so that every row has answer tokens to learn.

    Args:
        start: how many examples lie before these, for the number that an error names.

    Raises: DataError if an answer has no tokens or the template refuses a conversation, TokenizerError without one.
    """
    settings = {"return_attention_mask": False, "verbose": False}
    chat = any(one.conversation for one in dataset.examples)
    if chat:
        written = [_render_chat(one, tokenizer, dataset.reference) for one in dataset.examples]
    else:
        written = [(render_prompt(one), one.answer or "") for one in dataset.examples]
    texts = [answer for _, answer in written]
    leads = [prompt for prompt, _ in written]
    prompts: list[list[int]] = tokenizer(leads, add_special_tokens=not chat, **settings)["input_ids"]
    answers: list[list[int]] = tokenizer(texts, add_special_tokens=False, **settings)["input_ids"]
    end, opening = tokenizer.eos_token_id, list(opening_of(tokenizer))
    rows: list[list[int]] = []
    prompt_lengths: list[int] = []
    shortened = 0
    for example, prompt, answer in zip(dataset.examples, prompts, answers, strict=True):
        if end is not None and not chat and prompt and prompt[-1] == end:
            prompt.pop()
        # where a template writes more than the answer, it has ended it
        if end is not None and (not chat or texts[len(rows)].strip() == (example.answer or "").strip()):
            answer.append(end)
        if not answer:
            raise DataError(
                f"Example {start + len(rows) + 1} of {dataset.reference} has the answer {texts[len(rows)]!r:.40}, for "
                "which the tokenizer gives no tokens; fix or remove it."
            )
        shortened += len(prompt) + len(answer) > max_length
        kept = answer[: max(max_length - len(prompt), max_length - max_length // 2)]
        room = max_length - len(kept)
        lead = prompt if len(prompt) <= room else _shortened(prompt, opening, room)
        rows.append(lead + kept)
        prompt_lengths.append(len(lead))
    return Instructions(rows, prompt_lengths, shortened)
