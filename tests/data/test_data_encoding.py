from __future__ import annotations

import copy
import random
import time
from pathlib import Path

import pytest
import torch
from conversing import TEMPLATE, chat_tokenizer
from families import VOCABULARY, WORDS, tokenizer
from federated_samples import (
    encoder_tokenizer,
    labelled_set,
    shared,
    stories,
    without_padding,
    without_special_tokens,
)
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase

from spinecli.checkpoints.tokenizer import load_tokenizer, padding_id
from spinecli.data import encoding
from spinecli.data.batches import IGNORED, collate
from spinecli.data.encoding import Encoded, encode
from spinecli.data.examples import Dataset, Example, load_dataset
from spinecli.data.instructions import render_prompt
from spinecli.errors import DataError, OptionError, TokenizerError

TINY = Path(__file__).parents[2] / "src/spinecli/demo/assets/tiny"
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join)


def classified(*texts: str, pairs: list[str] | None = None) -> Dataset:
    examples = tuple(
        Example(text, pair=pairs[index] if pairs else None, label=index % 2) for index, text in enumerate(texts)
    )
    return Dataset("classification", examples, ("0", "1"), "made")


def ids(encoded: Encoded) -> list[list[int]]:
    return [row.tolist() for row in encoded.tokens]


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
        initializer_range=0.5,
    )


def test_classification_rows_are_what_the_tokenizer_makes() -> None:
    texts = [" ".join(WORDS[:count]) for count in (3, 1, 8)]
    for made in (tokenizer(), without_padding(), encoder_tokenizer(), load_tokenizer(TINY)):
        encoded = encode(classified(*texts), made, 64)
        assert ids(encoded) == [made(text)["input_ids"] for text in texts]
        assert encoded.labels.tolist() == [0, 1, 0]
        assert encoded.rows_of([2, 0]) == [2, 0]
        assert (len(encoded), encoded.shortened, encoded.segments) == (3, 0, None)


def test_pairs_carry_segments_only_where_a_model_wants_them() -> None:
    dataset = classified("a b", "c", pairs=["d", "e f g"])
    encoded = encode(dataset, encoder_tokenizer(), 16)
    made = encoder_tokenizer()(["a b", "c"], ["d", "e f g"])
    assert ids(encoded) == made["input_ids"]
    assert encoded.segments is not None
    assert [row.tolist() for row in encoded.segments] == made["token_type_ids"]
    batch = collate(encoded, [0, 1])
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask", "token_type_ids"}
    plain = encode(dataset, tokenizer(), 16)
    assert plain.segments is None
    assert set(collate(plain, [0, 1]).model_inputs()) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("pairs", [None, ["d e f g", "h"]])
def test_long_texts_are_cut_and_counted(pairs: list[str] | None) -> None:
    encoded = encode(classified("a b c d e f g h i", "j", pairs=pairs), encoder_tokenizer(), 8)
    assert encoded.shortened == 1
    assert len(encoded.tokens[0]) == 8
    assert encoded.tokens[0][-1] == 3
    if encoded.segments is not None:
        assert [len(row) for row in encoded.segments] == [len(row) for row in encoded.tokens]


