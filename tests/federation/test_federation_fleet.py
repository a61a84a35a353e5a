from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinecli.errors import FleetError, MissingPathError, UserError
from spinecli.federation.simulation.fleet import Fleet, known_fleets, load_fleet

PLAIN = """
name = "two"
[[class]]
name = "slow"
count = 2
modes = [1e9, 2e9]
up_mbps = 1
down_mbps = [2, 20]
memory_gb = 0.5
[[class]]
name = "fast"
count = 1
modes = 8e9
mode_rounds = 0
up_mbps = [1, 2]
down_mbps = 20
memory_gb = 4
jitter = 0.2
dropout = 0.1
latency_ms = 50
"""


def read(tmp_path: Path, text: str) -> Fleet:
    path = tmp_path / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    return load_fleet(str(path))


def test_a_file_says_every_value_in_its_unit(tmp_path: Path) -> None:
    fleet = read(tmp_path, PLAIN)
    slow, fast = fleet.classes
    assert (fleet.name, slow.count, slow.modes, slow.up_mbps, slow.down_mbps) == ("two", 2, (1e9, 2e9), (1, 1), (2, 20))
    assert (slow.mode_rounds, slow.jitter, slow.dropout, slow.latency_ms) == (20, 0, 0, 0)
    assert slow.memory_bytes == 500_000_000
    assert (fast.modes, fast.mode_rounds, fast.jitter, fast.dropout, fast.latency_ms) == ((8e9,), 0, 0.2, 0.1, 50)
    assert [device.name for device in fleet.devices] == ["slow-00", "slow-01", "fast-00"]
    assert [device.device_class for device in fleet.devices] == [slow, slow, fast]


def test_devices_keep_their_names_when_the_fleet_grows() -> None:
    small, large = ({device.name for device in load_fleet(f"jetson-{total}").devices} for total in (80, 400))
    assert len(small) == 80
    assert len(large) == 400
    assert small < large


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("jetson-80", {"tx2": 30, "nx": 40, "agx": 10}),
        ("jetson-10", {"tx2": 4, "nx": 5, "agx": 1}),
        ("uniform-7", {"device": 7}),
        ("phones-10", {"low": 4, "mid": 4, "high": 2}),
        ("phones-1", {"low": 1}),
    ],
)
def test_built_in_fleets(name: str, counts: dict[str, int]) -> None:
    fleet = load_fleet(name)
    assert fleet.name == name
    assert {found.name: found.count for found in fleet.classes} == counts
    assert len(fleet.devices) == sum(counts.values())


def test_jetson_modes_change_every_twenty_rounds() -> None:
    for device_class in load_fleet("jetson-80").classes:
        assert device_class.mode_rounds == 20
        assert len(device_class.modes) > 1
        assert device_class.up_mbps == (1, 30)


@given(st.sampled_from(["jetson", "uniform", "phones"]), st.integers(1, 3000))
def test_a_built_in_fleet_has_the_devices_asked_for_in_its_shares(kind: str, total: int) -> None:
    assert f"{kind}-N" in known_fleets()
    counts = {found.name: found.count for found in load_fleet(f"{kind}-{total}").classes}
    assert sum(counts.values()) == total
    whole = load_fleet(f"{kind}-800").classes
    for found in whole:
        assert abs(counts.get(found.name, 0) - found.count * total / 800) < 1


