"""Damaged, hostile and mistaken input, one function a kind: it builds the input and returns the command line.

`CASES` is what `test_hostile_inputs.py` checks and what `benchmarks/hostile_inputs.py` prints.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_llama import BLOCKS, POSITIONS, labelled_rows, made_up_text

Arguments = list[str]
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Workshop:
    """An empty folder and what can be damaged in it."""

    folder: Path
    dense_original: Path
    sharded_original: Path
    pruned_original: Path
    text_original: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def dense(self) -> Path:
        return self._copy(self.dense_original, "dense")

    def sharded(self) -> Path:
        return self._copy(self.sharded_original, "dense")

    def pruned(self) -> Path:
        return self._copy(self.pruned_original, "pruned")

    def text(self) -> Path:
        return self._copy(self.text_original, "words.txt")

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def prune(self, model: object, *options: object) -> Arguments:
        """A small prune run; later options win over these."""
        words = self.folder / "words.txt"
        text = [] if "--calibration" in options else ["--calibration", words if words.exists() else self.text()]
        given = ["prune", model, "--sparsity", 0.3, "--block-share", 0.5, "--out", self.out]
        small = [*text, "--calibration-rows", 8]
        return [*map(str, [*given, *small, "--calibration-length", 16, *options]), "--quiet"]

    def tune(self, pruned: object, *options: object) -> Arguments:
        return ["tune", str(pruned), "--out", str(self.out), *map(str, options), "--quiet"]

    def fed_launch(self, *options: object, model: object | None = None) -> Arguments:
        """A small federated run; later options win over these."""
        data = self.file("data.jsonl", "".join(json.dumps(row) + "\n" for row in labelled_rows(40)))
        small = ["--fleet", "uniform-4", "--rounds", 1, "--cohort", 2, "--local-steps", 1, "--max-length", 16]
        given = ["fed-launch", model or self.dense_original, "--data", data, "--out", self.out, *small]
        return [*map(str, [*given, *options]), "--quiet"]

    def plan(self, *options: object, model: object | None = None) -> Arguments:
        given = ["plan", model or self.dense_original, "--fleet", "jetson-4", "--length", 16, "--out", self.out]
        return [*map(str, [*given, *options]), "--quiet"]

    def _copy(self, original: Path, name: str) -> Path:
        place = self.folder / name
        if original.is_dir():
            return Path(shutil.copytree(original, place))
        return Path(shutil.copyfile(original, place))


Build = Callable[[Workshop], Arguments]


@dataclass(frozen=True)
class Case:
    """One kind of input: what is wrong, what the sentence must name, and whether it needs a process of its own."""

    title: str
    names: tuple[str, ...]
    build: Build
    in_process: bool


CASES: dict[str, Case] = {}


def inapplicable(case: Case) -> str | None:
    """Why a case cannot be tried by this user on this system; None if it can."""
    if case.title == "a read-only directory as output" and (os.name == "nt" or os.geteuid() == 0):
        return "root may write everywhere"
    if case.title == "an output where nobody may write" and sys.platform != "linux":
        return "there is no /proc"
    return None


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below a folder."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def case(title: str, *names: str, in_process: bool = True) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        assert title not in CASES
        CASES[title] = Case(title, names, build, in_process)
        return build

    return register


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys; None as a value stays, ... removes the key."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not ...}))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@case("a path that does not exist", "nowhere")
def _(shop: Workshop) -> Arguments:
    return shop.prune(shop.folder / "nowhere")


@case("a file instead of a directory", "words.txt", "is a file")
def _(shop: Workshop) -> Arguments:
    return shop.prune(shop.text())


@case("an empty directory", "empty", "config.json")
def _(shop: Workshop) -> Arguments:
    (shop.folder / "empty").mkdir()
    return shop.prune(shop.folder / "empty")


@case("a hub id without a network", "owner/model")
def _(shop: Workshop) -> Arguments:
    return shop.prune("owner/model")


@case("a built-in checkpoint that there is not", "builtin:giant", "builtin:tiny")
def _(shop: Workshop) -> Arguments:
    return shop.prune("builtin:giant")


@case("a built-in name that climbs out", "builtin:../tiny")
def _(shop: Workshop) -> Arguments:
    return shop.prune("builtin:../tiny")


def _config_text(title: str, content: str | bytes, *names: str, in_process: bool = True) -> None:
    @case(title, "config.json", *names, in_process=in_process)
    def _(shop: Workshop) -> Arguments:
        model = shop.dense()
        (model / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        return shop.prune(model)


_config_text("config.json is empty", "")
_config_text("config.json is cut short", '{"model_type": "lla')
_config_text("config.json is a list", "[1, 2]")
_config_text("config.json is bytes of nothing", b"\xff\xfe\x00\x80")
_config_text("config.json is nested without end", "[" * 100_000)
_config_text("config.json holds a number of 10,000 digits", '{"vocab_size": ' + "9" * 10_000 + "}")


def _config_value(title: str, *names: str, in_process: bool = True, **changes: Any) -> None:
    @case(title, *names, in_process=in_process)
    def _(shop: Workshop) -> Arguments:
        model = shop.dense()
        edit_json(model / "config.json", **changes)
        return shop.prune(model)


_config_value("a model type that nobody knows", "'quantum'", model_type="quantum")
_config_value("a model type that is a list", "[1]", model_type=[1])
_config_value("no model type", "model type", model_type=...)
_config_value("a negative number of heads", "config.json", "num_attention_heads", num_attention_heads=-8)
_config_value("no heads", "config.json", "num_attention_heads", num_attention_heads=0)
_config_value("a negative number of channels", "config.json", "intermediate_size", intermediate_size=-1)
_config_value("no blocks", "config.json", "num_hidden_layers", num_hidden_layers=0)
_config_value("a negative number of blocks", "config.json", "num_hidden_layers", num_hidden_layers=-3)
_config_value("heads as a word", "config.json", "num_attention_heads", num_attention_heads="eight")
_config_value("heads as a fraction", "config.json", "num_attention_heads", num_attention_heads=7.5)
_config_value("KV heads that do not divide the heads", "config.json", "num_key_value_heads", num_key_value_heads=3)
_config_value("more KV heads than heads", "config.json", "num_key_value_heads", num_key_value_heads=16)
_config_value("no vocabulary", "config.json", "vocab_size", vocab_size=0)
_config_value("no positions", "config.json", "max_position_embeddings", max_position_embeddings=0)
_config_value("positions as a word", "config.json", "max_position_embeddings", max_position_embeddings="many")
_config_value("an activation that there is not", "config.json", hidden_act="magic")
_config_value("a rotation that there is not", "config.json", rope_parameters={"rope_type": "magic", "rope_theta": 1e4})
_config_value("another number of channels than in the weights", "mlp", "64", intermediate_size=64)
_config_value("more blocks than in the weights", "num_hidden_layers", num_hidden_layers=BLOCKS + 100)
_config_value("a billion blocks", "config.json", "num_hidden_layers", num_hidden_layers=10**9, in_process=False)
_config_value("a million blocks", "config.json", "num_hidden_layers", num_hidden_layers=10**6)
_config_value("heads of 10^13 numbers", "config.json", "head_dim", head_dim=10**13)
_config_value("a hidden size of 10^18", "config.json", "hidden_size", hidden_size=10**18)


@case("no weights", "dense", "model.safetensors")
def _(shop: Workshop) -> Arguments:
    model = shop.dense()
    (model / "model.safetensors").unlink()
    return shop.prune(model)


def _weights_content(title: str, damage: Callable[[bytes], bytes], *names: str) -> None:
    @case(title, "model.safetensors", *names)
    def _(shop: Workshop) -> Arguments:
        model = shop.dense()
        path = model / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        return shop.prune(model)


_weights_content("weights of no bytes", lambda content: b"")
_weights_content("weights cut in half", lambda content: content[: len(content) // 2])
_weights_content("weights cut by one byte", lambda content: content[:-1])
_weights_content("weights cut inside the header", lambda content: content[:100])
_weights_content("a header length of 2^63", lambda content: struct.pack("<Q", 2**63) + content[8:])
_weights_content("a header of random bytes", lambda content: content[:8] + bytes(range(256)) * 20 + content[5128:])
_weights_content("weights of random bytes", lambda content: bytes(range(1, 256)) * 1000)
_weights_content("an error page instead of weights", lambda content: b"<html><title>404</title></html>" * 50)
_weights_content("a pickle called model.safetensors", lambda content: pickle.dumps({"a": 1}), "pickle")
_weights_content(
    "a git-lfs pointer instead of weights", lambda content: b"version https://git-lfs.github.com/spec/v1\n"
)


@case("a zipped pickle called model.safetensors", "model.safetensors", "pickle")
def _(shop: Workshop) -> Arguments:
    model = shop.dense()
    torch.save({"a": torch.ones(1)}, model / "model.safetensors")
    return shop.prune(model)


class _Trap:
    """Runs a command in whoever unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@case("only pytorch_model.bin, which would run code", "pytorch_model.bin", "pickle")
