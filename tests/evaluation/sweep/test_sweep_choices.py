from __future__ import annotations

import pytest

from spinecli.config import read_config
from spinecli.errors import OptionError
from spinecli.evaluation.sweep.config import AfterCut, SweepConfig
from spinecli.evaluation.sweep.points import MethodChoice, read_methods
from spinecli.pruning.config import TuneMethod, Widths
from spinecli.pruning.methods import METHODS


def methods(text: str) -> tuple[MethodChoice, ...]:
    given = {"model": "model", "sparsity": "0.3", "methods": text}
    return read_methods(read_config(SweepConfig, None, given).methods)


def test_methods_by_name_with_or_without_widths() -> None:
    wanted = (MethodChoice("spine"), MethodChoice("comp"), MethodChoice("spine", Widths.adaptive))
    assert methods("spine, comp,spine:adaptive,spine") == wanted
    assert [choice.name for choice in wanted] == ["spine", "comp", "spine:adaptive"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sorcery", "no method 'sorcery'; choose some of spine, comp"),
        ("spine:wide", "spine:uniform or spine:adaptive"),
        ("spine:", "spine:uniform or spine:adaptive"),
        (" , ", "names no method"),
    ],
)
def test_unknown_methods_are_told(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        methods(text)


def test_a_method_that_refits_is_tuned_only_if_asked_for_by_name() -> None:
    spine, comp = METHODS["spine"]("m4", 0), METHODS["comp"]("m4", 0)
    assert (spine.refits, comp.refits) == (True, False)
    assert [choice.after(comp) for choice in AfterCut] == [None, TuneMethod.auto, TuneMethod.mask, TuneMethod.lsq]
    assert [choice.after(spine) for choice in AfterCut] == [None, None, TuneMethod.mask, TuneMethod.lsq]


def test_unknown_tuning_is_told() -> None:
    with pytest.raises(OptionError, match="--tune must be one of none, auto, mask, lsq, not 'sft'"):
        read_config(SweepConfig, None, {"model": "model", "sparsity": "0.3", "tune": "sft"})
