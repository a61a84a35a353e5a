"""A real pretrained model through every command once, and what others compute of the result.

    python benchmarks/real_models.py [--model DIR] [--work DIR] [--rows 32]

The model is SmolLM2-135M-Instruct, made by ../shared/models/fetch-smollm2 where that is at hand; --model names another
directory, --work keeps what is made. Each command runs in a process of its own, with one thread unless OMP_NUM_THREADS
says otherwise; its processor time and peak memory are printed. Then spine's numbers are compared with those of plain
transformers, PEFT, lm-eval and, where llama-cpp-python is installed, llama.cpp on the same input. The exit code is 1 if
any of them differ by more than the line says.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from settings import SHARED
from torch import Tensor, nn

from spinecli.evaluation.quiet import quiet_libraries

FETCH = SHARED / "models" / "fetch-smollm2"
CALIBRATION = SHARED / "datasets" / "wikitext2" / "validation.txt"
EVALUATION = SHARED / "datasets" / "wikitext2" / "test.txt"
INSTRUCTIONS = SHARED / "datasets" / "alpaca_en_1000"
QUESTIONS = SHARED / "datasets" / "arc_easy"
WINDOW, WINDOWS, LIMIT = 512, 4, 40


@dataclass
class Log:
    """What ran and what agreed."""

    work: Path
    failed: list[str] = field(default_factory=list)

    def spine(self, title: str, *arguments: object) -> dict[str, Any]:
        """Run a command with --json and print what it took; its result."""
        command = [sys.executable, "-m", "spinecli", *map(str, arguments), "--json"]
        measured = [sys.executable, "-c", _MEASURING, *command]
        start = time.perf_counter()
        done = subprocess.run(measured, cwd=self.work, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            print(
                f"| `spine {title}` | exit {done.returncode}: {done.stderr.strip().splitlines()[-1]} | | |", flush=True
            )
            self.failed.append(title)
            return {}
        found = re.search(r"^measured (\S+) (\S+)$", done.stderr, re.MULTILINE)
        assert found
        cpu, peak = float(found[1]), float(found[2])
        print(f"| `spine {title}` | {cpu:.0f} | {seconds:.0f} | {peak / 1e9:.2f} |", flush=True)
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def agree(self, what: str, found: float, expected: float, tolerance: float) -> None:
        """Print two figures of the same thing, and remember if they are further apart than `tolerance`, relative."""
        difference = abs(found - expected) / max(abs(expected), 1e-12)
        right = difference <= tolerance
        print(f"| {what} | {found:.6g} | {expected:.6g} | {difference:.1e} | {tolerance:.0e} |", flush=True)
        if not right:
            self.failed.append(what)

    def alike(self, what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        """The same for logits: the largest difference, relative to the largest expected."""
        difference = float((found - expected).abs().max() / expected.abs().max())
        print(f"| {what} | | | {difference:.1e} | {tolerance:.0e} |", flush=True)
        if not difference <= tolerance:
            self.failed.append(what)


# Runs what follows and says its processor seconds and its peak memory in bytes.
_MEASURING = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(f"measured {used.ru_utime + used.ru_stime} {used.ru_maxrss * 1024}", file=sys.stderr)
sys.exit(code)
"""


def windows(tokenizer: Any) -> Tensor:
    """The first windows of the evaluation text as the tokenizer begins a text: (windows, window)."""
    ids = tokenizer(EVALUATION.read_text()[: 40 * WINDOW * WINDOWS], add_special_tokens=False)["input_ids"]
    opening = tokenizer("a")["input_ids"][: len(tokenizer("a")["input_ids"]) - 1]
    size = WINDOW - len(opening)
    return torch.tensor([[*opening, *ids[at * size : (at + 1) * size]] for at in range(WINDOWS)])


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """Plain transformers' own loss over disjoint windows, whose first token is not scored."""
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in tokens]
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())