def _(shop: Workshop) -> Arguments:
    model = shop.dense()
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(shop.folder / "the trap ran")))
    return shop.prune(model)


@case("a zip bomb called model.safetensors", "model.safetensors")
def _(shop: Workshop) -> Arguments:
    model = shop.dense()
    with zipfile.ZipFile(model / "model.safetensors", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", bytes(1 << 20))
    return shop.prune(model)


def _tensors(title: str, change: Callable[[dict[str, torch.Tensor]], object], *names: str) -> None:
    @case(title, *names)
    def _(shop: Workshop) -> Arguments:
        model = shop.dense()
        edit_weights(model, change)
        return shop.prune(model)


_DOWN = "model.layers.3.mlp.down_proj.weight"
_LAST = f"model.layers.{BLOCKS - 1}.self_attn.q_proj.weight"


def _put(name: str, index: tuple[int, int], value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][index] = value

    return change


_tensors("one NaN", _put(_DOWN, (0, 0), float("nan")), _DOWN, "model.safetensors")
_tensors("one infinity", _put(_LAST, (5, 7), float("-inf")), _LAST, "model.safetensors")
_tensors("one NaN in the embedding", _put("model.embed_tokens.weight", (1, 1), float("nan")), "model.embed_tokens")
_tensors("a missing tensor", lambda tensors: tensors.pop(_DOWN), _DOWN)
_tensors(
    "a tensor of another shape",
    lambda tensors: tensors.update({_DOWN: tensors[_DOWN][:, :64].contiguous()}),
    *(_DOWN, "model.safetensors"),
)
_tensors("a tensor lying on its side", lambda tensors: tensors.update({_DOWN: tensors[_DOWN].T.contiguous()}), _DOWN)
_tensors("integers", lambda tensors: tensors.update({_DOWN: tensors[_DOWN].long()}), _DOWN, "I64")
_tensors("float8", lambda tensors: tensors.update({_DOWN: tensors[_DOWN].to(torch.float8_e4m3fn)}), _DOWN, "F8")
_tensors("no tensor at all", lambda tensors: tensors.clear(), "dense")


def _index(title: str, change: Callable[[Path, dict[str, Any]], object], *names: str) -> None:
    @case(title, *names)
    def _(shop: Workshop) -> Arguments:
        model = shop.sharded()
        index = json.loads((model / INDEX).read_text())
        change(model, index)
        (model / INDEX).write_text(json.dumps(index))
        return shop.prune(model)


def _all_in(file: str) -> Callable[[Path, dict[str, Any]], object]:
    return lambda model, index: index["weight_map"].update(dict.fromkeys(index["weight_map"], file))


_index(
    "an index that names a tensor which its shard lacks",
    lambda model, index: index["weight_map"].update({"model.layers.9.extra": "model-00001-of-00004.safetensors"}),
    *(INDEX, "model.layers.9.extra", "model-00001-of-00004.safetensors"),
)
_index("an index without a map", lambda model, index: index.pop("weight_map"), INDEX, "weight_map")
_index("an index whose map is a list", lambda model, index: index.update(weight_map=[1]), INDEX, "weight_map")
_index("an index whose map names numbers", _all_in(7), INDEX)  # type: ignore[arg-type]
_index(
    "a missing shard",
    lambda model, index: (model / "model-00002-of-00004.safetensors").unlink(),
    *("model-00002-of-00004.safetensors", "missing"),
)
_index(
    "an empty shard",
    lambda model, index: (model / "model-00002-of-00004.safetensors").write_bytes(b""),
    "model-00002-of-00004.safetensors",
)
_index("shards swapped", _all_in("model-00001-of-00004.safetensors"), INDEX, "model-00001-of-00004.safetensors")
_index("an index that climbs out", _all_in("../../secret.safetensors"), INDEX, "'../../secret.safetensors'")
_index("an index with an absolute path", _all_in("/etc/passwd.safetensors"), INDEX, "'/etc/passwd.safetensors'")
_index("an index that climbs the way of Windows", _all_in("..\\secret.safetensors"), INDEX, "secret.safetensors")
_index("an index that names a pickle", _all_in("pytorch_model.bin"), INDEX, "'pytorch_model.bin'")


@case("an index that is not JSON", INDEX)
def _(shop: Workshop) -> Arguments:
    model = shop.sharded()
    (model / INDEX).write_text("{")
    return shop.prune(model)


def _tokenizer(title: str, change: Callable[[Path], object], *names: str) -> None:
    @case(title, *names)
    def _(shop: Workshop) -> Arguments:
        model = shop.dense()
        change(model)
        return shop.prune(model)


def _without_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def _foreign_tokenizer(model: Path) -> None:
    path = model / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"] = {word: index + 1000 for word, index in value["model"]["vocab"].items()}
    value["added_tokens"] = []
    path.write_text(json.dumps(value))


_tokenizer("no tokenizer", _without_tokenizer, "tokenizer", "dense")
_tokenizer("tokenizer.json of no bytes", lambda model: (model / "tokenizer.json").write_bytes(b""), "tokenizer.json")
_tokenizer(
    "tokenizer.json is not JSON", lambda model: (model / "tokenizer.json").write_text("{{{"), "tokenizer", "dense"
)
_tokenizer("tokenizer.json of another program", lambda model: (model / "tokenizer.json").write_text("{}"), "tokenizer")
_tokenizer("a tokenizer of another model", _foreign_tokenizer, "tokenizer", "vocabulary")
_tokenizer(
    "a tokenizer that wants to run code",
    lambda model: edit_json(
        model / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}
    ),
    *("tokenizer", "dense"),
)


