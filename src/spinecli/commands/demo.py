"""`spine demo`: the whole chain on the built-in model, and a small fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinecli.commands.flags import Debug, Json, Quiet
from spinecli.console import Terminal


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for the outputs of the steps.")] = Path("spine-demo"),
    sparsity: Annotated[
        float, typer.Option("--sparsity", help="Share of the block parameters to remove, between 0 and 1.")
    ] = 0.5,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prune, tune, heal, evaluate and fine-tune a small built-in model, in a minute or two and without a network."""
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.reporting_errors():
        from spinecli.commands.eval import comparison_table
        from spinecli.demo.chain import run_demo

        with terminal.context() as context:
            result = run_demo(out, sparsity, context)
        dense, pruned, tuned, healed = (model.perplexity[0].perplexity for model in result.evaluation.models)
        verdict = (
            f"Cutting {result.pruned['achieved_sparsity']:.0%} of the block parameters took perplexity from "
            f"{dense:.2f} to {pruned:.2f}; tuning, without training, brought it back to {tuned:.2f}, "
            f"and a short training to {healed:.2f}."
        )
        planned: Any = result.plan
        gain = {
            "seconds": planned["plan"]["seconds"],
            "uniform_seconds": planned["uniform"]["seconds"],
            "traffic_bytes": planned["plan"]["traffic_bytes"],
            "uniform_traffic_bytes": planned["uniform"]["traffic_bytes"],
        }
        federated = result.federated
        before, after = result.accuracy_before, federated.accuracy
        value = {
            "out": str(out),
            "perplexity": {"dense": dense, "pruned": pruned, "tuned": tuned, "healed": healed},
            "plan": gain,
            "accuracy": {"before": before, "after": after},
            "evaluation": result.evaluation.model_dump(mode="json"),
            "federated": federated.model_dump(mode="json"),
        }
        hint = (
            f"Look around: spine inspect {out / 'healed'}, {out / 'results' / 'report.html'}, "
            f"{out / 'fed' / 'history.jsonl'}"
        )
        terminal.result(
            value,
            comparison_table(result.evaluation),
            "",
            verdict,
            _planned(gain),
            f"{federated.rounds} rounds over them took the accuracy on four kinds of stories from {before:.0%} to "
            f"{after:.0%}, in {federated.seconds:.0f} s of the fleet's time.",
            hint,
        )


def _planned(gain: dict[str, float]) -> str:
    """What the plan gains, in a sentence."""
    return (
        f"On ten simulated boards, the plan predicts a round of {gain['seconds']:.1f} s where LoRA of the same rank in "
        f"every block takes {gain['uniform_seconds']:.1f} s ({gain['uniform_seconds'] / gain['seconds']:.1f}x), with "
        f"{gain['traffic_bytes'] / gain['uniform_traffic_bytes'] - 1:+.0%} traffic."
    )
