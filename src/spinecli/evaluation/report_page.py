"""report.html: one file with everything in it, for a screen of any width, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from spinecli.checkpoints.cut_picture import BlockCut
from spinecli.evaluation.report import cell, conditions, ratio_cell
from spinecli.evaluation.results import ComparisonRow, Evaluation

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


REPORT_NAME = "report.html"

_BAR_HEIGHT = 22

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #667; --line: #d9dce1; --paper: #fff; --bar: #4472c4;
  --first: #9aa5b8; --good: #177245; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --faint: #9aa0a8; --line: #3a3d42; --paper: #17191c;
  --bar: #7da2e8; --first: #6b7482; --good: #6fcf97; --bad: #f28b82; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: .95rem; margin: 0 0 .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem .35rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
small { display: block; color: var(--faint); } small.good { color: var(--good); } small.bad { color: var(--bad); }
ul { padding-left: 1.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.4rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg rect { fill: var(--bar); } svg rect.first { fill: var(--first); }
"""


def report_html(evaluation: Evaluation, started: str) -> str:
    """The report as one HTML document; `started` is the time of the measurement."""
    labels = [model.label for model in evaluation.models]
    title = "Evaluation of " + ", ".join(labels)
    charts = "".join(_chart(row, labels) for row in evaluation.comparison)
    notes = "".join(f"<li>{escape(sentence)}</li>" for sentence in conditions(evaluation))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<div class="scroll">{_table(evaluation.comparison, labels)}</div>
<h2>How it was measured</h2>
<ul>{notes}</ul>
<h2>Side by side</h2>
<div class="bars">{charts}</div>
{_cuts(evaluation)}<h2>Models</h2>
<div class="scroll">{_models(evaluation)}</div>
<h2>Machine</h2>
<dl>{_machine(evaluation, started)}</dl>
</body>
</html>
"""


def _table(rows: Sequence[ComparisonRow], labels: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label in ["", *labels])
    body = ""
    for row in rows:
        cells = "".join(f"<td>{escape(cell(row, index))}{_ratio(row, index)}</td>" for index in range(len(labels)))
        body += f"<tr><td>{escape(row.figure)}</td>{cells}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _ratio(row: ComparisonRow, index: int) -> str:
    ratio = row.ratios[index]
    if index == 0 or ratio is None:
        return ""
    # within half a percent nothing is called better or worse
    better = ratio > 1 if row.better == "higher" else ratio < 1
    judged = row.better != "neither" and abs(ratio - 1) > 0.005
    kind = ("good" if better else "bad") if judged else ""
    return f'<small class="{kind}">× {ratio_cell(row, index)}</small>'


def _chart(row: ComparisonRow, labels: Sequence[str]) -> str:
    largest = max((value for value in row.values if value is not None), default=0)
    if largest <= 0:
        return ""
    bars = ""
    for index, (label, value) in enumerate(zip(labels, row.values, strict=True)):
        top = index * 2 * _BAR_HEIGHT
        width = (value or 0) / largest * _WIDTH
        kind = "first" if index == 0 else "other"
        bars += (
            f'<text x="0" y="{top + 13}">{escape(label)}: {escape(cell(row, index))}</text>'
            f'<rect class="{kind}" x="0" y="{top + 18}" width="{width:.1f}" height="14" rx="2"/>'
        )
    height = len(labels) * 2 * _BAR_HEIGHT
    direction = {"lower": "lower is better", "higher": "higher is better", "neither": ""}[row.better]
    return (
        f"<section><h3>{escape(row.figure)} <small>{direction}</small></h3>"
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(row.figure)}">{bars}</svg></section>'
    )


def _cuts(evaluation: Evaluation) -> str:
    charts = "".join(cut_chart(model.label, model.cut) for model in evaluation.models if model.cut)
    return f'<h2>What was cut where</h2>\n<div class="bars">{charts}</div>\n' if charts else ""


def _models(evaluation: Evaluation) -> str:
    body = ""
    for model in evaluation.models:
        cells = (model.label, model.reference, model.adapter or "-")
        body += "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in cells) + "</tr>"
    return f"<table><thead><tr><th></th><th>checkpoint</th><th>adapter</th></tr></thead><tbody>{body}</tbody></table>"


def _machine(evaluation: Evaluation, started: str) -> str:
    facts = {"measured": started, **{name: value for name, value in evaluation.machine.items() if value is not None}}
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