def _calibration(title: str, name: str, content: str | bytes, *names: str) -> None:
    @case(title, *(names or (name,)))
    def _(shop: Workshop) -> Arguments:
        return shop.prune(shop.dense(), "--calibration", shop.file(name, content))


_calibration("an empty text", "empty.txt", "")
_calibration("a text of spaces", "blank.txt", " \n\t\n")
_calibration("a binary text", "binary.txt", bytes(range(256)) * 20)
_calibration("a text of nine words", "short.txt", made_up_text(9), "short.txt", "9 tokens")
_calibration(
    "a jsonl line that is not JSON", "lines.jsonl", '{"text": "bat bas"}\n{"text": \n', "lines.jsonl", "line 2"
)
_calibration("a jsonl without a text", "numbers.jsonl", '{"number": 1}\n', "numbers.jsonl", "line 1")
_calibration("a jsonl of lists", "lists.jsonl", "[1, 2]\n", "lists.jsonl", "line 1")
_calibration("a jsonl nested without end", "deep.jsonl", "[" * 100_000, "deep.jsonl", "line 1")


@case("a text that does not exist", "nowhere.txt", in_process=False)
def _(shop: Workshop) -> Arguments:
    return shop.prune(shop.dense(), "--calibration", shop.folder / "nowhere.txt")


