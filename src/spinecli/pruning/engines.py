"""Which inference engines take a cut checkpoint."""

from __future__ import annotations

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.errors import UnexportableError
from spinecli.export.form import form_of


def engines(cut: Checkpoint) -> dict[str, str]:
    """Engine or precision -> "yes", or why not; `spine export` decides the same way."""
    found = {"transformers": "with trust_remote_code=True" if cut.family.modelling_file else "yes"}
    try:
        shapes = form_of(cut).shapes
    except UnexportableError as error:
        return found | {"llama.cpp": f"no: {error.reason}"}
    found["llama.cpp f16"] = "yes"
    widths = {cut.d_model} | {width for shape in shapes for width in (shape.heads * shape.head_dim, shape.channels)}
    for name, multiple in (("llama.cpp Q8_0, Q4_0", 32), ("llama.cpp K-quants", 256)):
        ragged = sorted(width for width in widths if width % multiple)
        found[name] = f"no: {ragged[0]} is not a multiple of {multiple}" if ragged else "yes"
    return found
