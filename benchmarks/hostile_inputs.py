"""Prints, for every kind of damaged or hostile input, what `spine` answers to it.

    python benchmarks/hostile_inputs.py

Each kind runs in a process of its own. The last line counts the kinds that end with exit code 2 and one sentence, and
have written nothing; the exit code is 1 if that is not all of them. The table itself is tests/e2e/hostile_cases.py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "e2e"))

from hostile_cases import CASES, Workshop, inapplicable, tree
from spine_process import run_step, spine
from tiny_llama import made_up_text, write_tiny_llama


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "words.txt"
        text.write_text(made_up_text(8000))
        dense = write_tiny_llama(folder / "dense")
        sharded = write_tiny_llama(folder / "sharded", sharded=True)
        small = ("--calibration", text, "--calibration-rows", 16, "--calibration-length", 32, "--block-share", 0.5)
        pruned = run_step(folder / "pruned", "prune", dense, "--sparsity", 0.4, *small).out
        good = tried = 0
        for number, case in enumerate(CASES.values()):
            if reason := inapplicable(case):
                print(f"skipped  {case.title}: {reason}")
                continue
            place = folder / f"case-{number}"
            place.mkdir()
            arguments = case.build(Workshop(place, dense, sharded, pruned, text))
            before = tree(place)
            done = spine(*arguments)
            clean = tree(place) == before
            right = done.code == 2 and clean and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
            good, tried = good + right, tried + 1
            said = done.stderr.strip().replace(f"{place}/", "")
            print(f"{'ok' if right else 'WRONG'}  exit {done.code}  {case.title}\n    {said}", flush=True)
            if not clean:
                print("    left something behind")
    print(f"{good} of {tried} kinds end with exit code 2, one sentence, and nothing written")
    return 0 if good == tried else 1


if __name__ == "__main__":
    sys.exit(main())