@case("a directory as text", "dense", "directory")
def _(shop: Workshop) -> Arguments:
    model = shop.dense()
    return shop.prune(model, "--calibration", model)


@case("a built-in text that there is not", "builtin:novel")
def _(shop: Workshop) -> Arguments:
    return shop.prune(shop.dense(), "--calibration", "builtin:novel")


def _option(title: str, names: tuple[str, ...], *options: object) -> None:
    @case(title, *names)
    def _(shop: Workshop) -> Arguments:
        return shop.prune(shop.dense(), *options)


for _value in ("0", "1", "-1", "2", "nan", "inf"):
    _option(f"--sparsity {_value}", ("parsity",), "--sparsity", _value)
_option("a sparsity that leaves nothing", ("parsity 0.999",), "--sparsity", "0.999", "--block-share", "auto")
_option(
    "all blocks protected", ("parsity",), "--method", "shortgpt", "--block-share", "auto", "--protect", "0,1,2,3,4,5"
)
_option("a metric for a baseline", ("--metric", "flap"), "--method", "flap", "--metric", "m1")
_option("--block-share 2", ("--block-share",), "--block-share", "2")
_option("--block-share nan", ("--block-share",), "--block-share", "nan")
_option("--block-share half", ("--block-share", "'half'"), "--block-share", "half")
_option("--protect 99", ("--protect", "99"), "--protect", "99")
_option("--protect first", ("--protect", "'first'"), "--protect", "first")
_option("--method foo", ("'foo'", "comp"), "--method", "foo")
_option("--metric foo", ("'foo'", "m4"), "--method", "comp", "--metric", "foo")
_option("--round-to 0", ("--round-to",), "--round-to", "0")
_option("--round-to beyond the channels", ("--round-to",), "--round-to", "100000")
_option("rows beyond the positions", ("--calibration-length", str(POSITIONS)), "--calibration-length", POSITIONS + 1)
_option("too few rows to compare on", ("--calibration-rows",), "--block-share", "auto", "--calibration-rows", "2")
_option("--device cuda:99", ("--device",), "--device", "cuda:99")
_option("--device toaster", ("--device",), "--device", "toaster")
_option("--device meta", ("--device",), "--device", "meta")


