from __future__ import annotations

import json
import shutil
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tiny_checkpoint import write_task
from tokenizers.processors import TemplateProcessing

from spinecli.artifacts.context import RunContext
from spinecli.checkpoints.tokenizer import load_tokenizer
from spinecli.errors import MissingPathError, OfflineError, OptionError
from spinecli.evaluation.config import TaskConfig
from spinecli.evaluation.models import load_model, open_subjects
from spinecli.evaluation.quiet import quiet_libraries
from spinecli.evaluation.tasks import TaskSet, find_tasks, run_tasks, task_figures


class _LocalTasksOnly(lm_eval.tasks.TaskManager):
    """Reading lm-eval's own tasks takes ten seconds, which the tests do without."""

    def __init__(self, include_path: list[str], include_defaults: bool = False) -> None:
        super().__init__(include_path=include_path, include_defaults=False)


@pytest.fixture(autouse=True)
def _local_tasks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", _LocalTasksOnly)


def _find(folder: Path, *names: str) -> TaskSet:
    return find_tasks(TaskConfig(names=names, include_path=folder))


def test_local_data_is_found_from_anywhere_and_results_repeat(
    dense: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (subject,) = open_subjects([(str(dense), None)])
    seen = []
    with quiet_libraries():
        model = load_model(subject, device="cpu", dtype="float32")
        tasks = find_tasks(TaskConfig(names=("tiny_choice",), include_path=Path("../tasks"), limit=9))

        def progress(phase: str, done: int, total: int) -> None:
            seen.append((phase, done, total))

        results = [run_tasks(tasks, model, load_tokenizer(dense), RunContext(progress=progress)) for _ in range(2)]
    assert results[0]["results"] == results[1]["results"]
    assert results[0]["n-samples"] == {"tiny_choice": {"original": 12, "effective": 9}}
    json.dumps(results[0], allow_nan=False)
    (figure,) = task_figures(results[0])
    assert (figure.task, figure.metric, figure.higher_is_better) == ("tiny_choice", "acc", True)
    assert 0 <= figure.value <= 1
    assert figure.deviation is not None
    assert ("running loglikelihood requests", 27, 27) in seen
    assert capfd.readouterr() == ("", "")


def test_patterns_and_repeated_names(task_folder: Path, tmp_path: Path) -> None:
    write_task(task_folder / "more", "tiny_other")
    assert _find(task_folder, "tiny_other", "tiny_*o*e*").names == ("tiny_other", "tiny_choice", "tiny_cloze")
    assert _find(task_folder, "tiny_choice", "tiny_choice").names == ("tiny_choice",)


def test_groups_find_their_members_data(task_folder: Path) -> None:
    (task_folder / "group.yaml").write_text("group: tiny_group\ntask:\n  - tiny_choice\n")
    assert _find(task_folder, "tiny_group").names == ("tiny_group",)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (["tiny_chioce"], "'tiny_chioce', which is no task; did you mean tiny_choice"),
        (["tiny_choice", "{task: arc_easi, num_fewshot: 1}"], "'arc_easi', which is no task; did you mean arc_easy"),
        (["zzqqzz", "arc_easi"], "'zzqqzz' and 'arc_easi', which are no tasks; did you mean arc_easy"),
        (["zzqqzz"], "'zzqqzz', which is no task; `lm-eval ls tasks`"),
    ],
)
@pytest.mark.parametrize("asked", ["tiny_group", "outer"])
def test_a_misspelt_member_of_a_group_names_the_groups_file_and_its_neighbours(
    task_folder: Path, members: list[str], words: str, asked: str
) -> None:
    file = task_folder / "group.yaml"
    file.write_text("\n  - ".join(["group: tiny_group\ntask:", *members]))
    (task_folder / "outer.yaml").write_text("group: outer\ntask: [tiny_choice, tiny_group]\n")
    with pytest.raises(OptionError) as caught:
        _find(task_folder, asked)
    assert str(caught.value).startswith(f"The group tiny_group in {file} asks for {words}")


def test_a_misspelt_member_of_a_group_inside_a_list_is_found(task_folder: Path) -> None:
    file = task_folder / "group.yaml"
    file.write_text("group: tiny_group\ntask:\n  - tiny_choice\n  - group: inner\n    task: [tiny_chioce]\n")
    with pytest.raises(OptionError, match=rf"group inner in {file} asks for 'tiny_chioce', .* mean tiny_choice"):
        _find(task_folder, "tiny_group")


