from __future__ import annotations

import json
from pathlib import Path

import pytest
from export_cases import field_of, written_gguf
from families import VOCABULARY, recipe, sample_text, tokenizer
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.tokenizer import load_tokenizer
from spinecli.errors import TokenizerError
from spinecli.exports import llamacpp
from spinecli.exports.config import Quantization
from spinecli.exports.tokenizer import (
    _GPT4O,
    _LLAMA3,
    _QWEN2,
    _TEKKEN,
    GgufTokenizer,
    pre_tokenizer_name,
    read_tokenizer,
)

STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"
ENGLISH = STORIES.with_name("english-7M")


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*parts: dict[str, object]) -> dict[str, object]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("rule", "ignores_merges", "name"),
    [
        (GPT2, False, "gpt-2"),
        (sequence(split(_LLAMA3), BYTES), True, "llama-bpe"),
        (sequence(split(_LLAMA3), BYTES), False, "smaug-bpe"),
        (sequence(split(_QWEN2), BYTES), False, "qwen2"),
        (sequence(DIGITS, GPT2), False, "smollm"),
        (sequence(split(r"\d"), GPT2), False, "smollm"),
        (sequence(split("[abc]"), BYTES), False, None),
        (sequence({"type": "WhitespaceSplit"}, BYTES), False, None),
        (None, False, None),
    ],
)
def test_the_rule_that_cuts_text_has_llama_cpps_name(
    rule: dict[str, object] | None, ignores_merges: bool, name: str | None
) -> None:
    assert pre_tokenizer_name(rule, ignores_merges) == name


def sentencepiece_like(*, prefix: bool = True) -> PreTrainedTokenizerFast:
    """A BPE with byte fallback over ▁, as a converted SentencePiece model is."""
    steps = [normalizers.Prepend("▁")] if prefix else []
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = trainers.BpeTrainer(vocab_size=340, special_tokens=special[:3], show_progress=False)
    trained.train_from_iterator([sample_text()], pieces)
    learnt = json.loads(trained.to_str())
    vocabulary = {token: index for index, token in enumerate(special)}
    for token in learnt["model"]["vocab"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(merge) for merge in learnt["model"]["merges"]]
    final = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    final.normalizer = trained.normalizer
    final.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    final.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=final, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def test_byte_level_merges_come_over() -> None:
    found = read_tokenizer(tokenizer(), VOCABULARY + 4, "here")
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert found.tokens[:3] == ("<pad>", "<s>", "</s>")
    assert found.types[:4] == (TokenType.CONTROL, TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL)
    assert found.tokens[-1] == f"[PAD{VOCABULARY + 3}]"
    assert found.types[-1] == TokenType.UNUSED
    assert dict(found.special_ids) == {"bos": 1, "eos": 2, "pad": 0}
    assert dict(found.adds) == {"bos": False, "eos": False}
    assert found.merges is not None
    assert all(len(merge.split(" ")) == 2 for merge in found.merges)
    assert found.notes == ()


def test_scores_fall_with_the_rank_of_the_merge() -> None:
    found = read_tokenizer(sentencepiece_like(), 700, "here")
    assert found.model == "llama"
    assert found.scores is not None
    joined = [index for index, score in enumerate(found.scores) if score > min(found.scores)]
    assert joined
    assert all(len(found.tokens[index]) > 1 for index in joined)
    assert found.types[:3] == (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL)
    assert found.types[3:259] == (TokenType.BYTE,) * 256
    assert found.space_prefix is True
    assert dict(found.adds) == {"bos": True, "eos": False}
    assert read_tokenizer(sentencepiece_like(prefix=False), 700, "here").space_prefix is False


def test_added_tokens_and_the_chat_template_come_over() -> None:
    made = sentencepiece_like()
    made.add_tokens([AddedToken("<tool>", special=False), AddedToken("<|im_end|>", special=True)])
    made.chat_template = "{{ messages }}"
    found = read_tokenizer(made, len(made), "here")
    assert found.types[found.tokens.index("<tool>")] == TokenType.USER_DEFINED
    assert found.types[found.tokens.index("<|im_end|>")] == TokenType.CONTROL
    assert found.chat_template == "{{ messages }}"