@case("no output", "--out")
def _(shop: Workshop) -> Arguments:
    arguments = shop.prune(shop.dense())
    place = arguments.index("--out")
    return arguments[:place] + arguments[place + 2 :]


@case("an output in a missing directory", "missing")
def _(shop: Workshop) -> Arguments:
    return shop.prune(shop.dense(), "--out", shop.folder / "missing" / "out")


@case("an output that is a file", "taken", "is a file")
def _(shop: Workshop) -> Arguments:
    return shop.prune(shop.dense(), "--out", shop.file("taken", ""), "--overwrite")


@case("an output below a file", "taken")
def _(shop: Workshop) -> Arguments:
    return shop.prune(shop.dense(), "--out", shop.file("taken", "") / "out")


@case("an output with other people's files", "taken", "did not write")
def _(shop: Workshop) -> Arguments:
    (shop.folder / "taken").mkdir()
    shop.file("taken/thesis.tex", "years of work")
    return shop.prune(shop.dense(), "--out", shop.folder / "taken", "--overwrite")


@case("the model as output", "dense")
def _(shop: Workshop) -> Arguments:
    model = shop.dense()
    return shop.prune(model, "--out", model, "--overwrite")


@case("an output inside the model", "dense/out")
def _(shop: Workshop) -> Arguments:
    model = shop.dense()
    return shop.prune(model, "--out", model / "out")


@case("the input of tune as output", "pruned")
def _(shop: Workshop) -> Arguments:
    pruned = shop.pruned()
    return shop.tune(pruned, "--out", pruned, "--overwrite")


@case("the inputs' parent as output", "did not write")
def _(shop: Workshop) -> Arguments:
    pruned = shop.pruned()
    return shop.tune(pruned, "--out", pruned.parent, "--overwrite")


@case("a read-only directory as output", "read-only")
def _(shop: Workshop) -> Arguments:
    (shop.folder / "read-only").mkdir()
    (shop.folder / "read-only").chmod(0o500)
    return shop.prune(shop.dense(), "--out", shop.folder / "read-only" / "out")


@case("an output where nobody may write", "/proc")
def _(shop: Workshop) -> Arguments:
    return shop.prune(shop.dense(), "--out", "/proc/out")


@case("tune of a dense checkpoint", "dense", "spine.json")
def _(shop: Workshop) -> Arguments:
    return shop.tune(shop.dense())


@case("tune of nothing", "nowhere")
def _(shop: Workshop) -> Arguments:
    return shop.tune(shop.folder / "nowhere")


@case("tune by a method that there is not", "'foo'", "lsq")
def _(shop: Workshop) -> Arguments:
    return shop.tune(shop.pruned(), "--method", "foo")


@case("tune on one row", "rows")
def _(shop: Workshop) -> Arguments:
    return shop.tune(shop.pruned(), "--calibration", shop.file("row.txt", made_up_text(20)))


def _pruned(title: str, change: Callable[[Path], object], *names: str) -> None:
    @case(title, *names)
    def _(shop: Workshop) -> Arguments:
        pruned = shop.pruned()
        change(pruned)
        return shop.tune(pruned)


def _manifest(**changes: Any) -> Callable[[Path], object]:
    return lambda pruned: edit_json(pruned / "spine.json", **changes)


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _resum(pruned: Path, name: str) -> None:
    """Make spine.json agree with a file that was changed, as a careful attacker would."""
    from spinecli.artifacts.manifest import record_file

    outputs = json.loads((pruned / "spine.json").read_text())["outputs"]
    outputs[name] = record_file(pruned / name).model_dump()
    edit_json(pruned / "spine.json", outputs=outputs)


def _forged_masks(pruned: Path) -> None:
    masks = load_file(pruned / "masks.safetensors")
    save_file(
        {name: mask[:3] if "heads" in name else mask for name, mask in masks.items()}, pruned / "masks.safetensors"
    )
    _resum(pruned, "masks.safetensors")


