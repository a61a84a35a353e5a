"""BERT and RoBERTa with fewer heads, in a format that plain transformers has no modules for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import Recipe, answers, load, random_tokens, recipe
from test_checkpoints_cutting import cut, logits_of, random_masks, silenced

from spinecli.checkpoints import modeling_narrow_encoder
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.masks import Masks
from spinecli.checkpoints.stream.verify import streamed_logits

Opened = Callable[[Recipe], Checkpoint]
TOKENS = random_tokens(2, 12)
SHIPPED = Path(modeling_narrow_encoder.__file__)

STRANGER = """
import sys
sys.modules["spinecli"] = None
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
directory, tokens, out = sys.argv[1:]
config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
model, info = AutoModelForSequenceClassification.from_pretrained(
    directory, trust_remote_code=True, output_loading_info=True
)
assert not any(info.values()), info
assert AutoTokenizer.from_pretrained(directory, trust_remote_code=True)("bat din")["input_ids"]
assert config.num_attention_heads == 3 and type(model).__module__.startswith("transformers_modules"), type(model)
torch.save(model.eval()(torch.load(tokens)).logits, out)
model.save_pretrained(out + ".saved")
again = AutoModelForSequenceClassification.from_pretrained(out + ".saved", trust_remote_code=True)
assert torch.equal(again.eval()(torch.load(tokens)).logits, torch.load(out))
"""


@pytest.mark.parametrize("task", ["classification", "masked-lm", "encoding"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("removed", [(), (1,)], ids=["all blocks", "block 1 out"])
def test_cut_heads_equal_masked_heads(
    opened: Opened, tmp_path: Path, family: str, task: str, removed: tuple[int, ...]
) -> None:
    checkpoint = opened(recipe(family, task=task))
    masks = random_masks(checkpoint, 3, 24, removed)
    expected = logits_of(silenced(checkpoint.path, masks, 8))
    assert expected.std() > 0.1
    assert (expected - logits_of(load(checkpoint.path))).abs().max() > 0.01
    found = logits_of(cut(checkpoint, masks, tmp_path / "cut"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    written = Checkpoint.open(tmp_path / "cut")
    assert (written.family.model_type, written.task) == (f"narrow_{family}", checkpoint.task)
    assert (written.shape.heads, written.shape.head_dim) == (3, 8)
    torch.testing.assert_close(streamed_logits(written, TOKENS), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_that_keeps_its_heads_stays_plain(opened: Opened, tmp_path: Path, family: str) -> None:
    checkpoint = opened(recipe(family))
    assert cut(checkpoint, random_masks(checkpoint, 4, 24, ()), tmp_path / "cut").config.model_type == family
    assert not (tmp_path / "cut" / SHIPPED.name).exists()
    assert "auto_map" not in json.loads((tmp_path / "cut" / "config.json").read_text())


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_stranger_opens_it_without_spine(opened: Opened, tmp_path: Path, family: str) -> None:
    checkpoint = opened(recipe(family, task="classification"))
    expected = logits_of(cut(checkpoint, random_masks(checkpoint, 3, 24, ()), tmp_path / "cut"))
    torch.save(TOKENS, tmp_path / "tokens")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    paths = [str(tmp_path / name) for name in ("cut", "tokens", "logits")]
    command = [sys.executable, "-c", STRANGER, *paths]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, atol=1e-5, rtol=0)


def test_the_shipped_file_is_the_module_that_spine_runs(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(recipe("bert"))
    model = cut(checkpoint, random_masks(checkpoint, 2, 40, ()), tmp_path / "cut")
    assert (tmp_path / "cut" / SHIPPED.name).read_bytes() == SHIPPED.read_bytes()
    assert type(model).__module__ == modeling_narrow_encoder.__name__


def test_the_code_beside_a_checkpoint_is_never_run_by_spine(opened: Opened, tmp_path: Path) -> None:
    checkpoint = opened(recipe("bert"))
    masks = random_masks(checkpoint, 2, 40, ())
    expected = answers(cut(checkpoint, masks, tmp_path / "cut"), TOKENS)
    (tmp_path / "cut" / SHIPPED.name).write_text("raise SystemExit('this must not run')")
    assert torch.equal(answers(load(tmp_path / "cut"), TOKENS), expected)
    streamed_logits(Checkpoint.open(tmp_path / "cut"), TOKENS)


def test_a_narrow_encoder_can_be_cut_again(opened: Opened, tmp_path: Path) -> None:
    first = opened(recipe("roberta"))
    cut(first, random_masks(first, 3, 24, ()), tmp_path / "one")
    second = Checkpoint.open(tmp_path / "one")
    masks = random_masks(second, 1, 16, (0,), seed=1)
    expected = logits_of(silenced(second.path, masks, 8))
    torch.testing.assert_close(logits_of(cut(second, masks, tmp_path / "two")), expected, atol=1e-4, rtol=0)
    copied = cut(second, Masks.full((second.shape,) * second.blocks), tmp_path / "copy").state_dict()
    assert all(torch.equal(value, copied[name]) for name, value in load(second.path).state_dict().items())
