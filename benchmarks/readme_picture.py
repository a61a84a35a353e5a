"""The picture on the first screen: quality against size of one model by every method, out of RESULTS.md.

    python benchmarks/readme_picture.py [--model english-7M] [--out docs/pictures/quality-against-size.svg]

The figures are those of the section "The default method beside its peers" and, for the dense model, of "Perplexity of
every method"; nothing is measured here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from spinecli.evaluation.page.page import plot_svg
from spinecli.evaluation.page.plot import Drawing, Plot, Point

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
PICTURE = ROOT / "docs" / "pictures" / "quality-against-size.svg"
MODEL = "english-7M"
# As the table calls them, and as the picture does.
METHODS = {
    "spine, adaptive": "spine, adaptive",
    "spine": "spine",
    "comp + tune --method mask": "COMP, tuned",
    "wanda-sp": "Wanda-sp",
    "flap": "FLAP",
    "shortgpt": "ShortGPT",
}


def section(title: str) -> list[list[str]]:
    """The rows of all tables below a heading, as cells."""
    text = RESULTS.read_text(encoding="utf-8").partition(f"\n## {title}")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def plot(model: str) -> Plot:
    """Perplexity on held-out text of the kind that was calibrated on, against the block parameters that are left.

    Raises: ValueError if RESULTS.md has no figures of the model.
    """
    dense = [row for row in section("Perplexity of every method") if row[0] == model and row[2] == "dense"]
    cuts = [row for row in section("The default method beside its peers") if row[0] == model and row[2] in METHODS]
    if not dense or not cuts:
        raise ValueError(f"{RESULTS} has no figures of {model}")
    whole = float(dense[0][6])
    series = ("dense", *METHODS.values())
    said = f"dense: perplexity {whole:.2f}"
    points = [Point("dense", 1.0, whole, said, label=f"dense {whole:.2f}", series=0)]
    for _, asked, method, _, removed, parameters, perplexity, *_ in cuts:
        value, left = float(perplexity.split()[0]), 1 - float(removed.strip("%")) / 100
        points.append(
            Point(
                name=f"{METHODS[method]} at {asked}",
                x=left,
                y=value,
                said=f"{METHODS[method]}: {removed} removed, {parameters} parameters left, perplexity {perplexity}",
                label=f"{METHODS[method]} {value:.2f}",
                named=asked == "50%",
                series=series.index(METHODS[method]),
            )
        )
    return Plot(
        title=f"{model}, pruned: size and perplexity on held-out text",
        x_title="block parameters left",
        y_title="perplexity, lower is better",
        points=tuple(points),
        series=series,
        x_percent=True,
    )


def drawn(model: str) -> str:
    """The picture, as small as its names allow, so that a telephone can show it."""
    return plot_svg(Drawing(plot(model), 540, 340))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(drawn(arguments.model), encoding="utf-8")


if __name__ == "__main__":
    main()
