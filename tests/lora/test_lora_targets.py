from __future__ import annotations

import pytest

from spinecli.checkpoints.family import families, family_of
from spinecli.errors import OptionError
from spinecli.lora.factors import target_projections


@pytest.mark.parametrize("name", [name for name, family in families().items() if not family.transposed])
def test_every_selection_is_a_part_of_all_in_the_familys_order(name: str) -> None:
    family = family_of(name)
    everything = target_projections(family)
    attention, feed_forward = family.attention, family.feed_forward
    assert everything == (*attention.projections, *feed_forward.projections)
    assert len(set(everything)) == len(everything)
    assert target_projections(family, "attention") == attention.projections
    assert target_projections(family, "query-value") == tuple(dict.fromkeys((attention.query, attention.value)))
    assert target_projections(family, ",".join(reversed(everything))) == everything
    for each in everything:
        assert target_projections(family, f" {each} ") == (each,)


def test_transposed_projections_are_refused_in_one_sentence() -> None:
    with pytest.raises(OptionError, match=r"gpt2 stores its projections.*another family"):
        target_projections(family_of("gpt2"), "c_attn")


def test_short_names_will_do() -> None:
    assert target_projections(family_of("llama"), "down_proj, q_proj") == ("self_attn.q_proj", "mlp.down_proj")
    assert target_projections(family_of("bert"), "query") == ("attention.self.query",)


def test_a_short_name_that_two_projections_share_is_refused() -> None:
    """BERT's attention, its feed-forward input and its output all end in `dense`."""
    with pytest.raises(OptionError, match="'dense'"):
        target_projections(family_of("bert"), "dense")
    assert target_projections(family_of("bert"), "intermediate.dense") == ("intermediate.dense",)


@pytest.mark.parametrize("selection", ["banana", "", "q_proj,banana", "all,attention"])
def test_a_name_that_there_is_not_is_refused_with_those_that_there_are(selection: str) -> None:
    with pytest.raises(OptionError, match=r"--targets names .*llama.*self_attn\.q_proj"):
        target_projections(family_of("llama"), selection)
