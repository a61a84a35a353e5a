"""Which projections of a block carry LoRA."""

from __future__ import annotations

from collections import Counter

from spinecli.checkpoints.family import Family
from spinecli.errors import OptionError


def target_projections(family: Family, selection: str = "all") -> tuple[str, ...]:
    """Names of the adapted projections relative to a block, in the family's order.

    Args:
        selection: `all`, `attention`, `query-value`, or the projections' own names separated by commas. The last part
            of a name will do if no other projection shares it.

    Raises: OptionError if a name is none of the family's projections, or if LoRA does not fit them.
    """
    if family.transposed:
        raise OptionError(
            f"{family.model_type} stores its projections the other way round (d_in, d_out), which neither LoRA nor "
            "split training takes here; fine-tune a model of another family."
        )
    attention, everything = family.attention, family.projections
    named = {
        "all": everything,
        "attention": attention.projections,
        "query-value": tuple(dict.fromkeys((attention.query, attention.value))),
    }
    if selection in named:
        return named[selection]
    endings = Counter(name.rpartition(".")[2] for name in everything)
    unique = {name.rpartition(".")[2]: name for name in everything if endings[name.rpartition(".")[2]] == 1}
    short = unique | {name: name for name in everything}
    wanted = {part.strip() for part in selection.split(",")}
    if unknown := sorted(wanted - short.keys()):
        raise OptionError(
            f"--targets names {unknown[0]!r}, which is no projection of {family.model_type}; "
            f"take all, attention, query-value, or some of {', '.join(everything)}."
        )
    chosen = {short[name] for name in wanted}
    return tuple(name for name in everything if name in chosen)
