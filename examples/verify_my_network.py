"""How to verify a network of your own, and edges, energies and kernels of your own: a test file for pytest.

It defines one of each, and checks them on the network and on random graphs: that the local rules are the gradient of
the energy, that updates are local, that small steps descend, that the two engines agree, and that the kernel computes
what autograd does. To see a check fail, break something (halve ``LogCosh.value_gradient``, say): the failure ends in
the smallest network found that fails, as code that you can run.

    pip install -e '.[test]' && pytest examples/verify_my_network.py -n 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pcsim
from pcsim import verify

# Ours to verify


class Gated(nn.Module):
    """An edge module: a linear map, each output gated by another one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs  # named as the arguments, so that a failure can print the module
        self.content, self.gate = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, value: Tensor) -> Tensor:
        """(batch, inputs) to (batch, outputs)."""
        return self.content(value) * torch.sigmoid(self.gate(value))


@attrs.frozen
class LogCosh(pcsim.Energy):
    """An energy that forgives outliers: s² log cosh(ε/s), half of ε² near zero and s |ε| far away."""

    scale: float = 1.0

    def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
        """(batch, *shape); log cosh x written so that it does not overflow."""
        error = (value - prediction) / self.scale
        return self.scale**2 * (nn.functional.softplus(2 * error) - error - math.log(2))

    def value_gradient(self, value: Tensor, prediction: Tensor, scale: float | Tensor) -> Tensor:
        """In closed form: not needed, but faster than autograd."""
        return scale * self.scale * torch.tanh((value - prediction) / self.scale)

    def prediction_gradient(self, value: Tensor, prediction: Tensor, scale: float | Tensor) -> Tensor:
        """The same with the other sign."""
        return -self.value_gradient(value, prediction, scale)


class Scale(nn.Module):
    """An edge module with one weight per unit, worth a kernel: its products need no autograd."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units = units
        self.weight = nn.Parameter(torch.ones(units))

    def forward(self, value: Tensor) -> Tensor:
        """(batch, units) to the same."""
        return value * self.weight


class ScaleKernel(pcsim.Kernel[Scale]):
    """Computes :class:`Scale` without autograd."""

    def forward(self, call: pcsim.Call, value: Tensor, out: Tensor | None = None) -> Tensor:
        """The module's output."""
        return torch.mul(value, call.weights["weight"], out=out)

    def message(
        self, call: pcsim.Call, delta: Tensor, value: Tensor, output: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """What goes back to the source."""
        return torch.mul(delta, call.weights["weight"], out=out)

    def gradients(
        self, call: pcsim.Call, delta: Tensor, value: Tensor, factor: float, out: Mapping[str, Tensor]
    ) -> None:
        """Of the weight, summed over the batch, where it learns."""
        if "weight" in out:
            torch.mul((delta * value).sum(0), factor, out=out["weight"])


pcsim.register_kernel(Scale, ScaleKernel())


def make_network() -> pcsim.Network:
    """A network: two inputs that meet, a skip, and an output with our energy."""
    net = pcsim.Network()
    net.add_node("sound", (3,))
    net.add_node("image", (4,))
    net.add_node("meaning", (5,), transfer=nn.Tanh())
    net.add_node("context", (5,), precision=pcsim.LearnedPrecision())
    net.add_node("word", (2,), energy=LogCosh(0.5))
    net.add_edge("sound", "meaning", nn.Linear(3, 5))
    net.add_edge("image", "meaning", Gated(4, 5))
    net.add_edge("meaning", "context", Scale(5))
    net.add_edge("context", "word", Gated(5, 2))
    net.add_edge("sound", "word", nn.Linear(3, 2), gain=0.5)
    return net


# How


def node_factory(shape: tuple[int, ...]) -> st.SearchStrategy[Mapping[str, Any]]:
    """Arguments of a random node: our energy or the Gaussian, with or without a transfer."""
    energy = st.sampled_from([LogCosh(), LogCosh(0.5), pcsim.Gaussian()])
    transfer = st.sampled_from([nn.Tanh, nn.Softplus, nn.Identity]).map(lambda make: make())
    return st.fixed_dictionaries({"energy": energy, "transfer": transfer, "precision": st.sampled_from([0.5, 1.0])})


def edge_factory(source: tuple[int, ...], contribution: tuple[int, ...]) -> st.SearchStrategy[nn.Module]:
    """A random edge: ours, where the shapes let it."""
    gated = st.builds(Gated, st.just(source[0]), st.just(contribution[0]))
    return gated | st.builds(Scale, st.just(source[0])) if source == contribution else gated


random_graphs = verify.networks(
    nodes=(2, 5),
    node_factory=node_factory,
    edge_factory=edge_factory,
    node_shapes=st.tuples(st.integers(1, 4)),
)
our_network = verify.own_networks(make_network)

some = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,  # the same examples in every run; leave it out to see new ones
    database=None,
    phases=[Phase.explicit, Phase.generate],  # the checks find the smallest network that fails by themselves
    suppress_health_check=[HealthCheck.too_slow],
)


@some
@given(verify.cases(our_network | random_graphs, momentum=False, most_steps=2))
def test_the_local_rules_are_the_gradient_of_the_energy(case: verify.Case) -> None:
    verify.check_gradients(case.network, case.clamps, case.relaxation)


@some
@given(verify.cases(our_network | random_graphs, momentum=False, most_steps=3))
def test_updates_are_local(case: verify.Case) -> None:
    verify.check_locality(case.network, case.clamps, case.relaxation)


@some
@given(verify.cases(our_network | random_graphs, rules=[pcsim.SettledUpdate()], momentum=False, most_steps=2))
def test_small_steps_descend(case: verify.Case) -> None:
    verify.check_descent(case.network, case.clamps, case.relaxation)


@some
@given(verify.cases(our_network | random_graphs))
def test_the_engines_agree(case: verify.Case) -> None:
    verify.check_engines_agree(case)


@some
@given(units=st.integers(1, 6), batch=st.integers(1, 4))
def test_the_kernel_computes_what_autograd_does(units: int, batch: int) -> None:
    verify.check_kernel(Scale(units), (units,), batch=batch)


def test_our_network_as_it_is_used() -> None:
    """Without hypothesis: one network, one batch, the relaxation of one's experiments."""
    net, relaxation = make_network(), pcsim.Relaxation(steps=4, rate=0.1)
    clamps = {"sound": torch.randn(2, 3), "image": torch.randn(2, 4), "word": torch.randn(2, 2)}
    verify.check_gradients(net, clamps, relaxation)
    verify.check_locality(net, clamps, relaxation)
    verify.check_descent(net, clamps, relaxation)
