"""From a PyTorch model to a network, and from a network to a module: what they compute, share and refuse."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations

import pcsim
from pcsim import topologies
from pcsim.conversion import ForwardPass, from_sequential, to_module
from pcsim.errors import ClampError, GraphError


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained_a_little(model: nn.Module, x: Tensor) -> nn.Module:
    """In float64, with running statistics and normalisation that are not the ones a module starts with."""
    model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model(x + 0.5)
    return model


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout2d(),
        nn.ZeroPad2d(1),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Conv2d(4, 6, 1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.LayerNorm(5),
        nn.SiLU(inplace=True),
        nn.Dropout(inplace=True),
        nn.Linear(5, 3),
        nn.LogSoftmax(1),
    )


def nested() -> nn.Sequential:
    features = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(0.1)), nn.Sequential(nn.MaxPool2d(2))
    )
    head = nn.Sequential(nn.Linear(27, 4), nn.Softplus(), nn.Linear(4, 2))
    return nn.Sequential(OrderedDict(features=features, flat=nn.Flatten(), head=head))


MODELS: list[tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = [
    (mlp, (5,)),
    (conv, (2, 8, 8)),
    (nested, (2, 8, 8)),
]


class TestFromSequential:
    @pytest.mark.parametrize(("make", "shape"), MODELS)
    @pytest.mark.parametrize("engine", ["batched", "reference"])
    def test_predicts_what_the_model_gives(
        self, make: Callable[[], nn.Sequential], shape: tuple[int, ...], engine: str
    ) -> None:
        torch.manual_seed(0)
        x = values(4, *shape)
        model = trained_a_little(make(), x)
        expected = copy.deepcopy(model).eval()(x)
        net = from_sequential(model, input_shape=shape)
        found = pcsim.Simulator(net, engine=engine).predict({"input": x})["output"]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=0)
        assert dict.fromkeys(net.parameters()) == dict.fromkeys(model.parameters())

    def test_maps_are_edges_and_the_rest_is_the_transfer(self) -> None:
        model = conv()
        net = from_sequential(model, input_shape=(2, 8, 8))
        parts = list(model)
        assert {name: node.shape for name, node in net.nodes.items()} == {
            "input": (2, 8, 8),
            "hidden1": (4, 4, 4),
            "hidden2": (6, 2, 2),
            "hidden3": (5,),
            "output": (3,),
        }
        assert [list(net[f"hidden{k}"].transfer) for k in (1, 2, 3)] == [parts[1:5], parts[8:10], parts[12:15]]
        assert net["output"].transfer is parts[16]
        modules = [edge.module for edge in net.edges.values()]
        assert modules[0] is parts[0]
        assert [list(modules[1]), list(modules[2])] == [parts[5:8], parts[10:12]]
        assert modules[3] is parts[15]

    def test_is_what_the_topology_builds(self) -> None:
        theirs = topologies.vgg("VGG5", width=0.03, batch_norm=True)
        layers = [m for node in list(theirs.nodes.values())[1:] for m in (node.incoming[0].module, node.transfer)]
        ours = from_sequential(nn.Sequential(*layers), input_shape=(3, 32, 32))
        assert [node.shape for node in ours.nodes.values()] == [node.shape for node in theirs.nodes.values()]
        for edges in zip(ours.edges.values(), theirs.edges.values(), strict=True):
            assert repr(edges[0].module) == repr(edges[1].module)
        for nodes in zip(ours.nodes.values(), theirs.nodes.values(), strict=True):
            assert repr(nodes[0].transfer) == repr(nodes[1].transfer)

    def test_training_the_network_trains_the_model(self) -> None:
        torch.manual_seed(1)
        model = trained_a_little(conv(), values(4, 2, 8, 8))
        net = from_sequential(model, input_shape=(2, 8, 8), energy=pcsim.CrossEntropy())
        assert net["output"].energy_function == pcsim.CrossEntropy()
        before = copy.deepcopy(model)
        sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), pcsim.ForwardUpdate())
        clamps = {"input": values(4, 2, 8, 8), "output": torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]]}
        for _ in range(2):
            sim.update(clamps, optim.SGD(model.parameters(), lr=0.1))
        old = dict(before.named_parameters())
        unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, old[name])]
        assert unmoved in ([], ["0.bias"])  # which the normalisation after it cancels, but for rounding
        assert not torch.equal(model[1].running_mean, before[1].running_mean)

    @pytest.mark.parametrize(
        ("latents", "nodes"),
        [
            (["0", "2"], ["hidden1", "hidden2"]),
            ([0, 2], ["hidden1", "hidden2"]),
            ([-2, 1], ["hidden1", "hidden2"]),
            ([], []),
            ({1: "V1", "3": "V2"}, ["V1", "V2"]),
        ],
    )
    def test_latents_where_they_are_asked_for(self, latents: list[str | int], nodes: list[str]) -> None:
        model, x = mlp().double(), values(3, 5)
        expected = copy.deepcopy(model)(x)
        net = from_sequential(model, input_shape=(5,), latents=latents)
        assert list(net.nodes) == ["input", *nodes, "output"]
        torch.testing.assert_close(pcsim.Simulator(net).predict({"input": x})["output"], expected)

    def test_nodes_are_called_as_the_layers(self) -> None:
        model, x = nested().double().eval(), values(3, 2, 8, 8)
        net = from_sequential(model, input_shape=(2, 8, 8), latents=["head.1", "features.0", "features", 1])
        assert list(net.nodes) == ["input", "features/0", "features", "flat", "head/1", "output"]
        torch.testing.assert_close(pcsim.Simulator(net).predict({"input": x})["output"], model(x))
        assert isinstance(net["features"].incoming[0].module, nn.Identity)
        assert net["features"].transfer is model[0][1][0]
        assert net["features/0"].transfer[1] is model[0][0][2]

    def test_latents_before_the_nonlinearity(self) -> None:
        model = mlp()
        net = from_sequential(model, input_shape=(5,), latents=[0, 2])
        assert [type(net[name].transfer) for name in ("hidden1", "hidden2")] == [nn.Identity, nn.Identity]
        assert list(net["hidden2"].incoming[0].module) == [model[1], model[2]]

    def test_own_modules_are_maps_unless_they_are_said_to_be_nonlinear(self) -> None:
        class Square(nn.Module):
            def forward(self, value: Tensor) -> Tensor:
                return value.square()

        model, x = nn.Sequential(nn.Linear(4, 3), Square(), nn.Linear(3, 2)).double(), values(3, 4)
        for options, count in (({}, 2), ({"nonlinearities": [Square]}, 3)):
            net = from_sequential(model, input_shape=(4,), **options)
            assert len(net.nodes) == count
            torch.testing.assert_close(pcsim.Simulator(net).predict({"input": x})["output"], model(x))

    def test_a_layer_that_comes_twice_stays_one(self) -> None:
        linear, act = nn.Linear(3, 3).double(), nn.Tanh()
        net = from_sequential(nn.Sequential(linear, act, linear, act, nn.Linear(3, 1).double()), input_shape=(3,))
        assert [edge.module for edge in net.edges.values()][:2] == [linear, linear]
        x = values(2, 3)
        assert torch.equal(pcsim.Simulator(net).predict({"input": x})["hidden2"], act(linear(act(linear(x)))))

    @pytest.mark.parametrize("layers", [[nn.Flatten()], [nn.Tanh(), nn.Dropout()], [nn.ReLU(), nn.Linear(3, 3)]])
    def test_a_single_map_or_none_makes_one_edge(self, layers: list[nn.Module]) -> None:
        net = from_sequential(nn.Sequential(*layers), input_shape=(3,))
        assert list(net.edges) == ["input->output"]

    def test_random_draws_are_noticed_and_modes_stay(self) -> None:
        model = conv().eval()
        model[4].train()
        net = from_sequential(model, input_shape=(2, 8, 8))
        assert [name for name, node in net.nodes.items() if node.stochastic] == ["hidden1", "hidden3"]
        assert [m.training for m in model] == [place == 4 for place in range(len(model))]
        assert not net.training

    def test_statistics_and_random_state_stay(self) -> None:
        model = conv()
        before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        from_sequential(model, input_shape=(2, 8, 8))
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert torch.equal(state, torch.get_rng_state())

    def test_nothing_in_place_is_left(self) -> None:
        model, x = mlp().double(), values(3, 5)
        net = from_sequential(model, input_shape=(5,), latents=["2"])
        sim = pcsim.Simulator(net, pcsim.Relaxation(0), engine="reference")
        sim.infer({"input": x, "output": values(3, 3)})
        assert bool((net["hidden1"].value < 0).any())  # the ReLU after it has not overwritten it
        assert torch.equal(model[2](torch.tanh(model[0](x))), net["hidden1"].value)

    class Overwriting(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value.mul_(2)

    class Residual(nn.Sequential):
        def forward(self, value: Tensor) -> Tensor:
            return value + super().forward(value)

    @pytest.mark.parametrize(
        ("model", "options", "message"),
        [
            (nn.Linear(5, 3), {}, "Linear given, no nn.Sequential"),
            (Residual(nn.Linear(5, 5)), {}, "a forward of its own"),
            (nn.Sequential(), {}, "holds no module"),
            (nn.Sequential(nn.LazyLinear(3)), {}, "'0.weight' has no shape yet"),
            (mlp(), {"input_shape": (6,)}, r"layer '0' \(Linear.*\) does not accept \(batch, 6\).*without the batch"),
            (mlp(), {"input_shape": (0,)}, "'input'.*positive"),
            (mlp(), {"latents": ["5"]}, "no layer '5'; its layers are 0, 1, 2, 3, 4"),
            (mlp(), {"latents": [5]}, "no layer 5"),
            (mlp(), {"latents": "0"}, "expected a list"),
            (mlp(), {"latents": ["4"]}, "'4' is the last layer"),
            (mlp(), {"latents": ["1", 1]}, "1 is a place that another one gave"),
            (mlp(), {"latents": {0: "output"}}, "'output' exists already"),
            (nn.Sequential(nn.Flatten(0)), {}, "keeps the batch axis"),
            (nn.Sequential(nn.Linear(5, 4), Overwriting()), {}, "layer '1'.*overwrites what it reads"),
            (nn.Sequential(nn.Unflatten(1, (5, 1)), nn.LSTM(1, 2)), {}, "layer '1'.*into tuple"),
        ],
    )
    def test_refuses(self, model: nn.Sequential, options: dict[str, object], message: str) -> None:
        modes = [module.training for module in model.modules()]
        with pytest.raises(GraphError, match=message):
            from_sequential(model, **{"input_shape": (5,), **options})
        assert modes == [module.training for module in model.modules()]
        assert not any(isinstance(m, nn.ReLU) and not m.inplace for m in model.modules())

    def test_hooks_are_kept_or_refused(self) -> None:
        seen: list[str] = []
        inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        inner.register_forward_hook(lambda *_: seen.append("inner"))
        model = nn.Sequential(inner, nn.Tanh(), parametrizations.weight_norm(nn.Linear(3, 2))).double()
        net = from_sequential(model, input_shape=(3,))
        assert net.edges["input->hidden1"].module is inner
        seen.clear()
        x = values(2, 3)
        torch.testing.assert_close(pcsim.Simulator(net).predict({"input": x})["output"], model(x))
        assert seen == ["inner", "inner"]
        model.register_forward_hook(lambda *_: None)
        with pytest.raises(GraphError, match="with hooks"):
            from_sequential(model, input_shape=(3,))


def many_kinds() -> pcsim.Network:
    """Two inputs and a root with a prior, a skip, a gain, deterministic and combining nodes, two outputs."""
    torch.manual_seed(3)
    net = pcsim.Network()
    net.add_node("left", (3,))
    net.add_node("bias", (2,), prior=nn.Parameter(torch.tensor([0.3, -0.2])))
    net.add_node("right", (2, 2))
    net.add_node("joined", (9,), combine=pcsim.Concatenate(), deterministic=True)
    net.add_node(
        "hidden", (4,), transfer=nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()), precision=pcsim.LearnedPrecision()
    )
    net.add_node("gate", (4,), combine=pcsim.Product(), transfer=nn.Dropout())
    net.add_node("first", (2,))
    net.add_node("second", (3,), energy=pcsim.CrossEntropy(), transfer=nn.Tanh())
    net.add_edge("left", "joined", gain=0.5)
    net.add_edge("right", "joined", nn.Flatten())
    net.add_edge("bias", "joined")
    net.add_edge("joined", "hidden", nn.Linear(9, 4))
    net.add_edge("hidden", "gate", nn.Sigmoid())
    net.add_edge("left", "gate", nn.Linear(3, 4), gain=-2.0)
    net.add_edge("gate", "second", nn.Linear(4, 3))
    net.add_edge("gate", "first", nn.Linear(4, 2))
    net.add_edge("left", "second", name="skip")
    return net.double()


class TestToModule:
    def test_gives_what_the_simulator_predicts(self) -> None:
        net = many_kinds()
        x = {"left": values(5, 3), "right": values(5, 2, 2, seed=1)}
        module = to_module(net)
        assert (module.inputs, module.outputs) == (("left", "right"), ("first", "second"))
        module(*x.values())  # moves the running statistics, which are shared
        expected = pcsim.Simulator(net).predict(x)
        first, second = module.eval()(*x.values())
        torch.testing.assert_close(first, expected["first"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(second, expected["second"], rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            net.edges["gate->first"].module.bias.add_(1.0)
        torch.testing.assert_close(module(*x.values())[0], first + 1.0)

    def test_shares_parameters_and_their_names(self) -> None:
        net = many_kinds()
        module, own = to_module(net), dict(net.named_parameters())
        assert all(own[name] is parameter for name, parameter in module.named_parameters())
        assert own.keys() == dict(module.named_parameters()).keys()

    def test_a_state_loads_into_a_twin_of_its_own(self) -> None:
        net, x = many_kinds(), (values(5, 3), values(5, 2, 2, seed=1))
        for twin in (to_module(many_kinds()), copy.deepcopy(to_module(net))):
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.fill_(0.5)
                for parameter in net.parameters():
                    parameter.add_(0.1)
            assert not any(torch.equal(*pair) for pair in zip(twin.parameters(), net.parameters(), strict=True))
            twin.load_state_dict(net.state_dict())
            expected = to_module(net).eval()(*x)
            for found, right in zip(twin.eval()(*x), expected, strict=True):
                torch.testing.assert_close(found, right, rtol=0, atol=0)

    def test_inputs_and_outputs_by_choice(self) -> None:
        net = many_kinds()
        x = {"left": values(5, 3), "right": values(5, 2, 2, seed=1), "bias": values(5, 2, seed=2)}
        net.eval()
        expected = pcsim.Simulator(net).predict(x)
        module = to_module(net, inputs=["right", net["bias"], "left"], outputs=["second", "joined", "right"])
        found = module(x["right"], x["bias"], x["left"])
        for name, value in zip(("second", "joined", "right"), found, strict=True):
            torch.testing.assert_close(value, expected[name])
        head = to_module(net, inputs=["gate"], outputs=["first"])
        torch.testing.assert_close(head(expected["gate"]), expected["first"])
        assert list(head.state_dict()) == ["edges.gate->first.module.weight", "edges.gate->first.module.bias"]
        joined = to_module(net, outputs=["joined"])
        torch.testing.assert_close(joined(x["left"], x["right"])[:, :3], 0.5 * x["left"])

    @pytest.mark.parametrize("strict", [False, True])
    def test_export_with_any_batch(self, strict: bool) -> None:
        net = many_kinds().eval()
        module = to_module(net)
        batch = torch.export.Dim("batch")
        x = values(5, 3), values(5, 2, 2, seed=1)
        program = torch.export.export(module, x, dynamic_shapes=(({0: batch}, {0: batch}),), strict=strict)
        stored = io.BytesIO()
        torch.export.save(program, stored)
        stored.seek(0)
        again = torch.export.load(stored).module()
        for size in (2, 9):
            x = values(size, 3, seed=size), values(size, 2, 2, seed=size + 1)
            for found, expected in zip(again(*x), module(*x), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: topologies.mlp([4, 6, 5, 3], latents="before"),
            lambda: topologies.residual_mlp(4, 6, 3, blocks=2, gain=0.7),
            lambda: pcsim.balance_paths(topologies.residual_mlp(4, 6, 3, blocks=2), 0.5),
            lambda: topologies.vgg("VGG5", width=0.03, batch_norm=True, image=(3, 16, 16)),
            lambda: topologies.resnet("ResNet10", width=0.07, batch_norm=True, image=(3, 8, 8)),
        ],
    )
    def test_topologies(self, make: Callable[[], pcsim.Network]) -> None:
        net = make().double()
        module = to_module(net).eval()
        x = values(3, *net["input"].shape)
        expected = pcsim.Simulator(net).predict({"input": x})["output"]
        torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)
        program = torch.export.export(module, (x,), dynamic_shapes=(({0: torch.export.Dim("batch")},),))
        torch.testing.assert_close(program.module()(x[:2]), expected[:2], rtol=1e-11, atol=1e-11)

    @pytest.mark.filterwarnings("ignore")  # torch's exporter warns of its own deprecations
    def test_to_onnx(self) -> None:
        reference = pytest.importorskip("onnx.reference")
        pytest.importorskip("onnxscript")
        x = values(5, 3), values(5, 2, 2, seed=1)
        module = to_module(many_kinds()).eval()
        program = torch.onnx.export(module, x, dynamo=True, verbose=False, input_names=["left", "right"])
        assert program is not None
        run = reference.ReferenceEvaluator(program.model_proto).run
        found = run(None, {"left": x[0].numpy(), "right": x[1].numpy()})
        for result, expected in zip(found, module(*x), strict=True):
            torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-9, atol=1e-9)

    def test_trains_by_autograd_and_is_copied(self) -> None:
        net = many_kinds()
        module = to_module(net).eval()
        x = values(5, 3), values(5, 2, 2, seed=1)
        module(*x)[1].sum().backward()
        assert net["bias"].prior is not None
        assert net["bias"].prior.grad is not None
        other = copy.deepcopy(module)
        assert torch.equal(other(*x)[0], module(*x)[0])
        assert not {id(p) for p in other.parameters()} & {id(p) for p in net.parameters()}

    def test_round_trip_of_a_model(self) -> None:
        x = values(3, 2, 8, 8)
        model = trained_a_little(nested(), x).eval()
        module = to_module(from_sequential(model, input_shape=(2, 8, 8)))
        assert torch.equal(module(x), model(x))
        assert "input -> output" in repr(module)

    def test_cycles_are_cut_by_inputs_or_refused(self) -> None:
        net = many_kinds().eval()
        net.add_edge("first", "hidden", nn.Linear(2, 4).double())
        with pytest.raises(GraphError, match="is a cycle, which no forward pass computes"):
            to_module(net)
        cut = to_module(net, inputs=["left", "hidden"])
        assert cut.outputs == ("second",)  # first is no sink any more
        given = values(2, 3), values(2, 4)
        gate = torch.sigmoid(given[1]) * (-2.0 * net.edges["left->gate"].module(given[0]))
        torch.testing.assert_close(cut(*given), torch.tanh(net.edges["gate->second"].module(gate) + given[0]))
        net.add_edge("gate", "gate", nn.Linear(4, 4).double())
        with pytest.raises(GraphError, match="gate -> gate is a cycle"):
            to_module(net, inputs=["left", "hidden"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"inputs": ["left"]}, "node 'right' a value.*name it among the inputs"),
            ({"inputs": ["left", "right", "left"]}, "'left' is named twice"),
            ({"inputs": ["nobody"]}, "'nobody' is not in the network"),
            ({"inputs": "left"}, "expected a list"),
            ({"outputs": ["first", "first"]}, "'first' is named twice"),
            ({"outputs": []}, "no output"),
            ({"inputs": ["left", "right", "second"], "outputs": ["first"]}, "no output depends on input 'second'"),
            ({"outputs": ["bias"]}, "no input"),
        ],
    )
    def test_refuses(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(GraphError, match=message):
            to_module(many_kinds(), **options)

    def test_refuses_nodes_of_another_network_and_incomplete_ones(self) -> None:
        with pytest.raises(GraphError, match="belongs to another network"):
            to_module(many_kinds(), inputs=[many_kinds()["left"]])
        net = pcsim.Network()
        net.add_node("a", (2,))
        net.add_node("b", (5,), combine=pcsim.Concatenate())
        net.add_edge("a", "b")
        with pytest.raises(GraphError, match="for node 'b', whose shape"):
            to_module(net)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ((values(2, 3),), "1 values given, expected one for each of the 2 inputs, left, right"),
            ((values(2, 3), values(2, 4)), r"'right': shape \(2, 4\) given, expected \(batch, 2, 2\)"),
        ],
    )
    def test_wrong_values(self, given: tuple[Tensor, ...], message: str) -> None:
        module = to_module(many_kinds())
        assert isinstance(module, ForwardPass)
        with pytest.raises(ClampError, match=message):
            module(*given)


def test_constant_nodes_are_constant_in_a_module() -> None:
    """A bias of one's own; then also a hidden node that is held, and the comparing node of a pathway."""
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([4, 3, 3, 2])
    net.add_node("bias", (1,), constant=2.0)
    net.add_edge("bias", "hidden2", nn.Linear(1, 3))
    module, images = pcsim.to_module(net).eval(), torch.randn(6, 4)
    expected = pcsim.Simulator(net).predict({"input": images})["output"]
    torch.testing.assert_close(module(images), expected)
    net.add_node("held", (5,), constant=0.5)
    net.add_edge("input", "held", nn.Linear(4, 5))
    net.add_edge("held", "output", nn.Linear(5, 2))
    net.add_pathway("input", "hidden1", nn.Linear(4, 3))
    module = pcsim.to_module(net).eval()
    assert (module.inputs, module.outputs) == (("input",), ("output",))
    more = net.edges["held->output"].module(torch.full((6, 5), 0.5))
    torch.testing.assert_close(module(images), expected + more)
    exported = torch.export.export(module, (images,), dynamic_shapes=(({0: torch.export.Dim("batch")},),))
    torch.testing.assert_close(exported.module()(images[:3]), module(images[:3]))
    given = pcsim.to_module(net, inputs=["input", "held"]).eval()
    torch.testing.assert_close(given(images, torch.full((6, 5), 0.5)), module(images))


def test_a_module_without_an_input_is_refused() -> None:
    net = pcsim.Network()
    net.add_node("bias", (1,), constant=2.0)
    net.add_node("output", (2,))
    net.add_edge("bias", "output", nn.Linear(1, 2))
    with pytest.raises(GraphError, match="no input, and so no batch: every root has a prior or is constant"):
        pcsim.to_module(net)
