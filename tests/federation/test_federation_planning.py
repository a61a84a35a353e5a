from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from families import LABELS, Recipe, classifier, recipe
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from spinecli.artifacts.directory import OutputOptions
from spinecli.artifacts.manifest import damaged_files, read_manifest, record_file
from spinecli.checkpoints.family import family_of
from spinecli.commands.plan import plan as plan_command
from spinecli.config import read_config
from spinecli.errors import (
    DamagedArtifactError,
    FleetError,
    ForeignArtifactError,
    MissingPathError,
    OptionError,
    OutputExistsError,
)
from spinecli.federation.config import FederateConfig
from spinecli.federation.planning.artifact import PLAN_NAME, read_plan
from spinecli.federation.planning.config import PlanConfig
from spinecli.federation.planning.prediction import Predictor, first_speeds, memory_limits
from spinecli.federation.planning.request import open_request
from spinecli.federation.planning.run import PlanDecision, adapter_config, decide
from spinecli.federation.planning.run import plan as write_plan
from spinecli.federation.simulation.conditions import conditions
from spinecli.federation.simulation.fleet import load_fleet
from spinecli.lora.cost import TrainingCosts
from spinecli.lora.planning.ranks import completion_table

Written = Callable[[Recipe], Path]
LLAMA = recipe("llama", grouped=True, blocks=4)
ENCODERS = ("bert", "roberta")

app = typer.Typer(pretty_exceptions_enable=False)
app.command("plan")(plan_command)


def fleet_file(directory: Path, *classes: str, name: str = "made") -> str:
    path = directory / f"{name}.toml"
    path.write_text('name = "made"\n' + "\n".join(f"[[class]]\n{each}" for each in classes), encoding="utf-8")
    return str(path)


def device_class(name: str, count: int, modes: Sequence[float], memory_gb: float = 8) -> str:
    return (
        f'name = "{name}"\ncount = {count}\nmodes = {list(modes)}\nup_mbps = [2, 20]\ndown_mbps = [10, 50]\n'
        f"memory_gb = {memory_gb}\njitter = 0.2\nlatency_ms = 10"
    )


@pytest.fixture
def options(written: Written, tmp_path: Path) -> Callable[..., PlanConfig]:
    def make(made: Recipe = LLAMA, **changes: Any) -> PlanConfig:
        classes = (device_class("slow", 6, [1e9, 2e9, 4e9]), device_class("fast", 4, [4e9]))
        plain: dict[str, Any] = {
            "model": str(written(made)),
            "fleet": fleet_file(tmp_path, *classes, name="default"),
            "rank": 4,
            "batch_size": 4,
            "length": 16,
        }
        return read_config(PlanConfig, None, plain | changes)

    return make


def decided(options: PlanConfig) -> PlanDecision:
    return decide(open_request(options))


@pytest.mark.parametrize("labels", [None, 3])
def test_predicted_seconds_are_what_the_clock_charges(options: Callable[..., PlanConfig], labels: int | None) -> None:
    decision = decided(options(labels=labels, seed=5))
    request, tensors = decision.request, decision.tensors
    head = request.workload.head
    assert head.trained == (labels is not None)
    targets = request.workload.targets
    costs = TrainingCosts.of(request.checkpoint, targets, head.weights, head.per_token, head_trained=head.trained)
    shapes = [request.checkpoint.shape] * request.checkpoint.blocks
    assert len(set(tensors.depths.tolist())) > 1
    for index, device in enumerate(request.fleet.devices):
        now = replace(conditions(device, 5, 0), jitter=1.0)
        ranks = tensors.ranks[index].tolist()
        step = costs.step(shapes, ranks, rows=4, length=16)
        message = costs.adapter_bytes(shapes, ranks) + (4 * 3 * request.checkpoint.d_model if labels else 0)
        assert int(tensors.up_bytes[index]) == int(tensors.down_bytes[index]) == message
        assert float(tensors.compute_seconds[index]) == pytest.approx(now.compute_seconds(20 * step.flops))
        assert float(tensors.up_seconds[index]) == pytest.approx(now.upload_seconds(message))
        assert float(tensors.down_seconds[index]) == pytest.approx(now.download_seconds(message))
        parts = (tensors.down_seconds, tensors.compute_seconds, tensors.up_seconds)
        assert float(tensors.round_seconds[index]) == pytest.approx(sum(float(part[index]) for part in parts))
        assert int(tensors.memory_bytes[index]) == costs.memory(shapes, ranks, 4, 16, 4).total


