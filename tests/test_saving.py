"""Whole networks in files: all of a network comes back, what cannot come back is refused, and files run no code."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import pcsim
from pcsim import io, topologies
from pcsim.errors import FileError, SettingError
from pcsim.saving import load_network, register_module, registry, save_network
from pcsim.verify import Case, cases


@pytest.fixture(autouse=True)
def no_registrations() -> Iterator[None]:
    before = dict(registry.RECIPES)
    yield
    registry.RECIPES.clear()
    registry.RECIPES.update(before)


def there_and_back(net: pcsim.Network, path: Path) -> pcsim.Network:
    save_network(net, path)
    return load_network(path)


def holding(module: nn.Module) -> pcsim.Network:
    """A network with a module inside one that registers itself, so that any module can be tried on no values at all."""
    net = pcsim.Network()
    net.add_node("a", (2,))
    net.add_node("b", (2,))
    net.add_edge("a", "b", Holder(module))
    return net


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, value: Tensor) -> Tensor:
        return value


class Block(nn.Module):
    """Builds its own parts, keeps none of its arguments, and is twice as wide inside."""

    def __init__(self, units: int, depth: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(units, 2 * units)
        self.rest = nn.ModuleList([nn.Linear(2 * units, 2 * units) for _ in range(depth)])
        self.last = nn.Linear(2 * units, units, bias=False)
        self.register_buffer("scale", torch.ones(units), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        hidden = self.first(value)
        for layer in self.rest:
            hidden = torch.tanh(layer(hidden))
        return self.last(hidden) * self.scale


def block_config(block: Block) -> dict[str, Any]:
    return {"units": block.last.out_features, "depth": len(block.rest)}


def check_same(net: pcsim.Network, other: pcsim.Network) -> None:
    assert str(other) == str(net)
    assert list(other.nodes) == list(net.nodes)
    assert list(other.edges) == list(net.edges)
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        ours = list(tensors(net, remove_duplicate=False))
        theirs = list(tensors(other, remove_duplicate=False))
        assert [name for name, _ in ours] == [name for name, _ in theirs]
        shared = [[[id(t) for _, t in found].index(id(t)) for _, t in found] for found in (ours, theirs)]
        assert shared[0] == shared[1]
        for (_, one), (_, another) in zip(ours, theirs, strict=True):
            assert torch.equal(one, another)
            assert (one.dtype, one.requires_grad) == (another.dtype, another.requires_grad)
            assert type(one) is type(another)
            assert one.data_ptr() != another.data_ptr() or not one.numel()
    for (name, one), (again, another) in zip(net.named_modules(), other.named_modules(), strict=True):
        assert name == again
        assert one.training == another.training
        assert type(one) is type(another) or name == ""
    for name, edge in net.edges.items():
        again = other.edges[name]
        assert (edge.source_name, edge.target_name, edge.gain) == (again.source_name, again.target_name, again.gain)
        assert (repr(edge.module), edge.stochastic) == (repr(again.module), again.stochastic)
    for name, node in net.nodes.items():
        again = other[name]
        for attribute in ("shape", "energy_weight", "deterministic", "energy_function", "stochastic"):
            assert getattr(node, attribute) == getattr(again, attribute)
        assert [edge.name for edge in node.incoming] == [edge.name for edge in again.incoming]
        assert repr(node.combine) == repr(again.combine)


def check_relaxes_alike(net: pcsim.Network, other: pcsim.Network, relaxation: pcsim.Relaxation | None = None) -> None:
    generator = torch.Generator().manual_seed(1)
    dtype, _ = net.tensor_options()
    clamps = {
        node.name: torch.randn(3, *node.shape, generator=generator, dtype=dtype) for node in (net.roots() + net.sinks())
    }
    inputs = {node.name: clamps[node.name] for node in net.roots()}
    for one, another in zip(*(pcsim.Simulator(n).predict(inputs).values() for n in (net, other)), strict=True):
        assert torch.equal(one, another)
    for network in (net, other):
        torch.manual_seed(5)
        pcsim.Simulator(network, relaxation or pcsim.Relaxation(4, 0.05)).infer(clamps)
    for name in net.nodes:
        assert torch.equal(net[name].value, other[name].value)


TOPOLOGIES: dict[str, Callable[[], pcsim.Network]] = {
    "mlp": lambda: topologies.mlp([4, 6, 5, 3], energy=pcsim.CrossEntropy()),
    "mlp before": lambda: topologies.mlp([4, 6, 3], latents="before", bias=False, activation=nn.ELU),
    "residual mlp": lambda: topologies.residual_mlp(4, 6, 3, blocks=2, gain=0.7),
    "balanced": lambda: pcsim.balance_paths(topologies.residual_mlp(4, 6, 3, blocks=3), 0.5),
    "balanced apart": lambda: pcsim.balance_paths(topologies.residual_mlp(4, 6, 3, blocks=3), 0.5, share=False),
    "vgg": lambda: topologies.vgg("VGG7", width=0.03, batch_norm=True),
    "vgg with linear layers": lambda: topologies.vgg("VGG15", width=0.01),
    "resnet": lambda: topologies.resnet("ResNet18", width=0.05, batch_norm=True, image=(3, 8, 8)),
    "balanced resnet": lambda: pcsim.balance_paths(topologies.resnet((1, 1), width=0.05, image=(3, 8, 8)), 0.5),
}


class TestRoundTrip:
    @pytest.mark.parametrize("name", TOPOLOGIES)
    def test_topologies(self, name: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        net = TOPOLOGIES[name]()
        other = there_and_back(net, tmp_path / "net")
        check_same(net, other)
        check_relaxes_alike(net, other, pcsim.Relaxation(20, 0.5, precision=pcsim.Spiking()))

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases())
    def test_random_networks(self, case: Case, tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.mktemp("random") / "net"
        other = there_and_back(case.network, path)
        check_same(case.network, other)
        for network in (case.network, other):
            pcsim.Simulator(network, case.relaxation).infer(case.clamps)
        for name, node in case.network.nodes.items():
            assert torch.equal(node.value, other[name].value)
            assert torch.equal(node.energy, other[name].energy)

    def test_all_kinds_of_nodes_sharing_and_modes(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        net = pcsim.Network()
        prior = nn.Parameter(torch.rand(4))
        net.add_node("a", (4,), prior=prior)
        net.add_node("a again", (4,), prior=prior, precision=torch.rand(4))
        net.add_node("number", (4,), prior=0.5, energy_weight=0.25)
        net.add_node("fixed", (4,), prior=torch.rand(4), precision=2)
        both = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Tanh(), nn.Dropout(0.3)))
        net.add_node("b", (4,), precision=pcsim.LearnedPrecision(3.0))
        net.add_node("c", (4,), precision=pcsim.LearnedPrecision(0.5, per_unit=True), transfer=both[2])
        net.add_node("d", (16,), combine=pcsim.Concatenate(-1), deterministic=True)
        net.add_node("e", (4,), combine=pcsim.Product(), transfer=nn.Softmax(1), energy=pcsim.CrossEntropy())
        net.add_edge("a", "b", both)
        net.add_edge("a again", "c", both, gain=-0.5, name="shared module")
        tied = nn.Linear(4, 4)
        tied.weight = both[0].weight
        for source in ("c", "number", "fixed", "b"):
            net.add_edge(source, "d", tied)
        net.add_edge("d", "e", nn.Linear(16, 4))
        net.add_edge("b", "e", nn.Identity())
        net.add_edge("b", "e")
        net.add_edge("b", "b", nn.Linear(4, 4, bias=False), gain=0.1)
        net.remove_edge("number->d")
        net.add_edge("number", "d", nn.ModuleDict({"x": tied})["x"])
        tied.bias.requires_grad_(False)
        net["c"].log_precision = net["b"].log_precision = nn.Parameter(torch.tensor(0.3))
        net.double()
        net.check()
        net.edges["d->e"].module.float()
        net.edges["d->e"].module.double()
        both[2].eval()
        net["fixed"].eval()
        other = there_and_back(net, tmp_path / "net")
        check_same(net, other)
        assert other.edges["a->b"].module is other.edges["shared module"].module
        assert other.edges["a->b"].module[2] is other["c"].transfer
        assert other["a"].prior is other["a again"].prior
        assert other["b"].log_precision is other["c"].log_precision
        check_relaxes_alike(net, other)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_dtype(self, dtype: torch.dtype, tmp_path: Path) -> None:
        net = topologies.vgg("VGG5", width=0.02, batch_norm=True).to(dtype)
        check_same(net, there_and_back(net, tmp_path / "net"))

    def test_where_nodes_are_placed_is_not_kept(self, tmp_path: Path) -> None:
        net = topologies.mlp([6, 5, 4, 3]).place({"hidden1": "cpu"})
        other = there_and_back(net, tmp_path / "net")
        assert (net["hidden1"].device, other["hidden1"].device) == (torch.device("cpu"), None)
        check_relaxes_alike(net, other)

    def test_random_draws_are_known_even_when_saved_in_evaluation_mode(self, tmp_path: Path) -> None:
        net = pcsim.from_sequential(
            nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 2)), input_shape=3
        )
        other = there_and_back(net.eval(), tmp_path / "net")
        check_same(net, other)
        assert other["hidden1"].stochastic
        for network in (net, other):
            network.train()
        check_relaxes_alike(net, other)

    def test_weights_in_the_engines_stacks(self, tmp_path: Path) -> None:
        net = topologies.mlp([5] * 6).double()
        check_relaxes_alike(net, net)
        other = there_and_back(net, tmp_path / "net")
        check_same(net, other)
        check_relaxes_alike(net, other)

    def test_random_state_and_the_network_stay(self, tmp_path: Path) -> None:
        register_module(Block, config=block_config)
        net = topologies.vgg("VGG5", width=0.02, batch_norm=True)
        net.add_node("more", (10,))
        net.add_edge("output", "more", Block(10))
        before, state, revision = copy.deepcopy(net.state_dict()), torch.get_rng_state(), net.revision
        own = {id(tensor) for tensor in (*net.parameters(), *net.buffers())}
        check_same(net, there_and_back(net, tmp_path / "net"))
        assert torch.equal(state, torch.get_rng_state())
        assert own == {id(tensor) for tensor in (*net.parameters(), *net.buffers())}
        assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
        assert net.revision == revision

    def test_an_empty_network_and_single_nodes(self, tmp_path: Path) -> None:
        net = pcsim.Network()
        check_same(net, there_and_back(net, tmp_path / "net"))
        net.add_node("a", ())
        check_same(net, there_and_back(net, tmp_path / "net"))


MODULES: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(2, 3, bias=False),
    lambda: nn.Bilinear(2, 3, 4),
    lambda: nn.Conv1d(2, 4, 3, padding="same", padding_mode="circular", groups=2),
    lambda: nn.Conv2d(2, 4, (3, 1), stride=2, dilation=(2, 1), bias=False),
    lambda: nn.Conv3d(1, 2, 2, padding=1),
    lambda: nn.ConvTranspose1d(2, 3, 2),
    lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1, groups=2, bias=False),
    lambda: nn.ConvTranspose3d(1, 1, 2),
    lambda: nn.BatchNorm1d(3, affine=False),
    lambda: nn.BatchNorm2d(3, momentum=None, eps=1e-3),
    lambda: nn.BatchNorm3d(2, track_running_stats=False),
    lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    lambda: nn.LayerNorm((2, 3), bias=False),
    lambda: nn.LayerNorm(3, elementwise_affine=False),
    lambda: nn.GroupNorm(2, 4, affine=False),
    lambda: nn.RMSNorm(3),
    lambda: nn.LocalResponseNorm(2, alpha=0.1),
    lambda: nn.ReLU(inplace=True),
    lambda: nn.Hardtanh(-2.0, float("inf")),
    lambda: nn.ELU(0.5),
    lambda: nn.GELU("tanh"),
    lambda: nn.LeakyReLU(0.3),
    lambda: nn.Softplus(2.0, 3.0),
    lambda: nn.PReLU(3, 0.1),
    lambda: nn.Threshold(0.1, 0.2),
    lambda: nn.LogSoftmax(-1),
    lambda: nn.GLU(1),
    lambda: nn.MaxPool2d((2, 1), ceil_mode=True, return_indices=True),
    lambda: nn.AvgPool3d(2, count_include_pad=False, divisor_override=3),
    lambda: nn.LPPool2d(2, (2, 3), stride=1),
    lambda: nn.AdaptiveAvgPool2d((1, None)),
    lambda: nn.AdaptiveMaxPool1d(2, return_indices=True),
    lambda: nn.Dropout3d(0.3),
    lambda: nn.AlphaDropout(0.1, inplace=True),
    lambda: nn.Flatten(2, 3),
    lambda: nn.Unflatten(1, (2, 3)),
    lambda: nn.Identity(3, unused=True),
    lambda: nn.Embedding(4, 3, padding_idx=-1, max_norm=1.0, scale_grad_by_freq=True),
    lambda: nn.EmbeddingBag(4, 3, mode="sum", include_last_offset=True),
    lambda: nn.ConstantPad2d((1, 2, 3, 4), 2.0),
    lambda: nn.ZeroPad2d(1),
    lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    lambda: nn.UpsamplingNearest2d(size=3),
    lambda: nn.PixelShuffle(2),
    lambda: nn.Fold((4, 4), 2),
    lambda: nn.CosineSimilarity(1),
    lambda: nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True),
    lambda: nn.MultiheadAttention(4, 2, bias=False),
    lambda: nn.PairwiseDistance(1.0),
    lambda: nn.LSTM(2, 3),
    lambda: nn.TransformerEncoderLayer(4, 2, 8),
    lambda: nn.GRUCell(2, 3),
    lambda: nn.Sequential(nn.ModuleList([nn.Tanh()]), nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Sequential()})),
]


class TestModules:
    @pytest.mark.parametrize("make", MODULES, ids=lambda make: type(make()).__name__)
    def test_torchs_own(self, make: Callable[[], nn.Module], tmp_path: Path) -> None:
        register_module(Holder)
        net = holding(make())
        other = there_and_back(net, tmp_path / "net")
        check_same(net, other)
        ours, theirs = (
            [
                {k: v for k, v in vars(part).items() if not k.startswith("_")}
                for part in n.edges["a->b"].module.modules()
            ]
            for n in (net, other)
        )
        assert [part.keys() for part in ours] == [part.keys() for part in theirs]
        assert ours[1:] == theirs[1:]

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: nn.Sequential(Block(2)), r"inner\.0 is a \w+\.Block, which cannot be kept: register it"),
            (lambda: nn.LazyLinear(3), "LazyLinear.*cannot"),
            (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "has parametrizations"),
            (lambda: pcsim.Network(), "Network, which cannot be kept"),
        ],
    )
    def test_what_does_not_come_back_is_refused(
        self, make: Callable[[], nn.Module], message: str, tmp_path: Path
    ) -> None:
        register_module(Holder)
        with pytest.raises(FileError, match=message):
            save_network(holding(make()), tmp_path / "net")
        assert not list(tmp_path.iterdir())

    def test_changed_modules_are_refused(self, tmp_path: Path) -> None:
        def refused(change: Callable[[nn.Linear], Any], message: str) -> None:
            net = topologies.mlp([2, 3, 2])
            change(net.edges["input->hidden1"].module)
            with pytest.raises(FileError, match=message):
                save_network(net, tmp_path / "net")

        with pytest.warns(FutureWarning):
            refused(weight_norm, "edges.input->hidden1.module .*hooks")
        refused(lambda m: m.register_forward_hook(lambda *_: None), "hooks or a replaced forward")
        refused(lambda m: m.register_full_backward_hook(lambda *_: None), "hooks or a replaced forward")
        refused(lambda m: setattr(m, "forward", lambda value: value), "hooks or a replaced forward")
        refused(lambda m: m.weight.register_hook(lambda g: g), "weight has a hook")
        refused(lambda m: m.register_buffer("own", torch.zeros(2)), "with nothing as 'own'")
        refused(lambda m: setattr(m, "in_features", 7), "Linear is built.*as 'weight'")
        refused(lambda m: setattr(m, "note", 7), "note was 7 and became None")
        refused(lambda m: m.to("meta"), "expected a dense tensor")
        with pytest.raises(FileError, match="a type that safetensors does not hold"):
            io.save(tmp_path / "tensor", "test", {"a": torch.zeros(2, dtype=torch.complex128)})

    def test_what_is_outside_of_nodes_and_edges_is_refused(self, tmp_path: Path) -> None:
        net = topologies.mlp([2, 3, 2])
        net.register_buffer("own", torch.zeros(2))
        with pytest.raises(FileError, match="'own' belongs to no node and no edge"):
            save_network(net, tmp_path / "net")

    def test_tensors_that_only_share_memory_are_refused(self, tmp_path: Path) -> None:
        net = topologies.mlp([3, 3, 3])
        first, second = (edge.module for edge in net.edges.values())
        second.weight = nn.Parameter(first.weight.data)
        with pytest.raises(FileError, match="has the same memory as edge 'input->hidden1'"):
            save_network(net, tmp_path / "net")


class TestOwnClasses:
    def test_by_config(self, tmp_path: Path) -> None:
        assert register_module(Block, config=block_config) is Block
        torch.manual_seed(2)
        net = pcsim.Network()
        block = Block(3, depth=2)
        block.rest[1].weight = block.rest[0].weight
        block.scale.fill_(0.5)
        block.last.eval()
        net.add_node("a", (3,))
        net.add_node("b", (3,), transfer=nn.Sequential(Block(3, depth=0), nn.Tanh()))
        net.add_edge("a", "b", block)
        net.double()
        other = there_and_back(net, tmp_path / "net")
        check_same(net, other)
        check_relaxes_alike(net, other)

    def test_modules_in_a_config_stay_shared(self, tmp_path: Path) -> None:
        @register_module
        class Wrapped(nn.Module):
            def __init__(self, inner: nn.Module, *, others: dict[str, Any], scale: Tensor) -> None:
                super().__init__()
                self.inner, self.others, self.scale = inner, others, scale
                self.list = nn.ModuleList(others["list"])

            def forward(self, value: Tensor) -> Tensor:
                return self.inner(value) + self.scale

        linear = nn.Linear(3, 3)
        net = pcsim.Network()
        net.add_node("a", (3,))
        net.add_node("b", (3,))
        net.add_edge(
            "a", "b", Wrapped(linear, others={"list": [nn.Tanh(), linear], "k": (1, "x")}, scale=torch.rand(3))
        )
        net.add_edge("a", "b", linear)
        other = there_and_back(net, tmp_path / "net")
        wrapped = other.edges["a->b"].module
        assert wrapped.inner is wrapped.list[1] is other.edges["a->b#2"].module
        assert wrapped.others["k"] == (1, "x")
        check_relaxes_alike(net, other)

    def test_a_part_that_is_used_elsewhere_too_has_to_be_given(self, tmp_path: Path) -> None:
        register_module(Block, config=block_config)
        block = Block(3, depth=0)
        for modules in ((block, block.first), (block.first, block)):
            net = pcsim.Network()
            for place, module in enumerate(modules):
                net.add_node(f"a{place}", (3,))
                net.add_node(f"b{place}", (6 if module is block.first else 3,))
                net.add_edge(f"a{place}", f"b{place}", module)
            with pytest.raises(FileError, match=r"also (a part|one) of"):
                save_network(net, tmp_path / "net")

    def test_energies(self, tmp_path: Path) -> None:
        @register_module
        @attrs.frozen
        class Laplace(pcsim.Energy):
            width: float = 1.0

            def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
                return ((value - prediction) / self.width).square().add(1).sqrt()

        class Learned(pcsim.Energy, nn.Module):
            def __init__(self) -> None:
                nn.Module.__init__(self)
                self.scale = nn.Parameter(torch.ones(2))

            def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
                return self.scale * (value - prediction).square()

        register_module(Learned)
        net = topologies.mlp([3, 2], energy=Laplace(2.5))
        other = there_and_back(net, tmp_path / "net")
        assert other["output"].energy_function == Laplace(2.5)
        check_relaxes_alike(net, other)
        net = topologies.mlp([3, 2], energy=Learned())
        other = there_and_back(net, tmp_path / "net")
        assert "nodes.output.energy_function.scale" in dict(other.named_parameters())
        check_relaxes_alike(net, other)
        register_module(Laplace, config=lambda e: {"width": e.width}, build=lambda width: Laplace(2 * width))
        with pytest.raises(FileError, match=r"'output': its energy cannot be kept.*width was 2\.5 and became 5\.0"):
            save_network(topologies.mlp([3, 2], energy=Laplace(2.5)), tmp_path / "net")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"config": lambda block: {"units": 4}}, r"a buffer of shape \(4,\) as 'scale'"),
            ({"config": lambda block: {"units": 3, "depth": 2}}, "built with other modules|where nothing is kept"),
            ({"config": lambda block: {"width": 3}}, "unexpected keyword"),
            ({"config": lambda block: {"units": torch.device("cpu")}}, "its module.units has device"),
            ({"config": lambda block: 3}, "gave 3, expected the arguments by name"),
            ({"config": lambda block: {"units": block.nothing}}, "whose arguments cannot be told: 'Block'.*'nothing'"),
            ({"config": block_config, "build": lambda units, depth: nn.Linear(3, 3)}, "a Linear was built"),
            ({}, "does not keep its argument 'units'"),
        ],
    )
    def test_configs_that_do_not_fit(self, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        register_module(Block, **options)
        net = pcsim.Network()
        net.add_node("a", (3,))
        net.add_node("b", (3,))
        net.add_edge("a", "b", Block(3))
        with pytest.raises(FileError, match=f"edge 'a->b'.*({message})"):
            save_network(net, tmp_path / "net")

    def test_torchs_own_by_a_config(self, tmp_path: Path) -> None:
        register_module(Holder)
        register_module(nn.LSTM, config=lambda m: {"input_size": m.input_size, "hidden_size": m.hidden_size})
        net = holding(nn.LSTM(2, 3))
        other = there_and_back(net, tmp_path / "net")
        check_same(net, other)
        x = torch.rand(4, 1, 2)
        lstms = [n.edges["a->b"].module.inner for n in (net, other)]
        assert torch.equal(lstms[0](x)[0], lstms[1](x)[0])

    def test_registrations_that_are_refused(self) -> None:
        with pytest.raises(SettingError, match=r"expected a class of nn\.Module"):
            register_module(Block(2))  # type: ignore[arg-type]
        with pytest.raises(SettingError, match=r"expected a class of nn\.Module"):
            register_module(dict)  # type: ignore[type-var]
        register_module(Block, name="mine")
        with pytest.raises(SettingError, match=r"'mine' is that of \w+\.Block"):
            register_module(Holder, name="mine")
        with pytest.raises(SettingError, match="torch's or pcsim's own"):
            register_module(Holder, name="torch.nn.Linear")

    def test_a_class_that_is_defined_again_takes_its_own_place(self, tmp_path: Path) -> None:
        def define() -> type[nn.Module]:
            class Scale(nn.Module):
                def forward(self, value: Tensor) -> Tensor:
                    return 2 * value

            return register_module(Scale)

        net = pcsim.Network()
        net.add_node("a", (3,))
        net.add_node("b", (3,), transfer=define()())
        net.add_edge("a", "b")
        save_network(net, tmp_path / "net")
        again = define()
        assert type(load_network(tmp_path / "net")["b"].transfer) is again


class TestFiles:
    def test_an_unknown_class_is_named_and_nothing_is_imported(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "evil.py").write_text("raise SystemExit('it was imported')")
        monkeypatch.syspath_prepend(str(tmp_path))
        register_module(Holder, name="evil.Holder")
        save_network(holding(nn.Tanh()), tmp_path / "net")
        del registry.RECIPES[Holder]
        with pytest.raises(FileError, match=r"net: edge 'a->b': its module is a evil\.Holder.*register_module before"):
            load_network(tmp_path / "net")
        register_module(Holder, name="evil.Holder")
        assert isinstance(load_network(tmp_path / "net").edges["a->b"].module.inner, nn.Tanh)

    @pytest.mark.parametrize(
        "name", ["os.system", "torch.nn.os", "torch.nn.Module", "torch.nn.functional.relu", "torch.nn.DataParallel",
                 "pcsim.Network", "torch.nn.modules.linear.Linear", "eval", "torch.nn.Buffer", "torch.nn.Parameter"],
    )  # fmt: skip
    def test_names_of_other_things(self, name: str, tmp_path: Path) -> None:
        save_network(topologies.mlp([2, 3]), tmp_path / "net")
        tree = io.load(tmp_path / "net", "network")
        tree["modules"][0]["class"] = name
        io.save(tmp_path / "net", "network", tree)
        with pytest.raises(FileError, match=f"is a {re.escape(name)}, which is not known here"):
            load_network(tmp_path / "net")

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda tree: tree.pop("nodes"),
            lambda tree: tree["nodes"][0].update(shape="x"),
            lambda tree: tree["nodes"][0].update(transfer=99),
            lambda tree: tree["nodes"][1].update(energy=("torch.nn.Linear", {"mapping": {"in_features": 1}})),
            lambda tree: tree["edges"][0].update(source="nobody"),
            lambda tree: tree["tensors"].pop(),
            lambda tree: tree["tensors"][0].update(parameter=False),
            lambda tree: tree["tensors"][0].update(value=torch.zeros(7)),
            lambda tree: tree["modules"].clear(),
            lambda tree: tree["modules"][0].update(training={}),
            lambda tree: tree["modules"][0].update(config=[3]),
            lambda tree: tree["modules"][0].update({"class": None}),
        ],
    )
    def test_trees_that_describe_no_network(self, spoil: Callable[[Any], Any], tmp_path: Path) -> None:
        save_network(topologies.mlp([2, 3, 2]), tmp_path / "net")
        tree = io.load(tmp_path / "net", "network")
        spoil(tree)
        io.save(tmp_path / "net", "network", tree)
        with pytest.raises(FileError):
            load_network(tmp_path / "net")

    def test_damaged_and_foreign_files(self, tmp_path: Path) -> None:
        path = tmp_path / "net"
        with pytest.raises(FileError, match="no such file"):
            load_network(path)
        net = topologies.mlp([2, 3])
        save_network(net, path)
        content = path.read_bytes()
        for at in range(0, len(content), 97):
            for damaged in (content[:at], content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]):
                path.write_bytes(damaged)
                with pytest.raises(FileError):
                    load_network(path)
        torch.save(net, path)
        with pytest.raises(FileError, match="no file of pcsim"):
            load_network(path)
        safetensors.torch.save_file(net.state_dict(), path)
        with pytest.raises(FileError, match="not written by pcsim"):
            load_network(path)
        io.save(path, "training", {})
        with pytest.raises(FileError, match="holds 'training', expected 'network'"):
            load_network(path)

    def test_a_failed_save_leaves_the_old_file(self, tmp_path: Path) -> None:
        net = topologies.mlp([2, 3])
        save_network(net, tmp_path / "net")
        with pytest.raises(FileError):
            save_network(holding(nn.Tanh()), tmp_path / "net")
        check_same(net, load_network(tmp_path / "net"))

    def test_a_network_made_from_a_model(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
        net = pcsim.from_sequential(model, input_shape=(1, 4, 4))
        other = there_and_back(net, tmp_path / "net")
        check_same(net, other)
        x = torch.rand(3, 1, 4, 4)
        assert torch.equal(pcsim.to_module(other)(x), model(x))


@pytest.mark.parametrize(
    "module",
    [
        nn.Softplus(beta=1, threshold=20),
        nn.LeakyReLU(negative_slope=0),
        nn.ELU(alpha=1),
        nn.Dropout(p=0),
        nn.BatchNorm1d(4, eps=1, momentum=1),
        nn.LayerNorm(4, eps=1),
        nn.Hardtanh(min_val=-1, max_val=1),
    ],
    ids=str,
)
def test_whole_numbers_stay_whole_where_the_default_is_a_fraction(module: nn.Module, tmp_path: Path) -> None:
    net = pcsim.Network()
    net.add_node("x", (4,))
    net.add_node("y", (4,), energy=pcsim.Huber(1), transfer=module)
    net.add_edge("x", "y", nn.Sequential(nn.Linear(4, 4), module))
    net.add_node("z", (4,), energy=pcsim.StudentT(3))
    net.add_edge("y", "z", nn.Identity())
    pcsim.save_network(net, tmp_path / "net")
    again = pcsim.load_network(tmp_path / "net")
    assert repr(again["y"].transfer) == repr(module)
    for name in "yz":
        assert repr(again[name].energy_function) == repr(net[name].energy_function)


def test_what_is_tied_stays_tied(tmp_path: Path) -> None:
    """One module on two edges, twice in one edge, and as a transfer as well; one weight in two modules."""
    net, once, tied = pcsim.Network(), nn.Linear(3, 3), nn.Linear(3, 3)
    tied.weight = once.weight
    shared = nn.Tanh()
    for name in "abcd":
        net.add_node(name, (3,), transfer=shared if name in "bc" else None)
    for source, target, module in (
        ("a", "b", once),
        ("b", "c", nn.Sequential(once, shared, once)),
        ("c", "d", tied),
        ("a", "d", nn.Sequential(tied)),
    ):
        net.add_edge(source, target, module)
    again = net
    for run in range(2):
        pcsim.save_network(again, tmp_path / f"net{run}")
        again = pcsim.load_network(tmp_path / f"net{run}")
    first, twice, other, inside = (edge.module for edge in again.edges.values())
    assert twice[0] is first is twice[2]
    assert inside[0] is other
    assert other is not first
    assert other.weight is first.weight
    assert other.bias is not first.bias
    assert again["b"].transfer is again["c"].transfer is twice[1]
    assert len(list(again.parameters())) == len(list(net.parameters())) == 3
