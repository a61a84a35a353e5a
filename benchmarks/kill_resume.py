"""Kills spine's long commands with SIGKILL at random moments, resumes them, and compares every byte.

    python benchmarks/kill_resume.py [--model builtin:tiny] [--kills 10] [--seed 0]

Each step is first run undisturbed and timed. Then it is killed at moments drawn evenly over that time, one in each of
`--kills` equal parts of it, and finished with --resume. A kill that came too late, because the run was faster than the
undisturbed one, is repeated at an earlier moment. The exit code is 1 if any file differs from the undisturbed run.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "e2e"))

from killing import clear, end_after, stage
from spine_process import Step, contents, run_step, spine

FEDERATION = (
    *("--data", "builtin:tiny-topics", "--limit", 400, "--evaluation-limit", 40, "--max-length", 32),
    *("--strategy", "fedspine", "--fleet", "jetson-10", "--cohort", 3, "--rounds", 6, "--local-steps", 2),
    *("--batch-size", 4, "--prune-interval", 1, "--deploy"),
)
SPLIT = (
    *("--data", "builtin:tiny-topics", "--limit", 400, "--evaluation-limit", 40, "--max-length", 32),
    *("--strategy", "mergesfl", "--partition", "shards:1", "--fleet", "jetson-10", "--cohort", 3, "--rounds", 20),
    *("--local-steps", 3, "--batch-size", 4),
)


def kill_and_resume(step: str, undisturbed: Step, seconds: float, kills: int, source: random.Random) -> int:
    """Kill a step once in each part of its time; how often the outcome differed."""
    out = undisturbed.out.parent / "disturbed"
    differed = 0
    for part in range(kills):
        place = (part + source.random()) / kills
        reached = "finished"
        while reached == "finished":
            clear(out)
            moment = seconds * place
            begin = time.perf_counter()
            end_after(moment, out, *undisturbed.arguments)
            reached = stage(out)
            if reached == "finished":
                seconds = 0.95 * min(seconds, time.perf_counter() - begin)
        begin = time.perf_counter()
        resumed = spine(*undisturbed.arguments, "--out", out, "--resume")
        took = time.perf_counter() - begin
        same = resumed.code == 0 and contents(out) == undisturbed.contents
        differed += not same
        verdict = "same bytes" if same else f"DIFFERENT {resumed.stderr.strip()}"
        print(f"{step}  killed after {moment:6.1f} s  {reached:36}  resumed in {took:6.1f} s  {verdict}", flush=True)
    clear(out)
    return differed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny", help="what to prune")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--kills", type=int, default=10, help="kills of each step")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--steps", default="", help="only these: prune, tune, heal, fed-launch, split")
    options = parser.parse_args()
    source = random.Random(options.seed)
    differed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = {
            "prune": ("prune", options.model, "--sparsity", options.sparsity),
            "tune": ("tune", folder / "prune"),
            "heal": ("heal", folder / "prune", "--tokens", 10_000, "--text-length", 64),
            "fed-launch": ("fed-launch", options.model, *FEDERATION),
            "split": ("fed-launch", options.model, *SPLIT),
        }
        asked = options.steps.split(",") if options.steps else list(steps)
        if "prune" not in asked and {"tune", "heal"} & set(asked):
            run_step(folder / "prune", *steps["prune"])
        for step in asked:
            arguments = steps[step]
            begin = time.perf_counter()
            undisturbed = run_step(folder / step, *arguments)
            seconds = time.perf_counter() - begin
            print(f"{step}  undisturbed in {seconds:.1f} s")
            differed += kill_and_resume(step, undisturbed, seconds, options.kills, source)
    killed = len(asked) * options.kills
    print(f"{killed - differed} of {killed} killed runs ended with the bytes of the undisturbed run")
    return 1 if differed else 0


if __name__ == "__main__":
    sys.exit(main())
