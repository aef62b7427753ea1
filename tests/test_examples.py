"""The examples run as shown, and the numbers they show hold."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    """An example as a module."""
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def deep_mlp(folder: Path, options: str) -> list[dict[str, Any]]:
    """The runs of ``examples/deep_mlp.py`` with these options."""
    path = folder / "runs.json"
    example("deep_mlp").main([*options.split(), "--json", str(path)])
    runs: list[dict[str, Any]] = json.loads(path.read_text())
    return runs


def test_deep_mlp_writes_what_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "figure.png"
    methods = ["bp", "pc", "spiking+fu", "ipc+spiking"]
    runs = deep_mlp(
        tmp_path, f"--depths 2 3 --epochs 1 --width 16 --seeds 0 1 --methods {' '.join(methods)} --plot {plot}"
    )
    assert [(run["method"], run["depth"], run["seed"]) for run in runs] == [
        (method, depth, seed) for method in methods for depth in (2, 3) for seed in (0, 1)
    ]
    assert all(0.05 < run["test_accuracy"] <= 1 and run["seconds"] > 0 and not run["diverged"] for run in runs)
    assert runs[0]["settings"]["width"] == 16
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["method", *methods]
    assert all(line.count("±") == 2 for line in lines[2:6])
    assert any(line.startswith("left out: pc+fu, spiking, decaying+fu") for line in lines)


def test_deep_mlp_repeats_itself(tmp_path: Path) -> None:
    options = "--depths 3 --epochs 1 --width 16 --methods spiking"
    assert len({run["test_accuracy"] for _ in range(2) for run in deep_mlp(tmp_path, options)}) == 1


def test_deep_mlp_refuses_a_chain_without_a_hidden_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        deep_mlp(tmp_path, "--depths 1")
    assert "at least 2 edges" in capsys.readouterr().err


@pytest.mark.slow
def test_depth_twenty_is_where_plain_predictive_coding_fails_and_its_remedies_do_not(tmp_path: Path) -> None:
    runs = deep_mlp(tmp_path, "--depths 20 --epochs 8 --seeds 0 --methods bp pc pc+fu spiking+fu decaying+fu")
    accuracy = {run["method"]: run["test_accuracy"] for run in runs}
    assert accuracy["pc"] <= 0.50
    assert accuracy["pc+fu"] <= 0.50
    for method in ("spiking+fu", "decaying+fu"):
        assert accuracy[method] >= 0.96
        assert accuracy[method] == pytest.approx(accuracy["bp"], abs=0.02)