@given(texts=st.lists(SENTENCES, min_size=1, max_size=6), endings=st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_no_class_is_read_off_padding(texts: list[str], endings: list[int]) -> None:
    """Texts may say `</s>`, which is the token to pad with here; transformers would take it for padding."""
    texts = [text + "</s>" * ending for text, ending in zip(texts, endings, strict=False)]
    made = without_padding()
    encoded = encode(classified(*texts), made, 32)
    assert encoded.pad_id == padding_id(made) == made.eos_token_id
    assert all(int(row[-1]) != encoded.pad_id for row in encoded.tokens)
    torch.manual_seed(0)
    config = tiny_config()
    config.pad_token_id = encoded.pad_id
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        together = model(**collate(encoded, range(len(texts))).model_inputs()).logits
        alone = torch.cat([model.score(model.model(row[None]).last_hidden_state[:, -1]) for row in encoded.tokens])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_padding_token_is_the_tokenizers_own_or_its_end() -> None:
    assert padding_id(tokenizer()) == tokenizer().pad_token_id == 0
    assert padding_id(without_padding()) == 2
    assert padding_id(without_special_tokens()) == 0
    assert padding_id(load_tokenizer(TINY)) == 0


@given(texts=st.lists(SENTENCES, min_size=1, max_size=5), max_length=st.integers(2, 50))
def test_every_token_of_a_text_but_the_first_is_a_target_once(texts: list[str], max_length: int) -> None:
    for made in (tokenizer(), without_special_tokens()):
        encoded = encode(stories(texts), made, max_length)
        end = [] if made.eos_token_id is None else [made.eos_token_id]
        for example, text in enumerate(texts):
            rows = encoded.rows_of([example])
            whole = made(text)["input_ids"] + end
            assert all(2 <= len(encoded.tokens[row]) <= max_length for row in rows)
            targets = [int(token) for row in rows for token in collate(encoded, [row]).labels[0, 1:]]
            assert targets == whole[1:]
            assert int(encoded.tokens[rows[0]][0]) == whole[0]
        assert encoded.rows_of(range(len(texts))) == list(range(len(encoded)))


def test_text_that_ends_already_gets_no_second_end() -> None:
    assert ids(encode(stories([WORDS[0] + "</s>"]), tokenizer(), 16))[0].count(2) == 1


def test_prompts_are_not_learned() -> None:
    dataset = Dataset("language", (Example("bat", "kot", answer="lul mes"), Example("nak", answer="por")), (), "made")
    made = tokenizer()
    encoded = encode(dataset, made, 200)
    batch = collate(encoded, [0, 1])
    for row, example in enumerate(dataset.examples):
        learned = batch.labels[row] != IGNORED
        assert made.decode(batch.input_ids[row][learned]) == f"{example.answer}</s>"
        unlearned = batch.input_ids[row][~learned & (batch.attention_mask[row] == 1)]
        assert made.decode(unlearned) == render_prompt(example)
    assert "### Input:\nkot" in render_prompt(dataset.examples[0])
    assert "Input" not in render_prompt(dataset.examples[1])


@given(question=SENTENCES, answer=SENTENCES, max_length=st.integers(2, 200))
def test_long_instructions_keep_something_to_learn(question: str, answer: str, max_length: int) -> None:
    made = tokenizer()
    dataset = stories([question], [answer])
    encoded = encode(dataset, made, max_length)
    (row,) = ids(encoded)
    prompt = made(render_prompt(dataset.examples[0]))["input_ids"]
    reply = made(answer, add_special_tokens=False)["input_ids"] + [2]
    lead = int(encoded.prompt_lengths[0])
    assert len(row) == min(max_length, len(prompt) + len(reply))
    assert encoded.shortened == (len(prompt) + len(reply) > max_length)
    assert lead >= 1
    assert row[:lead] == prompt[len(prompt) - lead :]
    assert row[lead:] == reply[: len(row) - lead]
    assert len(row) - lead >= min(len(reply), max_length // 2)


CHAT = (
    '{"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "bat"}, '
    '{"role": "assistant", "content": "kot"}, {"role": "user", "content": "lul"}, '
    '{"role": "assistant", "content": "mes"}, {"role": "user", "content": "por"}]}\n'
)


def test_the_last_answer_of_a_conversation_is_learned_as_the_template_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(CHAT + '{"messages": [{"from": "human", "value": "nak"}, {"from": "gpt", "value": "kot"}]}\n')
    dataset = load_dataset(str(file))
    assert (dataset.task, dataset.examples[0].text, dataset.examples[0].answer) == ("language", "lul", "mes")
    for template, end in (
        (TEMPLATE, "</s>"),
        (TEMPLATE.replace("</s>", "\n"), "</s>"),
        (TEMPLATE.replace("</s>", "<e>\n"), "<e>"),
    ):
        made = chat_tokenizer(template)
        encoded = encode(dataset, made, 500)
        batch = collate(encoded, [0, 1])
        for row, example in enumerate(dataset.examples):
            turns = [{"role": turn.role, "content": turn.content} for turn in example.conversation]
            prompt = made.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            lead = int(encoded.prompt_lengths[row])
            assert encoded.tokens[row][:lead].tolist() == prompt
            assert prompt.count(made.bos_token_id) == 1
            assert made.decode(batch.input_ids[row][batch.labels[row] != IGNORED]) == f"{example.answer}{end}"
    with pytest.raises(TokenizerError, match="no chat template"):
        encode(dataset, tokenizer(), 500)


def test_the_sum_of_conversations_covers_every_turn(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(CHAT)
    first = load_dataset(str(file)).source()
    file.write_text(CHAT.replace('"be"', '"do"'))
    assert load_dataset(str(file)).source().digest != first.digest


def test_a_conversation_without_an_answer_is_told(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    for messages in ('[{"role": "user", "content": "a"}]', '[{"role": "assistant", "content": "a"}]'):
        file.write_text(f'{{"messages": {messages}}}\n')
        with pytest.raises(DataError, match=r"line 1 has a conversation without an answer"):
            load_dataset(str(file))


def test_many_examples_encode_as_few_do(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [
        classified(*(" ".join(WORDS[: 1 + index % 9]) for index in range(25))),
        classified(*("a b c",) * 25, pairs=["d e", "f"] * 12 + ["g"]),
        stories([" ".join(WORDS[: 1 + index % 30]) for index in range(25)]),
        stories(["bat"] * 25, [" ".join(WORDS[: 1 + index]) for index in range(25)]),
    ]
    whole = [encode(dataset, encoder_tokenizer(), 8) for dataset in sets]
    monkeypatch.setattr(encoding, "_CHUNK", 4)
    for dataset, expected in zip(sets, whole, strict=True):
        found = encode(dataset, encoder_tokenizer(), 8)
        assert ids(found) == ids(expected)
        assert (found.offsets, found.shortened, found.pad_id) == (expected.offsets, expected.shortened, expected.pad_id)
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.prompt_lengths, expected.prompt_lengths)
        assert [row.tolist() for row in found.segments or ()] == [row.tolist() for row in expected.segments or ()]
        assert len({row.untyped_storage().data_ptr() for row in found.tokens}) == 1
    with pytest.raises(DataError, match="Example 6 of made"):
        encode(classified(*["bat"] * 5, "</s>"), without_padding(), 8)


def test_labels_are_where_transformers_expects_them() -> None:
    encoded = encode(stories([" ".join(WORDS[:20]), WORDS[3]]), tokenizer(), 32)
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).eval()
    batch = collate(encoded, [0, 1])
    with torch.no_grad():
        found = model(**batch.model_inputs(), labels=batch.labels).loss
        losses = [
            torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none")
            for row in encoded.tokens
        ]
    assert float(found) == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(OptionError, match="at least 2"):
        encode(classified("a"), encoder_tokenizer(), 1)
    with pytest.raises(OptionError, match="3 special tokens"):
        encode(classified("a", pairs=["b"]), encoder_tokenizer(), 4)
    with pytest.raises(TokenizerError, match="another model"):
        encode(classified("a z"), encoder_tokenizer(), 8, vocabulary=20)
    with pytest.raises(DataError, match=r"Example 2 of made \('</s>'\) has 0 tokens"):
        encode(classified("bat", "</s>"), without_padding(), 8)
    with pytest.raises(DataError, match=r"Example 1 of made .* has 1 tokens and language needs 2"):
        encode(stories(["b"]), without_special_tokens(), 8)


@pytest.mark.real
@pytest.mark.parametrize("model", ["english-7M", "minilm-L6"])
def test_a_real_set_is_encoded_in_seconds(model: str) -> None:
    made: PreTrainedTokenizerBase = load_tokenizer(shared("models", model))
    dataset = load_dataset(str(shared("datasets", "sst2")))
    started = time.perf_counter()
    encoded = encode(dataset, made, 64)
    assert time.perf_counter() - started < 30
    assert len(encoded) == len(dataset)
    assert not any(int(row[-1]) == encoded.pad_id for row in encoded.tokens)
    for index in random.Random(0).sample(range(len(dataset)), 50):
        expected = made(dataset.examples[index].text, truncation=True, max_length=64)["input_ids"]
        assert encoded.tokens[index].tolist() == expected


@pytest.mark.real
@pytest.mark.parametrize("name", ["alpaca_en_1000", "shakespeare_by_speaker"])
def test_real_language_sets_are_encoded(name: str) -> None:
    dataset = load_dataset(str(shared("datasets", name)))
    encoded = encode(dataset, load_tokenizer(shared("models", "english-7M")), 128)
    assert all(encoded.rows_of([example]) for example in range(len(dataset)))
    assert 2 <= int(encoded.lengths.min()) <= int(encoded.lengths.max()) == 128
    assert (collate(encoded, range(len(encoded))).labels[:, 1:] != IGNORED).any(dim=1).all()


def test_made_sets_encode_alike_every_time() -> None:
    dataset = labelled_set([0, 1, 2] * 5)
    assert ids(encode(dataset, tokenizer(), 16)) == ids(encode(dataset, tokenizer(), 16))


def beginning(*tokens: str) -> PreTrainedTokenizerBase:
    """A tokenizer that puts special tokens in front of every text."""
    made = copy.deepcopy(tokenizer())
    numbers = [(token, int(made.convert_tokens_to_ids(token))) for token in tokens]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=" ".join((*tokens, "$A")), special_tokens=numbers)
    return made


@pytest.mark.parametrize("opening", [("<s>",), ("<s>", "<pad>")])
def test_every_row_of_a_long_text_begins_as_the_tokenizer_begins_one(opening: tuple[str, ...]) -> None:
    made = beginning(*opening)
    text = " ".join(WORDS[:20])
    plain = made(text, add_special_tokens=False)["input_ids"]
    dataset = Dataset("language", (Example(text),), (), "texts")
    encoded = encode(dataset, made, 8)
    first = list(made.convert_tokens_to_ids(list(opening)))
    assert all(row[: len(first)].tolist() == first for row in encoded.tokens)
    assert max(len(row) for row in encoded.tokens) == 8
    behind = [token for row in encoded.tokens for token in row[len(first) :].tolist()]
    assert behind == [*plain, made.eos_token_id]
    labels = collate(encoded, range(len(encoded))).labels[:, 1:]
    assert sorted(labels[labels != IGNORED].tolist()) == sorted(behind)


def test_a_shortened_prompt_still_begins_as_the_tokenizer_begins_a_text() -> None:
    made = beginning("<s>")
    example = Example(" ".join(WORDS[:40]), answer=" ".join(WORDS[:2]))
    encoded = encode(Dataset("language", (example,), (), "instructions"), made, 16)
    (row,) = encoded.tokens
    assert (len(row), int(row[0])) == (16, made.bos_token_id)
    answer = [*made(example.answer, add_special_tokens=False)["input_ids"], made.eos_token_id]
    assert row[-len(answer) :].tolist() == answer
    assert encoded.prompt_lengths.tolist() == [16 - len(answer)]


def test_a_text_that_begins_itself_does_not_begin_twice() -> None:
    made, text = beginning("<s>"), " ".join(WORDS[:6])
    for kind in ("texts", "classes"):
        task = "language" if kind == "texts" else "classification"
        labels = ("no", "yes") if kind == "classes" else ()
        rows = [
            encode(Dataset(task, (Example(words, label=0),), labels, kind), made, 16).tokens[0].tolist()
            for words in (text, f"<s>{text}")
        ]
        assert rows[0] == rows[1]
        assert rows[0].count(made.bos_token_id) == 1
