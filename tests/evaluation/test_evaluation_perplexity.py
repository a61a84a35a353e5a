from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_checkpoint import POSITIONS, random_words
from tokenizers import processors

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.stream.block_stream import ComputeOptions
from spinecli.checkpoints.tokenizer import load_tokenizer
from spinecli.data.config import SpecialTokens
from spinecli.data.rows import Frame, token_rows
from spinecli.data.text import Text, load_text
from spinecli.errors import CalibrationTextError, MeasurementError, OptionError, TokenizerError
from spinecli.evaluation import perplexity
from spinecli.evaluation.config import EvaluateConfig, PerplexityConfig
from spinecli.evaluation.models import load_model, open_subjects
from spinecli.evaluation.perplexity import (
    LoadedLogits,
    StreamedLogits,
    Windowing,
    read_passages,
    score,
    text_windows,
    token_losses,
)
from spinecli.evaluation.session import open_session


@st.composite
def windowings(draw: st.DrawFn) -> Windowing:
    window = draw(st.integers(2, 40))
    return Windowing(window, draw(st.integers(1, window)), draw(st.integers(1, 12)))


@given(windowings())
def test_no_token_is_scored_twice(windowing: Windowing) -> None:
    windows = windowing.cut(torch.arange(windowing.tokens))
    assert windows.shape == (windowing.rows, windowing.window)
    scored = Counter(
        token for index, window in enumerate(windows.tolist()) for token in window[windowing.first_scored(index) :]
    )
    assert set(scored.values()) == {1}
    if windowing.stride < windowing.window:
        assert sorted(scored) == list(range(1, windowing.tokens))
    else:
        assert sorted(scored) == [token for token in range(windowing.tokens) if token % windowing.window]