def test_a_member_of_a_group_whose_file_is_broken_shows_that_files_error(task_folder: Path) -> None:
    (task_folder / "group.yaml").write_text("group: tiny_group\ntask: [tiny_choice]\n")
    (task_folder / "tiny_choice.yaml").write_text("task: tiny_choice\nmetric_list: [acc\n")
    with pytest.raises(OptionError, match=r"tiny_choice\.yaml line 3 cannot be read"):
        _find(task_folder, "tiny_group")


def test_a_group_may_define_a_task_in_its_list(task_folder: Path) -> None:
    lines = (task_folder / "tiny_choice.yaml").read_text().replace("tiny_choice", "inline", 1)
    lines = lines.replace("data/", f"{task_folder}/data/").splitlines()
    (task_folder / "group.yaml").write_text("group: tiny_group\ntask:\n  - " + "\n    ".join(lines) + "\n")
    tasks = _find(task_folder, "tiny_group")
    assert list(tasks.manager.load(["tiny_group"])["tasks"]) == ["tiny_group::inline"]


def test_an_unknown_task_names_its_neighbours(task_folder: Path) -> None:
    with pytest.raises(OptionError, match=r"no task 'tiny_chioce'; did you mean tiny_choice"):
        _find(task_folder, "tiny_chioce")
    with pytest.raises(OptionError, match=r"no task 'zzz'; `lm-eval ls tasks`"):
        _find(task_folder, "zzz")


def test_a_task_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="absent is not a directory"):
        _find(tmp_path / "absent", "tiny_choice")


def test_missing_data_names_the_file(task_folder: Path) -> None:
    (task_folder / "data" / "tiny_choice.jsonl").unlink()
    with pytest.raises(OptionError, match=r"data of task tiny_choice was not found: .*tiny_choice.jsonl"):
        _find(task_folder, "tiny_choice")


def test_a_task_that_cannot_be_built(task_folder: Path) -> None:
    file = task_folder / "tiny_choice.yaml"
    file.write_text(file.read_text().replace("multiple_choice", "guesswork"))
    with pytest.raises(OptionError, match=r"tiny_choice cannot be loaded .*guesswork"):
        _find(task_folder, "tiny_choice")


def test_a_task_without_data_is_told(task_folder: Path) -> None:
    file = task_folder / "tiny_choice.yaml"
    file.write_text(file.read_text().replace("dataset_path: json\n", ""))
    with pytest.raises(OptionError, match=r"tiny_choice cannot be loaded \(tiny_choice has no dataset_path\); fix"):
        _find(task_folder, "tiny_choice")


def test_data_that_cannot_be_parsed_gives_its_own_reason(task_folder: Path) -> None:
    (task_folder / "data" / "tiny_choice.jsonl").write_text('{"context": "a",\n{{{')
    with pytest.raises(OptionError, match=r"tiny_choice cannot be loaded \(JSON parse error: .*\); fix"):
        _find(task_folder, "tiny_choice")


@pytest.mark.parametrize("grouped", [False, True])
def test_a_split_that_the_data_lacks_is_named(task_folder: Path, grouped: bool) -> None:
    file = task_folder / "tiny_choice.yaml"
    file.write_text(file.read_text().replace("validation_split: validation", "test_split: tset"))
    (task_folder / "group.yaml").write_text("group: tiny_group\ntask: [tiny_choice]\n")
    name = "tiny_group" if grouped else "tiny_choice"
    reason = "the data of tiny_choice has no split 'tset', which its test_split names"
    with pytest.raises(OptionError) as caught:
        _find(task_folder, name)
    assert str(caught.value) == f"Task {name} cannot be loaded ({reason}); fix its file."


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("return doc['nothing']", r"it finds no 'nothing'"),
        ("raise KeyError('there is no such thing')", r"there is no such thing"),
        ("assert not doc", r"AssertionError in {file} line 2"),
        ("raise ValueError('nothing')", r"ValueError nothing in {file} line 2"),
        ("return doc.nothing", r"'dict' object has no attribute 'nothing'"),
    ],
)
def test_a_reason_of_one_word_or_none_becomes_one_that_helps(task_folder: Path, code: str, reason: str) -> None:
    (task_folder / "own.py").write_text(f"def text(doc):\n    {code}\n")
    file = task_folder / "tiny_choice.yaml"
    file.write_text(file.read_text().replace('"{{context}}"', "!function own.text"))
    with pytest.raises(OptionError) as caught:
        _find(task_folder, "tiny_choice")
    expected = reason.format(file=task_folder / "own.py")
    assert str(caught.value) == f"Task tiny_choice cannot be loaded ({expected}); fix its file."


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("absent.text", r"module 'absent'"),
        ("own.nope", r"has no function 'nope'"),
        ("own", r"no module path"),
        ("broken.text", r"broken\.py, line 1"),
        ("failing.text", r"it finds no 'home'"),
    ],
)
def test_a_function_that_cannot_be_had_names_the_task_file(task_folder: Path, function: str, reason: str) -> None:
    (task_folder / "own.py").write_text("def text(doc):\n    return doc['context']\n")
    (task_folder / "broken.py").write_text("def text(\n")
    (task_folder / "failing.py").write_text("def text(doc):\n    return ''\n\n{}['home']\n")
    write_task(task_folder / "more", "tiny_other")
    (task_folder / "group.yaml").write_text("group: tiny_group\ntask: [tiny_choice]\n")
    file = task_folder / "tiny_choice.yaml"
    file.write_text(file.read_text().replace('"{{context}}"', f"!function {function}"))
    for name in ("tiny_choice", "tiny_group"):
        with pytest.raises(OptionError, match=rf"^The task file {file} cannot be loaded \(.*{reason}.*\); fix it\.$"):
            _find(task_folder, name)
    # a file that is not asked for does no harm
    assert _find(task_folder, "tiny_other").names == ("tiny_other",)