def test_devices_wait_less_and_rounds_are_shorter_than_under_the_uniform_plan(
    options: Callable[..., PlanConfig],
) -> None:
    decision = decided(options(max_waiting=1.0))
    found, uniform = decision.outcome.figures(), decision.uniform.figures()
    assert decision.uniform.depths.tolist() == [4] * 10
    assert int(decision.uniform.ranks.sum()) == int(decision.outcome.ranks.sum()) == 16
    assert found.seconds < uniform.seconds
    assert found.waiting < uniform.waiting
    assert found.traffic_bytes < uniform.traffic_bytes


@pytest.mark.parametrize("labels", [None, 2])
def test_the_linear_model_from_the_stored_capacities_is_near_the_counts(
    options: Callable[..., PlanConfig], labels: int | None
) -> None:
    request = open_request(options(labels=labels))
    predictor = Predictor(request.workload, first_speeds(request.fleet, 0))
    counted = predictor.predict(request.ranks).table
    linear = completion_table(predictor.capacities(request.ranks), request.ranks, 20, counted.memory_bytes)
    assert torch.allclose(linear.seconds[:, -1], counted.seconds[:, -1])
    assert torch.allclose(linear.traffic_bytes[:, -1], counted.traffic_bytes[:, -1])
    assert float((linear.seconds / counted.seconds - 1).abs().max()) < 0.2


def test_who_cannot_hold_the_least_depth_is_left_out_and_named(
    options: Callable[..., PlanConfig], tmp_path: Path
) -> None:
    needed = decided(options()).prediction.costs.memory_bytes
    classes = [
        device_class(name, 2, [1e9], memory_gb=(float(limit) + 0.5) / 1e9)
        for name, limit in (("none", needed[0] - 1), ("one", needed[0]), ("three", needed[2]), ("all", needed[3]))
    ]
    decision = decided(options(fleet=fleet_file(tmp_path, *classes), max_waiting=1.0, coverage=1.0))
    assert decision.tensors.depths[:2].tolist() == [0, 0]
    assert int(decision.tensors.ranks[:2].sum()) == 0
    assert bool((decision.tensors.memory_bytes <= memory_limits(decision.request.fleet)).all())
    assert decision.tensors.depths[2:4].tolist() == [1, 1]
    assert int(decision.tensors.depths[4:6].max()) <= 3
    assert int(decision.tensors.depths[6:].min()) >= 1
    assert decision.uniform.depths.tolist() == [0] * 6 + [4, 4]
    devices: Any = decision.report()["devices"]
    assert [device["name"] for device in devices if device["configuration"] is None] == ["none-00", "none-01"]
    with pytest.raises(OptionError, match=r"No device of .* at depth 4"):
        decide(open_request(options(fleet=fleet_file(tmp_path, *classes[:3]), min_depth=4)))


def test_traffic_stays_in_its_budget_or_the_report_says_so(options: Callable[..., PlanConfig]) -> None:
    free = decided(options())
    budget = 0.6 * free.outcome.figures().traffic_bytes / 1e6
    kept, impossible = decided(options(traffic_budget=budget)), decided(options(traffic_budget=1e-6))
    assert kept.outcome.figures().traffic_bytes <= budget * 1e6
    assert int(kept.configuration.ranks.sum()) < int(free.configuration.ranks.sum())
    goals: Any = kept.report()["goals"]
    assert goals["meets_traffic"]
    assert impossible.report()["goals"] == {**goals, "traffic_budget_bytes": 1.0, "meets_traffic": False}


