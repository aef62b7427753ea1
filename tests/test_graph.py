"""A network is built, asked, printed, copied, saved and changed; oracle: graphs small enough to see."""

from __future__ import annotations

import copy
import pickle
import random

import networkx as nx
import pytest
import torch
from torch import Tensor, nn, optim

import pcsim
from pcsim.errors import GraphError, StateError

ENGINES = pytest.mark.parametrize("engine", ["reference", "batched"])


def drawn(edges: str, deterministic: str = "") -> pcsim.Network:
    """A graph from pairs of letters: "ab bc" is a → b → c."""
    net = pcsim.Network()
    for name in dict.fromkeys(edges.replace(" ", "")):
        net.add_node(name, (2,), deterministic=name in deterministic)
    for source, target in edges.split():
        net.add_edge(source, target)
    return net


def names(nodes: list[pcsim.Node]) -> str:
    return "".join(node.name for node in nodes)


# Questions


def test_ends() -> None:
    net = drawn("ac bc cd ce")
    assert names(net.roots()) == "ab"
    assert names(net.sinks()) == "de"
    assert [edge.name for edge in net.incoming("c")] == ["a->c", "b->c"]
    assert [edge.name for edge in net["c"].outgoing] == ["c->d", "c->e"]
    assert net.in_degree("c") == 2
    assert net["c"].incoming[0].source is net["a"]
    assert net["c"].incoming[0].target is net["c"]


def test_neighbours_come_once_and_without_the_node_itself() -> None:
    net = drawn("ab ab bb bc cb")
    assert names(net.neighbours("b")) == "ac"
    assert names(net.neighbours(net["c"])) == "b"


def test_topological_order() -> None:
    net = drawn("bd ab ac cd")
    order = names(net.topological_order())
    assert all(order.index(source) < order.index(target) for source, target in ("bd", "ab", "ac", "cd"))


def test_components_come_sources_first() -> None:
    assert [names(group) for group in drawn("ab bc cb cd").components()] == ["a", "bc", "d"]
    assert [names(group) for group in drawn("ba ca").components()][-1] == "a"
    assert pcsim.Network().components() == []


@pytest.mark.parametrize("seed", range(20))
def test_components_come_in_the_order_that_networkx_gives(seed: int) -> None:
    draw = random.Random(seed)
    net = drawn(" ".join("".join(draw.choices("abcdefghijklmnop", k=2)) for _ in range(4 + seed)))
    condensed, place = nx.condensation(nx.DiGraph(net.to_networkx())), {name: n for n, name in enumerate(net.nodes)}
    members = {c: sorted(condensed.nodes[c]["members"], key=place.__getitem__) for c in condensed}
    ordered = nx.lexicographical_topological_sort(condensed, key=lambda c: place[members[c][0]])
    assert [names(group) for group in net.components()] == ["".join(members[c]) for c in ordered]


def test_levels_count_from_the_sinks_unless_told() -> None:
    net = drawn("ab bc cd", "c")
    assert net.levels() == {"a": 2, "b": 1, "c": 1, "d": 0}
    assert net.levels(["b"]) == {"a": 1, "b": 0}
    assert net.levels([net["b"]]) == {"a": 1, "b": 0}


def test_unequal_paths_are_found_where_they_part_and_meet() -> None:
    def found(edges: str, deterministic: str = "") -> list[tuple[str, str, int, int]]:
        return [(a.name, b.name, low, high) for a, b, low, high in drawn(edges, deterministic).unequal_paths()]

    assert found("ab bc cd") == []
    assert found("ab ac bd cd") == []
    assert found("ab bc ac") == [("a", "c", 1, 2)]
    assert found("ab bs as sc", "s") == [("a", "s", 0, 1)]
    assert found("ab bc cd ad de") == [("a", "d", 1, 3)]
    # A residual stack: each block's paths part at its sum and meet at the next.
    net = pcsim.topologies.residual_mlp(3, 4, 2, blocks=2)
    pairs = [(a.name, b.name, low, high) for a, b, low, high in net.unequal_paths()]
    assert ("stem", "sum1", 0, 2) in pairs
    assert ("sum1", "sum2", 0, 2) in pairs