def test_tasks_that_run_code_are_refused(task_folder: Path) -> None:
    file = task_folder / "tiny_choice.yaml"
    file.write_text(file.read_text() + "unsafe_code: true\n")
    with pytest.raises(OptionError, match="runs code that the model writes"):
        _find(task_folder, "tiny_choice")


def test_data_on_the_hub_without_a_connection(task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'some/data' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(OfflineError, match="Couldn't reach 'some/data'"):
        _find(task_folder, "tiny_choice")


def test_a_broken_task_file_shows_its_own_error(task_folder: Path) -> None:
    file = task_folder / "tiny_choice.yaml"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, "metric_list: [acc", "other: 1"]))
    for name in ("tiny_choice", "absent"):
        with pytest.raises(
            OptionError, match=rf"tiny_choice\.yaml line {len(lines) + 2} cannot be read \(.*\); fix it"
        ):
            _find(task_folder, name)
    file.write_text("include: nowhere.yaml\ntask: tiny_choice\n")
    with pytest.raises(OptionError, match=r"tiny_choice\.yaml cannot be read \(.*nowhere\.yaml"):
        _find(task_folder, "tiny_choice")


def test_the_tasks_of_the_demo_are_known() -> None:
    assert find_tasks(TaskConfig(names=("tiny_cloze",))).names == ("tiny_cloze",)


def test_figures_of_groups_filters_and_missing_errors() -> None:
    results = {
        "groups": {"all": {"alias": "all", "acc,none": 0.5, "acc_stderr,none": "N/A"}},
        "results": {
            "one": {
                "alias": "one",
                "sample_len": 4,
                "acc,none": 0.25,
                "acc_stderr,none": 0.1,
                "em,strict": 1,
                "n,none": "NaN",
            }
        },
        "higher_is_better": {"one": {"acc": True, "em": None}},
    }
    figures = task_figures(results)
    assert [(figure.task, figure.metric, figure.value, figure.deviation) for figure in figures] == [
        ("all", "acc", 0.5, None),
        ("one", "acc", 0.25, 0.1),
        ("one", "em (strict)", 1.0, None),
    ]
    assert [figure.higher_is_better for figure in figures] == [None, True, None]


def test_requests_begin_as_lm_eval_itself_begins_them(dense: Path, task_folder: Path, tmp_path: Path) -> None:
    """With a tokenizer that puts a token in front of every text; a model that never saw it would answer otherwise."""
    model = shutil.copytree(dense, tmp_path / "begun")
    tokenizer = load_tokenizer(model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(model)
    tasks = _find(task_folder, "tiny_choice")
    (subject,) = open_subjects([(str(model), None)])
    with quiet_libraries():
        loaded = load_model(subject, device="cpu", dtype="float32")
        own = HFLM(pretrained=loaded, tokenizer=subject.tokenizer, batch_size=8)
        alone = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=8)
        assert own.tok_encode("bat") == alone.tok_encode("bat") == [1, tokenizer.convert_tokens_to_ids("bat")]
        found = run_tasks(tasks, loaded, subject.tokenizer)
        expected = simple_evaluate(alone, tasks=["tiny_choice"], task_manager=tasks.manager, log_samples=False)
    assert found["results"] == json.loads(json.dumps(expected["results"]))
