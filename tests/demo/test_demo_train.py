from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from transformers import AutoModelForCausalLM

from spinecli.demo.train import CONTEXT, START, TrainingSetup, build_tokenizer, rate_at, train, training_rows


def test_rows_are_full_and_start_in_the_promised_ways() -> None:
    tokenizer = build_tokenizer(CONTEXT)
    ids = tokenizer.get_vocab()
    rows = training_rows(ids, Random(1))
    found = [next(rows) for _ in range(200)]
    assert {len(row) for row in found} == {CONTEXT}
    started = [row for row in found if row[0] == ids[START]]
    whole = [row for row in started if row[1:3] == [ids["at"], ids["the"]]]
    assert len(started) == pytest.approx(150, abs=25)
    assert len(whole) == pytest.approx(120, abs=25)
    assert all(START not in tokenizer.convert_ids_to_tokens(row[1:]) for row in found)


def test_learning_rate_rises_then_falls() -> None:
    recipe = TrainingSetup(steps=1000, warm_up=100, peak_rate=1.0)
    rates = [rate_at(step, recipe) for step in range(1000)]
    assert rates.index(max(rates)) in (99, 100)
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_two_steps_leave_a_model_that_opens(tmp_path: Path) -> None:
    train(TrainingSetup(steps=2, rows=2), tmp_path, every=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert 1.4e6 < sum(parameter.numel() for parameter in model.parameters()) < 2.2e6
    assert (tmp_path / "training_curve.csv").read_text(encoding="utf-8").count("\n") == 3
