"""Drawings of a network: its columns, what is folded, where boxes and edges run, and Graphviz source."""

from __future__ import annotations

import sys
from itertools import combinations
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyArrowPatch
from torch import nn

import pcsim
from pcsim import plots
from pcsim.errors import GraphError, PCError, SettingError, StateError
from pcsim.plots.network.folding import Diagram, diagram
from pcsim.plots.network.layout import place
from pcsim.plots.style import KIND_COLOURS
from pcsim.topologies import mlp, residual_mlp, resnet


def ring(*, parallel: int = 1) -> pcsim.Network:
    """Input, a cycle of three nodes of which one reads itself, and an output by parallel edges."""
    net = pcsim.Network()
    for name in ("input", "a", "b", "c", "output"):
        net.add_node(name, (2,))
    for source, target in (("input", "a"), ("a", "b"), ("b", "c"), ("c", "a"), ("b", "b")):
        net.add_edge(source, target, nn.Linear(2, 2))
    for _ in range(parallel):
        net.add_edge("c", "output", nn.Linear(2, 2))
    return net


def by_name(shown: Diagram) -> dict[str, int]:
    return {node.name: number for number, box in enumerate(shown.boxes) for node in box.nodes}


def arrows(shown: Diagram) -> set[tuple[str, str, int, bool]]:
    first = [box.nodes[0].name for box in shown.boxes]
    return {(first[a.source], first[a.target], a.count, a.back) for a in shown.arrows}


def columns(shown: Diagram) -> dict[str, int]:
    return {node.name: box.column for box in shown.boxes for node in box.nodes}


# Columns


def test_a_column_is_the_longest_path_and_late_inputs_stand_before_their_reader() -> None:
    net = residual_mlp(3, 4, 2, blocks=1)
    net.add_node("label", (2,))
    net.add_edge("label", "output", nn.Linear(2, 2))
    shown = diagram(net)
    assert columns(shown) == {"input": 0, "stem": 1, "main1a": 2, "main1b": 3, "sum1": 4, "label": 4, "output": 5}
    assert {(arrow.back, arrow.count) for arrow in shown.arrows} == {(False, 1)}


def test_edges_that_close_a_cycle_lead_back_and_parallel_ones_are_counted() -> None:
    shown = diagram(ring(parallel=3))
    assert columns(shown) == {"input": 0, "a": 1, "b": 2, "c": 3, "output": 4}
    assert arrows(shown) == {
        ("input", "a", 1, False),
        ("a", "b", 1, False),
        ("b", "c", 1, False),
        ("c", "a", 1, True),
        ("b", "b", 1, True),
        ("c", "output", 3, False),
    }


def test_kinds_are_told_apart_and_clamping_comes_first() -> None:
    net = pcsim.balance_paths(residual_mlp(3, 4, 2, blocks=1), 0.5)
    shown = diagram(net, clamped=["input", net["sum1"]])
    kinds = {box.nodes[0].name: box.kind for box in shown.boxes}
    assert kinds["input"] == kinds["sum1"] == "clamped"
    assert kinds["main1a"] == "latent"
    assert kinds["skip1/aux1"] == "auxiliary"
    assert diagram(net).boxes[by_name(diagram(net))["sum1"]].kind == "deterministic"


# Folding


def test_a_chain_of_a_thousand_layers_folds_into_one_box() -> None:
    shown = diagram(mlp([5, *[3] * 999, 2]))
    assert [box.names for box in shown.boxes] == [("input",), ("hidden1",), ("hidden2 …", "hidden999"), ("output",)]
    assert [(block.first, block.last, block.copies) for block in shown.blocks] == [(2, 2, 998)]
    assert arrows(shown) == {
        ("input", "hidden1", 1, False),
        ("hidden1", "hidden2", 1, False),
        ("hidden2", "output", 1, False),
    }


@pytest.mark.parametrize("auxiliary", [False, True])
def test_residual_blocks_fold_with_their_wiring(auxiliary: bool) -> None:
    net = residual_mlp(3, 4, 2, blocks=14)
    net = pcsim.balance_paths(net, 0.5) if auxiliary else net
    shown = diagram(net)
    assert [block.copies for block in shown.blocks] == [14]
    assert len(shown.boxes) == 3 + (5 if auxiliary else 3)
    one_block = (
        pcsim.balance_paths(residual_mlp(3, 4, 2, blocks=1), 0.5) if auxiliary else residual_mlp(3, 4, 2, blocks=1)
    )
    assert arrows(shown) == arrows(diagram(one_block))