def test_a_plan_is_written_whole_and_read_again(options: Callable[..., PlanConfig], tmp_path: Path) -> None:
    decision, out = decided(options()), tmp_path / "plan"
    manifest = write_plan(decision, OutputOptions(out), picture=True)
    assert damaged_files(out, read_manifest(out)) == {}
    assert read_manifest(out) == manifest
    assert [step.kind for step in manifest.lineage] == ["dense-checkpoint"]
    image = pytest.importorskip("matplotlib.image")
    assert image.imread(out / "plan.png").std() > 0.01  # something is drawn
    plan = read_plan(out)
    fleet = load_fleet(decision.request.config.fleet)
    plan.require(fleet, blocks=4)
    assert plan.devices == tuple(device.name for device in fleet.devices)
    assert plan.ranks_of("fast-03") == tuple(decision.tensors.ranks[9].tolist())
    assert torch.equal(plan.capacities().matrix, decision.tensors.capacities)
    for name, value in load_file(out / PLAN_NAME).items():
        assert torch.equal(value, getattr(decision.tensors, name))
    folders = {path.parent.name for path in out.rglob("adapter_config.json")}
    assert folders == {f"depth-{depth:02d}" for depth in decision.tensors.depths.tolist()}


def test_the_same_command_gives_the_same_digest_and_another_seed_another_plan(
    options: Callable[..., PlanConfig], tmp_path: Path
) -> None:
    first, again = (
        write_plan(decided(options()), OutputOptions(tmp_path / name), picture=True) for name in ("one", "two")
    )
    assert first.digest == again.digest
    assert first.outputs == again.outputs
    assert not torch.equal(decided(options(seed=1)).tensors.round_seconds, decided(options()).tensors.round_seconds)


def test_an_existing_plan_is_replaced_only_if_asked(options: Callable[..., PlanConfig], tmp_path: Path) -> None:
    decision, out = decided(options()), tmp_path / "plan"
    write_plan(decision, OutputOptions(out))
    with pytest.raises(OutputExistsError):
        write_plan(decision, OutputOptions(out))
    write_plan(decided(options(rank=2)), OutputOptions(out, overwrite=True))
    assert int(read_plan(out).tensors.rank_distribution.sum()) == 8


