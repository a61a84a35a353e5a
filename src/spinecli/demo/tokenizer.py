"""The word-level tokenizer of the built-in model."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spinecli.demo.language import vocabulary
from spinecli.demo.vocabulary import END

PAD, UNKNOWN, START = "<pad>", "<unk>", "<bos>"


def build_tokenizer(longest: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, for contexts of at most ``longest`` tokens.

    A line break ends a story, so it is read as the end token and the end token is written
    as a line break.
    """
    words = list(dict.fromkeys((PAD, UNKNOWN, START, *vocabulary())))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s*\n\s*"), f" {END} "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[.,]"), "isolated")]
    )
    # The word-piece decoder is here for its clean-up of the space before punctuation.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(Regex(f" ?{END} ?"), "\n"),
        ]
    )
    start = words.index(START)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, start)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        pad_token=PAD,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
