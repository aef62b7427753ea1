"""Clamped nodes that hold integers: known as what they are, checked by name, and never a latent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import pcsim
from pcsim import clamps as given
from pcsim import plots, verify
from pcsim.errors import ClampError, GraphError

TOKENS = torch.tensor([[0, 1, 6], [2, 2, 3]])


class OneHot(nn.Module):
    """Takes integers, as it says, and has no parameters."""

    num_embeddings = 7

    def forward(self, value: Tensor) -> Tensor:
        return one_hot(value, self.num_embeddings).to(torch.get_default_dtype()).flatten(1)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Sequential(nn.Embedding(7, 2), nn.Flatten()),
    "sparse": lambda: nn.Sequential(nn.Embedding(7, 2, sparse=True), nn.Flatten(), nn.Linear(6, 6)),
    "bag": lambda: nn.EmbeddingBag(7, 6),
    "of one's own": lambda: nn.Sequential(OneHot(), nn.Linear(21, 6)),
}


def network(module: nn.Module | None = None) -> pcsim.Network:
    torch.manual_seed(0)
    net = pcsim.Network()
    net.add_node("input", (3,))
    net.add_node("hidden", (6,), transfer=nn.Tanh())
    net.add_node("output", (2,))
    net.add_edge("input", "hidden", MODULES["embedding"]() if module is None else module)
    net.add_edge("hidden", "output", nn.Linear(6, 2))
    return net


def batch(tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    return {"input": tokens, "output": torch.eye(2)}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "sparse"])
def test_they_are_learned_from_as_by_autograd(name: str) -> None:
    relaxation = pcsim.Relaxation(3, 0.2)
    if name == "of one's own":
        net, clamps = network(MODULES[name]()), batch()
        for engine in ("batched", "reference"):
            sim = pcsim.Simulator(net, relaxation, engine=engine)
            sim.infer(clamps)
            gradient = sim.gradients()[net.edges["input->hidden"].module[1].weight]
            error = net["hidden"].error * (1 - net["hidden"].prediction.square())
            torch.testing.assert_close(gradient, -error.mT @ OneHot()(TOKENS) / 2)
        return
    verify.check_gradients(network(MODULES[name]()), batch(), relaxation)
    verify.check_locality(network(MODULES[name]()), batch(), relaxation)
    case = verify.Case(network(MODULES[name]()).double(), {**batch(), "output": torch.eye(2).double()}, relaxation)
    verify.check_engines_agree(case)


def test_sparse_embeddings_have_sparse_gradients() -> None:
    net = network(MODULES["sparse"]())
    dense = copy.deepcopy(net)
    dense.edges["input->hidden"].module[0].sparse = False
    found = []
    for each in (net, dense):
        sim = pcsim.Simulator(each, pcsim.Relaxation(3, 0.2))
        sim.infer(batch())
        found.append(sim.gradients()[each.edges["input->hidden"].module[0].weight])
    assert found[0].is_sparse
    torch.testing.assert_close(found[0].to_dense(), found[1])


def test_a_node_of_integers_says_so() -> None:
    net = network()
    assert (net["input"].integers, net["hidden"].integers) == (7, None)
    net.add_edge("input", "output", nn.Sequential(nn.EmbeddingBag(5, 2)))
    assert net["input"].integers == 5
    assert "input   integers  3" in str(net)
    assert "shape=octagon" in plots.graphviz(net).splitlines()[4]
    assert "<svg" in net._repr_html_()


def test_no_message_goes_to_it_and_nothing_of_it_moves() -> None:
    net = network()
    sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.2), engine=lambda n: pcsim.BatchedEngine(n, leave_out=False))
    sim.infer(batch(), record=True)
    place = [edge.name for edge in sim.plan.wiring.edges].index("input->hidden")
    assert not any(phase.message[place] for phase in sim.plan.phases)
    assert "group of 1 integers 3" in str(sim.program)
    assert net["input"].value.dtype == torch.int64
    assert torch.equal(net["input"].value, TOKENS)
    assert torch.equal(net.edges["input->hidden"].message, torch.zeros(2, 3))


def test_integers_of_both_kinds_are_the_same() -> None:
    net = network()
    first, second = (
        pcsim.Simulator(net).predict({"input": TOKENS.to(d)})["output"] for d in (torch.int32, torch.int64)
    )
    assert torch.equal(first, second)


WRONG = {
    "missing": ({}, r"clamp 'input': nothing is given, but the node holds integers from 0 to 6, .* clamp all of it"),
    "masked": ({"input": (TOKENS, TOKENS > 0)}, "clamp 'input': a mask is given, but the node holds integers"),
    "numbers": ({"input": TOKENS.float()}, r"clamp 'input': dtype torch\.float32 given, expected torch\.int64 or"),
    "bytes": ({"input": TOKENS.byte()}, r"clamp 'input': dtype torch\.uint8 given, expected torch\.int64 or"),
    "too large": ({"input": TOKENS + 1}, "clamp 'input': integers from 1 to 7 given, expected 0 to 6; number them"),
    "negative": ({"input": TOKENS - 1}, "clamp 'input': integers from -1 to 5 given, expected 0 to 6"),
    "one axis": ({"input": TOKENS[0]}, r"clamp 'input': shape \(3,\) given, expected \(batch, 3\).*batch is the first"),
    "integers of another": (
        {"input": TOKENS, "output": torch.eye(2).long()},
        "clamp 'output': dtype torch.int64 given",
    ),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused_by_name(wrong: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if late:
        monkeypatch.setattr(given, "reads_freely", lambda device: False)
    net = network()
    optimizer = SGD(net.parameters(), lr=0.1)
    sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.2))
    sim.update(batch(), optimizer)
    before = {**net.state_dict(), "value": net["hidden"].value}
    before = {name: tensor.clone() for name, tensor in before.items()}
    clamps, message = WRONG[wrong]
    with pytest.raises(ClampError, match=message):
        sim.update({"output": torch.eye(2), **clamps}, optimizer)
    after = {**net.state_dict(), "value": net["hidden"].value}
    assert all(torch.equal(before[name], after[name]) for name in before)


def _read_twice(net: pcsim.Network) -> None:
    net.add_edge(net.add_node("n", (3,)), "output", nn.Linear(3, 2))
    net.add_edge("n", "output", nn.EmbeddingBag(3, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.add_edge("hidden", "input", nn.Linear(6, 3)), "node 'input' holds integers.*let it be a root"),
        (lambda net: net.add_edge("input", "input", nn.EmbeddingBag(3, 3)), "node 'input' holds integers"),
        (
            lambda net: net.add_edge("input", "output", nn.Linear(3, 2)),
            "takes numbers, but edge 'input->hidden' reads integers",
        ),
        (_read_twice, "takes integers, but edge 'n->output' reads numbers"),
        (lambda net: net.add_edge("hidden", "output", nn.EmbeddingBag(6, 2)), "node 'hidden' is predicted; give a"),
        (lambda net: setattr(net["input"], "prior", 0.0), "node 'input': holds integers.*drop the prior"),
        (lambda net: setattr(net["input"], "deterministic", True), "node 'input': holds integers"),
        (lambda net: net.add_edge(net.add_node("n", (3,), prior=0.0), "output", nn.EmbeddingBag(3, 2)), "is predicted"),
        (
            lambda net: net.add_edge(net.add_node("n", (3,), deterministic=True), "output", nn.EmbeddingBag(3, 2)),
            "is deterministic",
        ),
    ],
)
def test_nothing_predicts_integers(change: Callable[[pcsim.Network], object], message: str) -> None:
    net = network()
    with pytest.raises(GraphError, match=message):
        change(net)
    assert net["input"].integers == 7


def test_an_embedding_may_be_exchanged() -> None:
    net = network()
    sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.2))
    sim.infer(batch())
    net.edges["input->hidden"].module[0] = nn.Embedding(9, 2)
    sim.infer(batch(TOKENS + 2))
    net.edges["input->hidden"].module = nn.Linear(3, 6)
    sim.infer(batch(TOKENS.float()))
    assert net["input"].integers is None


def test_files_keep_them(tmp_path: Path) -> None:
    net = pcsim.topologies.transformer(vocabulary=7, length=3, width=4, heads=2, blocks=1)
    pcsim.save_network(net, tmp_path / "network.pcsim")
    again = pcsim.load_network(tmp_path / "network.pcsim")
    one, other = (pcsim.Simulator(each).predict({"input": TOKENS})["output"] for each in (net, again))
    assert torch.equal(one, other)
    assert again["input"].integers == 7
    image = pcsim.topologies.transformer(image=(1, 4, 4), patch=2, classes=3, width=4, heads=2, blocks=1)
    pcsim.save_network(image, tmp_path / "image.pcsim")
    assert str(pcsim.load_network(tmp_path / "image.pcsim")) == str(image)


def test_checkpoints_go_on_exactly(tmp_path: Path) -> None:
    pairs = TensorDataset(torch.randint(7, (8, 3)), torch.randn(8, 2))

    def trainer() -> pcsim.Trainer:
        net = network()
        sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.2))
        return pcsim.Trainer(sim, SGD(net.parameters(), lr=0.1), progress=False, seed=0)

    whole, first, second = trainer(), trainer(), trainer()
    loader = DataLoader(pairs, 4, shuffle=True)
    whole.fit(loader, epochs=2)
    first.fit(loader, epochs=1)
    first.save_checkpoint(tmp_path / "checkpoint")
    second.load_checkpoint(tmp_path / "checkpoint")
    second.fit(loader, epochs=1)
    states = (each.simulator.network.state_dict() for each in (whole, second))
    assert all(torch.equal(one, other) for one, other in zip(*(state.values() for state in states), strict=True))


def test_there_and_back_from_torch() -> None:
    model = nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    net = pcsim.from_sequential(model, input_shape=(3,))
    assert net["input"].integers == 7
    torch.testing.assert_close(pcsim.Simulator(net).predict({"input": TOKENS})["output"], model(TOKENS))
    module = pcsim.to_module(net)
    torch.testing.assert_close(module(TOKENS), model(TOKENS))
    exported = torch.export.export(pcsim.to_module(network()).eval(), (TOKENS,)).module()
    torch.testing.assert_close(exported(TOKENS), pcsim.to_module(network()).eval()(TOKENS))


def test_where_it_is_the_only_clamp_the_network_has_its_own_dtype() -> None:
    net = network().double()
    assert pcsim.Simulator(net).predict({"input": TOKENS})["output"].dtype == torch.float64
    sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.2))
    sim.infer({"input": TOKENS}, init={"hidden": torch.zeros(2, 6).double()})
    assert net["hidden"].value.dtype == torch.float64