def test_as_networkx() -> None:
    net = drawn("ab ab bc")
    graph = net.to_networkx()
    assert isinstance(graph, nx.MultiDiGraph)
    assert list(graph.nodes) == ["a", "b", "c"]
    assert sorted(graph.edges(keys=True)) == [("a", "b", "a->b"), ("a", "b", "a->b#2"), ("b", "c", "b->c")]
    assert graph.nodes["a"]["node"] is net["a"]
    assert graph.edges["a", "b", "a->b#2"]["edge"] is net.edges["a->b#2"]


def test_membership_and_listing() -> None:
    net, other = drawn("ab"), drawn("ab")
    assert "a" in net
    assert net["a"] in net
    assert other["a"] not in net
    assert "z" not in net
    assert 3 not in net
    assert list(net.nodes) == ["a", "b"]
    assert list(net.edges) == ["a->b"]
    with pytest.raises(TypeError):
        net.nodes["c"] = net["a"]  # type: ignore[index]


def test_printing() -> None:
    net = pcsim.Network()
    net.add_node("image", (1, 4, 4))
    net.add_node("hidden", (8,), transfer=nn.Tanh(), precision=pcsim.LearnedPrecision())
    net.add_node("sum", (8,), deterministic=True)
    net.add_node("digit", (3,), energy=pcsim.CrossEntropy())
    net.add_node("bias", (3,), prior=0.5)
    net.add_edge("image", "hidden", nn.Sequential(nn.Flatten(), nn.Linear(16, 8)))
    net.add_edge("hidden", "sum")
    net.add_edge("sum", "digit", nn.Linear(8, 3), gain=0.5)
    lines = str(net).splitlines()
    assert [line.split()[0] for line in lines] == ["node", "------", "image", "hidden", "sum", "digit", "bias", "5"]
    assert lines[2].split()[1:] == ["latent", "1x4x4", "-", "Gaussian", "0"]
    assert "image (Sequential)" in lines[3]
    assert lines[3].split()[-3:] == ["Tanh", "Gaussian", "137"]
    assert lines[4].split()[1] == "deterministic"
    assert lines[5].split()[-2:] == ["CrossEntropy", "27"]
    assert "prior" in lines[6]
    assert lines[7] == "5 nodes, 3 edges, 164 parameters"
    assert repr(net) == "Network(5 nodes, 3 edges)"
    assert repr(net["sum"]) == "Node('sum', shape=(8,), deterministic)"
    assert repr(net.edges["sum->digit"]).endswith("gain=0.5)")
    assert repr(net.edges["hidden->sum"]) == "Edge('hidden->sum', Identity())"


# Edges


def test_parallel_edges_get_names_of_their_own() -> None:
    net = drawn("ab ab")
    net.add_edge("a", "b", name="third")
    net.add_edge("a", "b")
    assert list(net.edges) == ["a->b", "a->b#2", "third", "a->b#3"]
    net.remove_edge("a->b#2")
    assert net.add_edge("a", "b").name == "a->b#2"


@ENGINES
def test_parallel_edges_add_up(engine: str) -> None:
    net = pcsim.Network()
    net.add_node("a", (3,))
    net.add_node("b", (2,))
    first, second = (net.add_edge("a", "b", nn.Linear(3, 2), gain=gain) for gain in (1.0, -0.5))
    value = torch.randn(4, 3)
    predicted = pcsim.Simulator(net, engine=engine).predict({"a": value})["b"]
    torch.testing.assert_close(predicted, (first.module(value) - 0.5 * second.module(value)).detach())


@ENGINES
def test_a_self_loop_reads_the_node_s_own_value(engine: str) -> None:
    net = pcsim.Network()
    net.add_node("a", (2,))
    net.add_edge("a", "a", gain=0.5)
    simulator = pcsim.Simulator(net, pcsim.Relaxation(1, 0.1), engine=engine)
    value = torch.tensor([[2.0, -4.0]])
    simulator.infer({"a": value})
    torch.testing.assert_close(net["a"].prediction, 0.5 * value)
    torch.testing.assert_close(net["a"].error, 0.5 * value)
    torch.testing.assert_close(net.edges["a->a"].message, 0.25 * value)


