"""Documents packed into rows to train on: one behind the other, none padded, a long one continued in the next row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase

from spinecli.data.conversations import segments
from spinecli.data.rows import NO_FRAME, Frame, TokenRows, prefix_ids, require_vocabulary
from spinecli.data.text import Text
from spinecli.errors import CalibrationTextError


def packed_rows(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    rows: int,
    length: int,
    *,
    frame: Frame = NO_FRAME,
    vocabulary: int | None = None,
) -> TokenRows:
    """The first rows of a text, `rows` or as many as it fills.

    A document begins with the frame's opening and ends with the tokenizer's end token, if there is one. Of
    conversations, which end as their template has it, only the assistant's words are scored.

    Raises: CalibrationTextError if the text does not fill a row, DataError, TokenizerError.
    """
    inner = length - frame.size
    if inner < 1:
        raise CalibrationTextError(f"Rows of {length} tokens have no room between the model's special tokens.")
    ids: list[int] = []
    scored: list[bool] = []
    for piece in _pieces(tokenizer, text, rows * inner, frame):
        if len(ids) % inner:  # a row is opened anyway
            ids += frame.opening
            scored += [False] * len(frame.opening)
        for part, counts in piece:
            ids += part
            scored += [counts] * len(part)
        if len(ids) >= rows * inner:
            break
    count = min(rows, len(ids) // inner)
    if count == 0:
        raise CalibrationTextError(
            f"{text.reference} has {len(ids)} tokens, fewer than one row of {inner}; name a longer text or shorter "
            "rows."
        )
    require_vocabulary(ids, vocabulary)
    body = torch.tensor(ids[: count * inner]).view(count, inner)
    opening, closing = (body.new_tensor(ends).expand(count, -1) for ends in (frame.opening, frame.closing))
    unscored = [torch.zeros_like(ends, dtype=torch.bool) for ends in (opening, closing)]
    return TokenRows(
        torch.cat([opening, body, closing], dim=1),
        (text.reference,),
        torch.zeros(count, dtype=torch.int64),
        frame,
        torch.cat([unscored[0], torch.tensor(scored[: count * inner]).view(count, inner), unscored[1]], dim=1),
    )


def _pieces(
    tokenizer: PreTrainedTokenizerBase, text: Text, wanted: int, frame: Frame
) -> Iterator[list[tuple[list[int], bool]]]:
    """Documents or conversations as token ids, in parts that are scored or not."""
    end = tokenizer.eos_token_id
    for document in text.documents:
        ids = prefix_ids(tokenizer, document.removeprefix(frame.opening_text), wanted)
        if ids:
            yield [(ids if end is None or len(ids) == wanted else [*ids, end], True)]
    for conversation in text.conversations:
        found = segments(conversation, tokenizer, text.reference)
        texts = [each.text for each in found]
        texts[0] = texts[0].removeprefix(frame.opening_text)
        rendered = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        yield [(part, each.answered) for part, each in zip(rendered, found, strict=True)]
