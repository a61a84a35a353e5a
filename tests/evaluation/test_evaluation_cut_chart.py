from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from families import Recipe, recipe

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cut_picture import BlockCut, block_cuts
from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.evaluation.config import EvaluateConfig, PerplexityConfig
from spinecli.evaluation.report_page import cut_of_model, report_html
from spinecli.evaluation.session import open_session


def test_blocks_that_were_cut_alike_share_a_line() -> None:
    whole, less, none = BlockCut(4, 4, 40, 40), BlockCut(2, 4, 30, 40), BlockCut(0, 4, 0, 40)
    cut = cut_of_model("cut", [whole, less, less, none, less])
    assert [(row.blocks, row.removed) for row in cut.rows] == [
        ("0", False),
        ("1 to 2", False),
        ("3", True),
        ("4", False),
    ]
    assert [(row.heads.percent, row.channels.percent) for row in cut.rows[:2]] == [(100, 100), (50, 75)]
    assert cut.summary == "Keeps 4 of 5 blocks, 10 of 20 heads and 130 of 200 channels."
    assert cut_of_model("whole", [whole]).summary == "Keeps everything."


def test_the_report_shows_the_cut_of_pruned_models_alone(
    written: Callable[[Recipe], Path], sample_file: Path, tmp_path: Path
) -> None:
    dense = Checkpoint.open(written(recipe("llama", grouped=True)))
    first, *others = Masks.full(dense.shapes).blocks
    channels = first.channels.clone()
    channels[8:] = False
    none = BlockMask(first.heads & False, first.channels & False)
    masks = Masks((BlockMask(first.heads, channels), none, BlockMask(others[1].heads, channels)))
    (tmp_path / "cut").mkdir()
    write_cut(tmp_path / "cut", dense, masks)
    texts = PerplexityConfig(texts=(str(sample_file),), window=16, rows=2)
    config = EvaluateConfig(model=str(tmp_path / "cut"), against=(str(dense.path),), perplexity=texts)
    evaluation = open_session(config).measure()
    assert [model.cut for model in evaluation.models] == [(), block_cuts(masks)]
    shown = report_html(evaluation, "now")
    assert "What was cut where" in shown
    for words in ("removed", f"8 of {len(first.channels)}", f"{len(first.heads)} of {len(first.heads)}"):
        assert f">{words}<" in shown
    alone = open_session(EvaluateConfig(model=str(dense.path), perplexity=texts)).measure()
    assert "What was cut where" not in report_html(alone, "now")