def opening(model: Path) -> float:
    """Processor milliseconds to open the checkpoint, the smallest of 15."""
    from spinecli.checkpoints.checkpoint import Checkpoint

    taken = []
    for _ in range(16):
        start = time.process_time()
        Checkpoint.open(model)
        taken.append(time.process_time() - start)
    return 1e3 * min(taken[1:])


def write_task(folder: Path) -> Path:
    """ARC-easy as an lm-eval task on the local questions."""
    folder.mkdir(exist_ok=True)
    (folder / "local_arc_easy.yaml").write_text(
        f"""task: local_arc_easy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {QUESTIONS / "test.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices.text}}}}"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    return folder


def lm_eval_alone(directory: Path, folder: Path) -> dict[str, float]:
    """The task as lm-eval itself runs it on the directory."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    arguments = {"pretrained": str(directory), "dtype": "float32"}
    settings = {"tasks": ["local_arc_easy"], "limit": LIMIT, "batch_size": 8, "device": "cpu", "task_manager": manager}
    results: Any = simple_evaluate("hf", model_args=arguments, **settings)
    found: dict[str, float] = results["results"]["local_arc_easy"]
    return found


def commands(log: Log, model: Path, rows: int) -> dict[str, dict[str, Any]]:
    """Every command once, from the dense model to what a device runs."""
    tasks = write_task(log.work / "tasks")
    text = ("--calibration", CALIBRATION, "--calibration-rows", rows)
    read = ("--perplexity", EVALUATION, "--window", WINDOW, "--rows", WINDOWS)
    fleet = ("--fleet", "jetson-4", "--local-steps", 2, "--batch-size", 4)
    lora = ("--data", INSTRUCTIONS, "--max-length", 64, "--limit", 120, "--learning-rate", 1e-3, *fleet)
    short = ("--rounds", 2, "--cohort", 2, "--evaluation-limit", 16)
    print("| command | CPU s | s | peak GB |\n|---|---|---|---|")
    return {
        "inspect": log.spine("inspect dense", "inspect", model),
        "plan of a cut": log.spine(
            "prune --dry-run --method magnitude",
            "prune",
            model,
            "--sparsity",
            0.3,
            "--method",
            "magnitude",
            "--dry-run",
            *text,
        ),
        "prune": log.spine(
            "prune --sparsity 0.2", "prune", model, "--sparsity", 0.2, "--block-share", 0, *text, "--out", "pruned"
        ),
        "cut": log.spine(
            "prune --method comp",
            "prune",
            model,
            "--sparsity",
            0.2,
            "--method",
            "comp",
            "--block-share",
            0.5,
            *text,
            "--out",
            "cut",
        ),
        "tune": log.spine("tune", "tune", "cut", "--out", "tuned"),
        "eval": log.spine(
            "eval --tasks",
            "eval",
            "pruned",
            "--against",
            model,
            "--against",
            "tuned",
            *read,
            "--tasks",
            "local_arc_easy",
            "--include-path",
            tasks,
            "--limit",
            LIMIT,
            "--out",
            "results",
        ),
        "streamed": log.spine("eval, streamed", "eval", "pruned", *read),
        "sweep": log.spine(
            "sweep",
            "sweep",
            model,
            "--sparsity",
            "0.1,0.3",
            "--methods",
            "magnitude",
            "--tune",
            "none",
            *text,
            "--perplexity",
            EVALUATION,
            "--rows",
            2,
            "--out",
            "sweep",
        ),
        "plan": log.spine("plan", "plan", "pruned", "--length", 64, *fleet, "--out", "plan"),
        "fed-launch": log.spine(
            "fed-launch --strategy legend",
            "fed-launch",
            "pruned",
            "--strategy",
            "legend",
            "--plan",
            "plan",
            *lora,
            *short,
            "--out",
            "fed",
        ),
        "split": log.spine(
            "fed-launch --strategy mergesfl",
            "fed-launch",
            "pruned",
            "--strategy",
            "mergesfl",
            *lora,
            *short,
            "--bottom",
            "lora",
            "--top",
            "lora",
            "--out",
            "split",
        ),
        "adapted": log.spine("eval --adapter", "eval", "pruned", "--adapter", log.work / "fed", *read),
        "hf": log.spine(
            "export --format hf", "export", "pruned", "--adapter", "fed", "--format", "hf", "--out", "merged"
        ),
        "gguf": log.spine("export --format gguf", "export", "pruned", "--format", "gguf", "--out", "pruned.gguf"),
        "bench": log.spine("bench", "bench", "pruned", model, "--engine", "torch", "--repeats", 2),
        "verify": log.spine("inspect --verify", "inspect", "tuned", "--verify"),
    }


def references(log: Log, model: Path, found: dict[str, dict[str, Any]]) -> None:
    """What others compute of the same directories and texts."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def loaded(directory: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = windows(tokenizer)
    print("\n| of the same thing | spine | the reference | difference | at most |\n|---|---|---|---|---|")
    for result, directory in zip(
        found["eval"]["models"], (model, log.work / "tuned", log.work / "pruned"), strict=True
    ):
        name = directory.name
        plain = perplexity(loaded(directory), tokens)
        log.agree(f"perplexity of {name}, transformers", result["perplexity"][0]["perplexity"], plain, 1e-5)
        alone = lm_eval_alone(directory, log.work / "tasks")
        for metric in ("acc,none", "acc_norm,none"):
            own = result["lm_eval"]["results"]["local_arc_easy"][metric]
            log.agree(f"ARC-easy of {name}, {metric.partition(',')[0]}, lm-eval", own, alone[metric], 0)
    streamed = found["streamed"]["models"][0]["perplexity"][0]["perplexity"]
    log.agree("perplexity streamed, loaded", streamed, found["eval"]["models"][2]["perplexity"][0]["perplexity"], 1e-5)
    adapted = PeftModel.from_pretrained(loaded(log.work / "pruned"), log.work / "fed").eval()
    own = found["adapted"]["models"][0]["perplexity"][0]["perplexity"]
    log.agree("perplexity with the adapter, PEFT", own, perplexity(adapted, tokens), 1e-5)
    with torch.no_grad():
        expected = adapted(tokens[:1, :128]).logits
        merged = loaded(log.work / "merged")(tokens[:1, :128]).logits
        base = loaded(log.work / "pruned")(tokens[:1, :128]).logits[0]
    log.alike("logits of the adapter merged and stored in bfloat16, PEFT", merged, expected, 0.03)
    llama_cpp(log, tokens[0, :128], base)


def llama_cpp(log: Log, tokens: Tensor, expected: Tensor) -> None:
    """The exported file in llama.cpp against the checkpoint in transformers."""
    from spinecli.exports import llamacpp

    if not llamacpp.available():
        print("| logits of the GGUF file, llama.cpp | not installed | | | |")
        return
    with llamacpp.opened(log.work / "pruned.gguf", vocabulary_only=False, context=len(tokens)) as model:
        log.alike("logits of the GGUF file in f16, llama.cpp", llamacpp.logits(model, tokens.tolist()), expected, 5e-3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; 0 if all commands ran and all figures agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rows", type=int, default=32, help="calibration rows of 128 tokens")
    asked = parser.parse_args(arguments)
    if not CALIBRATION.is_file() or (asked.model is None and not FETCH.is_file()):
        print(f"skipped: {SHARED} has no {'texts' if FETCH.is_file() else 'model'}")
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as folder:
        work = (asked.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        model = (asked.model or work / "smollm2").resolve()
        if asked.model is None and subprocess.run([sys.executable, FETCH, model]).returncode:
            print("skipped: the package with the model cannot be fetched")
            return 0
        print(f"opening the checkpoint: {opening(model):.1f} ms of processor time\n", flush=True)
        log = Log(work)
        found = commands(log, model, asked.rows)
        if not log.failed:
            with quiet_libraries():
                references(log, model, found)
    print(f"\n{'all agree' if not log.failed else 'not right: ' + ', '.join(log.failed)}")
    return 1 if log.failed else 0


if __name__ == "__main__":
    sys.exit(main())
