"""The package as Python code and notebooks use it."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import spinecli as spine
from spinecli.errors import OptionError, OutputExistsError


def test_importing_the_package_imports_nothing_else() -> None:
    script = (
        "import sys, time; start = time.process_time(); import spinecli; spent = time.process_time() - start; "
        "print(spent, [name for name in sys.modules if name.startswith(('torch', 'pydantic', 'typer', 'spinecli.'))])"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    spent, _, loaded = answer.stdout.strip().partition(" ")
    assert float(spent) < 0.05
    assert loaded == "[]"


def test_type_checkers_see_the_names_that_are_imported_lazily() -> None:
    tree = ast.parse(Path(spine.__file__).read_text(encoding="utf-8"))
    seen = {
        (alias.name, node.module)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name, _ in seen} == set(spine.__all__) - {"__version__"}
    assert all(getattr(spine, name) is getattr(import_module(module), name) for name, module in seen)
    with pytest.raises(AttributeError, match="prunes"):
        spine.prunes  # noqa: B018


def test_the_result_of_one_command_is_the_input_of_the_next(tmp_path: Path) -> None:
    pruned = spine.prune("builtin:tiny", sparsity=0.3, method="magnitude", calibration_rows=8, out=tmp_path / "pruned")
    tuned = spine.tune(pruned, method=spine.TuneMethod.mask, out=tmp_path / "tuned")
    assert tuned.manifest is not None
    assert tuned.manifest.lineage[-1].reference == str(tmp_path / "pruned")
    assert tuned.figures["kept"] in ("tuned", "untuned")
    planned = spine.plan(tuned, fleet="jetson-10", length=32)
    assert planned.path is None
    assert "configurations" in planned.figures
    exported = spine.export(tuned, format="hf", out=tmp_path / "plain")
    assert spine.inspect(exported)["model_type"] == "mistral"
    with pytest.raises(OptionError, match="Nothing was written"):
        spine.tune(planned, out=tmp_path / "x")


def test_a_config_and_its_fields_ask_for_the_same(tmp_path: Path) -> None:
    config = spine.PruneConfig(
        model="builtin:tiny", sparsity=0.3, method="magnitude", calibration=spine.CalibrationConfig(rows=8)
    )
    one = spine.prune(config, out=tmp_path / "one")
    two = spine.prune("builtin:tiny", sparsity=0.3, method="magnitude", calibration={"rows": 8}, out=tmp_path / "two")
    assert one.manifest is not None
    assert two.manifest is not None
    assert one.manifest.digest == two.manifest.digest
    dry = spine.prune(config, sparsity=0.2)
    assert (dry.path, dry.config) == (None, config.model_copy(update={"sparsity": 0.2}))


def test_errors_name_fields_and_not_flags(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "spine.json").write_text("{}")
    with pytest.raises(OptionError, match=r"^sparsity must be above 0 and below 1, not 3\.$"):
        spine.prune("builtin:tiny", sparsity=3)
    with pytest.raises(OptionError, match=r"^There is no option sparsety; did you mean sparsity\?$"):
        spine.prune("builtin:tiny", sparsety=0.3)
    with pytest.raises(OptionError, match=r"^metric belongs to method comp"):
        spine.prune("builtin:tiny", sparsity=0.3, method="flap", metric="m1")
    with pytest.raises(OptionError, match=r"^This takes a TuneConfig, not a PruneConfig"):
        spine.tune(spine.PruneConfig(model="x", sparsity=0.3), out=tmp_path / "x")  # type: ignore[arg-type]
    spine.prune("builtin:tiny", sparsity=0.3, method="magnitude", calibration_rows=8, out=tmp_path / "out")
    with pytest.raises(OutputExistsError, match="add overwrite=True to replace it or choose another out"):
        spine.prune("builtin:tiny", sparsity=0.3, method="random", calibration_rows=8, out=tmp_path / "out")


def test_a_notebook_shows_what_was_found_and_escapes_it(tmp_path: Path) -> None:
    out = tmp_path / "<b>"
    shown = spine.prune("builtin:tiny", sparsity=0.3, method="magnitude", calibration_rows=8, out=out)._repr_html_()
    assert "achieved sparsity" in shown
    assert "&lt;b&gt;: magnitude, 29.6% of block parameters removed" in shown
    assert "<b>" not in shown


def test_measuring_gives_tables_and_writes_only_where_it_is_told(tmp_path: Path) -> None:
    texts = {"perplexity": ["builtin:tiny-evaluation"], "rows": 2, "window": 32}
    found = spine.evaluate("builtin:tiny", against=["builtin:tiny"], **texts)
    assert (found.path, found.manifest) == (None, None)
    head, *lines = found.table().splitlines()
    assert head.split() == ["builtin:tiny", "builtin:tiny", "(2)", "×"]
    assert any(line.startswith("perplexity, stories, evaluation") and line.endswith(" 1.000") for line in lines)
    assert "<td>perplexity, stories, evaluation</td>" in found._repr_html_()
    first = spine.evaluate("builtin:tiny", **texts, out=tmp_path / "results")
    again = spine.evaluate("builtin:tiny", **texts, out=tmp_path / "results", resume=True)
    assert first.manifest is not None
    assert again.manifest is not None
    assert again.manifest.measured.started == first.manifest.measured.started
    assert again.evaluation == first.evaluation
    speed = spine.bench("builtin:tiny", engine="torch", prompt_length=8, new_tokens=2, repeats=1)
    assert "nothing was written" in repr(speed)


def test_a_fleet_is_looked_at_without_training(tmp_path: Path) -> None:
    asked = {"data": "builtin:tiny-topics", "fleet": "jetson-10", "limit": 100, "max_length": 32}
    found = spine.federate("builtin:tiny", strategy="fedit", **asked)
    assert found.path is None
    assert found.figures["refused"] is None
    with pytest.raises(OptionError, match=r"^cut_layer belongs to split training"):
        spine.federate("builtin:tiny", strategy="fedit", cut_layer=2, **asked)
