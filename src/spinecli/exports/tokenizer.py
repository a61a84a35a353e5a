"""A checkpoint's tokenizer as llama.cpp reads it.

llama.cpp has no reader for tokenizer.json: it has kinds of tokenizers, each with code of its own, and the file says
which kind, the tokens, and what joins them. Byte-level BPE (`gpt2`) joins by the list of merges. SentencePiece's BPE
(`llama`) joins by the score of the joined token, which is the negative rank of the merge that makes it. A tokenizer of
another kind is left out (`no_vocab`): llama.cpp then computes on token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from spinecli.errors import TokenizerError

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the tokenizers library's ByteLevel splits by when it is asked to."""
_DIGIT = r"\p{N}"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _REST
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = f"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*" + r"|\p{N}" + _SLASHED_REST
_GPT4O = f"{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_UPPER}+{_LOWER}*{_CONTRACTIONS}?" + r"|\p{N}{1,3}" + _SLASHED_REST

# (patterns in their order, whole words skip the merges) -> llama.cpp's name
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}
_DIGITS_ONE_BY_ONE = {r"\d": _DIGIT, r"[0-9]": _DIGIT}
UNKNOWN = "default"


def pre_tokenizer_name(description: dict[str, Any] | None, ignores_merges: bool) -> str | None:
    """llama.cpp's name of the rule; None if it has none that is known to cut alike.

    Args:
        description: `pre_tokenizer` of tokenizer.json.
        ignores_merges: `ignore_merges` of its model.
    """
    patterns = _patterns(description)
    return None if patterns is None else _NAMES.get((patterns, ignores_merges))


