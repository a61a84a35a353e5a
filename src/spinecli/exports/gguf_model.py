"""From a checkpoint to everything that its GGUF file says."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.exports.config import Quantization
from spinecli.exports.gguf_file import GgufModel
from spinecli.exports.gguf_shape import gguf_shape_of
from spinecli.exports.tokenizer import GgufTokenizer, read_tokenizer

_POSITIONS_WITHOUT_LIMIT = 2048
_PHI3_NAMES = re.compile("phi(-?)3", re.IGNORECASE)
_PHI3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}


def gguf_model(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, quantization: Quantization
) -> tuple[GgufModel, tuple[str, ...]]:
    """The model as it will be written, and notes on where llama.cpp will treat it otherwise.

    Raises: UnexportableError, TokenizerError.
    """
    form = gguf_shape_of(checkpoint)
    text = read_tokenizer(tokenizer, int(checkpoint.config.vocab_size), str(checkpoint.path))
    positions = checkpoint.positions or _POSITIONS_WITHOUT_LIMIT
    window = sliding_window(checkpoint)
    notes = text.notes
    windows = None
    if window is not None and form.architecture.sliding:
        windows = tuple(kind == "sliding_attention" for kind in checkpoint.config.layer_types)
        window = None
    if window is not None and window < positions:
        notes = (*notes, f"the context is cut to {window} tokens, since llama.cpp would not slide the attention window")
    model = GgufModel(
        checkpoint=checkpoint,
        architecture=form.architecture,
        shapes=form.shapes,
        rotary=form.rotary,
        tokenizer=text,
        quantization=quantization,
        name=_model_name(checkpoint.path.resolve().name, text),
        context=positions if window is None else min(window, positions),
        windows=windows,
    )
    return model, notes


def sliding_window(checkpoint: Checkpoint) -> int | None:
    """Tokens that some block looks back on, itself included; None if all see the whole row.

    Within that many tokens a sliding window changes nothing.
    """
    window = getattr(checkpoint.config, "sliding_window", None)
    kinds = getattr(checkpoint.config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return int(window)


def _model_name(name: str, tokenizer: GgufTokenizer) -> str:
    """The model's name in the file.

    llama.cpp looks up four tokens of the original Phi-3 in every model with "phi3" in its name, and refuses the file
    if one is absent.
    """
    if set(tokenizer.tokens) >= _PHI3_TOKENS:
        return name
    return _PHI3_NAMES.sub("phi 3", name)