def _resummed(name: str, content: bytes) -> Callable[[Path], object]:
    def change(pruned: Path) -> None:
        (pruned / name).write_bytes(content)
        _resum(pruned, name)

    return change


_A_RECORD = {"sha256": "0" * 64, "bytes": 1}
_pruned("masks missing", lambda pruned: (pruned / "masks.safetensors").unlink(), "pruned", "masks.safetensors")
_pruned("masks changed", lambda pruned: _flip_last_byte(pruned / "masks.safetensors"), "masks.safetensors")
_pruned("masks of no bytes", lambda pruned: (pruned / "masks.safetensors").write_bytes(b""), "masks.safetensors")
_pruned("masks forged with their sum", _resummed("masks.safetensors", b"nonsense"), "masks.safetensors")
_pruned("masks forged for another model", _forged_masks, "pruned", "masks")
_pruned(
    "weights changed after prune", lambda pruned: _flip_last_byte(pruned / "model.safetensors"), "model.safetensors"
)
_pruned("config changed after prune", lambda pruned: edit_json(pruned / "config.json", rms_norm_eps=0.1), "config.json")
_pruned("spine.json of no bytes", lambda pruned: (pruned / "spine.json").write_bytes(b""), "spine.json")
_pruned("spine.json is a list", lambda pruned: (pruned / "spine.json").write_text("[]"), "spine.json")
_pruned("spine.json nested without end", lambda pruned: (pruned / "spine.json").write_text("[" * 100_000), "spine.json")
_pruned("spine.json of another format", _manifest(spine_format=99), "spine.json", "99")
_pruned("spine.json of another kind", _manifest(kind="cake"), "spine.json", "kind")
_pruned("spine.json without inputs", _manifest(inputs={}), "spine.json")
_pruned("spine.json without a config", _manifest(config={}), "spine.json", "prune again")
_pruned("spine.json with an option of another type", _manifest(config={"model": 3}), "spine.json", "prune again")
_pruned("spine.json that climbs out", _manifest(outputs={"../../secret": _A_RECORD}), "spine.json", "'../../secret'")
_pruned(
    "spine.json with an absolute path", _manifest(outputs={"/etc/passwd": _A_RECORD}), "spine.json", "'/etc/passwd'"
)


@case("the dense model has moved", "moved", "--dense")
def _(shop: Workshop) -> Arguments:
    pruned = shop.pruned()
    inputs = json.loads((pruned / "spine.json").read_text())["inputs"]
    inputs["model"]["reference"] = str(shop.folder / "moved")
    edit_json(pruned / "spine.json", inputs=inputs)
    return shop.tune(pruned)


@case("the dense model has moved from a path like a hub id", "models/dense", "--dense")
def _(shop: Workshop) -> Arguments:
    pruned = shop.pruned()
    inputs = json.loads((pruned / "spine.json").read_text())["inputs"]
    inputs["model"]["reference"] = "models/dense"
    edit_json(pruned / "spine.json", inputs=inputs)
    return shop.tune(pruned)


@case("another dense model", "dense", "--dense")
def _(shop: Workshop) -> Arguments:
    model = shop.dense()
    edit_weights(model, _put(_DOWN, (0, 0), 1.0))
    return shop.tune(shop.pruned(), "--dense", model)


@case("inspect of nothing", "nowhere")
def _(shop: Workshop) -> Arguments:
    return ["inspect", str(shop.folder / "nowhere")]


@case("inspect of a directory of other things", "folder", "config.json")
def _(shop: Workshop) -> Arguments:
    (shop.folder / "folder").mkdir()
    return ["inspect", str(shop.folder / "folder")]


@case("sums to check where there are none", "dense", "spine.json")
def _(shop: Workshop) -> Arguments:
    return ["inspect", str(shop.dense()), "--verify"]


@case("inspect of a damaged spine.json", "spine.json", "measured")
def _(shop: Workshop) -> Arguments:
    pruned = shop.pruned()
    edit_json(pruned / "spine.json", measured=None)
    return ["inspect", str(pruned)]


@case("inspect of forged masks", "masks.safetensors")
def _(shop: Workshop) -> Arguments:
    pruned = shop.pruned()
    (pruned / "masks.safetensors").write_bytes(b"nonsense")
    return ["inspect", str(pruned)]


