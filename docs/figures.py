"""Draws the figures of the documentation: `python docs/figures.py` remakes docs/figures/*.png, in about a minute."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import pcsim
from pcsim import diagnosis, plots

FOLDER = Path(__file__).parent / "figures"
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#BBBBBB"
METHODS: dict[str, tuple[pcsim.PrecisionSchedule, pcsim.LearningRule]] = {
    "PC": (pcsim.Constant(), pcsim.SettledUpdate()),
    "PC + FU": (pcsim.Constant(), pcsim.ForwardUpdate()),
    "spiking": (pcsim.Spiking(), pcsim.SettledUpdate()),
    "spiking + FU": (pcsim.Spiking(), pcsim.ForwardUpdate()),
}


def anatomy() -> Figure:
    """One edge between two nodes, and what each of them holds."""
    figure = plots.new_figure(7.5, 2.6)
    axes = figure.subplots()
    for x, name, lines in (
        (0, "source m", ("value $v_m$", "prediction $u_m$", "error $ε_m = v_m - u_m$")),
        (6, "target n", ("value $v_n$", "prediction $u_n$", "error $ε_n = v_n - u_n$", "precision $π_n$")),
    ):
        axes.add_patch(Rectangle((x - 1.2, -1.1), 2.4, 2.2, fill=False, linewidth=1.5))
        axes.text(x, 1.3, name, ha="center", weight="bold")
        for row, line in enumerate(lines):
            axes.text(x - 1.05, 0.72 - 0.5 * row, line, va="center")
    for y, start, end, colour in ((0.5, 1.2, 4.8, BLUE), (-0.6, 4.8, 1.2, RED)):
        axes.add_patch(FancyArrowPatch((start, y), (end, y), arrowstyle="-|>", mutation_scale=16, color=colour))
    axes.text(3, 0.62, "$a_e = gain_e · f_e(v_m)$", ha="center", va="bottom", color=BLUE)
    axes.text(3, 0.32, "predicts", ha="center", va="top", color=BLUE)
    axes.text(3, -0.48, "$m_e = (∂a_e/∂v_m)^T δ_n$", ha="center", va="bottom", color=RED)
    axes.text(3, -0.78, "feeds the error back", ha="center", va="top", color=RED)
    axes.set(xlim=(-1.4, 7.4), ylim=(-1.3, 1.7))
    axes.axis("off")
    return figure


def schedules() -> Figure:
    """Precision by level and step, of each schedule."""
    steps = 8
    figure = plots.new_figure(8, 2.9)
    panels = figure.subplots(1, 3, sharey=True)
    shown = {
        "Constant()": pcsim.Constant(),
        "Spiking(alpha=0.001)": pcsim.Spiking(),
        "Decaying()": pcsim.Decaying(),
    }
    for axes, (title, schedule) in zip(panels, shown.items(), strict=True):
        numbers = torch.tensor([[schedule.at(t, level, steps) for t in range(steps)] for level in range(steps)])
        axes.set_facecolor("#DDDDDD")
        image = axes.pcolormesh(numbers.masked_fill(numbers == 0, torch.nan).numpy(), norm=LogNorm(1e-5, 1))
        axes.set(title=title, xlabel="inference step t", xticks=[t + 0.5 for t in range(0, steps, 2)])
        axes.set_xticklabels(range(0, steps, 2))
        axes.set(yticks=[level + 0.5 for level in range(0, steps, 2)], yticklabels=range(0, steps, 2))
    panels[0].set_ylabel("level (hops from the target)")
    figure.colorbar(image, ax=list(panels), label="precision π (grey: 0)")
    return figure


def deep(method: str, rate: float, depth: int = 12) -> tuple[pcsim.Simulator, dict[str, Tensor]]:
    """An untrained chain on a batch of digits."""
    torch.manual_seed(0)
    train, _ = pcsim.data.standardise(*pcsim.data.digits())
    net = pcsim.topologies.mlp([64, *[128] * (depth - 1), 10])
    precision, rule = METHODS[method]
    sim = pcsim.Simulator(net, pcsim.Relaxation(depth, rate, precision=precision), rule)
    return sim, {"input": train.images[:256], "output": train.one_hot()[:256]}


def relaxation() -> Figure:
    """Where the energy is, level by level and step by step."""
    rate, traces = 0.2, {}
    shown = {
        "PC": pcsim.Constant(),
        "spiking, peak 1": pcsim.Spiking(),
        "peak 0.9 / rate": pcsim.Spiking(peak=0.9 / rate),
    }
    for title, precision in shown.items():
        sim, clamps = deep("PC", rate)
        sim.relaxation = pcsim.Relaxation(12, rate, precision=precision)
        traces[title] = sim.infer(clamps, record=True)
    figure = plots.new_figure(9, 3.2)
    plots.energy_by_level(traces, figure=figure)
    return figure


def similarity() -> Figure:
    """How the weights' updates agree with backprop's, edge by edge."""
    found = {}
    for method in METHODS:
        sim, clamps = deep(method, rate=0.5)
        found[method] = diagnosis.update_similarity(sim, clamps)
    figure = plots.new_figure(7.5, 3.8)
    plots.similarity_by_edge(found, figure=figure)
    return figure


def depth() -> Figure:
    """Cosine of each edge's update with backprop's against its level, in float32, by three methods."""
    figure = plots.new_figure(9, 3.4)
    rate = 0.8
    torch.manual_seed(0)
    panels = {
        "VGG19, untrained, width 0.25": (pcsim.topologies.vgg("VGG19", width=0.25), torch.randn(16, 3, 32, 32)),
        "chain of 1,000 tanh layers": (pcsim.topologies.mlp([32] * 1000 + [10]), torch.randn(16, 32)),
    }
    for axes, (title, (net, images)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        levels = net.levels()
        steps = max(levels[name] for name, node in net.nodes.items() if node.predicted) + 1
        clamps = {"input": images, "output": torch.eye(10)[torch.randint(10, (16,))]}
        for (method, rule, precision, own), (colour, marker, _) in zip(
            (
                ("PC, rate 0.1", pcsim.SettledUpdate(), pcsim.Constant(), 0.1),
                ("spiking + FU", pcsim.ForwardUpdate(), pcsim.Spiking(alpha=0.0), rate),
                ("arrival", pcsim.ArrivalUpdate(), pcsim.Spiking.for_rate(rate), rate),
            ),
            ((RED, "s", ""), (ORANGE, "D", ""), (BLUE, "o", "")),
            strict=True,
        ):
            sim = pcsim.Simulator(net, pcsim.Relaxation(steps, own, precision=precision), rule)
            found = diagnosis.update_similarity(sim, clamps)
            where = [levels[net.edges[name].target_name] for name in found]
            axes.plot(
                where, list(found.values()), color=colour, marker=marker, markersize=3, linestyle="", label=method
            )
        axes.set(xlabel="level of the edge's target", ylim=(-1.05, 1.1))
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("cosine with backprop's update")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def descent() -> Figure:
    """The energy of one batch while latents relax, at three rates."""
    torch.manual_seed(0)
    train, _ = pcsim.data.digits()
    net = pcsim.topologies.mlp([64, 128, 128, 10])
    figure = plots.new_figure(6.5, 3.2)
    axes = figure.subplots()
    for rate, colour, dashes in ((0.05, BLUE, "-"), (0.2, GREEN, "--"), (0.5, ORANGE, "-.")):
        trace = pcsim.Simulator(net, pcsim.Relaxation(30, rate)).infer(
            {"input": train.images[:256], "output": train.one_hot()[:256]}, record=True
        )
        axes.plot((trace.free_energies / 256).tolist(), color=colour, linestyle=dashes, label=f"rate {rate}")
    axes.set(xlabel="inference step", ylabel="energy F per sample", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def auxiliary() -> Figure:
    """A block with a skip path, without and with auxiliary neurons."""
    plain = pcsim.topologies.residual_mlp(64, 16, 10, blocks=1)
    figure = plots.new_figure(9, 4.6)
    for part, net in zip(figure.subfigures(2), (plain, pcsim.balance_paths(plain, rate=0.5)), strict=True):
        plots.draw(net, clamped=["input", "output"], figure=part)
    return figure


def own() -> Figure:
    """The tutorial's own network, with its auxiliary neurons."""
    net = pcsim.Network()
    net.add_node("image", (64,))
    for name in ("first", "second", "third"):
        net.add_node(name, (64,), transfer=nn.Tanh())
    net.add_node("digit", (10,))
    for source, target in (("image", "first"), ("first", "second"), ("second", "third")):
        net.add_edge(source, target, nn.Linear(64, 64))
    net.add_edge("third", "digit", nn.Linear(64, 10))
    net.add_edge("first", "digit", nn.Linear(64, 10), name="skip")
    return plots.draw(pcsim.balance_paths(net, 0.5), clamped=["image", "digit"])