def test_a_plan_of_another_fleet_or_model_is_refused(options: Callable[..., PlanConfig], tmp_path: Path) -> None:
    write_plan(decided(options()), OutputOptions(tmp_path / "plan"))
    plan = read_plan(tmp_path / "plan")
    with pytest.raises(ForeignArtifactError, match="of 4 blocks, not 5"):
        plan.require(load_fleet(options().fleet), blocks=5)
    with pytest.raises(ForeignArtifactError, match="devices are not those of uniform-10"):
        plan.require(load_fleet("uniform-10"), blocks=4)
    with pytest.raises(KeyError):
        plan.ranks_of("device-00")


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a rank of another block": lambda tensors: tensors["ranks"].add_(1),
    "a depth beyond the blocks": lambda tensors: tensors["depths"].fill_(9),
    "NaN seconds": lambda tensors: tensors["up_seconds"].fill_(float("nan")),
    "a missing tensor": lambda tensors: tensors.pop("depths"),
    "an unknown tensor": lambda tensors: tensors.update(more=torch.ones(1)),
    "a device less": lambda tensors: tensors.update(up_bytes=tensors["up_bytes"][1:].clone()),
    "no device": lambda tensors: tensors.update(ranks=torch.ones(0, 4, dtype=torch.int64)),
    "flat ranks": lambda tensors: tensors.update(ranks=torch.ones(3, dtype=torch.int64)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("listed", [True, False])
def test_damage_is_found(
    options: Callable[..., PlanConfig], tmp_path: Path, damage: Callable[[dict[str, Any]], object], listed: bool
) -> None:
    out = tmp_path / "plan"
    manifest = write_plan(decided(options()), OutputOptions(out))
    read_plan(out)
    tensors = load_file(out / PLAN_NAME)
    damage(tensors)
    save_file(tensors, out / PLAN_NAME)
    if listed:  # as if someone had written the sums anew
        outputs = {**manifest.outputs, PLAN_NAME: record_file(out / PLAN_NAME)}
        manifest.model_copy(update={"outputs": outputs}).sealed().write(out)
    with pytest.raises(DamagedArtifactError, match=r"plan\.safetensors is .*; run spine plan again\."):
        read_plan(out)


def test_what_is_no_plan_is_not_read(written: Written, tmp_path: Path) -> None:
    with pytest.raises(ForeignArtifactError, match="no spine command wrote it"):
        read_plan(written(LLAMA))
    with pytest.raises(MissingPathError):
        read_plan(tmp_path / "nowhere")


@pytest.mark.parametrize("targets", ["all", "attention", "query-value", "output"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", *ENCODERS])
def test_peft_puts_the_planned_ranks_on_the_planned_blocks_and_nowhere_else(
    options: Callable[..., PlanConfig], tmp_path: Path, family: str, targets: str
) -> None:
    encoder = family in ENCODERS
    made = classifier(family, blocks=4) if encoder else recipe(family, blocks=4)
    if targets == "output":  # of BERT's two projections of this name, the feed-forward one
        targets = open_request(options(made)).checkpoint.family.feed_forward.output
    decision = decided(options(made, targets=targets))
    write_plan(decision, OutputOptions(tmp_path / "plan"))
    config = AutoConfig.from_pretrained(decision.request.config.model)
    auto = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    found = sorted((tmp_path / "plan" / "configurations").iterdir())
    assert found
    for directory in found:
        depth = int(directory.name.removeprefix("depth-"))
        lora = PeftConfig.from_pretrained(str(directory))
        assert isinstance(lora, LoraConfig)
        model = get_peft_model(auto.from_config(config), lora)
        adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        ranks = {name: module.r["default"] for name, module in adapted.items()}
        scales = {module.scaling["default"] for module in adapted.values()}
        checkpoint = decision.request.checkpoint
        assert ranks == {
            f"base_model.model.{checkpoint.block_prefix(block)}{target}": int(decision.configuration.ranks[block])
            for block in range(4 - depth, 4)
            for target in decision.request.workload.targets
        }
        assert scales == {FederateConfig.model_fields["lora"].default.scale}
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        others = {name for name in trained if ".lora_" not in name}
        assert all("modules_to_save" in name for name in others)
        assert bool(others) == encoder


def test_many_blocks_are_told_apart_by_their_whole_number() -> None:
    config: Any = adapter_config(
        family_of("llama"), "base", ["self_attn.q_proj"], [0, 0, 0, 5, *[6] * 7, 7, 8, 9], None
    )
    lora = LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"})
    lora.base_model_name_or_path = None
    tiny = recipe("llama", blocks=14)
    model = get_peft_model(AutoModelForCausalLM.from_config(tiny.config()), lora)
    ranks = [module.r["default"] for _, module in model.named_modules() if hasattr(module, "lora_A")]
    assert ranks == [5, *[6] * 7, 7, 8, 9]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0.5}, "--rank must be at least 1"),
        ({"rank": float("nan")}, "--rank must be at least 1"),
        ({"rank": 64}, "lower --rank or --rank-step"),
        ({"rank_step": -1}, "--rank-step must be at least 0"),
        ({"batch_size": 0}, "--batch-size"),
        ({"local_steps": 0}, "--local-steps"),
        ({"length": 129}, "--length 129 exceeds the model's 128 positions"),
        ({"min_depth": 5}, "--min-depth 5 exceeds the model's 4 blocks"),
        ({"labels": 1}, "--labels must be at least 2"),
        ({"max_waiting": 1.5}, "--max-waiting must be at least 0 and at most 1"),
        ({"coverage": 0.0}, "--coverage must be above 0 and at most 1"),
        ({"traffic_budget": 0.0}, "--traffic-budget must be above 0"),
        ({"dtype": "int3"}, "--dtype must be one of float32, bfloat16, float16, not 'int3'"),
        ({"targets": "nose"}, "--targets names 'nose'"),
    ],
    ids=str,
)
def test_wrong_options_are_told(options: Callable[..., PlanConfig], change: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        open_request(options(**change))


def test_unknown_fleets_and_encoders_without_labels_are_told(options: Callable[..., PlanConfig]) -> None:
    with pytest.raises(FleetError, match="There is no fleet 'armada-9'"):
        open_request(options(fleet="armada-9"))
    with pytest.raises(OptionError, match=r"is an encoder .* --labels"):
        open_request(options(recipe("bert")))
    assert open_request(options(classifier("bert"))).labels == LABELS


def run(*arguments: object, columns: int = 120) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})