def _federated(title: str, names: tuple[str, ...], *options: object) -> None:
    @case(f"fed-launch: {title}", *names)
    def _(shop: Workshop) -> Arguments:
        return shop.fed_launch(*options)


_federated("a strategy that there is not", ("fedsprout", "fedspine"), "--strategy", "fedsprout")
_federated("a fleet that there is not", ("'ships-3'", "jetson-N"), "--fleet", "ships-3")
_federated("a fleet of nobody", ("jetson-0",), "--fleet", "jetson-0")
_federated("a fleet file that there is not", ("ships.toml",), "--fleet", "ships.toml")
_federated("more devices than examples", ("200",), "--fleet", "uniform-200")
_federated("a partition that there is not", ("--partition",), "--partition", "slices")
_federated("a partition of no concentration", ("--partition",), "--partition", "dirichlet:-1")
_federated("a partition by a column that there is not", ("speaker", "data.jsonl"), "--partition", "column:speaker")
_federated("data that is not there", ("nowhere.jsonl",), "--data", "nowhere.jsonl")
_federated("built-in data that there is not", ("builtin:giant", "tiny-topics"), "--data", "builtin:giant")
_federated("held-out data that is not there", ("nowhere.csv",), "--evaluation", "nowhere.csv")
_federated("all data held out", ("--evaluation-share",), "--evaluation-share", 1)
_federated("a label column that there is not", ("'mood'",), "--label-column", "mood")
_federated("a text column that there is not", ("'body'",), "--text-column", "body")
_federated("no rounds", ("--rounds", "0"), "--rounds", 0)
_federated("a cohort of nobody", ("--cohort",), "--cohort", 0)
_federated("no local steps", ("--local-steps",), "--local-steps", 0)
_federated("no rows", ("--batch-size",), "--batch-size", 0)
_federated("rank 0", ("--rank",), "--rank", 0)
_federated(
    "ranks the wrong way round", ("--largest-rank", "--smallest-rank"), "--smallest-rank", 9, "--largest-rank", 8
)
_federated("a learning rate that is no number", ("--learning-rate",), "--learning-rate", "nan")
_federated("a learning rate of 0", ("--learning-rate",), "--learning-rate", 0)
_federated("a deadline of 0", ("--deadline",), "--deadline", 0)
_federated("a sparsity of 1", ("--sparsity",), "--sparsity", 1)
_federated("a sparsity that is no number", ("--sparsity",), "--sparsity", "nan")
_federated("a target above 1", ("--target-accuracy",), "--target-accuracy", 1.5)
_federated("rows beyond the positions", ("--max-length", str(POSITIONS)), "--max-length", POSITIONS + 1)
_federated("rows of one token", ("--max-length",), "--max-length", 1)
_federated("targets that there are not", ("--targets", "'banana'"), "--targets", "banana")
_federated("a device that there is not", ("--device",), "--device", "toaster")
_federated("a plan that is not there", ("nowhere",), "--strategy", "legend", "--plan", "nowhere")


@case("fed-launch: no output", "--out", "--dry-run")
def _(shop: Workshop) -> Arguments:
    given = shop.fed_launch()
    place = given.index("--out")
    return given[:place] + given[place + 2 :]


@case("fed-launch: a model that is not there", "nowhere")
def _(shop: Workshop) -> Arguments:
    return shop.fed_launch(model=shop.folder / "nowhere")


@case("fed-launch: a NaN in the model", _DOWN)
def _(shop: Workshop) -> Arguments:
    model = shop.dense()
    edit_weights(model, _put(_DOWN, (0, 0), float("nan")))
    return shop.fed_launch(model=model)


@case("fed-launch: the model as output", "dense")
def _(shop: Workshop) -> Arguments:
    model = shop.dense()
    return shop.fed_launch("--out", model, model=model)


@case("fed-launch: a checkpoint as plan", "dense", "spine.json")
def _(shop: Workshop) -> Arguments:
    return shop.fed_launch("--strategy", "legend", "--plan", shop.dense())


def _data(title: str, name: str, content: str | bytes, *names: str) -> None:
    @case(f"fed-launch: {title}", name, *names)
    def _(shop: Workshop) -> Arguments:
        return shop.fed_launch("--data", shop.file(name, content))


