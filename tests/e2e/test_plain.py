"""What spine writes, used by those who do not have spine: transformers, lm-eval's own command line, PEFT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from spine_process import Finished, Step, run
from tiny_llama import made_up_text

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.cutting import write_cut
from spinecli.checkpoints.masks import Masks

# From here on, whoever imports spinecli gets an ImportError.
WITHOUT_SPINE = "import sys; sys.modules['spinecli'] = None\n"

GENERATE = """
from transformers import AutoModelForCausalLM, AutoTokenizer
directory = sys.argv[1]
model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
inputs = AutoTokenizer.from_pretrained(directory)("bat bas bal", return_tensors="pt")
tokens = model.generate(**inputs, min_new_tokens=8, max_new_tokens=8, do_sample=False)
print(type(model).__name__, tokens.shape[1] - inputs["input_ids"].shape[1])
"""

LORA = """
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
directory, adapter = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory)
lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
tokens = torch.arange(3, 19)[None]
loss = lora(input_ids=tokens, labels=tokens).loss
loss.backward()
assert all(value.grad is not None for value in lora.parameters() if value.requires_grad)
lora.save_pretrained(adapter)
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), adapter)
assert torch.allclose(again(input_ids=tokens, labels=tokens).loss, loss)
print(lora.get_nb_trainable_parameters()[0])
"""

TASK = """
task: made_up
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def plainly(code: str, *arguments: object, **env: str) -> Finished:
    done = run([sys.executable, "-c", WITHOUT_SPINE + code, *map(str, arguments)], **env)
    assert done.code == 0, done.stderr
    return done


@pytest.fixture(params=["pruned", "tuned"])
def written(request: pytest.FixtureRequest) -> Path:
    step = request.getfixturevalue(request.param)
    assert isinstance(step, Step)
    return step.out


@pytest.mark.slow
def test_plain_transformers_generates(written: Path) -> None:
    assert plainly(GENERATE, written).stdout.split() == ["MistralForCausalLM", "8"]


@pytest.mark.slow
def test_peft_attaches_lora(tuned: Step, tmp_path: Path) -> None:
    assert int(plainly(LORA, tuned.out, tmp_path / "adapter").stdout) > 0


@pytest.fixture(scope="module")
def varied(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of two widths, one without attention."""
    checkpoint = Checkpoint.open(dense)
    masks = Masks.full(checkpoint.shapes)
    masks.blocks[0].channels[::2] = False
    masks.blocks[1].heads[:] = False
    out = tmp_path_factory.mktemp("varied")
    write_cut(out, checkpoint, masks)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("of", ["tuned", "varied"])
def test_lm_eval_runs_from_its_own_command_line(request: pytest.FixtureRequest, of: str, tmp_path: Path) -> None:
    found = request.getfixturevalue(of)
    model = f"pretrained={found.out}" if of == "tuned" else f"pretrained={found},trust_remote_code=True"
    data, tasks = tmp_path / "made_up.jsonl", tmp_path / "tasks"
    tasks.mkdir()
    rows = [
        {"context": made_up_text(4, seed=row), "choices": made_up_text(3, seed=100 + row).split(), "answer": row % 3}
        for row in range(12)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "made_up.yaml").write_text(TASK.format(data=data))
    command_line = "import runpy; sys.argv[0] = 'lm_eval'; runpy.run_module('lm_eval', run_name='__main__')"
    arguments = ("--model", "hf", "--model_args", model, "--tasks", "made_up")
    plainly(
        command_line,
        *(*arguments, "--include_path", tasks, "--limit", 8, "--device", "cpu", "--output_path", tmp_path / "results"),
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )
    [results] = (tmp_path / "results").rglob("results*.json")
    scores = json.loads(results.read_text())
    assert scores["n-samples"]["made_up"]["effective"] == 8
    assert 0 <= scores["results"]["made_up"]["acc,none"] <= 1