def test_what_differs_in_any_way_that_is_drawn_or_computed_is_not_folded() -> None:
    plain = mlp([3] * 30)
    assert diagram(plain).blocks[0].copies == 28
    assert [block.copies for block in diagram(plain, clamped=["hidden10"]).blocks] == [9, 18]
    for change in (
        lambda node: setattr(node, "transfer", nn.ReLU()),
        lambda node: setattr(node, "energy_weight", 2.0),
        lambda node: setattr(node.incoming[0], "gain", 0.5),
        lambda node: setattr(node.incoming[0], "module", nn.Linear(3, 3, bias=False)),
    ):
        net = mlp([3] * 30)
        change(net["hidden10"])
        assert [block.copies for block in diagram(net).blocks] == [9, 18]
    skipping = mlp([3] * 30)
    skipping.add_edge("hidden5", "hidden10")
    assert [block.copies for block in diagram(skipping).blocks] == [9, 18]
    assert ("hidden1", "hidden10", 2, False) in arrows(diagram(skipping))  # from the last copy, and from the fifth


def test_folding_is_for_large_networks_unless_said_otherwise() -> None:
    net = resnet("ResNet18", width=0.02)
    assert [block.copies for block in diagram(net).blocks] == [2]
    assert len(diagram(net, fold=False).boxes) == len(net.nodes) == 27
    small = residual_mlp(3, 4, 2, blocks=3)
    assert not diagram(small).blocks
    assert [block.copies for block in diagram(small, fold=True).blocks] == [3]
    # One box less is no gain.
    assert not diagram(mlp([3, 3, 3, 3]), fold=True).blocks


def test_layers_that_also_predict_backwards_fold() -> None:
    net = mlp([3] * 30)
    for depth in range(1, 28):
        net.add_edge(f"hidden{depth + 1}", f"hidden{depth}", nn.Linear(3, 3))
    shown = diagram(net)
    (block,) = shown.blocks
    assert block.copies >= 25
    assert sum(len(box.nodes) for box in shown.boxes) == len(net.nodes)


# Where things stand