def _patterns(description: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The patterns that text is cut by, one after the other; None if a part of the rule is no pattern."""
    if description is None:
        return ()
    kind = description.get("type")
    if kind == "Sequence":
        found: tuple[str, ...] = ()
        for part in description.get("pretokenizers", []):
            patterns = _patterns(part)
            if patterns is None:
                return None
            found += patterns
        return found
    if kind == "ByteLevel":
        return (_GPT2,) if description.get("use_regex", True) else ()
    if kind == "Digits":
        return (_DIGIT,) if description.get("individual_digits") else None
    if kind == "Split" and description.get("behavior") in ("Isolated", "Removed") and "pattern" in description:
        pattern = str(description["pattern"].get("Regex", ""))
        kept = description["behavior"] == "Isolated" or description.get("invert")
        return (_DIGITS_ONE_BY_ONE.get(pattern, pattern),) if kept else None
    return None


_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PROBE = "a"
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class GgufTokenizer:
    """What the file says about text."""

    model: str
    """llama.cpp's kind: gpt2, llama or no_vocab."""
    pre: str | None = None
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    scores: tuple[float, ...] | None = None
    merges: tuple[str, ...] | None = None
    special_ids: Mapping[str, int] = field(default_factory=dict)
    """By role: bos, eos, unk, sep, pad, cls, mask."""
    adds: Mapping[str, bool] = field(default_factory=dict)
    """Whether bos and eos are put around a text."""
    space_prefix: bool | None = None
    chat_template: str | None = None
    notes: tuple[str, ...] = ()
    """Where llama.cpp will cut text in another way than the checkpoint's tokenizer."""

    @property
    def description(self) -> str:
        """In a few words."""
        if self.model == "no_vocab":
            return "none"
        kind = {"gpt2": "byte-level BPE", "llama": "SentencePiece BPE"}[self.model]
        return f"{kind}, {len(self.tokens)} tokens" + (f", {self.pre}" if self.pre and self.model == "gpt2" else "")


def read_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, source: str) -> GgufTokenizer:
    """The tokenizer for a model whose embedding has `rows` rows; rows without a token get an unused one.

    Args:
        source: what to call it in an error.

    Raises: TokenizerError if it has more tokens than the embedding has rows.
    """
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    special_ids = {role: value for role, value in roles.items() if isinstance(value, int) and 0 <= value < rows}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = description.get("model", {})
    kind = _kind(description)
    if kind is None:
        reason = f"a {model.get('type', type(tokenizer).__name__)} tokenizer"
        return GgufTokenizer(
            "no_vocab",
            special_ids=special_ids,
            notes=(f"llama.cpp has nothing like {reason}; it will take token ids, but no text",),
        )
    added = {entry["id"]: entry for entry in description.get("added_tokens", [])}
    texts = {index: text for text, index in model["vocab"].items()} | {
        index: str(entry["content"]) for index, entry in added.items()
    }
    if texts and max(texts) >= rows:
        raise TokenizerError(
            f"The tokenizer in {source} has the token {max(texts)}, but the model's embedding only {rows} rows; the "
            "files do not belong together."
        )
    tokens = tuple(texts.get(index, f"[PAD{index}]") for index in range(rows))
    unknown = model.get("unk_token")
    types = tuple(int(_type(index, texts, added, unknown, kind)) for index in range(rows))
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    adds, notes = _frame(tokenizer, special_ids)
    common: dict[str, Any] = {
        "tokens": tokens,
        "types": types,
        "special_ids": special_ids,
        "adds": adds,
        "chat_template": _chat_template(tokenizer),
    }
    if kind == "llama":
        return GgufTokenizer(
            "llama",
            pre="default",
            scores=_scores(tokens, pairs),
            space_prefix=_puts_space_first(tokenizer),
            notes=tuple(notes),
            **common,
        )
    rule = description.get("pre_tokenizer")
    pre = pre_tokenizer_name(rule, bool(model.get("ignore_merges")))
    if pre is None:
        notes.append(f"llama.cpp has no known name for the rule that cuts text first; {UNKNOWN!r} may cut differently")
    if _adds_prefix_space(rule):
        notes.append("the tokenizer puts a space before a text, which llama.cpp does not")
    normalizer = (description.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        notes.append(f"the tokenizer normalises text ({normalizer}), which llama.cpp does not")
    merges = tuple(" ".join(pair) for pair in pairs)
    return GgufTokenizer("gpt2", pre=pre or UNKNOWN, merges=merges, notes=tuple(notes), **common)


def _kind(description: Mapping[str, Any]) -> str | None:
    """llama.cpp's kind for a tokenizer.json, or None."""
    model = description.get("model", {})
    if model.get("type") != "BPE" or not model.get("merges"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if model.get("byte_fallback"):
        return "llama"
    return "gpt2" if "ByteLevel" in _types_within(description.get("pre_tokenizer")) else None


def _types_within(description: Mapping[str, Any] | None) -> list[str]:
    if description is None:
        return []
    return [str(description.get("type"))] + [
        name for part in description.get("pretokenizers", []) for name in _types_within(part)
    ]


def _adds_prefix_space(description: Mapping[str, Any] | None) -> bool:
    if description is None:
        return False
    if description.get("type") == "ByteLevel":
        return bool(description.get("add_prefix_space"))
    return any(_adds_prefix_space(part) for part in description.get("pretokenizers", []))


def _type(
    index: int, texts: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], unknown: str | None, kind: str
) -> TokenType:
    if index not in texts:
        return TokenType.UNUSED
    if kind == "llama" and texts[index] == unknown:
        return TokenType.UNKNOWN
    if index in added:
        return TokenType.CONTROL if added[index].get("special") else TokenType.USER_DEFINED
    if kind == "llama" and _BYTE.fullmatch(texts[index]):
        return TokenType.BYTE
    return TokenType.NORMAL


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """By token: minus the rank of the first merge that makes it; tokens that no merge makes come last."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return tuple(-float(ranks.get(token, len(merges))) for token in tokens)


def _frame(tokenizer: PreTrainedTokenizerBase, special_ids: Mapping[str, int]) -> tuple[dict[str, bool], list[str]]:
    """Whether the tokenizer puts its bos and eos around a text, as seen on one; notes on what else it puts there."""
    plain = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    framed = list(tokenizer(_PROBE)["input_ids"])
    for before in range(len(framed) - len(plain) + 1):
        if framed[before : before + len(plain)] == plain:
            break
    else:
        return {}, ["the tokenizer changes a text when it adds special tokens, which llama.cpp does not"]
    ahead, behind = framed[:before], framed[before + len(plain) :]
    bos, eos = [special_ids.get("bos")], [special_ids.get("eos")]
    notes = []
    if ahead not in ([], bos) or behind not in ([], eos):
        notes.append(f"the tokenizer puts tokens {ahead} before and {behind} behind a text, which llama.cpp does not")
    return {"bos": ahead == bos, "eos": behind == eos}, notes


def _puts_space_first(tokenizer: PreTrainedTokenizerBase) -> bool:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    return str(tokens[0]).startswith(_SPACE)


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) and template else None
