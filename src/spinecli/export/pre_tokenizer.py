"""How llama.cpp calls the rule that cuts text into pieces before byte-level merges, found from tokenizer.json."""

from __future__ import annotations

from typing import Any

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
