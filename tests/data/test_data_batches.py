from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import WORDS, tokenizer
from federated_samples import labelled_set, stories
from hypothesis import given
from hypothesis import strategies as st

from spinecli.data.batches import IGNORED, Batch, batches, collate, evaluation_batches
from spinecli.data.encoding import Encoded, encode
from spinecli.errors import DataError, OptionError


def sample(rows: int = 24) -> Encoded:
    return encode(labelled_set([row * row % 3 for row in range(rows)]), tokenizer(), 64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def row_numbers(found: list[Batch]) -> list[list[int]]:
    return [batch.row_numbers.tolist() for batch in found]


@given(
    examples=st.lists(st.integers(0, 23), min_size=1, max_size=24, unique=True),
    batch_size=st.integers(1, 30),
    steps=st.integers(0, 20),
    seed=st.integers(0, 2**32),
)
def test_passes_are_whole_shuffled_and_run_into_each_other(
    examples: list[int], batch_size: int, steps: int, seed: int
) -> None:
    found = row_numbers(list(batches(SAMPLE, examples, batch_size, steps, generator(seed))))
    assert [len(numbers) for numbers in found] == [min(batch_size, len(examples))] * steps
    drawn = [number for numbers in found for number in numbers]
    for start in range(0, len(drawn), len(examples)):
        one_pass = drawn[start : start + len(examples)]
        assert max(Counter(one_pass).values()) == 1
        assert set(one_pass) <= set(examples)
        if len(one_pass) == len(examples):
            assert set(one_pass) == set(examples)
    again = row_numbers(list(batches(SAMPLE, examples, batch_size, steps, generator(seed))))
    assert again == found


def test_the_generator_decides_and_global_state_does_not() -> None:
    def drawn(seed: int) -> list[list[int]]:
        return row_numbers(list(batches(SAMPLE, range(24), 5, 10, generator(seed))))

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = drawn(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn(1) != first
    assert first[0] != sorted(first[0])


def test_a_batch_holds_its_rows_and_nothing_else() -> None:
    encoded = encode(labelled_set([0, 1, 2]), tokenizer(), 64)
    batch = collate(encoded, [2, 0])
    assert batch.labels.tolist() == [2, 0]
    for place, row in enumerate((2, 0)):
        present = batch.attention_mask[place] == 1
        assert batch.input_ids[place][present].tolist() == encoded.tokens[row].tolist()
        assert (batch.input_ids[place][~present] == encoded.pad_id).all()
    assert {value.dtype for value in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask"}


def test_padding_is_on_the_right_and_out_of_the_loss() -> None:
    encoded = encode(stories([WORDS[0], " ".join(WORDS[:9])]), tokenizer(), 64)
    batch = collate(encoded, [0, 1])
    short = len(encoded.tokens[0])
    assert batch.attention_mask.tolist() == [
        [1] * short + [0] * (batch.input_ids.shape[1] - short),
        [1] * batch.input_ids.shape[1],
    ]
    assert (batch.labels[0, short:] == IGNORED).all()
    assert batch.labels[0, :short].tolist() == encoded.tokens[0].tolist()


def test_all_pieces_of_a_devices_long_texts_are_drawn() -> None:
    encoded = encode(stories([" ".join(WORDS[:30]), WORDS[0], " ".join(WORDS[:20])]), tokenizer(), 8)
    mine = encoded.rows_of([0, 2])
    assert len(mine) > 4
    drawn = row_numbers(list(batches(encoded, [0, 2], 1, len(mine), generator())))
    assert sorted(number for (number,) in drawn) == sorted(mine)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    batch_size=st.integers(1, 12),
)
def test_evaluation_batches_hold_every_row_once_and_restore_their_order(lengths: list[int], batch_size: int) -> None:
    encoded = encode(stories([" ".join(WORDS[:length]) for length in lengths]), tokenizer(), 64)
    found = list(evaluation_batches(encoded, batch_size))
    result = torch.full((len(encoded),), -1)
    for batch in found:
        result[batch.row_numbers] = batch.attention_mask.sum(dim=1)
    assert result.tolist() == encoded.lengths.tolist()
    assert sorted(number for numbers in row_numbers(found) for number in numbers) == list(range(len(encoded)))
    widths = [batch.input_ids.shape[1] for batch in found]
    assert widths == sorted(widths, reverse=True)


def test_what_makes_no_batch_is_refused() -> None:
    with pytest.raises(DataError, match="without examples"):
        batches(SAMPLE, [], 4, 1, generator())
    with pytest.raises(OptionError, match="at least 1 row"):
        batches(SAMPLE, [0], 0, 1, generator())
    with pytest.raises(OptionError, match="at least 1 row"):
        evaluation_batches(SAMPLE, 0)


def test_moving_a_batch_keeps_what_it_holds() -> None:
    batch = collate(SAMPLE, [3, 1])
    moved = batch.to("cpu")
    assert torch.equal(moved.input_ids, batch.input_ids)
    assert torch.equal(moved.labels, batch.labels)
    assert moved.row_numbers is batch.row_numbers


SAMPLE = sample()