_data("data of no bytes", "empty.jsonl", "")
_data("data of random bytes", "noise.jsonl", bytes(range(128, 256)) * 20)
_data("data cut short", "cut.jsonl", '{"text": "bat dit", "label": 0}\n{"text": "ba')
_data("data that is a list of numbers", "list.jsonl", "[1]\n[2]\n", "line 1")
_data("data nested without end", "deep.jsonl", "[" * 100_000)
_data("a table without a label", "table.csv", "words\nbat\n")
_data("a label that is missing in one row", "hole.csv", "text,label\nbat dit,1\nkol lut,\nbat,0\n")
_data("data in a format that nobody reads", "data.parquet", "PAR1")


@case("fed-launch: a fleet file with a device that never computes", "fleet.toml", "modes", "'slow'")
def _(shop: Workshop) -> Arguments:
    rates = "up_mbps = 1\ndown_mbps = 1\nmemory_gb = 1\n"
    fleet = shop.file("fleet.toml", f'name = "f"\n[[class]]\nname = "slow"\ncount = 1\nmodes = 0\n{rates}')
    return shop.fed_launch("--fleet", fleet)


def _planned(title: str, names: tuple[str, ...], *options: object) -> None:
    @case(f"plan: {title}", *names)
    def _(shop: Workshop) -> Arguments:
        return shop.plan(*options)


_planned("a fleet that there is not", ("'ships-3'",), "--fleet", "ships-3")
_planned("rank 0", ("--rank",), "--rank", 0)
_planned("a rank that is no number", ("--rank",), "--rank", "nan")
_planned("targets that there are not", ("--targets", "'banana'"), "--targets", "banana")
_planned("one label", ("--labels",), "--labels", 1)
_planned("no rows", ("--batch-size",), "--batch-size", 0)
_planned("rows beyond the positions", ("--length", str(POSITIONS)), "--length", POSITIONS + 1)
_planned("waiting longer than a round", ("--max-waiting",), "--max-waiting", 2)
_planned("no coverage", ("--coverage",), "--coverage", 0)
_planned("no traffic", ("--traffic-budget",), "--traffic-budget", 0)
_planned("deeper than the model", ("--min-depth",), "--min-depth", BLOCKS + 1)
_planned("an output in a missing directory", ("nowhere",), "--out", "nowhere/plan")


@case("plan: a model that is not there", "nowhere")
def _(shop: Workshop) -> Arguments:
    return shop.plan(model=shop.folder / "nowhere")


@case("plan: the model as output", "dense")
def _(shop: Workshop) -> Arguments:
    model = shop.dense()
    return shop.plan("--out", model, model=model)


_OPENERS: dict[str, Callable[[Workshop, Path], Arguments]] = {
    "prune": lambda shop, model: shop.prune(model),
    "sweep": lambda shop, model: ["sweep", str(model), "--sparsity", "0.3", "--out", str(shop.out), "--quiet"],
    "plan": lambda shop, model: shop.plan(model=model),
    "fed-launch": lambda shop, model: shop.fed_launch(model=model),
    "split training": lambda shop, model: shop.fed_launch("--strategy", "mergesfl", model=model),
    "eval": lambda shop, model: ["eval", str(model), "--latency", "--quiet"],
    "bench": lambda shop, model: ["bench", str(model), "--engine", "torch", "--quiet"],
    "export": lambda shop, model: ["export", str(model), "--format", "hf", "--out", str(shop.out), "--quiet"],
}


def _everywhere(title: str, change: Callable[[Path], object], *names: str) -> None:
    """What every command that opens a checkpoint refuses in the same words."""
    for command, build in _OPENERS.items():

        @case(f"{command}: {title}", *names)
        def _(shop: Workshop, build: Callable[[Workshop, Path], Arguments] = build) -> Arguments:
            model = shop.dense()
            change(model)
            return build(shop, model)


def _adapter_alone(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "somebody/base"}')


_everywhere(
    "a padding token that the embedding has no row for",
    lambda model: edit_json(model / "tokenizer_config.json", pad_token="[PAD]"),
    "tokenizer_config.json",
    "'[PAD]'",
)
_everywhere(
    "a padding id that the embedding has no row for",
    lambda model: edit_json(model / "config.json", pad_token_id=32_000),
    "config.json",
    "pad_token_id 32000",
)
_everywhere("an adapter for a checkpoint", _adapter_alone, "adapter of somebody/base", "--adapter")
_everywhere(
    "a tagger for a language model",
    lambda model: edit_json(model / "config.json", architectures=["LlamaForTokenClassification"]),
    "LlamaForTokenClassification",
)