NETWORKS = {
    "chain": mlp([784, *[16] * 8, 10]),
    "residual": residual_mlp(3, 4, 2, blocks=3),
    "auxiliary": pcsim.balance_paths(residual_mlp(3, 4, 2, blocks=3), 0.5),
    "folded": pcsim.balance_paths(residual_mlp(3, 4, 2, blocks=14), 0.5),
    "unfolded": pcsim.balance_paths(resnet("ResNet18", width=0.02), 0.5),
    "cycle": ring(parallel=9),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("length", [3.0, 14.5])
def test_boxes_are_apart_and_edges_run_around_them(name: str, length: float) -> None:
    shown = diagram(NETWORKS[name])
    layout = place(shown, length)
    (width, height), (whole_width, whole_height) = layout.box, layout.size
    for (a, b), (c, d) in combinations(layout.centres, 2):
        assert abs(a - c) > width or abs(b - d) > height
    for x, y in layout.centres:
        assert width / 2 < x < whole_width - width / 2
        assert height / 2 < -y < whole_height - height / 2
    drawn = sum(arrow.count if arrow.count <= 3 else 1 for arrow in shown.arrows)
    assert len(layout.lines) == drawn
    for line in layout.lines:
        for (a, b), (c, d) in zip(line.points, line.points[1:], strict=False):
            for x, y in layout.centres:
                outside_x = max(a, c) <= x - width / 2 + 1e-9 or min(a, c) >= x + width / 2 - 1e-9
                outside_y = max(b, d) <= y - height / 2 + 1e-9 or min(b, d) >= y + height / 2 - 1e-9
                assert outside_x or outside_y, (line, x, y)
    for frame, block in zip(layout.frames, shown.blocks, strict=True):
        for box, (x, y) in zip(shown.boxes, layout.centres, strict=True):
            within = frame.left < x < frame.right and frame.bottom < y < frame.top
            assert within == (block.first <= box.column <= block.last)


def test_a_thousand_layers_unfolded_are_no_endless_strip() -> None:
    layout = place(diagram(mlp([2] * 1001), fold=False))
    assert len(layout.centres) == 1001
    assert 0.5 < layout.size[0] / layout.size[1] < 2


# By matplotlib


def test_draw_shows_names_shapes_and_a_legend_of_what_is_there() -> None:
    figure = plots.draw(pcsim.balance_paths(residual_mlp(3, 4, 2, blocks=1), 0.5), clamped=["input", "output"])
    (axes,) = figure.axes
    texts = {text.get_text() for text in axes.texts}
    assert texts == {
        "input\n3",
        "stem\n4",
        "main1a\n4",
        "main1b\n4",
        "skip1/aux1\n4",
        "skip1/aux2\n4",
        "sum1\n4",
        "output\n2",
    }
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["latent", "deterministic", "auxiliary", "clamped"]
    edges = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    assert len(edges) == 8


def test_draw_marks_cycles_parallels_and_copies() -> None:
    figure = plots.draw(ring(parallel=5))
    assert "closes a cycle" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "×5" in [text.get_text() for text in figure.axes[0].texts]
    folded = plots.draw(mlp([3, *[2] * 99, 3]))
    assert "× 98" in [text.get_text() for text in folded.axes[0].texts]


def test_text_fits_its_box_in_any_figure() -> None:
    net = residual_mlp(3, 4, 2, blocks=3)
    net.add_node("a_name_of_more_than_twenty_letters $x_1$", (123, 45, 67))
    for figure in (None, plots.new_figure(4, 3), plots.new_figure(20, 2).subfigures(1, 2)[1]):
        drawn = plots.draw(net, figure=figure)
        (axes,) = drawn.axes
        width, height = place(diagram(net)).box
        renderer = FigureCanvasAgg(drawn.figure).get_renderer()
        (x0, y0), (x1, y1) = axes.transData.transform([(0, 0), (width, height)])
        for text in axes.texts:
            extent = text.get_window_extent(renderer)
            assert extent.width <= x1 - x0
            assert extent.height <= y1 - y0


def test_after_a_run_nodes_are_filled_by_their_energy() -> None:
    net = mlp([3, 4, 2])
    sim = pcsim.Simulator(net, pcsim.Relaxation(steps=3, rate=0.1))
    with pytest.raises(StateError, match="no state yet"):
        plots.draw(net, energy=True)
    sim.infer({"input": torch.ones(5, 3), "output": torch.ones(5, 2)})
    figure = plots.draw(net, energy=True)
    axes, bar = figure.axes
    assert bar.get_xlabel() == "energy per sample"
    energies = [float(net[name].energy.mean()) for name in ("hidden1", "output")]
    assert bar.get_xlim() == pytest.approx(sorted(energies), rel=1e-4)
    fills = [patch.get_facecolor() for patch in axes.patches if not isinstance(patch, FancyArrowPatch)]
    assert len(set(fills)) == 3
    assert len({fill[0] for fill in fills[:1]}) == 1
    assert fills[0][0] == fills[0][1] == fills[0][2]  # grey: an input has no energy


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(SettingError, match="empty network"):
        plots.draw(pcsim.Network())
    with pytest.raises(GraphError, match="'hiden'"):
        plots.draw(mlp([2, 2]), clamped=["hiden"])
    with pytest.raises(GraphError, match="'input'"):
        plots.graphviz(mlp([2, 2]), clamped=[mlp([2, 2])["input"]])
    net = mlp([2, 2])
    pcsim.Simulator(net).infer({"input": torch.ones(1, 2)})
    with pytest.raises(SettingError, match="clamp a target"):
        plots.draw(net, energy=True)


def test_without_matplotlib_drawing_says_so_and_graphviz_does_not_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PCError, match=r"pip install 'pcsim\[examples\]'"):
        plots.draw(mlp([2, 2]))
    assert "->" in plots.graphviz(mlp([2, 2]))


# Graphviz