@given(windowings(), st.integers(0, 100))
def test_windows_end_with_the_text(windowing: Windowing, extra: int) -> None:
    length = windowing.window + extra
    windows = windowing.cut(torch.arange(length))
    assert len(windows) == min(windowing.rows, 1 + extra // windowing.stride)
    assert windows[-1, -1] < length


@given(windowings(), st.integers(2, 50))
def test_uniform_logits_have_the_vocabulary_as_perplexity(windowing: Windowing, vocabulary: int) -> None:
    windows = windowing.cut(torch.arange(windowing.tokens) % vocabulary)
    found = score([torch.zeros(*windows.shape, vocabulary)], windows, windowing)
    assert found.perplexity == pytest.approx(vocabulary, rel=1e-5)


@settings(max_examples=25)
@given(windowings(), st.integers(1, 5), st.integers(0, 1000))
def test_score_is_the_mean_over_scored_tokens(windowing: Windowing, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    windows = windowing.cut(torch.randint(7, (windowing.tokens,), generator=generator))
    logits = torch.randn(*windows.shape, 7, generator=generator)
    expected = [
        -float(logits[row, position - 1].double().log_softmax(-1)[windows[row, position]])
        for row in range(len(windows))
        for position in range(windowing.first_scored(row), windowing.window)
    ]
    found = score(logits.split(chunk), windows, windowing)
    assert found.tokens == len(expected)
    assert found.nll == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_disjoint_windows_give_the_mean_of_the_rows_means() -> None:
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(7, (4, 10), generator=generator)
    logits = torch.randn(4, 10, 7, generator=generator)
    row_means = token_losses(logits, windows).mean(dim=1)
    assert score([logits], windows, Windowing(10, 10, 4)).nll == pytest.approx(float(row_means.mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("window", "stride", "rows", "named"),
    [(1, 1, 1, "--window"), (8, 9, 1, "--stride"), (8, 0, 1, "--stride"), (8, 8, 0, "--rows")],
)
def test_impossible_windows_are_refused(window: int, stride: int, rows: int, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        Windowing(window, stride, rows)


def test_a_loss_without_perplexity_is_an_error() -> None:
    windows = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(MeasurementError, match="nan"):
        score([torch.full((1, 4, 3), math.nan)], windows, Windowing(4, 4, 1))
    with pytest.raises(MeasurementError, match="perplexity"):
        score([torch.tensor([-1e5, 1e5, 0]).expand(1, 4, 3)], windows, Windowing(4, 4, 1))


def test_disjoint_windows_are_the_calibration_rows(dense: Path, text_file: Path) -> None:
    tokenizer, text = load_tokenizer(dense), load_text(str(text_file))
    windows = text_windows(tokenizer, text, Windowing(31, 31, 9))
    assert torch.equal(windows, token_rows(tokenizer, text, 9, 31).tokens)


def test_a_text_of_one_window_is_enough_and_less_is_not(dense: Path) -> None:
    tokenizer, windowing = load_tokenizer(dense), Windowing(20, 5, 10)
    text = Text("short.txt", "short.txt", (random_words(20),))
    assert len(text_windows(tokenizer, text, windowing)) == 1
    with pytest.raises(CalibrationTextError, match=r"short.txt has 18 tokens, fewer than one window of 20"):
        text_windows(tokenizer, Text("short.txt", "", (random_words(18),)), windowing)


def test_a_text_that_begins_itself_does_not_begin_twice(dense: Path) -> None:
    tokenizer, words = load_tokenizer(dense), random_words(40)
    frame = Frame(opening=(tokenizer.bos_token_id,), names=(tokenizer.bos_token,))
    plain, begun = (
        text_windows(tokenizer, Text("", "", (content,)), Windowing(12, 6, 3), frame=frame)
        for content in (words, tokenizer.bos_token + words)
    )
    assert torch.equal(plain, begun)
    assert (plain == tokenizer.bos_token_id).sum(1).tolist() == [1, 1, 1]


def test_a_tokenizer_of_another_model_is_refused(dense: Path, text_file: Path) -> None:
    with pytest.raises(TokenizerError, match="another model"):
        text_windows(load_tokenizer(dense), load_text(str(text_file)), Windowing(8, 8, 2), vocabulary=10)


@pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 8), (POSITIONS, 50)])
def test_stream_and_loaded_model_agree(
    dense: Path, text_file: Path, window: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (subject,) = open_subjects([(str(dense), None)])
    windowing = Windowing(window, stride, 9)
    windows = text_windows(load_tokenizer(dense), load_text(str(text_file)), windowing)
    loaded = LoadedLogits(load_model(subject, device="cpu", dtype="float32"), "cpu")
    streamed = StreamedLogits(subject.checkpoint, ComputeOptions())
    whole = score(loaded(windows, RunContext()), windows, windowing)
    in_blocks = score(streamed(windows, RunContext()), windows, windowing)
    monkeypatch.setattr(perplexity, "_HIDDEN_BYTES", 4 * window * 32 * 4)
    in_passes = score(streamed(windows, RunContext()), windows, windowing)
    assert whole.tokens == in_blocks.tokens == in_passes.tokens
    assert in_blocks.nll == pytest.approx(whole.nll, abs=1e-6)
    assert in_passes.nll == pytest.approx(whole.nll, abs=1e-6)


def test_strided_score_equals_a_plain_loop(dense: Path, text_file: Path) -> None:
    (subject,) = open_subjects([(str(dense), None)])
    model = load_model(subject, device="cpu", dtype="float32")
    windowing = Windowing(24, 7, 6)
    windows = text_windows(load_tokenizer(dense), load_text(str(text_file)), windowing)
    losses = []
    for index, window in enumerate(windows):
        labels = window.clone()
        labels[: windowing.first_scored(index)] = -100  # as the transformers guide on fixed-length models does
        with torch.no_grad():
            output = model(input_ids=window[None], labels=labels[None])
        losses += [float(output.loss)] * int((labels != -100).sum())
    found = score(LoadedLogits(model, "cpu")(windows, RunContext()), windows, windowing)
    assert found.tokens == len(losses) == 23 + 5 * 7
    assert found.nll == pytest.approx(sum(losses) / len(losses), abs=1e-6)


@pytest.mark.real
@pytest.mark.parametrize(
    ("model", "text", "expected"),
    [("english-7M", "english-evaluation.txt", 32.762), ("stories260K", "stories-evaluation.txt", 4.9447)],
)
def test_the_protocol_of_the_shared_checkpoints(shared: Path, model: str, text: str, expected: float) -> None:
    (subject,) = open_subjects([(str(shared / "models" / model), None)])
    windowing = Windowing(256, 256, 40)
    windows = text_windows(load_tokenizer(subject.path), load_text(str(shared / "texts" / text)), windowing)
    found = score(StreamedLogits(subject.checkpoint, ComputeOptions())(windows, RunContext()), windows, windowing)
    assert found.perplexity == pytest.approx(expected, rel=1e-4)


def test_windows_begin_as_the_tokenizer_begins_a_text(dense: Path, tmp_path: Path, text_file: Path) -> None:
    """What opens a window counts into its length, and neither it nor anything twice is scored."""
    model = shutil.copytree(dense, tmp_path / "begun")
    tokenizer = load_tokenizer(model)
    first, second = (tokenizer.convert_ids_to_tokens(token) for token in (1, 2))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} {second} $A", special_tokens=[(first, 1), (second, 2)]
    )
    tokenizer.save_pretrained(model)
    subjects = open_subjects([(str(model), None)])
    settings = PerplexityConfig(texts=(str(text_file),), window=20, stride=5, rows=6)
    (passage,) = read_passages(settings, subjects, pytest.fail)
    windows = passage.windows[0]
    text = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    loaded = load_model(subjects[0], device="cpu", dtype="float32")
    losses = []
    for index, window in enumerate(windows.tokens):
        assert window.tolist() == [1, 2, *text[5 * index : 5 * index + 18]]
        labels = window.clone()
        labels[: 2 if index == 0 else 15] = -100
        with torch.no_grad():
            output = loaded(input_ids=window[None], labels=labels[None])
        losses += [float(output.loss)] * int((labels != -100).sum())
    found = score(LoadedLogits(loaded, "cpu")(windows.tokens, RunContext()), windows.tokens, windows.windowing)
    assert found.tokens == len(losses) == 18 + 5 * 5
    assert found.nll == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    config = EvaluateConfig(model=str(model), perplexity=settings)
    evaluated = open_session(config).measure().models[0].perplexity[0]
    assert (evaluated.nll, evaluated.opened_by) == (pytest.approx(found.nll, abs=1e-6), first + second)
    plain = settings.model_copy(update={"special_tokens": SpecialTokens.none})
    assert read_passages(plain, subjects, pytest.fail)[0].windows[0].tokens[0].tolist() == text[:20]


