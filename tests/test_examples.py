"""The examples run as shown, and the numbers they show hold."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import load_script

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    """An example as a module."""
    return load_script(EXAMPLES / f"{name}.py")


def deep_mlp(folder: Path, options: str) -> list[dict[str, Any]]:
    """The runs of ``examples/deep_mlp.py`` with these options."""
    path = folder / "runs.json"
    example("deep_mlp").main(["--processes", "1", *options.split(), "--json", str(path)])
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
    options = "--depths 3 --epochs 1 --width 16 --methods spiking --seeds 0"
    assert len({run["test_accuracy"] for _ in range(2) for run in deep_mlp(tmp_path, options)}) == 1


@pytest.mark.slow
def test_deep_mlp_finds_the_same_in_several_processes(tmp_path: Path) -> None:
    path, options = tmp_path / "several.json", "--depths 3 --epochs 1 --width 16 --methods bp spiking --seeds 0 1 2"
    command = [sys.executable, str(EXAMPLES / "deep_mlp.py"), *options.split(), "--processes", "2", "--json", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    several, one = json.loads(path.read_text()), deep_mlp(tmp_path, options)
    found = [[(run["method"], run["seed"], run["test_accuracy"]) for run in runs] for runs in (one, several)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_depth_twenty_is_where_plain_predictive_coding_fails_and_its_remedies_do_not(tmp_path: Path) -> None:
    runs = deep_mlp(tmp_path, "--depths 20 --epochs 8 --seeds 0 --methods bp pc pc+fu spiking+fu decaying+fu")
    accuracy = {run["method"]: run["test_accuracy"] for run in runs}
    assert accuracy["pc"] <= 0.50
    assert accuracy["pc+fu"] <= 0.50
    for method in ("spiking+fu", "decaying+fu"):
        assert accuracy[method] >= 0.96
        assert accuracy[method] == pytest.approx(accuracy["bp"], abs=0.02)


def train_images(folder: Path, options: str) -> dict[str, Any]:
    """What ``examples/train_images.py`` writes with these options, on few digits."""
    path = folder / "runs.json"
    few = "--data digits --train-size 200 --epochs 1 --batch 32 --no-progress"
    example("train_images").main([*few.split(), *options.split(), "--json", str(path)])
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.mark.parametrize(
    "options",
    [
        "--topology mlp4 --width 0.2 --method bp",
        "--topology mlp4 --width 0.2 --init kaiming",
        "--topology mlp4 --width 0.2 --precision decaying --rule settled --momentum 0.3 --steps 6",
        "--topology mlp4 --width 0.2 --method ipc --nudge -0.5",
        "--topology residual3 --width 0.2 --nudge 0.3 --centred",
        "--topology resnet10 --width 0.04 --batchnorm --alpha 0 --augment --auxiliary",
        "--topology resnet10 --width 0.04 --no-auxiliary --precision none --rule settled --rate 0.1",
    ],
)
def test_train_images_in_all_its_variants(tmp_path: Path, options: str) -> None:
    content = train_images(tmp_path, options)
    (run,) = content["runs"]
    assert run["epochs"] == 1
    assert run["diverged"] is None
    assert 0.02 < run["test"] <= 1
    assert run["validations"] == [run["validation"]]
    assert content["settings"]["topology"] in options


def test_train_images_gives_mean_and_spread_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = train_images(tmp_path, "--topology mlp3 --width 0.2 --seeds 0 1")["runs"]
    assert [run["seed"] for run in runs] == [0, 1]
    mean = sum(run["test"] for run in runs) / 2
    assert f"test accuracy {mean:.4f} ±" in capsys.readouterr().out


def test_train_images_goes_on_only_with_the_same_settings(tmp_path: Path) -> None:
    options = f"--topology mlp3 --width 0.2 --resume {tmp_path / 'run'}"
    first = train_images(tmp_path, options)["runs"]
    again = train_images(tmp_path, options)["runs"]
    assert {**first[0], "seconds": 0} == {**again[0], "seconds": 0}, "what is finished is not trained further"
    with pytest.raises(SystemExit, match=r"other settings \(lr: 0.0007 -> 0.1\)"):
        train_images(tmp_path, options + " --lr 0.1")


@pytest.mark.parametrize("path", sorted((EXAMPLES / "settings").glob("*.json")), ids=lambda path: path.stem)
def test_every_settings_file_names_the_cell_that_it_sets(path: Path) -> None:
    options = example("train_images").parsed(["--settings", str(path), "--topology", "vgg5", "--data", "cifar10"])
    words = path.stem.split("-")
    assert options.method == words[0]
    assert options.batchnorm == ("bn" in words)
    if options.method != "bp":
        assert options.precision == words[1]
    if options.method == "pc":
        assert options.rule == words[2]
    assert options.augment
    replaced = example("train_images").parsed(["--settings", str(path), "--method", "ipc", "--topology", "vgg5"])
    assert replaced.method == "ipc", "the command line has the last word"


def test_train_images_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = tmp_path / "settings.json"
    unknown.write_text('{"colour": "red"}')
    wrongs = {
        f"--settings {unknown}": "unknown option colour",
        f"--settings {tmp_path / 'none.json'}": "cannot be read",
        "--topology mlp0": "expected vgg5",
        "--batchnorm": "--batchnorm: mlp5 has no normalisation",
        "--centred": "give --nudge as well",
        "--lr -1": "--lr: -1 given, expected a number from 0 other than 0",
        "--rate nan": "--rate: nan given",
        "--epochs 1.5": "--epochs: 1.5 given, expected a whole number from 1",
        "--nudge 2": "--nudge: 2 given, expected a number from -1 to 1 other than 0",
        "--device nowhere": "nowhere cannot be used here",
        f"--resume {unknown}": "a file, expected a folder",
    }
    for wrong, message in wrongs.items():
        with pytest.raises(SystemExit):
            train_images(tmp_path, wrong)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example("train_images").main(["--json", str(tmp_path)])
    assert "expected a file in a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--topology vgg5", "at least 16x16"),
        ("--validation 1500", "1437 images for both together"),
        ("--data mnist --root nowhere", "nowhere"),
    ],
)
def test_train_images_says_in_a_line_what_does_not_fit(tmp_path: Path, options: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        train_images(tmp_path, f"{options} --resume {tmp_path / 'run'}")
    assert not (tmp_path / "run").exists(), "what fails leaves nothing to stand in the way of the next try"


def test_train_images_augments_for_a_chain_too(tmp_path: Path) -> None:
    plain, turned = (
        train_images(tmp_path, f"--topology mlp2 --width 0.1{more}")["runs"] for more in ("", " --augment")
    )
    assert turned[0]["validations"] != plain[0]["validations"]


def test_a_settings_file_is_read_as_the_command_line_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{"weight-decay": 0.1, "batch": 16, "augment": false, "nudge": null}')
    options = example("train_images").parsed(["--settings", str(path), "--batch", "8"])
    assert (options.weight_decay, options.batch, options.augment, options.nudge) == (0.1, 8, False, None)
    for wrong in ('{"method": "magic"}', '{"batchnorm": "no"}', '{"lr": true}', "[1]", "{"):
        path.write_text(wrong)
        with pytest.raises(SystemExit):
            example("train_images").parsed(["--settings", str(path)])
        assert "error: " in capsys.readouterr().err


def test_a_checkpoint_belongs_to_its_settings_and_seed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = f"--topology mlp3 --width 0.2 --resume {folder}"
    train_images(tmp_path, options)
    shutil.copy(folder / "seed0.safetensors", folder / "seed1.safetensors")
    with pytest.raises(SystemExit, match=r"other settings \(seed: 0 -> 1\)"):
        train_images(tmp_path, f"{options} --seeds 0 1")


def test_results_table_has_a_row_for_each_file_and_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--data digits --topology resnet10 --width 0.04 --batchnorm --alpha 0 --epochs 2 --train-size 256"
    paths = [tmp_path / "small.json", tmp_path / "backprop.json"]
    for path, method in zip(paths, ("", " --method bp"), strict=True):
        example("train_images").main(f"{words}{method} --json {path}".split())
    capsys.readouterr()
    example("results_table").main(["--commands", "--of", "validation", *map(str, paths)])
    head, rule, backprop, row, _, *commands = capsys.readouterr().out.splitlines()
    head, rule, backprop, row = (text.strip("| ").split(" | ") for text in (head, rule, backprop, row))
    assert len(head) == len(rule) == len(row) == len(backprop)
    assert dict(zip(head, backprop, strict=True))["method"] == "backprop"
    cells = dict(zip(head, row, strict=True))
    assert cells["network"] == "ResNet10"
    assert cells["method"] == "PC + spiking + FU"
    assert (cells["BF"], cells["auxiliary"], cells["α"], cells["T"]) == ("yes", "yes", "0", "10")
    runs = json.loads(paths[0].read_text())
    assert cells["validation accuracy"] == f"{runs['runs'][0]['validation']:.4f}"
    for text, path in zip(commands, reversed(paths), strict=True):
        options = example("train_images").parsed(text.split()[2:])
        assert example("train_images").settings_of(options) == json.loads(path.read_text())["settings"]


def test_the_results_in_the_documents_are_those_of_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    folder = EXAMPLES.parent / "docs" / "results"
    page = (folder.parent / "results.md").read_text()
    for options, files in ((["--commands"], folder), (["--of", "validation"], folder / "search")):
        example("results_table").main([*options, *map(str, sorted(files.glob("*.json")))])
        for text in filter(None, capsys.readouterr().out.splitlines()):
            assert text in page


def test_hundred_layers_at_a_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, path = tmp_path / "figure.png", tmp_path / "runs.json"
    example("hundred_layers").main(
        f"--blocks 1 2 --epochs 1 --no-progress --batch 256 --json {path} --plot {plot}".split()
    )
    runs = json.loads(path.read_text())
    assert [run["levels"] for run in runs] == [4] * 4 + [6] * 4
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("plain PC") == 2


def test_characters_at_a_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "modules"
    text.mkdir()
    for place, words in enumerate(("def a(b):\n    return b ? é\n", "import this\n", "class A:\n    pass\n")):
        (text / f"m{place}.py").write_text(words * 9, encoding="utf-8")
    plot, path = tmp_path / "figure.png", tmp_path / "runs.json"
    small = "--steps 4 --every 2 --blocks 1 --width 8 --heads 2 --length 8 --batch 4 --characters 12"
    example("characters").main([*small.split(), *f"--text {text} --json {path} --plot {plot}".split()])
    runs = {run["method"]: run for run in json.loads(path.read_text())}
    assert list(runs) == ["backprop", "arrival", "spiking + FU", "plain PC"]
    assert all(run["steps"] == [2, 4] for run in runs.values())
    exact, arrival = (runs[name]["bits_per_character"] for name in ("backprop", "arrival"))
    assert arrival == pytest.approx(exact, abs=1e-3)
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "arrival: +0.000 bits from backprop at step 4" in shown.replace("-0.000", "+0.000")
    assert shown.count("seed 0:\ndef ") == 4


def test_characters_goes_on_without_a_method_that_diverges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in range(2):
        (tmp_path / f"m{place}.py").write_text("def a(b):\n    return b\n" * 9, encoding="utf-8")
    script, path = example("characters"), tmp_path / "runs.json"
    monkeypatch.setattr(script, "PLAIN_RATE", 1e9)
    small = "--steps 2 --every 1 --blocks 1 --width 8 --heads 2 --length 8 --batch 4 --characters 0"
    script.main([*small.split(), "--methods", "backprop", "plain PC", "--text", str(tmp_path), "--json", str(path)])
    backprop, plain = json.loads(path.read_text())
    assert (backprop["diverged"], backprop["steps"]) == (False, [1, 2])
    assert (plain["diverged"], plain["steps"]) == (True, [])
    assert "plain PC has diverged, and stops" in capsys.readouterr().out


def test_characters_held_out_are_of_other_files(tmp_path: Path) -> None:
    for place in range(21):
        (tmp_path / f"m{place:02}.py").write_text(f"{place:02}é", encoding="utf-8")
    learned, held_out = example("characters").read_text(tmp_path)
    assert held_out == "00?10?20?"
    assert learned.startswith("01?02?")
    assert len(learned) == 18 * 3


@pytest.mark.parametrize("graph", ["mlp3", pytest.param("residual1", marks=pytest.mark.slow)])
def test_compare_methods_sets_all_of_them_side_by_side(
    graph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plot = tmp_path / "rows.json", tmp_path / "methods.png"
    small = f"--graphs {graph} --width 0.2 --train-size 150 --epochs 1 --search-epochs 1 --seeds 0 --lrs 3e-3"
    rest = f"--rates 0.4 --parametrisations standard mupc --no-progress --json {path} --plot {plot}"
    compare, count = example("compare_methods"), itertools.count()
    monkeypatch.setattr(compare, "held", lambda: next(count))  # which looks at all objects of the test run
    compare.main([*small.split(), *rest.split()])
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * len(compare.METHODS)
    assert plot.read_bytes().startswith(b"\x89PNG")
    cosines = {row["title"]: row["cosine"] for row in rows}
    for suffix in ("", ", muPC"):
        assert cosines["backprop" + suffix] == pytest.approx(1)
        assert cosines["arrival" + suffix] > 0.9999
    assert all(row["memory"] > 0 for row in rows)
    products = {row["title"]: row["products"] for row in rows}
    if graph == "mlp3":
        assert products["backprop"] == products["spiking + FU"] == products["arrival"] == 1
        assert products["iPC"] > products["PC"] > 1.2
    shown = capsys.readouterr().out
    assert shown.count("| arrival |") == shown.count("| PC |") == 2


def test_compare_methods_counts_what_tensors_hold() -> None:
    held = example("compare_methods").held
    before = held()
    kept = torch.zeros(1000, 1000)
    views = [kept[row] for row in range(10)]
    assert held() - before == kept.untyped_storage().nbytes()
    assert len(views) == 10


def test_the_compared_methods_in_the_documents_are_those_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    docs = Path(__file__).parent.parent / "docs"
    rows = json.loads((docs / "results" / "methods" / "methods.json").read_text())
    page = (docs / "results.md").read_text()
    for graph in ("mlp5", "mlp10", "mlp20"):
        example("compare_methods").show(graph, [row for row in rows if row["graph"] == graph])
        table = [line for line in capsys.readouterr().out.splitlines() if " ±" in line]
        assert len(table) == 11
        assert all(line in page for line in table)


def test_rate_transfer_tells_the_best_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "rows.json", tmp_path / "mupc.png"
    options = f"--widths 8 --depths 3 --lrs 1e-3 1e-2 --steps 2 --json {path} --plot {plot}"
    example("rate_transfer").main(options.split())
    rows = json.loads(path.read_text())
    assert [(row["parametrisation"], row["over"]) for row in rows] == [
        (parametrisation, over) for parametrisation in ("standard", "mupc") for over in ("width", "depth")
    ]
    assert all(row["best"] in (1e-3, 1e-2) for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "best learning rate" in capsys.readouterr().out


def test_energy_imbalance_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "figure.png"
    example("energy_imbalance").main(["--batch", "4", "--plot", str(plot)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "least agreement with backprop: 1.000" in lines[1]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("hundred_layers", "--blocks 0", "--blocks: 0 given, expected a whole number from 1"),
        ("hundred_layers", "--json .", "expected a file"),
        ("characters", "--steps 0", "--steps: 0 given, expected a whole number from 1"),
        ("deep_mlp", "--depths 1", "--depths: 1 given, expected a whole number from 2"),
        ("deep_mlp", "--device nowhere", "nowhere cannot be used here"),
        ("energy_imbalance", "--rate -1", "--rate: -1 given"),
        ("energy_imbalance", "--plot .", "expected a file in a folder that can be written"),
    ],
)
def test_options_are_refused_before_any_work(
    script: str, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example(script).main(options.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "options"),
    [("hundred_layers", "--data mnist --root nowhere"), ("energy_imbalance", "--data cifar10 --root nowhere")],
)
def test_missing_data_is_said_in_a_line(script: str, options: str) -> None:
    with pytest.raises(SystemExit, match=f"{script}.py: .*nowhere"):
        example(script).main(options.split())


WHY = EXAMPLES / "why"
WHY_RESULTS = EXAMPLES.parent / "docs" / "results" / "why"
WHY_TINY = {
    "target_alignment": "--depths 2 3 --width 4",
    "saddle": "--most 3",
    "online_learning": "--samples 4",
    "tasks_and_few_data": "--updates 2",
    "missing_inputs": "--epochs 1",
    "moving_input": "--epochs 1",
}


SLOWER = ("missing_inputs",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOWER else ()) for n in WHY_TINY])
def test_why_compares_tells_and_draws(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, plot, path = load_script(WHY / f"{name}.py"), tmp_path / "figure.png", tmp_path / "found.json"
    for constant, few in {"STEPS": (1, 2), "GRID": ((0.02, 0.0),), "LRS": None}.items():
        if hasattr(script, constant):
            own = getattr(script, constant)
            monkeypatch.setattr(
                script, constant, few or ({k: v[:1] for k, v in own.items()} if name == "saddle" else own[:1])
            )
    script.main([*WHY_TINY[name].split(), "--seeds", "0", "1", "--json", str(path), "--plot", str(plot)])
    lines = capsys.readouterr().out.splitlines()
    for each in json.loads(path.read_text())["comparisons"]:
        assert f"| {' | '.join(script.Comparison(**each).row())} |" in lines
        assert len(each["ours"]) == len(each["theirs"]) == 2
    assert any("comparisons over 2 seeds" in line for line in lines)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_comparison_is_a_paired_test_with_three_standard_errors() -> None:
    comparison = load_script(WHY / "comparing.py").Comparison
    ours, theirs = [0.1, 0.2, 0.3, 0.4], [0.2, 0.35, 0.4, 0.55]
    found = comparison("setting", "backprop", ours, theirs, less=True)
    mean, error = 0.125, 0.028867513 / 2
    assert found.ahead == pytest.approx(mean / error)
    assert found.p == pytest.approx(0.00320, abs=1e-4), "of Student's t at 8.66 with three degrees of freedom"
    assert found.verdict == "ahead"
    assert comparison("setting", "backprop", ours, theirs).verdict == "behind"
    assert comparison("setting", "backprop", ours, ours[::-1]).verdict == "within the noise"
    assert comparison("setting", "backprop", ours, ours).p == 1
    assert comparison("setting", "backprop", [0.1], [0.2]).verdict == "within the noise", "one seed says nothing"


@pytest.mark.parametrize("depth", [2, 5])
def test_backprops_target_alignment_is_that_of_its_tangent_kernel(depth: int) -> None:
    script = load_script(WHY / "target_alignment.py")
    torch.manual_seed(3)
    sim = script.simulator("backprop", depth, 6)
    weights = [edge.module.weight.detach() for edge in sim.network.edges.values()]
    x, target = torch.randn(2, 1, 6, dtype=torch.float64)
    activities = [x]
    for weight in weights:
        activities.append(activities[-1] @ weight.T)
    error, change, above = target - activities[-1], torch.zeros(1, 6, dtype=torch.float64), torch.eye(6).double()
    for weight, activity in zip(reversed(weights), reversed(activities[:-1]), strict=True):
        change += activity.square().sum() * error @ above @ above.T  # A Aᵀ ε |v|², to first order in the rate
        above = above @ weight
    expected = script.alignment(torch.zeros_like(change), change, error)
    assert script.aligned("backprop", depth, 6, 1e-7, 3) == pytest.approx(expected, abs=1e-5)


def test_last_layer_alone_has_a_target_alignment_of_one() -> None:
    script = load_script(WHY / "target_alignment.py")
    torch.manual_seed(0)
    sim = script.simulator("backprop", 4, 8)
    x, target = torch.randn(2, 1, 8, dtype=torch.float64)
    before = sim.predict({"input": x})["output"]
    sim.infer({"input": x, "output": target})
    sim.learn(torch.optim.SGD(list(sim.network.parameters())[-1:], lr=1e-3))
    assert script.alignment(before, sim.predict({"input": x})["output"], target) == pytest.approx(1)


def test_labels_drift_by_permutations_of_five_classes() -> None:
    script, labels = load_script(WHY / "online_learning.py"), torch.arange(10).repeat(4)
    found = script.labels_over_time(labels, 10, torch.Generator().manual_seed(0)).view(4, 10)
    assert (found[0] == labels[:10]).all()
    assert all(set(part.tolist()) == set(range(10)) for part in found)
    assert [int((after != before).sum()) for before, after in pairwise(found)] == [5, 5, 5]


def test_a_stream_without_its_data_says_so_in_a_line() -> None:
    with pytest.raises(SystemExit, match=r"online_learning.py: .*nowhere"):
        load_script(WHY / "online_learning.py").main(["--data", "mnist", "--root", "nowhere"])


def test_a_digit_turned_by_nothing_stays_as_it_is() -> None:
    script, images = load_script(WHY / "moving_input.py"), torch.rand(2, 64)
    assert torch.allclose(script.turned(images, torch.zeros(2)), images, atol=1e-5)
    quarter = script.turned(images, torch.full((2,), 90.0)).view(2, 8, 8)
    assert torch.allclose(quarter, images.view(2, 8, 8).rot90(1, (1, 2)), atol=1e-4)


def test_why_shows_the_results_of_the_runs() -> None:
    comparing, page = load_script(WHY / "comparing.py"), (EXAMPLES.parent / "docs" / "why.md").read_text()
    found = {path.stem: comparing.read(path) for path in WHY_RESULTS.glob("*.json")}
    assert found.keys() >= WHY_TINY.keys()
    for name, comparisons in found.items():
        assert comparing.table(comparisons) in page
        assert re.search(rf"^    python examples/why/\w+\.py .*--json {name}\.json", page, re.MULTILINE)
        assert all(len(each.ours) == len(each.theirs) == 10 for each in comparisons)
    assert all(len((WHY / f"{name}.py").read_text().splitlines()) <= 150 for name in WHY_TINY)


MNIST = EXAMPLES.parent.parent / "shared" / "data" / "mnist"
needs_mnist = pytest.mark.skipif(not MNIST.exists(), reason="MNIST is not beside the checkout")


@pytest.mark.slow
@needs_mnist
def test_twenty_layers_learn_mnist_as_with_backprop(tmp_path: Path) -> None:
    options = f"--data mnist --root {MNIST} --topology mlp20 --lr 1e-3 --epochs 5 --batch 128"
    options += " --train-size 59000 --validation 1000"
    tests = [
        train_images(tmp_path, f"{options} {method}")["runs"][0]["test"]
        for method in ("--method bp", "--alpha 0 --rate 0.8")
    ]
    assert tests[1] >= 0.955
    assert tests[1] == pytest.approx(tests[0], abs=0.01)


@pytest.mark.slow
@needs_mnist
def test_a_hundred_and_thirty_levels_learn_mnist_as_with_backprop(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    options = ["--data", "mnist", "--root", str(MNIST), "--blocks", "64", "--no-progress", "--json", str(path)]
    example("hundred_layers").main([*options, "--methods", "backprop", "spiking + FU"])
    tests = {run["method"]: run["test"] for run in json.loads(path.read_text())}
    assert tests["spiking + FU"] >= 0.95
    assert tests["spiking + FU"] == pytest.approx(tests["backprop"], abs=0.015)
