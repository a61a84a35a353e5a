from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODERS, LABELS, POSITIONS, UNGROUPED, VARIANTS, Recipe, classifier, recipe
from safetensors.torch import load_file, save_file

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.source import describe_source, resolve_checkpoint
from spinecli.checkpoints.tensors import INDEX_FILE, SINGLE_FILE, StoredTensor, stored_tensors
from spinecli.errors import (
    DamagedCheckpointError,
    MissingPathError,
    NonFiniteWeightsError,
    NotACheckpointError,
    UnsafeFileError,
    UnsupportedFamilyError,
    UserError,
)

Written = Callable[[Recipe], Path]
PLAIN = recipe("llama")
SHARDED = recipe("llama", shard_size="20KB")
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def copy(written: Written, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint that a test may damage."""
    return lambda made=PLAIN: shutil.copytree(written(made), tmp_path / "copy")


def change_tensors(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE)


def change_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_every_tensor_is_read_as_stored(written: Written) -> None:
    for made in (recipe("llama"), SHARDED, recipe("llama", dtype="bfloat16"), recipe("llama", dtype="float16")):
        checkpoint = Checkpoint.open(written(made))
        for name, value in made.model().state_dict().items():
            assert torch.equal(checkpoint.read(name), value)
            assert checkpoint.tensors[name].dtype is value.dtype
            assert checkpoint.tensors[name].bytes == value.numel() * value.itemsize


def test_shards_are_found_through_the_index(written: Written) -> None:
    found = stored_tensors(written(SHARDED))
    assert len({stored.file for stored in found.values()}) >= 3


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_opens_with_its_sizes(written: Written, name: str) -> None:
    made = VARIANTS[name]
    checkpoint = Checkpoint.open(written(made))
    grouped = made.family not in UNGROUPED
    head_dim = dict(made.extra).get("head_dim", 8) if grouped else 8
    kv_heads = made.kv_heads if grouped else made.heads
    shape = checkpoint.shape
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.channels) == (made.heads, kv_heads, head_dim, 40)
    assert (checkpoint.blocks, checkpoint.d_model) == (3, 32)
    assert checkpoint.task.value == made.task
    assert checkpoint.labels == (LABELS if made.task == "classification" else None)
    assert checkpoint.is_post_norm == (name == "opt post-norm" or made.family in ENCODERS)
    if made.task == "causal-lm":
        assert ("lm_head.weight" in checkpoint.outer_names()) != made.tied
    assert checkpoint.bytes == sum(value.nbytes for value in load_file(checkpoint.path / SINGLE_FILE).values())


def test_old_files_without_the_model_prefix_open(written: Written, tmp_path: Path) -> None:
    """The first OPT checkpoints name their tensors from the decoder on."""
    source = written(VARIANTS["opt"])
    tensors = {name.removeprefix("model."): value for name, value in load_file(source / SINGLE_FILE).items()}
    save_file(tensors, tmp_path / SINGLE_FILE)
    shutil.copy(source / "config.json", tmp_path)
    old, new = Checkpoint.open(tmp_path), Checkpoint.open(source)
    assert set(old.tensors) == set(new.tensors)
    assert all(torch.equal(old.read(name), new.read(name)) for name in new.tensors)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("task", ["encoding", "classification"])
def test_encoders_open_with_and_without_their_own_prefix(
    written: Written, tmp_path: Path, family: str, task: str
) -> None:
    source = written(recipe(family, task=task))
    stored = load_file(source / SINGLE_FILE)
    other = {
        name.removeprefix(f"{family}.") if task == "classification" else f"{family}.{name}": value
        for name, value in stored.items()
    }
    assert set(other) != set(stored)
    save_file(other, tmp_path / SINGLE_FILE)
    shutil.copy(source / "config.json", tmp_path)
    renamed, new = Checkpoint.open(tmp_path), Checkpoint.open(source)
    assert set(renamed.tensors) == set(new.tensors)
    assert all(torch.equal(renamed.read(name), new.read(name)) for name in new.tensors)


def test_the_first_berts_open(copy: Callable[..., Path]) -> None:
    """They call their norms gamma and beta, and store the positions that the architecture counts itself."""
    made = recipe("bert", tied=True)
    directory = copy(made)

    def age(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "LayerNorm" in name]:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(128)[None]
        tensors["cls.seq_relationship.weight"] = torch.ones(2, 32)

    change_tensors(directory, age)
    checkpoint = Checkpoint.open(directory)
    state = made.model().state_dict()
    assert "bert.encoder.layer.1.output.LayerNorm.weight" in checkpoint.tensors
    assert all(torch.equal(checkpoint.read(name), state[name]) for name in checkpoint.tensors)


@pytest.mark.parametrize(
    "change",
    [
        {"is_decoder": True},
        {"is_decoder": True, "add_cross_attention": True},
        {"position_embedding_type": "relative_key"},
        {"model_type": "xlm-roberta"},
        {"architectures": ["BertForQuestionAnswering"]},
        {"architectures": ["BertForPreTraining"]},
    ],
    ids=str,
)
def test_encoders_that_spine_cannot_run_are_refused_in_one_sentence(
    copy: Callable[..., Path], change: dict[str, Any]
) -> None:
    directory = copy(classifier("bert"))
    change_json(directory / "config.json", lambda config: config.update(change))
    [value] = [value[0] if isinstance(value, list) else value for value in list(change.values())[:1]]
    expect(directory, UnsupportedFamilyError, str(value))


@pytest.mark.parametrize("key", ["scale_attn_by_inverse_layer_idx", "add_cross_attention"])
def test_a_gpt2_whose_blocks_depend_on_their_number_is_refused(copy: Callable[..., Path], key: str) -> None:
    directory = copy(recipe("gpt2"))
    change_json(directory / "config.json", lambda config: config.update({key: True}))
    expect(directory, UnsupportedFamilyError, key)


def test_a_bert_that_names_no_architecture_is_bare(copy: Callable[..., Path]) -> None:
    directory = copy(recipe("bert", task="encoding"))
    change_json(directory / "config.json", lambda config: config.pop("architectures"))
    assert Checkpoint.open(directory).task.value == "encoding"


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_classifier_with_another_number_of_labels_than_it_says(copy: Callable[..., Path], family: str) -> None:
    directory = copy(classifier(family))
    change_json(directory / "config.json", lambda config: config.update(id2label={"0": "no", "1": "yes"}))
    expect(directory, DamagedCheckpointError, SINGLE_FILE, "[3, 32]", "[2, 32]")


def test_a_roberta_without_padding_has_no_positions(copy: Callable[..., Path]) -> None:
    directory = copy(recipe("roberta"))
    change_json(directory / "config.json", lambda config: config.update(pad_token_id=None))
    expect(directory, DamagedCheckpointError, "config.json", "pad_token_id")


def test_roberta_counts_positions_from_behind_its_padding(written: Written) -> None:
    assert Checkpoint.open(written(recipe("roberta"))).positions == POSITIONS - 1
    assert Checkpoint.open(written(recipe("bert"))).positions == POSITIONS


def expect(directory: Path, wanted: type[UserError], *words: str) -> None:
    with pytest.raises(wanted) as caught:  # noqa: PT012
        checkpoint = Checkpoint.open(directory)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("made", [recipe("llama"), SHARDED], ids=["single", "sharded"])
@pytest.mark.parametrize("kept", [0, 4, 100, -8])
def test_truncated_files(copy: Callable[..., Path], made: Recipe, kept: int) -> None:
    directory = copy(made)
    file = sorted(directory.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:kept])
    expect(directory, DamagedCheckpointError, str(file))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_number_is_found(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 5).to(dtype)
    weight[3, 2] = value
    save_file({"w": weight}, tmp_path / "file.safetensors")
    formats = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    stored = StoredTensor(tmp_path / "file.safetensors", "w", (7, 5), formats[dtype])
    with pytest.raises(NonFiniteWeightsError, match=r"w in .*file\.safetensors"):
        stored.read()


def test_the_largest_finite_half_is_fine(tmp_path: Path) -> None:
    save_file({"w": torch.full((3,), 65504.0).half()}, tmp_path / "file.safetensors")
    assert StoredTensor(tmp_path / "file.safetensors", "w", (3,), "F16").read().max() == 65504


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", "", 7])
def test_an_index_that_reaches_outside(copy: Callable[..., Path], place: object) -> None:
    directory = copy(SHARDED)
    change_json(directory / INDEX_FILE, lambda index: index["weight_map"].update({DOWN: place}))
    expect(directory, UnsafeFileError, INDEX_FILE, DOWN)


def test_an_index_that_names_a_pickle(copy: Callable[..., Path]) -> None:
    directory = copy(SHARDED)
    change_json(directory / INDEX_FILE, lambda index: index["weight_map"].update({DOWN: "pytorch_model.bin"}))
    expect(directory, UnsafeFileError, "pytorch_model.bin", "not safetensors")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_broken_indexes(copy: Callable[..., Path], content: str) -> None:
    directory = copy(SHARDED)
    (directory / INDEX_FILE).write_text(content)
    expect(directory, DamagedCheckpointError, INDEX_FILE)


def test_a_missing_shard(copy: Callable[..., Path]) -> None:
    directory = copy(SHARDED)
    file = sorted(directory.glob("*.safetensors"))[0]
    file.unlink()
    expect(directory, DamagedCheckpointError, file.name, "missing")


def test_an_index_that_is_wrong_about_a_tensor(copy: Callable[..., Path]) -> None:
    directory = copy(SHARDED)
    files = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    other = next(file for file in files.values() if file != files[DOWN])
    change_json(directory / INDEX_FILE, lambda index: index["weight_map"].update({DOWN: other}))
    expect(directory, DamagedCheckpointError, DOWN, other)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/spine-test-bomb"),))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_never_opened(copy: Callable[..., Path], protocol: int) -> None:
    directory = copy()
    (directory / SINGLE_FILE).write_bytes(pickle.dumps({"w": _Bomb()}, protocol=protocol))
    expect(directory, UnsafeFileError, SINGLE_FILE, "pickle")
    assert not Path("/tmp/spine-test-bomb").exists()


def test_a_torch_archive_in_disguise_is_not_opened(copy: Callable[..., Path]) -> None:
    directory = copy()
    torch.save({"w": torch.ones(2)}, directory / SINGLE_FILE)
    expect(directory, UnsafeFileError, SINGLE_FILE, "pickle")


def test_only_pickles(copy: Callable[..., Path]) -> None:
    directory = copy()
    (directory / SINGLE_FILE).rename(directory / "pytorch_model.bin")
    expect(directory, UnsafeFileError, "pytorch_model.bin", "convert it first")


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """640 bytes of header begin with 80 02, as a pickle does."""
    for size in range(500, 640):
        save_file({"w": torch.ones(200)}, tmp_path / SINGLE_FILE, metadata={"note": "x" * size})
        if (tmp_path / SINGLE_FILE).read_bytes()[:2] == b"\x80\x02":
            break
    else:
        raise AssertionError("no header of that length was made")
    assert stored_tensors(tmp_path)["w"].shape == (200,)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.int8])
def test_dtypes_that_are_not_weights(copy: Callable[..., Path], dtype: torch.dtype) -> None:
    directory = copy()
    change_tensors(directory, lambda tensors: tensors.update({DOWN: tensors[DOWN].to(dtype)}))
    expect(directory, DamagedCheckpointError, DOWN, SINGLE_FILE, "dequantise")


def test_a_missing_tensor(copy: Callable[..., Path]) -> None:
    directory = copy()
    change_tensors(directory, lambda tensors: tensors.pop(DOWN))
    expect(directory, DamagedCheckpointError, str(directory), DOWN)


def test_a_tensor_of_another_shape(copy: Callable[..., Path]) -> None:
    directory = copy()
    change_tensors(directory, lambda tensors: tensors.update({DOWN: torch.ones(32, 39)}))
    expect(directory, DamagedCheckpointError, DOWN, SINGLE_FILE, "[32, 39]", "[32, 40]")


def test_fewer_blocks_in_the_files_than_in_the_config(copy: Callable[..., Path]) -> None:
    directory = copy()
    change_json(directory / "config.json", lambda config: config.update(num_hidden_layers=4))
    expect(directory, DamagedCheckpointError, "model.layers.3")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"model_type": "gptj"}, UnsupportedFamilyError),
        ({"model_type": None}, UnsupportedFamilyError),
        ({"model_type": ["llama"]}, UnsupportedFamilyError),
        ({"hidden_size": "wide"}, DamagedCheckpointError),
        ({"hidden_size": 33}, DamagedCheckpointError),
        ({"hidden_size": -32}, DamagedCheckpointError),
        ({"hidden_size": None}, DamagedCheckpointError),
        ({"num_attention_heads": 0}, DamagedCheckpointError),
        ({"num_key_value_heads": 0}, DamagedCheckpointError),
        ({"num_key_value_heads": 3}, DamagedCheckpointError),
        ({"num_hidden_layers": 0}, DamagedCheckpointError),
        ({"num_hidden_layers": -1}, DamagedCheckpointError),
        ({"hidden_act": "nonsense"}, DamagedCheckpointError),
        ({"rope_parameters": {"rope_type": "nonsense"}}, DamagedCheckpointError),
        ({"vocab_size": 10**12}, DamagedCheckpointError),
    ],
    ids=str,
)
def test_configs_that_make_no_model(copy: Callable[..., Path], change: dict[str, Any], wanted: type[UserError]) -> None:
    directory = copy()
    change_json(directory / "config.json", lambda config: config.update(change))
    expect(directory, wanted, *(["config.json"] if wanted is DamagedCheckpointError else []))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_configs_that_are_no_json(copy: Callable[..., Path], content: bytes) -> None:
    directory = copy()
    (directory / "config.json").write_bytes(content)
    expect(directory, DamagedCheckpointError, "config.json")


def test_directories_that_are_no_checkpoints(tmp_path: Path, copy: Callable[..., Path]) -> None:
    expect(tmp_path, NotACheckpointError, "config.json")
    directory = copy()
    (directory / SINGLE_FILE).unlink()
    expect(directory, NotACheckpointError, SINGLE_FILE)


def test_references(written: Written, tmp_path: Path) -> None:
    directory = written(recipe("llama"))
    assert resolve_checkpoint(str(directory)) == directory
    with pytest.raises(NotACheckpointError, match="is a file"):
        resolve_checkpoint(str(directory / "config.json"))
    with pytest.raises(MissingPathError, match="does not exist"):
        resolve_checkpoint(str(tmp_path / "absent"))
    with pytest.raises(MissingPathError, match="builtin:tiny"):
        resolve_checkpoint("builtin:huge")


def test_identity_covers_weights_config_and_tokenizer_but_no_readme(copy: Callable[..., Path]) -> None:
    directory = copy()
    before = describe_source("x", directory)
    assert {"config.json", SINGLE_FILE, "tokenizer.json"} <= set(before.files)
    (directory / "README.md").write_text("hello")
    assert describe_source("y", directory).digest == before.digest
    (directory / "tokenizer.json").write_text("{}")
    assert describe_source("x", directory).digest != before.digest
