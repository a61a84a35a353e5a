"""Checkpoints whose blocks differ, and whose first block has lost a sub-layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families import Recipe, recipe
from small_federations import Maker

from spinecli.artifacts.directory import OutputOptions
from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.masks import Masks
from spinecli.errors import OptionError
from spinecli.federation.config import FederateConfig
from spinecli.federation.launch import launch
from spinecli.federation.planning.config import PlanConfig
from spinecli.federation.planning.request import open_request as open_plan
from spinecli.federation.planning.run import decide
from spinecli.federation.request import open_request
from spinecli.federation.split.request import split_request
from spinecli.lora.cost import BlockLayout
from spinecli.lora.factors import target_projections


@pytest.fixture
def varied(written: Callable[[Recipe], Path], tmp_path: Path) -> Path:
    dense = Checkpoint.open(written(recipe("llama", grouped=True, blocks=4)))
    masks = Masks.full(dense.shapes)
    masks.blocks[0].heads[:] = False
    masks.blocks[1].channels[:] = False
    masks.blocks[2].channels[::2] = False
    out = tmp_path / "varied"
    out.mkdir()
    write_cut(out, dense, masks)
    return out


@pytest.fixture
def configs(varied: Path, requests: Maker) -> Callable[..., FederateConfig]:
    return lambda **changes: requests.config(rounds=1, **{"model": str(varied), **changes})


@pytest.mark.parametrize("strategy", ["fedit", "legend", "flora"])
def test_lora_goes_where_projections_are(configs: Callable[..., FederateConfig], tmp_path: Path, strategy: str) -> None:
    launch(open_request(configs(strategy=strategy)), OutputOptions(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("cut", ["1", "2"])
def test_a_split_model_trains_what_it_has(configs: Callable[..., FederateConfig], tmp_path: Path, cut: str) -> None:
    asked = configs(strategy="mergesfl", learning_rate=1e-3, cut_layer=cut, top="lora")
    split = split_request(open_request(asked))
    launch(split, OutputOptions(tmp_path / "out"))
    joined = Checkpoint.open(tmp_path / "out")
    assert joined.shapes == split.checkpoint.shapes


def test_strategies_that_prune_say_why_not(configs: Callable[..., FederateConfig], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="all blocks equally wide"):
        launch(open_request(configs(strategy="fedspine")), OutputOptions(tmp_path / "out"))


def test_a_plan_is_made_and_counts_what_is_there(varied: Path) -> None:
    decide(open_plan(PlanConfig(model=str(varied), fleet="jetson-10", labels=2, length=16)))
    checkpoint = Checkpoint.open(varied)
    targets = target_projections(checkpoint.family)
    layout = BlockLayout.of(checkpoint, frozenset(targets))
    for index, shape in enumerate(checkpoint.shapes):
        names = [name for relative, name in checkpoint.block_names(index).items() if relative.endswith("_proj.weight")]
        sides = sum(sum(checkpoint.tensors[name].shape) for name in names)
        assert layout.adapter_parameters(shape, 3) == 3 * sides