@ENGINES
@pytest.mark.parametrize(
    ("combine", "width", "expected"),
    [
        (None, 2, lambda a, b: a + b),
        (pcsim.Product(), 2, lambda a, b: a * b),
        (pcsim.Concatenate(), 4, lambda a, b: torch.cat((a, b), 1)),
        (pcsim.Concatenate(-1), 4, lambda a, b: torch.cat((a, b), 1)),
    ],
    ids=["sum", "product", "concatenate", "concatenate the last axis"],
)
def test_combining(combine: nn.Module | None, width: int, expected, engine: str) -> None:  # type: ignore[no-untyped-def]
    net = pcsim.Network()
    net.add_node("a", (2,))
    net.add_node("b", (2,))
    net.add_node("c", (width,), combine=combine, transfer=nn.Tanh())
    net.add_edge("a", "c")
    net.add_edge("b", "c", gain=2.0)
    a, b = torch.randn(3, 2), torch.randn(3, 2)
    predicted = pcsim.Simulator(net, engine=engine).predict({"a": a, "b": b})["c"]
    torch.testing.assert_close(predicted, torch.tanh(expected(a, 2 * b)))


def test_concatenating_images_by_channel() -> None:
    net = pcsim.Network()
    for name, channels in (("a", 1), ("b", 2)):
        net.add_node(name, (channels, 3, 3))
    net.add_node("c", (3, 3, 3), combine=pcsim.Concatenate())
    net.add_edge("a", "c")
    net.add_edge("b", "c")
    a, b = torch.randn(2, 1, 3, 3), torch.randn(2, 2, 3, 3)
    assert torch.equal(pcsim.Simulator(net).predict({"a": a, "b": b})["c"], torch.cat((a, b), 1))


@ENGINES
def test_a_module_of_several_arguments_combines(engine: str) -> None:
    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            return torch.softmax(query * key, -1) * key

    net = pcsim.Network()
    net.add_node("a", (3,))
    net.add_node("b", (3,), combine=Attention())
    net.add_edge("a", "b")
    net.add_edge("a", "b", nn.Tanh())
    a = torch.randn(2, 3)
    predicted = pcsim.Simulator(net, engine=engine).predict({"a": a})["b"]
    torch.testing.assert_close(predicted, Attention()(a, torch.tanh(a)))


@ENGINES
def test_nodes_of_a_single_unit_without_axes(engine: str) -> None:
    net = pcsim.Network()
    net.add_node("a", ())
    net.add_node("b", ())
    net.add_edge("a", "b", gain=2.0)
    simulator = pcsim.Simulator(net, engine=engine)
    trace = simulator.infer({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([2.0, 5.0])}, record=True)
    assert torch.equal(net["b"].error, torch.tensor([0.0, 1.0]))
    assert torch.equal(trace.energy("b")[-1], torch.tensor([0.0, 0.5]))


@ENGINES
def test_a_network_without_parameters_takes_the_precision_of_its_clamps(engine: str) -> None:
    net = drawn("ab")
    value = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert pcsim.Simulator(net, engine=engine).predict({"a": value})["b"].dtype == torch.float64
    assert pcsim.Simulator(net, engine=engine).predict({"a": value.float()})["b"].dtype == torch.float32


# Changing


def test_removing_an_edge() -> None:
    net = drawn("ab bc ac")
    revision = net.revision
    net.remove_edge("a->c")
    net.remove_edge(net.edges["b->c"])
    assert list(net.edges) == ["a->b"]
    assert net.incoming("c") == []
    assert net.revision > revision
    assert "a->c" not in net.edges
    assert names(net.sinks()) == "bc"


def test_removing_a_node_takes_its_edges() -> None:
    net = drawn("ab bb bc ac")
    net.remove_node("b")
    assert list(net.nodes) == ["a", "c"]
    assert list(net.edges) == ["a->c"]
    assert net.outgoing("a") == [net.edges["a->c"]]
    net.add_node("b", (7,))
    assert net["b"].shape == (7,)


