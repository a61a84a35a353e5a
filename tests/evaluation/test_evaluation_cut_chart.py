from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from families import Recipe, recipe

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cut_picture import BlockCut, block_cuts
from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.masks import BlockMask, Masks
from spinecli.evaluation.config import EvaluateConfig, PerplexityConfig
from spinecli.evaluation.report_page import cut_chart, report_html
from spinecli.evaluation.session import open_session


def test_a_column_is_as_high_as_what_is_kept() -> None:
    drawn = cut_chart("<cut>", [BlockCut(2, 4, 40, 40), BlockCut(0, 4, 0, 40)])
    assert "<cut>" not in drawn
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"/>', drawn)]
    whole = max(heights)
    assert [height / whole for height in heights] == [1, 0.5, 1, 0, 1, 1, 1, 0]
    assert drawn.count("<path") == 1


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
    assert "What was cut where" in report_html(evaluation, "now")
    alone = open_session(EvaluateConfig(model=str(dense.path), perplexity=texts)).measure()
    assert "What was cut where" not in report_html(alone, "now")
