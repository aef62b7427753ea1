"""Figures: they show the numbers they are given, and refuse what holds none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pcsim
from pcsim import diagnosis, plots
from pcsim.errors import PCError, SettingError, StateError


def trace(*, record: bool = True) -> pcsim.Trace:
    """A relaxation of a network whose level 1 holds two nodes."""
    net = pcsim.Network()
    for name, size in (("input", 3), ("left", 4), ("right", 2), ("output", 2)):
        net.add_node(name, (size,))
    for side, size in (("left", 4), ("right", 2)):
        net.add_edge("input", side, torch.nn.Linear(3, size))
        net.add_edge(side, "output", torch.nn.Linear(size, 2))
    sim = pcsim.Simulator(net, pcsim.Relaxation(steps=3, rate=0.1))
    return sim.infer({"input": torch.ones(5, 3), "output": torch.ones(5, 2)}, record=record)


def test_level_energies_sum_nodes_and_average_samples() -> None:
    recorded = trace()
    energies = diagnosis.level_energies(recorded)
    assert energies.shape == (4, 2)
    both = recorded.energy("left") + recorded.energy("right")
    torch.testing.assert_close(energies[:, 1], both.mean(1).double())
    torch.testing.assert_close(energies[:, 0], recorded.energy("output").mean(1).double())


def test_energy_by_level_draws_a_panel_for_each_trace(tmp_path: Path) -> None:
    figure = plots.energy_by_level({"first": trace(), "second": trace()})
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["first", "second"]
    assert {axes.get_xlabel() for axes in panels} == {"inference step"}
    shown = panels[0].collections[0].get_array()
    assert shown.shape == (2, 4)
    assert shown.mask[1, 0]  # no error has arrived at level 1 before the first step
    figure.savefig(tmp_path / "energies.png")


def test_accuracy_by_depth_draws_means_and_ranges(tmp_path: Path) -> None:
    runs = {"good": {5: [0.9, 1.0], 20: [0.9]}, "bad": {5: [0.5], 10: [0.2]}}
    figure = plots.accuracy_by_depth(runs, chance=0.1)
    (axes,) = figure.axes
    assert axes.lines[0].get_ydata().tolist() == [0.95, 0.9]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5", "10", "20"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["good", "bad"]
    figure.savefig(tmp_path / "accuracies.png")


def test_many_methods_get_a_line_each() -> None:
    figure = plots.accuracy_by_depth({str(number): {1: [0.5]} for number in range(9)})
    assert len(figure.axes[0].lines) == 9


def test_what_holds_no_numbers_is_refused() -> None:
    with pytest.raises(SettingError, match="at least one run"):
        plots.accuracy_by_depth({})
    with pytest.raises(SettingError, match="at least one run"):
        plots.accuracy_by_depth({"pc": {5: []}})
    with pytest.raises(StateError, match="record=True"):
        plots.energy_by_level({"pc": trace(record=False)})
    with pytest.raises(SettingError, match="at least one with an energy above zero"):
        plots.energy_by_level({})
    unreached = pcsim.Trace(0, ("alone",), {}, torch.ones(1, 1, 1))
    with pytest.raises(SettingError, match="clamp a target"):
        plots.energy_by_level({"pc": unreached})


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PCError, match=r"pip install 'pcsim\[examples\]'"):
        plots.new_figure()


def deep() -> tuple[pcsim.Network, pcsim.Trace]:
    net = pcsim.topologies.mlp([3] * 20)
    sim = pcsim.Simulator(net, pcsim.Relaxation(steps=4, rate=0.1))
    return net, sim.infer({"input": torch.ones(5, 3), "output": torch.ones(5, 3)}, record=True)


def test_energy_over_steps_draws_each_level_from_its_first_energy_on(tmp_path: Path) -> None:
    recorded = trace()
    figure = plots.energy_over_steps(recorded)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["level 0", "level 1"]
    energies = diagnosis.level_energies(recorded)
    first, second = (torch.tensor(line.get_ydata()) for line in axes.lines)
    torch.testing.assert_close(first, energies[:, 0])
    assert second[0].isnan()
    torch.testing.assert_close(second[1:], energies[1:, 1])
    figure.savefig(tmp_path / "energies.png")


def test_many_levels_are_told_apart_by_a_colour_bar_and_unreached_ones_are_left_out() -> None:
    _, recorded = deep()
    axes, bar = plots.energy_over_steps(recorded).axes
    assert len(axes.lines) == 5  # in four steps the error reaches four levels above the target
    assert axes.get_legend() is None
    assert "level" in bar.get_ylabel()


def test_error_histograms_count_every_unit_of_every_sample() -> None:
    with pytest.raises(SettingError, match="no node"):
        plots.error_histograms(pcsim.Network())
    net, _ = deep()
    for by, titles in (("level", ["level 0", "level 1"]), ("node", ["hidden1", "hidden2"])):
        figure = plots.error_histograms(net, by=by, bins=7)
        shown = [axes for axes in figure.axes if axes.get_title()]
        assert len(shown) == 16
        assert [axes.get_title().split(",")[0] for axes in shown][:2] == titles
        assert {len(axes.patches) for axes in shown} == {7}
        assert {sum(bar.get_height() for bar in axes.patches) for axes in shown} == {15}
    some = plots.error_histograms(net, levels={f"hidden{level}": level for level in range(1, 6)}).axes
    assert [axes.axison for axes in some] == [True] * 5 + [False] * 3
    last = plots.error_histograms(net, levels={"output": 0, "hidden18": 3}).axes[1]
    rms = float(net["hidden18"].error.double().square().mean().sqrt())
    assert last.get_title() == f"level 3, rms {rms:.2g}"


def test_histograms_of_what_has_not_run_or_makes_no_sense_are_refused() -> None:
    net = pcsim.topologies.mlp([3, 3])
    with pytest.raises(StateError, match="no state yet"):
        plots.error_histograms(net)
    with pytest.raises(SettingError, match="'layer'"):
        plots.error_histograms(net, by="layer")
    with pytest.raises(SettingError, match="bins=0"):
        plots.error_histograms(net, bins=0)
    with pytest.raises(StateError, match="record=True"):
        plots.energy_over_steps(trace(record=False))
    with pytest.raises(SettingError, match="above zero"):
        plots.energy_over_steps(pcsim.Trace(0, ("alone",), {"alone": 0}, torch.zeros(1, 1, 1)))


def test_images_show_what_they_are_given(tmp_path: Path) -> None:
    pictures = torch.linspace(-1, 3, 5 * 2 * 3).view(5, 2, 3).requires_grad_()
    figure = plots.images(pictures, titles=list("abcde"), columns=2)
    figure.savefig(tmp_path / "pictures.png")
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == [*"abcde", ""]
    assert [len(axes.images) for axes in panels] == [1, 1, 1, 1, 1, 0]
    assert panels[0].get_gridspec().ncols == 2
    for axes, picture in zip(panels, pictures, strict=False):
        assert torch.equal(torch.tensor(axes.images[0].get_array()), picture)
        assert axes.images[0].get_clim() == (-1, 3)
    signed = plots.images(pictures, signed=True)
    for axes, picture in zip(signed.axes, pictures, strict=False):
        size = picture.abs().max().item()
        assert axes.images[0].get_clim() == (-size, size)
    assert signed.axes[0].get_gridspec().ncols == 2


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 4), {}, r"shape \(3, 4\) given, expected \(N, height, width\)"),
        ((0, 3, 4), {}, r"shape \(0, 3, 4\) given"),
        ((2, 3, 4), {"titles": ["one"]}, "1 titles given, expected one for each of 2 pictures"),
        ((2, 3, 4), {"columns": 0}, "columns=0 given, expected at least 1"),
    ],
)
def test_images_say_what_they_take(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        plots.images(torch.zeros(shape), **options)
