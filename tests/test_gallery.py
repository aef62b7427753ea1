"""The gallery's scripts run, tell and draw; at their defaults, what each claims holds."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from conftest import load_script

GALLERY = Path(__file__).parent.parent / "examples" / "gallery"
TINY = {
    "skip_network": "--blocks 2 --width 8 --epochs 1 --seeds 0",
    "lateral_inhibition": "--epochs 1",
    "completion": "--hidden 4 --epochs 1 --steps 5",
    "top_down": "--width 8 --epochs 1 --steps 5",
    "small_world": "--nodes 6 --width 4 --epochs 1",
    "against_backprop": "--hidden 3 --width 8 --epochs 1",
    "attention": "--blocks 1 --width 8 --epochs 1",
}
NUMBERS = {
    "skip_network": [0, 3, 3, 3],
    "lateral_inhibition": [3, 3, 3, 3],
    "completion": [0, 2],
    "top_down": [2, 2],
    "small_world": [2, 1, 1, 1, 1],
    "against_backprop": [3, 3, 3, 1],
    "attention": [0, 2, 2, 1, 1, 1, 1],
}
"""How many results each line tells."""


def script(name: str) -> ModuleType:
    """A script of the gallery as a module."""
    return load_script(GALLERY / f"{name}.py")


def numbers(line: str) -> list[float]:
    """All decimal fractions of a line, in order."""
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def told(name: str, options: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that a script prints, having drawn a picture."""
    plot = folder / f"{name}.png"
    script(name).main([*options.split(), "--plot", str(plot)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"drawn: {plot}"
    assert plot.read_bytes().startswith(b"\x89PNG")
    return lines[:-1]


def test_the_gallery_is_complete_and_short() -> None:
    lengths = {path.stem: len(path.read_text().splitlines()) for path in GALLERY.glob("*.py")}
    assert lengths.keys() == TINY.keys()
    assert max(lengths.values()) <= 120


@pytest.mark.parametrize("name", TINY)
def test_it_tells_and_draws_in_the_current_folder_unless_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script(name).main(TINY[name].split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"drawn: {name}.png"
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert [len(numbers(line)) for line in lines[:-1]] == NUMBERS[name], lines


@pytest.mark.slow
class TestAtItsDefaults:
    def test_a_skip_needs_auxiliary_neurons(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        _, backprop, balanced, plain = told("skip_network", "", tmp_path, capsys)
        assert numbers(balanced)[0] > 0.93
        assert numbers(balanced)[0] == pytest.approx(numbers(backprop)[0], abs=0.02)
        assert numbers(plain)[0] < 0.5

    def test_lateral_inhibition_sharpens(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before, switched_on, learned, control = map(numbers, told("lateral_inhibition", "", tmp_path, capsys))
        assert switched_on[0] < 0.8 * before[0]
        assert switched_on[1] < 0.6 * before[1]
        assert learned[0] < control[0]
        assert switched_on[2] < learned[2]
        assert learned[2] > 0.93

    @pytest.mark.parametrize("half", ["top", "left"])
    def test_completion_beats_the_mean_image(
        self, half: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        completed, mean = numbers(told("completion", f"--given {half}", tmp_path, capsys)[1])
        assert completed < 0.8 * mean

    def test_one_network_draws_and_classifies(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        drawn, classified = map(numbers, told("top_down", "", tmp_path, capsys))
        assert drawn[0] < 0.1 * drawn[1]
        assert classified[0] > 0.88

    def test_a_small_world_learns(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for line in told("small_world", "", tmp_path, capsys)[1:]:
            assert numbers(line)[0] > 0.87, line

    def test_predictive_coding_comes_close_to_backprop(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        few, more, spiking, backprop = map(numbers, told("against_backprop", "", tmp_path, capsys))
        assert all(line[0] == pytest.approx(backprop[0], abs=0.03) for line in (few, more, spiking))
        assert few[1] < more[1]
        assert spiking[1] > 0.8

    def test_attention_is_learned_and_needs_auxiliary_neurons(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _, without, balanced, *learned = map(numbers, told("attention", "", tmp_path, capsys))
        backprop, arrival, spiking, plain = (line[0] for line in learned)
        assert without[1] < 0.5
        assert balanced[0] > 0.8
        assert backprop > 0.9
        assert arrival == pytest.approx(backprop, abs=0.02)
        assert spiking == pytest.approx(backprop, abs=0.05)
        assert plain < backprop - 0.2