def test_side_by_side_windows_hold_less_text_where_something_opens_them() -> None:
    assert Windowing(8, 7, 3, opening=1).cut(torch.arange(21)).tolist() == torch.arange(21).view(3, 7).tolist()
    with pytest.raises(OptionError, match="between 1 and the window's 7 tokens of text"):
        Windowing(8, 8, 3, opening=1)


def test_a_head_of_its_own_counts_whichever_way_a_model_is_run(dense: Path, tmp_path: Path, text_file: Path) -> None:
    """The configuration says that it is tied, as transformers 5 writes it after such a head was trained."""
    model = shutil.copytree(dense, tmp_path / "own-head")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    texts = PerplexityConfig(texts=(str(text_file),), window=16, rows=8)
    found = [
        open_session(EvaluateConfig(model=str(directory), perplexity=texts, latency=latency)).measure().models[0]
        for directory, latency in ((dense, False), (model, False), (model, True))
    ]
    tied, streamed, loaded = (result.perplexity[0] for result in found)
    assert (streamed.computed_by, loaded.computed_by) == ("block stream", "loaded model")
    assert streamed.nll == pytest.approx(loaded.nll, abs=1e-6)
    assert abs(streamed.nll - tied.nll) > 0.01
    assert found[1].weights.parameters - found[0].weights.parameters == tensors["lm_head.weight"].numel()
