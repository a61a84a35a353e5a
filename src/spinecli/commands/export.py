"""`spine export`: write a checkpoint in the form that a device runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinecli.commands.flags import OUTPUT, Overwrite, from_config
from spinecli.console import Terminal, size, table
from spinecli.exports.config import ExportConfig

ExportOut = Annotated[
    Path,
    typer.Option(
        "--out",
        help="File (gguf) or directory (hf) to write; it appears whole or not at all.",
        rich_help_panel=OUTPUT,
    ),
]


@from_config(ExportConfig)
def export(config: ExportConfig, terminal: Terminal, out: ExportOut, overwrite: Overwrite = False) -> None:
    """Write MODEL as GGUF for llama.cpp, including the tokenizer, or as a plain Hugging Face directory."""
    from spinecli.artifacts.stopwatch import Stopwatch
    from spinecli.evaluation.quiet import quiet_libraries
    from spinecli.exports.run import export as run_export
    from spinecli.exports.run import open_request

    stopwatch = Stopwatch()
    with quiet_libraries(terminal.debug):
        request = open_request(config, out, overwrite=overwrite)
        with terminal.context(stopwatch) as context:
            done = run_export(request, context)
    for note in done.notes:
        terminal.note(f"note: {note}")
    value = {"out": str(out), **done.report, "measured": stopwatch.measured().model_dump(mode="json")}
    terminal.result(value, *_rendered(value))


def _rendered(value: dict[str, Any]) -> list[Any]:
    rows = [
        ("format", f"{value['format']}, {value['architecture']}"),
        ("tensors", ", ".join(f"{count} {kind}" for kind, count in value["tensors"].items())),
    ]
    lines = []
    if value["format"] == "gguf":
        rows.append(("tokenizer", value["tokenizer"]))
        rows.append(("context", f"{value['context']} tokens"))
    if value["adapter"]:
        rows.append(
            ("adapter", f"{value['adapter']['path']}, merged into {value['adapter']['merged_tensors']} tensors")
        )
    rows.append(("size", size(value["bytes"])))
    if value["format"] == "gguf":
        rows.append(("sha256", value["sha256"]))
        rows.append(("in llama.cpp", _verdict(value["llama_cpp"])))
        if value["fallen_back_to_f16"]:
            lines.append(
                f"f16 instead of {value['quantize']}, as their rows are no multiple of 32: "
                + ", ".join(value["fallen_back_to_f16"])
            )
        if value["filled_blocks"]:
            lines.append(
                "filled up with zeros, which llama.cpp needs and which change nothing: block "
                + ", ".join(map(str, value["filled_blocks"]))
            )
    else:
        rows.append(("largest logit difference", f"{value['logit_difference']:.1e}"))
    peak = value["measured"]["peak_memory_bytes"]
    lines.append(str(value["out"]) + (f", peak memory {size(peak)}" if peak else ""))
    return [table("What was written", ("", ""), rows, words=(0, 1)), "", *lines]


def _verdict(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not opened; pip install llama-cpp-python to have the file checked"
    parts = []
    if found["logit_difference"] is not None:
        parts.append(f"logits differ by {found['logit_difference']:.1e} of the largest")
    if found["texts"]:
        parts.append(f"{found['texts_alike']} of {found['texts']} texts give the same tokens")
    return "; ".join(parts) or "opened"
