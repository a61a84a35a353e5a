"""What was cut where, for report.html: a column a block of the dense model, its heads above and its channels below."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from spinecli.checkpoints.cuts import BlockCut

_WIDTH = 320
_WIDEST = 28.0
_HEIGHT = 44
_CAPTION = 16


def cut_chart(label: str, cut: Sequence[BlockCut]) -> str:
    """One section with an SVG: what each block keeps before what it had, and a cross where nothing is left of it."""
    step = min(_WIDEST, _WIDTH / len(cut))
    heads = _columns([(block.heads, block.of_heads) for block in cut], step, 0)
    channels = _columns([(block.channels, block.of_channels) for block in cut], step, _HEIGHT + _CAPTION)
    crosses = "".join(_cross(index * step, step) for index, block in enumerate(cut) if block.removed)
    height = 2 * (_HEIGHT + _CAPTION)
    return (
        f"<section><h3>{escape(label)} <small>blocks of the dense model, input to output</small></h3>"
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="what {escape(label)} keeps of each block">'
        f"{heads}{channels}{crosses}{_caption('heads', _HEIGHT)}{_caption('channels', height - _CAPTION)}"
        "</svg></section>"
    )


def _columns(units: Sequence[tuple[int, int]], step: float, top: float) -> str:
    most = max(1, *(had for _, had in units))
    drawn = ""
    for index, (kept, had) in enumerate(units):
        for kind, count in (("first", had), ("other", kept)):
            height = count / most * _HEIGHT
            drawn += (
                f'<rect class="{kind}" x="{index * step:.1f}" y="{top + _HEIGHT - height:.1f}" '
                f'width="{0.8 * step:.1f}" height="{height:.1f}"/>'
            )
    return drawn


def _cross(left: float, step: float) -> str:
    right, bottom = left + 0.8 * step, 2 * _HEIGHT + _CAPTION
    return (
        f'<path d="M{left:.1f} 0L{right:.1f} {bottom}M{right:.1f} 0L{left:.1f} {bottom}" stroke="var(--bad)" '
        'stroke-width="1.5"/>'
    )


def _caption(text: str, bottom: float) -> str:
    return f'<text x="0" y="{bottom + 12}">{text}</text>'
