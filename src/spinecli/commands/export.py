"""`spine export`: write a checkpoint in the form that a device runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spinecli.commands import options
from spinecli.console import Terminal, size, table


def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint: a directory, a hub id, or builtin:tiny.")],
    format: Annotated[  # noqa: A002
        str, typer.Option("--format", help="gguf: one file for llama.cpp; hf: a plain Hugging Face directory.")
    ],
    out: Annotated[
        Path, typer.Option("--out", help="File (gguf) or directory (hf) to write; appears whole or not at all.")
    ],
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="PEFT LoRA directory, merged into the weights first.", show_default=False),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize", help="Type of GGUF's matrices: f32, f16, q8_0 or q4_0. Default: f16.", show_default=False
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output of an earlier export.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write CHECKPOINT as GGUF for llama.cpp, tokenizer included, or as a plain Hugging Face directory."""
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.reporting_errors():
        from spinecli.artifacts.stopwatch import Stopwatch
        from spinecli.evaluation.quiet import quiet_libraries
        from spinecli.export.request import ExportConfig, open_request
        from spinecli.export.run import export as run_export

        stopwatch = Stopwatch()
        with quiet_libraries(debug):
            request = open_request(
                ExportConfig(
                    model=checkpoint, format=format, out=out, adapter=adapter, quantize=quantize, overwrite=overwrite
                )
            )
            with terminal.progress() as progress:
                done = run_export(request, stopwatch, progress)
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
