"""The checks of pcsim.verify fail when they should, refuse what they cannot judge, and take a user's own parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pcsim
from pcsim import verify
from pcsim.engine.reference import ReferenceEngine
from pcsim.errors import SettingError


def chain() -> verify.Case:
    """A chain of tanh nodes with both ends clamped."""
    torch.manual_seed(0)
    net = pcsim.Network()
    for index, width in enumerate((3, 4, 4, 2)):
        net.add_node(f"n{index}", (width,), transfer=nn.Tanh() if index in (1, 2) else None)
        if index:
            net.add_edge(f"n{index - 1}", f"n{index}", nn.Linear(net[f"n{index - 1}"].shape[0], width))
    net.double()
    clamps: verify.NamedClamps = {"n0": torch.randn(2, 3).double(), "n3": torch.randn(2, 2).double()}
    return verify.Case(net, clamps, pcsim.Relaxation(3, 0.2))


class Halved(pcsim.Gaussian):
    """A Gaussian whose derivative is wrong."""

    def value_gradient(self, value: Tensor, prediction: Tensor, scale: float | Tensor) -> Tensor:
        return 0.5 * scale * (value - prediction)


class Forgetful(ReferenceEngine):
    """Learns nothing at all."""

    def gradients(self, state: Any) -> Any:
        return {}


class Telepathic(ReferenceEngine):
    """Lets one node feel a distant one."""

    def relax(self, problem: Any, previous: Any = None, learn: Any = None) -> Any:
        state = super().relax(problem, previous, learn)
        if problem.relaxation.steps:
            state.value["n1"] = state.value["n1"] + 0.1 * state.value["n3"].mean()
        return state


class Sentimental(ReferenceEngine):
    """Lets one node feel where it started."""

    def relax(self, problem: Any, previous: Any = None, learn: Any = None) -> Any:
        state = super().relax(problem, previous, learn)
        state.value["n1"] = state.value["n1"] + 0.1 * problem.relaxation.steps * state.forward_value["n1"]
        return state


class Climbing(ReferenceEngine):
    """Ascends the energy."""

    def relax(self, problem: Any, previous: Any = None, learn: Any = None) -> Any:
        state = super().relax(problem, previous, learn)
        for name in problem.clamping.free if problem.relaxation.steps else ():
            state.value[name] = 2 * state.forward_value[name] - state.value[name]
        return state


def test_a_wrong_derivative_is_caught_with_code_that_rebuilds_the_network() -> None:
    case = chain()
    case.network["n2"].energy_function = Halved()
    with pytest.raises(AssertionError, match=r"(?s)node 'n2', step 1: −∂F_t/∂v.*expected.*net\.add_node\('n2'"):
        verify.check_gradients(case.network, case.clamps, case.relaxation, engine="reference")


def test_missing_gradients_are_caught() -> None:
    case = chain()
    with pytest.raises(AssertionError, match=r"parameter 'edge\.n0->n1\.module\.weight' \(its grad is None\)"):
        verify.check_gradients(case.network, case.clamps, case.relaxation, engine=Forgetful)
    with pytest.raises(AssertionError, match=r"gradient of 'edge\.n0->n1\.module\.weight' is None, expected a tensor"):
        verify.check_engines_agree(case, ("reference", Forgetful))


def test_an_update_that_is_not_local_is_caught() -> None:
    case = chain()
    with pytest.raises(AssertionError, match=r"node 'n1': its value after one step, with \['n3'\]"):
        verify.check_locality(case.network, case.clamps, pcsim.Relaxation(0, 0.2), engine=Telepathic)
    with pytest.raises(AssertionError, match="node 'n1': its value after step 1, restarted from the state before it"):
        verify.check_locality(case.network, case.clamps, pcsim.Relaxation(2, 0.2), engine=Sentimental)


def test_a_step_that_climbs_is_caught() -> None:
    case = chain()
    with pytest.raises(AssertionError, match="F_t rose"):
        verify.check_descent(case.network, case.clamps, pcsim.Relaxation(1, 0.2), engine=Climbing)


def test_engines_that_differ_are_caught() -> None:
    with pytest.raises(AssertionError, match=r"Climbing.* against reference: run 1"):
        verify.check_engines_agree(chain(), ("reference", Climbing))


def test_what_no_check_can_judge_is_refused() -> None:
    case, momentum = chain(), pcsim.Relaxation(3, 0.2, momentum=0.5)
    with pytest.raises(SettingError, match=r"momentum 0\.5"):
        verify.check_descent(case.network, case.clamps, momentum)
    with pytest.raises(SettingError, match=r"momentum 0\.5"):
        verify.check_locality(case.network, case.clamps, momentum)
    with pytest.raises(SettingError, match="IncrementalUpdate changes the weights"):
        verify.check_descent(case.network, case.clamps, case.relaxation, pcsim.IncrementalUpdate())
    with pytest.raises(SettingError, match="nothing is clamped"):
        verify.check_gradients(case.network, {})
    own = type("Own", (pcsim.LearningRule,), {})()
    with pytest.raises(SettingError, match="no objective of Own"):
        verify.check_gradients(case.network, case.clamps, case.relaxation, own)
    case.network["n1"].weight = 5.0
    with pytest.raises(SettingError, match="node 'n1' has weight 1/rate"):
        verify.check_descent(case.network, case.clamps, case.relaxation)


def test_descent_counts_free_units() -> None:
    net = pcsim.topologies.mlp([2, 300, 2])
    with pytest.raises(SettingError, match="600 free units, and a Hessian is computed for 400 at most"):
        verify.check_descent(net, {"input": torch.zeros(2, 2), "output": torch.zeros(2, 2)})


def test_own_nodes_and_edges_are_drawn() -> None:
    def nodes(shape: tuple[int, ...]) -> st.SearchStrategy[dict[str, Any]]:
        return st.just({"transfer": nn.Softplus()})

    def edges(source: tuple[int, ...], contribution: tuple[int, ...]) -> st.SearchStrategy[nn.Module]:
        linear = st.builds(nn.Linear, st.just(math.prod(source)), st.just(math.prod(contribution)))
        return linear.map(lambda module: nn.Sequential(nn.Flatten(), module, nn.Unflatten(1, contribution)))

    drawn = verify.networks(nodes=(3, 3), node_factory=nodes, edge_factory=edges, cross_entropy=False)
    net = find(drawn, lambda network: len(network.edges) >= 2)
    assert all(type(node.transfer) is nn.Softplus for node in net.nodes.values())
    assert all(type(edge.module[0]) is nn.Flatten for edge in net.edges.values())
    case = verify.Case(net, {"n0": torch.zeros(1, *net["n0"].shape).double()})
    verify.check_gradients(case.network, case.clamps, pcsim.Relaxation(2, 0.1))


def test_networks_cover_what_can_be_built() -> None:
    kinds = {
        "cycle": lambda net: any(len(group) > 1 for group in net.components()),
        "self-loop": lambda net: any(e.source_name == e.target_name for e in net.edges.values()),
        "parallel edges": lambda net: any(name.endswith("#2") for name in net.edges),
        "deterministic": lambda net: any(node.deterministic for node in net.nodes.values()),
        "three axes": lambda net: any(len(node.shape) == 3 and node.incoming for node in net.nodes.values()),
        "convolution": lambda net: any(isinstance(module, nn.Conv2d) for module in net.modules()),
        "product": lambda net: any(isinstance(module, pcsim.Product) for module in net.modules()),
        "concatenation": lambda net: any(isinstance(module, pcsim.Concatenate) for module in net.modules()),
        "cross-entropy": lambda net: any(
            isinstance(node.energy_function, pcsim.CrossEntropy) for node in net.nodes.values()
        ),
        "learned precision": lambda net: any(node.log_precision is not None for node in net.nodes.values()),
        "learned prior": lambda net: any(isinstance(node.prior, nn.Parameter) for node in net.nodes.values()),
        "shared module": lambda net: len({id(e.module) for e in net.edges.values()}) < len(net.edges),
        "several roots": lambda net: len(net.roots()) > 1,
    }
    missing = set(kinds)

    @settings(max_examples=200, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(verify.networks())
    def draw(net: pcsim.Network) -> None:
        missing.difference_update([kind for kind in missing if kinds[kind](net)])

    draw()
    assert not missing