@ENGINES
def test_a_changed_graph_runs_as_it_is_now(engine: str) -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 4, 2])
    simulator = pcsim.Simulator(net, pcsim.Relaxation(3, 0.2), engine=engine)
    clamps = {"input": torch.randn(2, 3), "output": torch.randn(2, 2)}
    simulator.infer(clamps)
    net.add_node("context", (5,))
    net.add_edge("context", "hidden1", nn.Linear(5, 4))
    clamps["context"] = torch.randn(2, 5)
    simulator.infer(clamps)
    fresh = copy.deepcopy(net)
    pcsim.Simulator(fresh, simulator.relaxation, engine=engine).infer(clamps)
    assert torch.equal(net["hidden1"].value, fresh["hidden1"].value)
    net.remove_node("context")
    del clamps["context"]
    simulator.infer(clamps)
    assert net["hidden1"].value.shape == (2, 4)


# Copies and files


def test_a_copy_has_no_run_of_its_own_and_shares_nothing() -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 4, 2])
    clamps = {"input": torch.randn(2, 3), "output": torch.randn(2, 2)}
    pcsim.Simulator(net).infer(clamps)
    twin = copy.deepcopy(net)
    with pytest.raises(StateError, match="node 'hidden1' has no state yet"):
        _ = twin["hidden1"].value
    assert twin["hidden1"] in twin
    assert twin["hidden1"] not in net
    assert twin["hidden1"].network is twin
    assert twin.edges["input->hidden1"].source is twin["input"]
    with torch.no_grad():
        twin.edges["input->hidden1"].module.weight.zero_()
    assert net.edges["input->hidden1"].module.weight.any()
    twin.add_node("more", (1,))
    assert "more" not in net
    pcsim.Simulator(twin).infer(clamps)
    assert not torch.equal(net["hidden1"].value, twin["hidden1"].value)


def test_pickling() -> None:
    net = pcsim.topologies.mlp([3, 4, 2])
    twin = pickle.loads(pickle.dumps(net))
    value = torch.randn(2, 3)
    assert torch.equal(
        pcsim.Simulator(net).predict({"input": value})["output"],
        pcsim.Simulator(twin).predict({"input": value})["output"],
    )


@ENGINES
def test_state_dict_round_trip(engine: str) -> None:
    def build() -> pcsim.Network:
        net = pcsim.Network()
        net.add_node("a", (3,), prior=nn.Parameter(torch.randn(3)))
        net.add_node("b", (4,), transfer=nn.PReLU(), precision=pcsim.LearnedPrecision(per_unit=True))
        net.add_node("c", (2,), precision=torch.rand(2) + 0.5)
        net.add_edge("a", "b", nn.Linear(3, 4))
        net.add_edge("b", "c", nn.Linear(4, 2))
        return net

    net, other = build(), build()
    with torch.no_grad():
        net["b"].log_precision.normal_()
    clamps = {"c": torch.randn(5, 2)}
    simulators = [pcsim.Simulator(n, pcsim.Relaxation(4, 0.1), engine=engine) for n in (net, other)]
    for simulator in simulators:
        simulator.infer(clamps)
    assert not torch.equal(net["b"].value, other["b"].value)
    other.load_state_dict(net.state_dict())
    for simulator in simulators:
        simulator.infer(clamps)
    for name in net.nodes:
        assert torch.equal(net[name].value, other[name].value), name
    assert set(net.state_dict()) == {
        "nodes.a.prior",
        "nodes.b.log_precision",
        "nodes.b.transfer.weight",
        "nodes.c.own_precision",
        "edges.a->b.module.weight",
        "edges.a->b.module.bias",
        "edges.b->c.module.weight",
        "edges.b->c.module.bias",
    }