def test_graphviz_source_names_quotes_and_tells_apart() -> None:
    net = pcsim.Network()
    net.add_node('say "hi"\\', (2,))
    net.add_node("two\nlines", (2,), deterministic=True)
    net.add_edge('say "hi"\\', "two\nlines")
    source = plots.graphviz(net, clamped=['say "hi"\\'])
    lines = source.splitlines()
    fill, outline = KIND_COLOURS["clamped"]
    assert lines[0] == "digraph network {"
    assert lines[-1] == "}"
    assert (
        f'  "say \\"hi\\"\\\\" [label="say \\"hi\\"\\\\\\n2" shape=octagon style="filled" fillcolor="{fill}" '
        f'color="{outline}"];' in lines
    )
    assert '  "say \\"hi\\"\\\\" -> "two\\nlines" [color="#333333"];' in lines


def test_graphviz_source_holds_every_edge_and_the_blocks() -> None:
    source = plots.graphviz(ring(parallel=2))
    assert source.count(" -> ") == 7
    assert source.count('"c" -> "output"') == 2
    assert source.count("style=dashed constraint=false") == 2
    folded = plots.graphviz(residual_mlp(3, 4, 2, blocks=14))
    assert "subgraph cluster_0 {" in folded
    assert 'label="× 14"' in folded
    assert '"main1a" [label="main1a …\\nmain14a\\n4"' in folded
    assert folded.count("{") == folded.count("}") == 2


# Notebooks


def test_the_svg_is_well_formed_and_the_same_every_time() -> None:
    net = mlp([2, 3, 2])
    net.add_node("<script>&", (1,))
    first, second = plots.svg(net), plots.svg(net)
    assert first == second
    root = ElementTree.fromstring(first)
    assert root.tag.endswith("svg")
    assert "<script>" in "".join(root.itertext())
    assert "<script>" not in first


def cells(page: str) -> list[list[str]]:
    """Rows of the one table of a page, headings first."""
    tree = ElementTree.fromstring(page[page.index("<table>") :])
    return [[cell.text or "" for cell in row] for row in tree.iter("tr")]


def test_a_network_shows_its_picture_and_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp([2, 3, 2])
    net.add_node("<b>", (1,))
    page = net._repr_html_()
    assert page.startswith('<div style="overflow-x: auto"><svg')
    assert "<b>" not in page
    assert [row[0] for row in cells(page)] == ["node", "input", "hidden1", "output", "<b>"]
    assert cells(page)[2][2:4] == ["3", "input (Linear)"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert net._repr_html_() == page[page.index("<table>") :]
    assert cells(pcsim.Network()._repr_html_()) == [cells(page)[0]]


def test_a_long_table_loses_its_middle() -> None:
    rows = cells(mlp([2] * 101)._repr_html_())
    assert [row[0] for row in rows[:2]] == ["node", "input"]
    assert rows[21] == ["… 61 more …"]
    assert rows[-1][0] == "output"
    assert len(rows) == 42


def test_a_plan_is_a_table_of_its_steps() -> None:
    net = mlp([2, 3, 2])
    sim = pcsim.Simulator(net, pcsim.Relaxation(steps=5, rate=0.1))
    sim.infer({"input": torch.ones(4, 2), "output": torch.ones(4, 2)})
    headings, *rows = cells(sim.plan._repr_html_())
    assert headings == ["", "predict", "active", "message", "move", "weights"]
    text = str(sim.plan)
    assert [row[0] for row in rows] == ["step 0", "steps 1 to 4", "learn"]
    for row in rows:
        assert f"{row[0]}:\n  predict  {row[1]}\n" in text
    assert f"  move     {rows[0][4]}\n" in text
    assert rows[-1][-1] in text.splitlines()[-2]


def test_a_trace_is_a_table_of_its_levels() -> None:
    net = mlp([2, 3, 2])
    sim = pcsim.Simulator(net, pcsim.Relaxation(steps=5, rate=0.1))
    clamps = {"input": torch.ones(4, 2), "output": torch.ones(4, 2)}
    trace = sim.infer(clamps, record=True)
    headings, *rows = cells(trace._repr_html_())
    assert headings[:2] == ["level", "nodes"]
    assert [row[:2] for row in rows] == [["0", "output"], ["1", "hidden1"]]
    energies = pcsim.diagnosis.level_energies(trace)
    for level, row in enumerate(rows):
        assert float(row[2]) == pytest.approx(float(energies[0, level]), rel=1e-3)
        assert float(row[3]) == pytest.approx(float(energies[-1, level]), rel=1e-3)
    assert "record=True" in sim.infer(clamps)._repr_html_()
