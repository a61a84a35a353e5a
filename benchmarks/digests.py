"""The sums of what a run of every command writes, to show that a change of the code changes no byte of its outputs.

    python benchmarks/digests.py before.json        # record
    python benchmarks/digests.py before.json        # once more, with other code: compare

The runs are small ones of the built-in model and its texts, with one thread. A file that exists is compared with, and
the exit code is 1 if a sum differs, or a run is in one of both alone. Of spine.json its digest is taken, which covers
all but what was measured; pictures and pages are left out, because libraries of others draw them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LEFT_OUT = (".png", ".svg", ".html")
SMALL = "--calibration-rows 8 --calibration-length 32"
ROUNDS = "--data builtin:tiny-topics --limit 200 --fleet jetson-4 --rounds 2 --cohort 2 --local-steps 2 --max-length 32"
LORA = ("legend", "fedspine", "fedspine-model", "fedit", "hetlora", "flexlora", "flora", "ffa-lora", "fed-loraprune")
SPLIT = ("mergesfl", "sfl-fm", "sfl-br", "splitfed", "fedavg")
METHODS = ("comp", "magnitude", "random", "wanda-sp", "flap", "shortgpt")
# output -> the command that makes it, in an order in which each finds what it reads
RUNS = {
    "pruned": f"prune builtin:tiny --sparsity 0.4 {SMALL}",
    "adaptive": f"prune builtin:tiny --sparsity 0.4 --widths adaptive {SMALL}",
    **{f"cut-{method}": f"prune builtin:tiny --sparsity 0.4 --method {method} {SMALL}" for method in METHODS},
    "tuned": "tune cut-comp",
    "masked": "tune cut-comp --method mask",
    "swept": f"sweep builtin:tiny --sparsity 0.2,0.4 --methods magnitude {SMALL} --rows 4 --keep",
    "measured": "eval tuned --against builtin:tiny --perplexity builtin:tiny-evaluation --rows 4 --window 64",
    "plan": "plan pruned --fleet jetson-4 --labels 4 --length 32 --local-steps 2",
    **{f"fed-{name}": f"fed-launch pruned --strategy {name} {ROUNDS}" for name in LORA},
    "fed-deployed": f"fed-launch builtin:tiny --strategy fedspine-model --deploy {ROUNDS}",
    "fed-planned": f"fed-launch pruned --strategy legend --plan plan {ROUNDS}",
    "fed-language": f"fed-launch pruned --strategy fedit {ROUNDS} --task language",
    **{f"split-{name}": f"fed-launch pruned --strategy {name} {ROUNDS}" for name in SPLIT},
    "plain": "export pruned --format hf",
    "merged": "export pruned --adapter fed-fedit --format hf",
    "pruned.gguf": "export pruned --format gguf",
    "adaptive.gguf": "export adaptive --format gguf --quantize q8_0",
}


def sums(output: Path) -> dict[str, str]:
    """Name -> sum of every file of an output."""
    files = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
    found = {}
    for path in files:
        if path.suffix in LEFT_OUT:
            continue
        name = path.relative_to(output.parent).as_posix()
        content = path.read_bytes()
        measured = path.name == "spine.json"
        found[name] = json.loads(content)["digest"] if measured else hashlib.sha256(content).hexdigest()
    return found


def main() -> int:
    """Run everything; 0 if there was nothing to compare with, or nothing differs."""
    place = Path(sys.argv[1]).resolve()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for output, command in RUNS.items():
            whole = [sys.executable, "-m", "spinecli", *command.split(), "--out", output, "--quiet"]
            done = subprocess.run(
                whole, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            if done.returncode:
                print(f"{output}: exit {done.returncode}: {done.stderr.strip()}", flush=True)
                found[output] = f"exit {done.returncode}"
                continue
            made = sums(Path(folder) / output)
            found |= made
            print(f"{output}: {len(made)} files", flush=True)
    if not place.exists():
        place.write_text(json.dumps(found, indent=1) + "\n")
        print(f"recorded {len(found)} sums in {place}")
        return 0
    before = json.loads(place.read_text())
    differing = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
    print("\n".join(f"differs: {name}" for name in differing) or f"all {len(found)} sums are the same")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