def folded() -> Figure:
    """A network of sixteen blocks, its repeated part drawn once."""
    net = pcsim.balance_paths(pcsim.topologies.residual_mlp(64, 16, 10, blocks=16), rate=0.5)
    return plots.draw(net, clamped=["input", "output"])


def plan() -> Figure:
    """What is computed for which edge at which step, with two schedules."""
    net = pcsim.topologies.mlp([8, 8, 8, 8, 8, 4])
    clamps = {"input": torch.zeros(1, 8), "output": torch.ones(1, 4)}
    figure = plots.new_figure(8, 3.3)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, schedule in zip(panels, (pcsim.Constant(), pcsim.Spiking(alpha=0.0)), strict=True):
        sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.5, precision=schedule), pcsim.ForwardUpdate())
        sim.infer(clamps)
        made = sim.plan
        for step, position in enumerate(made.sequence):
            phase = made.phases[position]
            for row, (predicts, sends) in enumerate(zip(phase.refresh, phase.message, strict=True)):
                for place, active, colour in ((0.06, predicts, BLUE), (0.5, sends, RED)):
                    face = colour if active else "#EEEEEE"
                    axes.add_patch(Rectangle((step + place, row + 0.1), 0.42, 0.8, facecolor=face, edgecolor="none"))
        names = [edge.name.replace("->", " → ") for edge in made.wiring.edges]
        axes.set(xlim=(0, len(made.sequence)), ylim=(0, len(names)), xlabel="inference step")
        axes.set(xticks=[t + 0.5 for t in range(len(made.sequence))], xticklabels=range(len(made.sequence)))
        axes.set(yticks=[row + 0.5 for row in range(len(names))], yticklabels=names)
        axes.set_title(f"{schedule}: {made.left_out():.0%} left out", fontsize=10)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    marks = [Rectangle((0, 0), 1, 1, facecolor=colour) for colour in (BLUE, RED, "#EEEEEE")]
    figure.legend(marks, ["prediction", "message", "exactly zero or unchanged: left out"], loc="outside lower center",
                  ncols=3, frameon=False)  # fmt: skip
    return figure