@ENGINES
def test_another_dtype(engine: str) -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([3, 4, 2])
    net.add_node("noise", (4,), prior=0.25, precision=torch.ones(4))
    net.add_edge("noise", "hidden1")
    clamps = {"input": torch.randn(2, 3), "output": torch.randn(2, 2)}
    simulator = pcsim.Simulator(net, pcsim.Relaxation(3, 0.2), engine=engine)
    simulator.infer(clamps)
    single = net["hidden1"].value.clone()
    net.to(torch.float64)
    trace = simulator.infer({name: value.double() for name, value in clamps.items()}, record=True)
    assert net["hidden1"].value.dtype == torch.float64
    assert trace.energies is not None
    assert trace.energies.dtype == torch.float64
    torch.testing.assert_close(net["hidden1"].value.float(), single)
    simulator.compute_gradients()
    assert all(parameter.grad is None or parameter.grad.dtype == torch.float64 for parameter in net.parameters())
    net.add_edge("input", "output", nn.Linear(3, 2).double())  # probed in the network's own dtype


def test_it_is_a_module_like_any_other() -> None:
    net = pcsim.topologies.mlp([3, 4, 2])
    assert sum(parameter.numel() for parameter in net.parameters()) == 3 * 4 + 4 + 4 * 2 + 2
    net.apply(lambda module: nn.init.constant_(module.weight, 0.5) if isinstance(module, nn.Linear) else None)
    assert bool((net.edges["input->hidden1"].module.weight == 0.5).all())
    net.eval()
    assert not net["hidden1"].transfer.training
    net.edges["input->hidden1"].requires_grad_(False)
    simulator = pcsim.Simulator(net, pcsim.Relaxation(4, 0.2))
    optimizer = optim.SGD(net.parameters(), 0.1)
    simulator.update({"input": torch.ones(1, 3), "output": torch.ones(1, 2)}, optimizer)
    assert net.edges["input->hidden1"].module.weight.grad is None
    assert net.edges["hidden1->output"].module.weight.grad is not None


# Ready graphs


def test_mlp_with_latents_after_the_activation() -> None:
    net = pcsim.topologies.mlp([5, 4, 3, 2], activation=nn.ReLU)
    assert list(net.nodes) == ["input", "hidden1", "hidden2", "output"]
    assert [type(net[name].transfer) for name in net.nodes] == [nn.Identity, nn.ReLU, nn.ReLU, nn.Identity]
    assert all(type(edge.module) is nn.Linear for edge in net.edges.values())
    composed = nn.Sequential(
        net.edges["input->hidden1"].module,
        nn.ReLU(),
        net.edges["hidden1->hidden2"].module,
        nn.ReLU(),
        net.edges["hidden2->output"].module,
    )
    value = torch.randn(6, 5)
    torch.testing.assert_close(pcsim.Simulator(net).predict({"input": value})["output"], composed(value).detach())


def test_mlp_with_latents_before_the_activation() -> None:
    net = pcsim.topologies.mlp([5, 4, 3], latents="before", bias=False, energy=pcsim.CrossEntropy())
    assert all(type(node.transfer) is nn.Identity for node in net.nodes.values())
    assert type(net.edges["input->hidden1"].module) is nn.Linear
    assert type(net.edges["hidden1->output"].module[0]) is nn.Tanh
    assert net["output"].energy_function == pcsim.CrossEntropy()
    assert net["hidden1"].energy_function == pcsim.Gaussian()
    value = torch.randn(6, 5)
    hidden = net.edges["input->hidden1"].module(value)
    predicted = pcsim.Simulator(net).predict({"input": value})
    torch.testing.assert_close(predicted["hidden1"], hidden.detach())
    torch.testing.assert_close(predicted["output"], net.edges["hidden1->output"].module[1](torch.tanh(hidden)).detach())
    assert sum(parameter.numel() for parameter in net.parameters()) == 5 * 4 + 4 * 3


def test_mlp_weights_keep_the_scale_of_the_activity() -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([100, 400, 400])
    for edge in net.edges.values():
        assert edge.module.weight.std().item() == pytest.approx(edge.module.in_features**-0.5, rel=0.05)
        assert not edge.module.bias.any()


