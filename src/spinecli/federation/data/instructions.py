"""Instructions as prompts, and prompts with answers as tokens."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from spinecli.errors import DataError
from spinecli.federation.data.examples import Dataset, Example


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


def encode_instructions(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Instructions:
    """Prompts with the tokenizer's special tokens, then answers with an end token if the tokenizer has one.

    Too long a row first loses the beginning of its prompt, down to half of `max_length`, then the end of its answer, so
    that every row has answer tokens to learn.

    Raises: DataError if an answer has no tokens.
    """
    settings = {"return_attention_mask": False, "verbose": False}
    prompts: list[list[int]] = tokenizer([render_prompt(one) for one in dataset.examples], **settings)["input_ids"]
    texts = [one.answer or "" for one in dataset.examples]
    answers: list[list[int]] = tokenizer(texts, add_special_tokens=False, **settings)["input_ids"]
    end = tokenizer.eos_token_id
    rows: list[list[int]] = []
    prompt_lengths: list[int] = []
    shortened = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if end is not None:
            if prompt and prompt[-1] == end:
                prompt.pop()
            answer.append(end)
        if not answer:
            raise DataError(
                f"Example {len(rows) + 1} of {dataset.reference} has the answer {texts[len(rows)]!r:.40}, which the "
                "tokenizer reads as nothing; mend or remove it."
            )
        shortened += len(prompt) + len(answer) > max_length
        kept = answer[: max(max_length - len(prompt), max_length - max_length // 2)]
        room = max_length - len(kept)
        lead = prompt[len(prompt) - min(room, len(prompt)) :]
        rows.append(lead + kept)
        prompt_lengths.append(len(lead))
    return Instructions(rows, prompt_lengths, shortened)