def test_the_digest_covers_values_and_not_how_they_are_written(tmp_path: Path) -> None:
    source = read(tmp_path, PLAIN).source()
    rewritten = PLAIN.replace("modes = 8e9", "modes = [8000000000] # one mode").replace(
        "up_mbps = 1\n", "up_mbps=[1,1]\n"
    )
    assert read(tmp_path, rewritten).source().digest == source.digest
    assert source.reference == str(tmp_path / "fleet.toml")
    for changed in (PLAIN.replace("0.2", "0.3"), PLAIN.replace("count = 2", "count = 3"), PLAIN.replace("two", "2")):
        assert read(tmp_path, changed).source().digest != source.digest


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("count = 2", "count = 0", "count of class 'slow' is 0, but should be greater than or equal to 1"),
        ("count = 2", "count = 1.5", "count of class 'slow' is 1.5"),
        ("count = 2", "count = true", "count of class 'slow' is True"),
        ("count = 2", "count = 100001", "count of class 'slow' is 100001"),
        ("count = 2", "count = 100000", "100001 devices over all classes"),
        ("count = 2\n", "", "class 'slow' lacks the key count"),
        ("modes = [1e9, 2e9]", "modes = []", "modes of class 'slow' is []"),
        ("modes = [1e9, 2e9]", "modes = [1e9, -2e9]", "modes of class 'slow' is -2000000000.0"),
        ("modes = [1e9, 2e9]", "modes = nan", "modes of class 'slow' is nan"),
        ("modes = [1e9, 2e9]", "modes = inf", "modes of class 'slow' is inf"),
        ("modes = [1e9, 2e9]", "modes = '9'", "modes of class 'slow' is '9'"),
        ("mode_rounds = 0", "mode_rounds = -1", "mode_rounds of class 'fast' is -1"),
        (
            "down_mbps = [2, 20]",
            "down_mbps = [20, 2]",
            "down_mbps of class 'slow' is [20, 2], but should have its lower",
        ),
        ("down_mbps = [2, 20]", "down_mbps = [2]", "down_mbps of class 'slow' is [2], but should be one number or"),
        ("up_mbps = 1\n", "up_mbps = 0\n", "up_mbps of class 'slow' is 0"),
        ("memory_gb = 4", "memory_gb = 0", "memory_gb of class 'fast' is 0"),
        ("jitter = 0.2", "jitter = -0.2", "jitter of class 'fast' is -0.2"),
        ("dropout = 0.1", "dropout = 1", "dropout of class 'fast' is 1, but should be less than 1"),
        ("latency_ms = 50", "latency_ms = -1", "latency_ms of class 'fast' is -1"),
        ("latency_ms = 50", "latency = 50", "class 'fast' has the unknown key 'latency'; the keys are name, count"),
        ('name = "two"', "", "the fleet lacks the key name"),
        ('name = "two"', "size = 3\nname='two'", "the fleet has the unknown key 'size'"),
        ('name = "fast"', 'name = "Slow"', "more than one class with the name 'slow'"),
        ('name = "fast"', 'name = "../fast"', "name of class '../fast' is '../fast'"),
        ('name = "fast"', "", "class number 2 lacks the key name"),
        ("[[class]]", "[class]", "not valid TOML"),
        ("count = 2", "count = ", "not valid TOML"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_file_class_and_key(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    assert old in PLAIN
    with pytest.raises(FleetError) as caught:
        read(tmp_path, PLAIN.replace(old, new))
    message = str(caught.value)
    assert str(tmp_path / "fleet.toml") in message
    assert complaint in message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize("text", ["", "name = 'x'", "name = 'x'\nclass = 3", "name = 'x'\nclass = []", "class = [[1]]"])
def test_a_file_without_classes_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(FleetError):
        read(tmp_path, text)


@given(st.text(max_size=60))
def test_any_text_gives_a_fleet_or_a_users_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("fleets") / "fleet.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FleetError):
        load_fleet(str(path))


@pytest.mark.parametrize(
    "name", ["jetson", "uniform-0", "uniform-100001", "tablets-3", "uniform--3", "", "../uniform-3"]
)
def test_an_unknown_fleet_is_refused(name: str) -> None:
    with pytest.raises(FleetError):
        load_fleet(name)


def test_a_missing_file_and_a_binary_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="jetson-N, phones-N, uniform-N"):
        load_fleet(str(tmp_path / "none.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_fleet(str(tmp_path / "binary.toml"))


def test_a_fleet_is_read_without_torch() -> None:
    script = (
        "import sys; from spinecli.federation.simulation.fleet import load_fleet; load_fleet('jetson-80');"
        "import spinecli.federation.simulation.conditions;"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_documentation_states_the_built_in_figures() -> None:
    page = (Path(__file__).parents[2] / "docs" / "fleets.md").read_text(encoding="utf-8")

    def band(ends: tuple[float, float]) -> str:
        return "–".join(f"{end:g}" for end in sorted(set(ends)))

    for kind, total in (("jetson", 80), ("phones", 10), ("uniform", 1)):
        for found in load_fleet(f"{kind}-{total}").classes:
            cells = (
                f"`{kind}`",
                f"`{found.name}`",
                f"{found.count}/{total}",
                ", ".join(f"{mode / 1e9:g}" for mode in found.modes),
                found.mode_rounds or "never",
                band(found.up_mbps),
                band(found.down_mbps),
                *(f"{value:g}" for value in (found.memory_gb, found.jitter, found.dropout, found.latency_ms)),
            )
            assert "| " + " | ".join(map(str, cells)) + " |" in page


def test_the_fleet_in_the_documentation_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "fleets.md").read_text(encoding="utf-8")
    example = page.partition("```toml\n")[2].partition("```")[0]
    assert len(read(tmp_path, example).devices) == 42
