"""What llama.cpp itself makes of a written file, where llama-cpp-python is installed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spinecli.errors import VerificationError

_log = logging.getLogger(__name__)
TEXTS = (
    "Hello world",
    " The quick brown fox, who's 12345 years old, didn't jump over 67 lazy dogs!",
    'Once upon a time\n\nthere was a girl named Lily.\n  She said: "I\'ll go."\t(And she went...)',
    "naïve café – ½ Straße, Ελλάδα, Россия, 中文字符 and 日本語 😀👍🏽",
    "def f(x):\n    return x**2 + [1, 2][0]  # ok\r\n\r\n",
    "UPPER lower MiXeD http://example.org/a?b=c&d=e   three   spaces ",
)
"""Texts on which a written tokenizer is compared with the checkpoint's."""


@cache
def available() -> bool:
    """Whether llama-cpp-python is installed and can be imported."""
    if find_spec("llama_cpp") is None:
        return False
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError) as error:  # without its own dependencies, or its shared library
        _log.warning(f"llama-cpp-python cannot be imported ({error}), so the file is not compared in llama.cpp.")
        return False
    return True


@contextmanager
def opened(path: Path, *, vocabulary_only: bool = False, context: int = 512, precise: bool = False) -> Iterator[Any]:
    """The file, opened by llama.cpp on one thread.

    Args:
        context: tokens that it has room for.
        precise: keys and values are cached in float32 instead of float16.

    Raises: VerificationError if llama.cpp refuses the file.
    """
    import llama_cpp

    llama_cpp.llama_log_set(_silence(), None)
    cache_types = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32} if precise else {}
    try:
        model = llama_cpp.Llama(
            model_path=str(path),
            vocab_only=vocabulary_only,
            n_ctx=context,
            n_batch=context,
            n_ubatch=context,
            n_threads=1,
            n_threads_batch=1,
            n_gpu_layers=0,
            logits_all=True,
            verbose=False,
            **cache_types,
        )
    except (ValueError, RuntimeError, AssertionError) as error:
        raise VerificationError(f"llama.cpp does not open the written file ({error}); nothing was kept.") from error
    try:
        yield model
    finally:
        model.close()


@cache
def _silence() -> Any:
    """A receiver of llama.cpp's log lines that drops them; it must live as long as llama.cpp may call it."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """Logits at every position of one row of tokens: (tokens, vocabulary) float32."""
    model.reset()
    model.eval(list(tokens))
    return torch.from_numpy(np.array(model.scores[: len(tokens)], dtype=np.float32))


def greedy(model: Any, tokens: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that follow, each the likeliest."""
    model.reset()
    model.eval(list(tokens))
    found: list[int] = []
    for _ in range(count):
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval([found[-1]])
    return found


def token_ids(model: Any, text: str) -> list[int]:
    """The tokens of a text with the special ones that the file asks for, which are not read from the text."""
    return [int(index) for index in model.tokenize(text.encode("utf-8"), add_bos=True, special=False)]