def test_the_screen_shows_both_plans_and_the_gain(options: Callable[..., PlanConfig], tmp_path: Path) -> None:
    made, out = options(), tmp_path / "plan"
    shown = run(made.model, "--fleet", made.fleet, "--out", out, "--length", 16, "--rank", 4, columns=80)
    assert shown.exit_code == 0, shown.output
    table = shown.stdout.partition("Configurations")[0].splitlines()
    assert all(len(line.rstrip()) <= 80 for line in table)
    assert [line.split()[0] for line in table if line.startswith(("slow", "fast", "all"))] == ["slow", "fast", "all"]
    figures = read_manifest(out).report["plan"]
    assert isinstance(figures, dict)
    assert f"A round takes {figures['seconds']:.2f} s instead of" in shown.stdout
    assert "x faster)" in shown.stdout
    assert shown.stdout.splitlines()[-1] == str(out)


def test_json_holds_the_report_and_a_dry_run_writes_nothing(options: Callable[..., PlanConfig], tmp_path: Path) -> None:
    made = options()
    before = sorted(tmp_path.iterdir())
    shown = run(made.model, "--fleet", made.fleet, "--length", 16, "--dry-run", "--json")
    value = json.loads(shown.stdout)
    assert value["out"] is None
    assert len(value["devices"]) == 10
    assert sum(configuration["devices"] for configuration in value["configurations"]) == 10
    assert sorted(tmp_path.iterdir()) == before


def test_unmet_goals_are_said_in_words(options: Callable[..., PlanConfig], tmp_path: Path) -> None:
    made = options()
    needed = decided(made).prediction.costs.memory_bytes
    classes = (
        device_class("none", 3, [1e9], 0.5 * float(needed[0]) / 1e9),
        device_class("one", 2, [1e9, 9e9], float(needed[0] + 0.5) / 1e9),
    )
    arguments = (made.model, "--fleet", fleet_file(tmp_path, *classes), "--batch-size", 4, "--length", 16, "--rank", 4)
    shown = run(*arguments, "--dry-run", "--max-waiting", 0, "--traffic-budget", 1e-6, "--seed", 2, columns=200)
    assert shown.exit_code == 0, shown.output
    assert "3 devices take no part" in shown.stdout
    assert "No depths keep the waiting below 0%" in shown.stdout
    assert "No plan keeps the traffic of a round below 1 B" in shown.stdout
    assert "Ranks are lowered by up to" in shown.stdout
    assert "the uniform plan cannot be run" in shown.stdout


def test_mistakes_are_one_sentence(options: Callable[..., PlanConfig], tmp_path: Path) -> None:
    made = options()
    for arguments, words in (
        ((made.model, "--fleet", "armada-9", "--dry-run"), "There is no fleet 'armada-9'"),
        ((made.model, "--fleet", made.fleet, "--dry-run", "--plot"), "--plot draws into the output"),
        ((made.model, "--fleet", made.fleet), "Name the directory to write with --out"),
        ((made.model, "--fleet", made.fleet, "--out", tmp_path / "none" / "plan"), "does not exist; create it"),
        ((tmp_path / "nothing", "--fleet", made.fleet, "--dry-run"), "does not exist; name a checkpoint directory"),
    ):
        shown = run(*arguments, columns=300)
        assert shown.exit_code == 2
        assert words in shown.stderr
        assert "Traceback" not in shown.stderr
        assert len(shown.stderr.strip().splitlines()) == 1


def test_a_checkpoint_cannot_hold_its_own_plan(options: Callable[..., PlanConfig], tmp_path: Path) -> None:
    copied = tmp_path / "model"
    shutil.copytree(options().model, copied)
    with pytest.raises(OutputExistsError, match="inside each other"):
        write_plan(decided(options(model=str(copied))), OutputOptions(copied / "plan"))