def skip() -> Figure:
    """When the error reaches each node of a skip network, without and with auxiliary neurons."""
    torch.manual_seed(0)
    plain = pcsim.topologies.residual_mlp(64, 64, 10, blocks=4)
    train, _ = pcsim.data.digits()
    traces = {}
    for title, net in (("without auxiliary neurons", plain), ("with", pcsim.balance_paths(plain, 0.5))):
        sim = pcsim.Simulator(net, pcsim.Relaxation(12, 0.5, precision=pcsim.Spiking()))
        traces[title] = sim.infer({"input": train.images[:64], "output": train.one_hot()[:64]}, record=True)
    figure = plots.new_figure(6, 3.2)
    plots.error_front(traces, figure=figure)
    return figure


def tutorial() -> Figure:
    """Test accuracy by epoch of the tutorial's deep network, by three methods."""
    train, test = pcsim.data.digits()
    batches = [(train.images[i : i + 64], train.one_hot()[i : i + 64]) for i in range(0, len(train), 64)]
    figure = plots.new_figure(6.5, 3.2)
    axes = figure.subplots()
    for (title, method), colour, marker in (
        (("backprop", (pcsim.Constant(), pcsim.Backprop())), "black", "o"),
        (("plain PC", METHODS["PC"]), RED, "s"),
        (("spiking + FU", METHODS["spiking + FU"]), BLUE, "D"),
    ):
        torch.manual_seed(0)
        net = pcsim.topologies.mlp([64, *[128] * 19, 10])
        sim = pcsim.Simulator(net, pcsim.Relaxation(20, 0.5, precision=method[0]), method[1])
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        trainer = pcsim.Trainer(sim, optimizer, metrics=[pcsim.Accuracy()], progress=False, seed=0)
        history = trainer.fit(batches, epochs=6, validation=[(test.images, test.one_hot())])
        axes.plot(range(1, 7), history.of("accuracy", "validation"), color=colour, marker=marker, label=title)
    axes.set(xlabel="epoch", ylabel="test accuracy, 20 layers", ylim=(0, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center right")
    return figure


def turning() -> Figure:
    """Errors of a digit's pixels while it turns: the run of the guide to sequences."""
    page = (FOLDER.parent / "guides" / "sequences.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    figure = plots.new_figure(6.5, 3.4)
    plots.unit_map(names["trace"], "image", figure=figure)
    return figure


def strips(count: int, side: int = 8) -> Tensor:
    """Three neighbouring patches of filtered photographs, where there is contrast, (count or less, 3 · side²)."""
    found = []
    for photograph in load_sample_images().images:
        grey = photograph.mean(2)
        filtered = gaussian_filter(grey, 1) - gaussian_filter(grey, 5)
        windows = torch.from_numpy(filtered / filtered.std()).float().unfold(0, side, 1).unfold(1, 3 * side, 1)
        rows, columns = (torch.randint(size, (count // 2,)) for size in windows.shape[:2])
        found.append(windows[rows, columns])
    chosen = torch.cat(found)[torch.randperm(count // 2 * 2)]
    chosen = chosen[chosen.flatten(1).std(1) > 0.5]
    return chosen.unflatten(2, (3, side)).movedim(2, 1).flatten(1)


class UnitLength(pcsim.Callback):
    """Holds the length of every feature."""

    def on_batch_end(self, trainer: pcsim.Trainer, record: pcsim.BatchRecord) -> None:
        """Divide each column of weights by its length."""
        with torch.no_grad():
            for module in {edge.module for edge in trainer.simulator.network.edges.values()}:
                module.weight /= module.weight.norm(dim=0)


def generative() -> Figure:
    """What a hierarchy of causes has learned of patches of photographs, and what it makes of hidden pixels."""
    torch.manual_seed(0)
    train, test = strips(30_000), strips(40)
    net, features = pcsim.Network(), nn.Linear(48, 64, bias=False)
    context, patches = net.add_node("context", (24,), prior=0.0), ("left", "middle", "right")
    for patch in patches:
        net.add_node(f"causes_{patch}", (48,), energy=pcsim.StudentT(0.1))
        net.add_edge(context, f"causes_{patch}", nn.Linear(24, 48))
    net.add_node("image", (192,), combine=pcsim.Concatenate())
    for patch in patches:
        net.add_edge(f"causes_{patch}", "image", features)
    sim = pcsim.Simulator(net, pcsim.Relaxation(15, 0.05, momentum=0.8))
    trainer = pcsim.Trainer(
        sim,
        torch.optim.Adam(net.parameters(), lr=0.01),
        inputs="image",
        target=None,
        callbacks=[UnitLength()],
        progress=False,
    )
    trainer.fit(train.split(50), epochs=1)
    pixel, shown = torch.arange(192), test[:8]
    hidden = (pixel // 64 == 1) & (pixel % 8 >= 4)
    patient = pcsim.Simulator(net, pcsim.Relaxation(60, 0.05, momentum=0.8))
    filled = patient.predict({"image": (shown, ~hidden)})["image"]
    pcsim.Simulator(net, pcsim.Relaxation(200, 0.05, temperature=1.0)).infer({}, batch=8)
    drawn = net["image"].prediction
    figure = plots.new_figure(9.5, 5.2)
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    left.suptitle("features", fontsize=11)
    plots.images(features.weight.T.unflatten(1, (8, 8)), columns=7, signed=True, figure=left)
    columns = ("seen", "partly hidden", "filled in", "drawn")
    for part, title, pictures in zip(
        right.subfigures(1, 4), columns, (shown, shown.masked_fill(hidden, 0.0), filled, drawn), strict=True
    ):
        part.suptitle(title, fontsize=9)
        strip = pictures.unflatten(1, (3, 8, 8)).movedim(1, 2).flatten(2)
        plots.images(strip, columns=1, signed=True, figure=part)
    return figure


DRAWN = (
    anatomy,
    schedules,
    descent,
    relaxation,
    similarity,
    depth,
    auxiliary,
    own,
    folded,
    skip,
    plan,
    tutorial,
    turning,
    generative,
)
FIGURES: dict[str, Callable[[], Figure]] = {function.__name__: function for function in DRAWN}


def main(names: list[str], folder: Path = FOLDER) -> None:
    """Draw some, or all."""
    torch.set_num_threads(1)
    for name in names or list(FIGURES):
        FIGURES[name]().savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
