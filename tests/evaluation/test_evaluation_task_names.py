from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.tasks._index import TaskIndex

from spinecli.errors import MissingPathError, OptionError
from spinecli.evaluation.config import TaskConfig
from spinecli.evaluation.task_names import expand_names, lm_eval_names, names_in
from spinecli.evaluation.tasks import _add_lm_evals_own

FILES = {
    "plain.yaml": "# a comment\ntask: one\ntag: [all, 'some']\ndataset_path: x\n",
    "quoted.yaml": "\"task\": 'two'\ntag:\n- all\n- rest\noutput_type: y\n",
    "nested/included.yaml": "include: ../_template\ntask: three\n",
    "_template": "task: hidden\ntag: templated\n",
    "group.yaml": "group: both\ntask:\n  - one\n  - group: inner\n    task: [two]\ntag: unheard\n",
    "python.yaml": "class: !function module.Task\ntask: four\n",
    "twice.yaml": "task: one\ntag: late\n",
    "broken.yaml": "group: {{ name }}\n",
    "__pycache__/kept.yaml": "task: stale\n",
}


def test_names_are_those_that_lm_eval_finds(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    found, expected = names_in(tmp_path), TaskIndex.build([tmp_path])
    assert found.all == set(expected)
    for name, entry in expected.items():
        if entry.yaml_path:
            assert found.defining(name) == [entry.yaml_path]
        else:
            assert {path for task in entry.tags for path in found.defining(task)} == set(found.defining(name))


def test_a_folder_of_lm_eval_gives_the_same_names() -> None:
    folder = lm_eval_names().files["arc_easy"].parent.parent
    for part in ("arc", "bbh", "leaderboard", "AraDICE"):
        if (folder / part).is_dir():
            assert names_in(folder / part).all == set(TaskIndex.build([folder / part]))


def test_what_a_group_needs_is_added_and_nothing_else() -> None:
    index: dict[str, object] = {}
    _add_lm_evals_own(index, ["ai2_arc"])  # type: ignore[arg-type]
    assert {"ai2_arc", "arc_easy", "arc_challenge"} <= set(index)
    assert len(index) < 10
    taken = {"arc_easy": index["arc_easy"]}
    _add_lm_evals_own(taken, ["arc_easy"])  # type: ignore[arg-type]
    assert list(taken) == ["arc_easy"]


def test_a_misspelt_task_names_its_neighbours() -> None:
    with pytest.raises(OptionError, match="no task 'arc_esy'; did you mean arc_easy"):
        expand_names(TaskConfig(names=("arc_esy",)))
    with pytest.raises(OptionError, match=r"no task 'zzqqzz'; `lm-eval ls tasks`"):
        expand_names(TaskConfig(names=("zzqqzz",)))
    with pytest.raises(OptionError, match=r"no task 'ARC_EASY'; did you mean arc_easy\?"):
        expand_names(TaskConfig(names=("ARC_EASY",)))
    with pytest.raises(OptionError, match=r"no task 'Arc_Esy'; did you mean arc_easy"):
        expand_names(TaskConfig(names=("Arc_Esy",)))
    with pytest.raises(OptionError, match=r"no task 'ARC_E\?SY'; did you mean arc_easy\?"):
        expand_names(TaskConfig(names=("ARC_E?SY",)))
    with pytest.raises(MissingPathError, match="absent is not a directory"):
        expand_names(TaskConfig(names=("arc_easy",), include_path=Path("absent")))
    assert expand_names(TaskConfig(names=("arc_e?sy", "arc_easy"))) == ("arc_easy",)


def test_a_misspelt_task_is_refused_before_anything_heavy_is_imported() -> None:
    script = (
        "import sys\nfrom spinecli.app import app\n"
        "try:\n    app(['eval', '/no/such/model', '--tasks', 'arc_esy'])\n"
        "except SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'transformers', 'lm_eval'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert answer.stdout.strip() == "2 []"
    assert "did you mean arc_easy" in answer.stderr