def test_other_tokenizers_are_left_out_with_a_note() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = read_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"), 2, "here")
    assert (found.model, found.tokens) == ("no_vocab", ())
    assert "WordLevel" in found.notes[0]


def test_an_unknown_rule_is_noted() -> None:
    made = tokenizer().__class__(tokenizer_object=Tokenizer.from_str(tokenizer().backend_tokenizer.to_str()))
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("x", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    found = read_tokenizer(made, VOCABULARY, "here")
    assert found.pre == "default"
    assert len(found.notes) == 2


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(TokenizerError, match="only 10 rows"):
        read_tokenizer(tokenizer(), 10, "here")


def test_the_file_holds_the_tokenizer(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(recipe("llama").write(tmp_path / "checkpoint"))
    path = tmp_path / "x.gguf"
    model = written_gguf(path, checkpoint)
    assert field_of(path, "tokenizer.ggml.tokens") == list(model.tokenizer.tokens)
    assert field_of(path, "tokenizer.ggml.token_type") == list(model.tokenizer.types)
    assert field_of(path, "tokenizer.ggml.merges") == list(model.tokenizer.merges or ())
    assert field_of(path, "tokenizer.ggml.pre") == "gpt-2"
    assert field_of(path, "tokenizer.ggml.add_bos_token") is False


def cut_by(pattern: str, *, ignores_merges: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose text is cut by a pattern first."""
    trained = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    # tokens across the borders that the patterns draw differently, so that another pattern would show
    trained.train_from_iterator([*llamacpp.TEXTS] * 20, pieces)
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>")


RULES = [(_LLAMA3, True), (_LLAMA3, False), (_QWEN2, False), (_TEKKEN, True), (_GPT4O, False)]


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "ignores_merges"), RULES)
def test_llama_cpp_cuts_by_the_rule_of_that_name(tmp_path: Path, pattern: str, ignores_merges: bool) -> None:
    pytest.importorskip("llama_cpp")
    made = cut_by(pattern, ignores_merges=ignores_merges)
    directory = recipe("llama", extra=(("vocab_size", len(made)), ("bos_token_id", 0))).write(tmp_path / "checkpoint")
    made.save_pretrained(directory)
    _write(tmp_path / "x.gguf", directory)
    cut_alike(tmp_path / "x.gguf", load_tokenizer(directory), (*llamacpp.TEXTS, "12345678 We'LL see 3.1415 ŉaïve"))


def cut_alike(path: Path, made: PreTrainedTokenizerFast, texts: tuple[str, ...]) -> None:
    with llamacpp.opened(path, vocabulary_only=True) as model:
        for text in texts:
            assert llamacpp.token_ids(model, text) == made(text)["input_ids"], text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "pieces", "pieces without prefix"])
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("llama_cpp")
    made = {"bytes": tokenizer(), "pieces": sentencepiece_like()}.get(kind, sentencepiece_like(prefix=False))
    directory = recipe("llama", extra=(("vocab_size", len(made)),)).write(tmp_path / "checkpoint")
    made.save_pretrained(directory)
    _write(tmp_path / "x.gguf", directory)
    cut_alike(tmp_path / "x.gguf", load_tokenizer(directory), (*llamacpp.TEXTS, sample_text()[:500], "a", ""))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("directory", [STORIES, ENGLISH], ids=lambda path: path.name)
def test_llama_cpp_cuts_real_texts_as_the_tokenizer_does(tmp_path: Path, directory: Path) -> None:
    pytest.importorskip("llama_cpp")
    if not directory.is_dir():
        pytest.skip("needs the checkpoints in ../shared")
    _write(tmp_path / "x.gguf", directory)
    stories = (directory.parents[1] / "texts" / "stories-evaluation.txt").read_text()[:20000]
    cut_alike(tmp_path / "x.gguf", load_tokenizer(directory), (*llamacpp.TEXTS, stories))


def _write(path: Path, directory: Path) -> GgufTokenizer:
    from spinecli.exports.gguf_file import write_gguf
    from spinecli.exports.gguf_model import gguf_model

    model, notes = gguf_model(Checkpoint.open(directory), load_tokenizer(directory), Quantization.f16)
    assert notes == ()
    write_gguf(path, model)
    return model.tokenizer