def test_residual_mlp() -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.residual_mlp(5, 4, 3, blocks=2, gain=0.5)
    assert net["sum1"].deterministic
    assert [edge.name for edge in net["sum2"].incoming] == ["main2b->sum2", "skip2"]
    assert net.edges["main1a->main1b"].gain == 0.5
    assert net.levels() == {
        "input": 6,
        "stem": 5,
        "main1a": 4,
        "main1b": 3,
        "sum1": 3,
        "main2a": 2,
        "main2b": 1,
        "sum2": 1,
        "output": 0,
    }
    value = torch.randn(6, 5)
    z = net.edges["input->stem"].module(value)
    for k in (1, 2):
        first = net.edges[f"{'stem' if k == 1 else 'sum1'}->main{k}a"].module(z)
        z = z + 0.5 * net.edges[f"main{k}a->main{k}b"].module(first)
    expected = net.edges["sum2->output"].module(z).detach()
    torch.testing.assert_close(pcsim.Simulator(net).predict({"input": value})["output"], expected)


def test_topologies_refuse_what_makes_no_network() -> None:
    with pytest.raises(GraphError, match=r"mlp: sizes \[3\] given"):
        pcsim.topologies.mlp([3])
    with pytest.raises(GraphError, match="latents='beside' given"):
        pcsim.topologies.mlp([3, 2], latents="beside")  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="residual_mlp: 0 blocks given"):
        pcsim.topologies.residual_mlp(3, 4, 2, blocks=0)


def test_what_is_taken_away_or_put_in_its_place_is_gone() -> None:
    net = pcsim.Network()
    root, node = (
        net.add_node("root", (2,), prior=1.0),
        net.add_node("node", (2,), precision=pcsim.LearnedPrecision(4.0)),
    )
    net.add_edge(root, node, nn.Linear(2, 2))
    assert node.own_precision.item() == pytest.approx(4.0)
    node.own_precision = 3.0
    assert node.own_precision == 3.0
    assert node.log_precision is None
    learned = nn.Parameter(torch.zeros(2))
    for prior in (torch.ones(2), learned, 0.5, None):
        root.prior = prior
        assert root.predicted == (prior is not None)
        assert sum("prior" in name for name in (*root._parameters, *root._buffers)) == (prior is not None)
    root.prior = learned
    assert root.prior is learned
    assert learned in root.trainable
    node.own_precision = pcsim.LearnedPrecision(0.5, per_unit=True)
    assert node.own_precision.tolist() == pytest.approx([0.5, 0.5])


def test_a_fingerprint_comes_back_with_what_it_was_of() -> None:
    net = pcsim.topologies.mlp([2, 3, 2])
    training = net.fingerprint()
    evaluating = net.eval().fingerprint()
    assert evaluating is not training
    assert net.train().fingerprint() is training
    assert net.eval().fingerprint() is evaluating
    bare = pcsim.topologies.mlp([2, 2], bias=False)
    before = bare.fingerprint()
    bare.edges["input->output"].module.bias = nn.Parameter(torch.ones(2))
    assert bare.fingerprint() is not before
    nothing = nn.Sequential()
    bare.edges["input->output"].module = nothing
    before = bare.fingerprint()
    nothing.append(nn.Tanh())
    assert bare.fingerprint() is not before


@pytest.mark.parametrize("axis", [1, -1, -2])
def test_contributions_are_joined_along_any_axis(axis: int) -> None:
    net = pcsim.Network()
    net.add_node("a", (2, 3))
    net.add_node("b", (2, 6) if axis in (1, -1) else (4, 3), combine=pcsim.Concatenate(axis))
    for name in ("one", "other"):
        net.add_edge("a", "b", name=name)
    value = torch.arange(6.0).view(1, 2, 3)
    found = pcsim.Simulator(net).predict({"a": value})["b"]
    assert torch.equal(found[0], torch.cat([value[0], value[0]], axis))


def test_a_seed_of_zero_is_a_seed() -> None:
    net = pcsim.Network()
    net.add_node("a", (20,))
    net.add_node("b", (20,), transfer=nn.Dropout(0.5))
    edge = net.add_edge("a", "b", nn.Dropout(0.5))
    value = torch.ones(2, 20)
    assert torch.equal(edge.contribute(value, 0), edge.contribute(value, 0))
    assert torch.equal(net["b"].predict([value], 0), net["b"].predict([value], 0))
    assert not torch.equal(edge.contribute(value, 0), edge.contribute(value, 1))
