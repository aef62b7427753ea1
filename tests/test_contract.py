"""The page "pcsim and PyTorch: what you may rely on", line by line; oracle: what PyTorch itself does."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable

import attrs
import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import pcsim
from pcsim.errors import ClampError, EnergyWarning, GraphError, PCError, SettingError, StateError

ENGINES = ("batched", "reference")
RULES = (pcsim.SettledUpdate(), pcsim.ForwardUpdate(), pcsim.Backprop())


def chain(*widths: int) -> pcsim.Network:
    torch.manual_seed(0)
    return pcsim.topologies.mlp(list(widths or (4, 5, 5, 5, 3)))


def clamps(net: pcsim.Network, batch: int = 4, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ends = (net.roots()[0], net.sinks()[0])
    return {node.name: torch.randn(batch, *node.shape, generator=draw) for node in ends}


def pair(source: tuple[int, ...], target: tuple[int, ...], module: nn.Module, **options: object) -> pcsim.Network:
    net = pcsim.Network()
    net.add_node("x", source)
    net.add_node("y", target, **options)
    net.add_edge("x", "y", module)
    return net


def shown(net: pcsim.Network, sim: pcsim.Simulator) -> list[Tensor | None]:
    """Values, predictions, messages and gradients of the latest run."""
    gradients = sim.gradients()
    values = [node.value for node in net.nodes.values()]
    predictions = [node.prediction for node in net.nodes.values() if node.predicted]
    messages = [edge.message for edge in net.edges.values()]
    return [*values, *predictions, *messages, *(gradients.get(parameter) for parameter in net.parameters())]


def assert_honoured(make: Callable[[], pcsim.Network], change: Callable[[pcsim.Network], object]) -> None:
    """What is changed between runs holds from the next run on: as in a twin that was so from the start."""
    for rule in RULES:
        seen = []
        for engine, runs in (("batched", 2), ("batched", 1), ("reference", 2), ("reference", 0)):
            net = make()
            sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), rule, engine=engine)
            given = clamps(net)
            for _ in range(runs):
                sim.infer(given)
            change(net)
            for _ in range(3):
                sim.infer(given)
                seen.append(shown(net, sim))
        for other in seen[:-1]:
            for got, expected in zip(other, seen[-1], strict=True):
                assert (got is None) == (expected is None)
                if got is not None:
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class TestWhatIsHandedOut:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_is_never_written_again(self, engine: str) -> None:
        net = chain()
        sim, optimizer = pcsim.Simulator(net, engine=engine), optim.SGD(net.parameters(), 0.1)
        kept: list[tuple[Tensor, Tensor]] = []
        for seed in range(5):
            trace = sim.infer(clamps(net, seed=seed), record=True)
            found = [*shown(net, sim), *sim.predict({"input": clamps(net, seed=seed)["input"]}).values()]
            found += [trace.energies, trace.free_energies, *sim.energy().values()]
            sim.compute_gradients()
            found += [parameter.grad for parameter in net.parameters()]
            kept += [(tensor, tensor.clone()) for tensor in found if tensor is not None]
            sim.learn(optimizer)
        assert all(torch.equal(tensor, copied) for tensor, copied in kept)

    @pytest.mark.parametrize("engine", ENGINES)
    def test_is_weighed_as_at_the_last_step(self, engine: str) -> None:
        net = pcsim.topologies.mlp([3, 3, 3, 3, 2], activation=nn.Identity)
        spiking = pcsim.Spiking(alpha=0.25, peak=2.0)  # at the last of three steps in hidden2, and after it in hidden1
        sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1, precision=spiking), engine=engine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pcsim.PrecisionWarning)
            sim.infer({"input": torch.randn(4, 3), "output": torch.randn(4, 2)})
        for name, precision in (("hidden1", 0.25), ("hidden2", 2.0), ("hidden3", 0.25)):
            node, (edge,) = net[name], net[name].incoming
            assert float(node.precision) == precision
            torch.testing.assert_close(edge.message, precision * node.error @ edge.module.weight)

    @pytest.mark.parametrize("engine", ENGINES)
    def test_may_be_written_without_harm(self, engine: str) -> None:
        net = chain()
        sim = pcsim.Simulator(net, engine=engine)
        sim.infer(clamps(net))
        before = [tensor.clone() for tensor in shown(net, sim) if tensor is not None]
        for tensor in shown(net, sim):
            if tensor is not None:
                tensor.fill_(7.0)
        after = [tensor for tensor in shown(net, sim) if tensor is not None]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))

    def test_is_contiguous(self) -> None:
        net = pcsim.from_sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), input_shape=(1, 6, 6)
        )
        sim = pcsim.Simulator(net)
        sim.infer(clamps(net))
        assert all(node.value.is_contiguous() for node in net.nodes.values())
        assert all(value.is_contiguous() for value in sim.predict({"input": clamps(net)["input"]}).values())

    def test_clamps_stay_as_they_were(self) -> None:
        net = chain()
        given = clamps(net)
        before = {name: value.clone() for name, value in given.items()}
        sim = pcsim.Simulator(net, nudging=pcsim.Nudging(0.3))
        sim.update(given, optim.SGD(net.parameters(), 0.1))
        assert all(torch.equal(given[name], before[name]) for name in given)

    @pytest.mark.parametrize("engine", ["batched", "reference"])
    def test_integers_are_shown_as_they_were_given(self, engine: str) -> None:
        net = pcsim.Network()
        net.add_node("input", (3,))
        net.add_node("output", (2,))
        net.add_edge("input", "output", nn.EmbeddingBag(5, 2))
        tokens = torch.tensor([[0, 4, 1], [2, 2, 3]])
        sim = pcsim.Simulator(net, engine=engine)
        sim.infer({"input": tokens, "output": torch.zeros(2, 2)})
        assert torch.equal(net["input"].value, tokens)
        for wrong in (tokens + 1, tokens.float(), -tokens):
            with pytest.raises(ClampError, match="clamp 'input'"):
                sim.infer({"input": wrong, "output": torch.zeros(2, 2)})
        assert torch.equal(net["input"].value, tokens)


class TestGradients:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_accumulate_in_place_on_request(self, engine: str) -> None:
        net = chain()
        sim = pcsim.Simulator(net, engine=engine)
        sim.infer(clamps(net))
        sim.compute_gradients()
        first = [parameter.grad for parameter in net.parameters()]
        alone = [gradient.clone() for gradient in first]
        sim.compute_gradients(accumulate=True)
        for parameter, gradient, single in zip(net.parameters(), first, alone, strict=True):
            assert parameter.grad is gradient
            torch.testing.assert_close(gradient, 2 * single)

    @pytest.mark.parametrize("engine", ENGINES)
    def test_hooks_of_parameters_are_called(self, engine: str) -> None:
        net = chain()
        weight, called = net.edges["hidden1->hidden2"].module.weight, []
        weight.register_hook(lambda gradient: 3 * gradient)
        weight.register_post_accumulate_grad_hook(called.append)
        sim = pcsim.Simulator(net, engine=engine)
        sim.infer(clamps(net))
        plain = sim.gradients()[weight]
        sim.compute_gradients()
        assert called == [weight]
        torch.testing.assert_close(weight.grad, 3 * plain)

    def test_a_sparse_embedding_gives_what_autograd_gives(self) -> None:
        class Lookup(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(9, 4, sparse=True)

            def forward(self, value: Tensor) -> Tensor:
                return self.table(value.long()).flatten(1)

        net = pair((2,), (8,), Lookup())
        table = net.edges["x->y"].module.table.weight
        x, y = torch.ones(3, 2), torch.randn(3, 8)
        sim = pcsim.Simulator(net)
        sim.infer({"x": x, "y": y})
        sim.compute_gradients()
        found = table.grad.to_dense()
        table.grad = None
        (0.5 * (net.edges["x->y"].module(x) - y).square().sum() / 3).backward()
        torch.testing.assert_close(found, table.grad.to_dense())

    def test_what_autograd_does_not_reach_has_none(self) -> None:
        class Idle(nn.Linear):
            def __init__(self) -> None:
                super().__init__(4, 3)
                self.idle = nn.Parameter(torch.ones(2))

        for engine in ENGINES:
            net = pair((4,), (3,), Idle())
            sim = pcsim.Simulator(net, engine=engine)
            sim.infer({"x": torch.randn(2, 4), "y": torch.randn(2, 3)})
            sim.compute_gradients()
            assert net.edges["x->y"].module.idle.grad is None
            assert net.edges["x->y"].module.weight.grad is not None


class TestParameters:
    def test_stay_in_place_shared_and_tied(self) -> None:
        net = chain(8, 8, 8, 8, 8)
        net.share_memory()
        one, other = (net.edges[name].module.weight for name in ("hidden1->hidden2", "hidden2->hidden3"))
        one.data = other.data
        places = [parameter.data_ptr() for parameter in net.parameters()]
        pcsim.Simulator(net).update(clamps(net), optim.SGD(net.parameters(), 0.1))
        assert [parameter.data_ptr() for parameter in net.parameters()] == places
        assert all(parameter.is_shared() for parameter in net.parameters())
        assert torch.equal(one, other)

    def test_stay_in_a_flat_buffer(self) -> None:
        net = chain()
        flat = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
        offset = 0
        for parameter in net.parameters():
            parameter.data = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        sim, before = pcsim.Simulator(net), flat.clone()
        sim.update(clamps(net), optim.SGD(net.parameters(), 0.1))
        assert not torch.equal(flat, before)
        assert torch.equal(flat, torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))

    def test_files_keep_their_size(self, tmp_path) -> None:
        net = chain(64, 64, 64, 64, 64)
        layer = net.edges["hidden1->hidden2"].module

        def size() -> int:
            file = io.BytesIO()
            torch.save(layer.state_dict(), file)
            return file.tell()

        before = size()
        pcsim.Simulator(net).infer(clamps(net))
        assert size() == before
        save_model(net, str(tmp_path / "net.safetensors"))

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("rule", [*RULES, pcsim.IncrementalUpdate()], ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    def test_are_frozen_and_thawed_at_any_time(self, engine: str, rule: pcsim.LearningRule, bias: bool) -> None:
        net = chain()
        edge = net.edges["hidden1->hidden2"]
        frozen = [edge.module.bias] if bias else list(edge.module.parameters())
        sim, optimizer = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), rule, engine=engine), None
        for learns in (True, False, True, False):
            for parameter in frozen:
                parameter.requires_grad_(learns)
            before = [parameter.detach().clone() for parameter in frozen]
            others = [p.detach().clone() for p in net.parameters()]
            optimizer = optim.SGD(net.parameters(), 0.1)
            sim.update(clamps(net), optimizer)
            assert all(torch.equal(p, b) != learns for p, b in zip(frozen, before, strict=True))
            assert any(not torch.equal(p, b) for p, b in zip(net.parameters(), others, strict=True))

    @pytest.mark.parametrize("engine", ENGINES)
    def test_frozen_between_inference_and_learning(self, engine: str) -> None:
        net = chain()
        sim = pcsim.Simulator(net, engine=engine)
        sim.infer(clamps(net))
        expected = sim.gradients()
        frozen = net.edges["hidden1->hidden2"].requires_grad_(False)
        sim.compute_gradients()
        assert frozen.module.weight.grad is None
        weight = net.edges["input->hidden1"].module.weight
        torch.testing.assert_close(weight.grad, expected[weight])

    def test_are_found_by_name(self) -> None:
        def pruned(kind: type[nn.Module], *sizes: int) -> nn.Module:
            torch.manual_seed(0)
            module = kind(*sizes)
            nn.init.uniform_(module.weight, 1, 2)
            prune.l1_unstructured(module, "weight", 0.5)
            return prune.remove(module, "weight")

        assert_honoured(lambda: pair((4,), (4,), pruned(nn.BatchNorm1d, 4)), lambda net: None)
        assert_honoured(lambda: pair((4,), (3,), pruned(nn.Linear, 4, 3)), lambda net: None)

    def test_an_optimizer_that_no_longer_holds_them_is_told(self) -> None:
        net = chain()
        sim, optimizer = pcsim.Simulator(net), optim.SGD(net.parameters(), 0.1)
        sim.update(clamps(net), optimizer)
        net.edges["input->hidden1"].module = nn.Linear(4, 5)
        with pytest.raises(SettingError, match="holds 2 parameters that this network had"):
            sim.update(clamps(net), optimizer)
        net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
        with pytest.raises(SettingError, match="holds no parameter of this network"):
            sim.update(clamps(net), optimizer)


def double_output(net: pcsim.Network) -> object:
    return net.edges["hidden1->hidden2"].module.register_forward_hook(lambda module, given, output: 2 * output)


def double_input(net: pcsim.Network) -> object:
    return net["hidden1"].transfer.register_forward_pre_hook(lambda module, given: (2 * given[0],))


def triple_forward(net: pcsim.Network) -> None:
    module = net.edges["hidden1->hidden2"].module
    before = module.forward
    module.forward = lambda value: 3 * before(value)


def edit_data(net: pcsim.Network) -> None:
    net.edges["hidden1->hidden2"].module.weight.data += 1.0


CHANGES = {
    "gain": lambda net: setattr(net.edges["hidden1->hidden2"], "gain", 0.5),
    "module": lambda net: setattr(net.edges["hidden1->hidden2"], "module", nn.Sequential(nn.Identity(), nn.ReLU())),
    "energy weight": lambda net: setattr(net["hidden1"], "energy_weight", 3.0),
    "precision": lambda net: setattr(net["hidden1"], "own_precision", 5.0),
    "precision per unit": lambda net: setattr(net["hidden1"], "own_precision", torch.arange(1.0, 6.0)),
    "learned precision": lambda net: setattr(net["hidden1"], "own_precision", pcsim.LearnedPrecision(2.0)),
    "energy": lambda net: setattr(net["output"], "energy_function", pcsim.CrossEntropy()),
    "transfer": lambda net: setattr(net["hidden1"], "transfer", nn.GELU()),
    "combine": lambda net: setattr(net["hidden1"], "combine", pcsim.Product()),
    "deterministic": lambda net: setattr(net["hidden2"], "deterministic", True),
    "weights by data": edit_data,
    "forward hook": double_output,
    "forward pre-hook": double_input,
    "forward of an instance": triple_forward,
    "evaluation mode": lambda net: net.eval(),
    "a frozen layer": lambda net: net.edges["hidden1->hidden2"].requires_grad_(False),
    "a frozen bias": lambda net: net.edges["hidden1->hidden2"].module.bias.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_runs_is_honoured(change: str) -> None:
    assert_honoured(chain, CHANGES[change])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", ["gain", "weights by data", "forward hook", "transfer", "energy weight"])
def test_readings_are_never_stale(engine: str, change: str) -> None:
    net = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), engine=engine)
    sim.infer(clamps(net))
    CHANGES[change](net)
    for node in (node for node in net.nodes.values() if node.incoming):
        given = [edge.gain * edge.module(edge.source.value) for edge in node.incoming]
        torch.testing.assert_close(node.prediction, node.transfer(node.combine(*given)))


@pytest.mark.parametrize(
    ("part", "name"),
    [("node", name) for name in ("name", "shape", "value", "prediction", "error", "incoming", "network")]
    + [("edge", name) for name in ("name", "source_name", "target_name", "contribution_shape", "message", "network")],
)
def test_what_is_not_honoured_cannot_be_set(part: str, name: str) -> None:
    net = chain()
    with pytest.raises(AttributeError):
        setattr(net["hidden1"] if part == "node" else net.edges["hidden1->hidden2"], name, 1)


@pytest.mark.parametrize("old", ["weight", "given_precision", "base_precision"])
def test_earlier_names_say_the_present_ones(old: str) -> None:
    node = chain()["hidden1"]
    with pytest.raises(AttributeError, match="is called"):
        setattr(node, old, 2.0)
    with pytest.raises(AttributeError, match="is called"):
        getattr(node, old)


@pytest.mark.parametrize("engine", ENGINES)
def test_full_backward_hooks_are_called(engine: str) -> None:
    net, called = chain(), []
    sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1), engine=engine)
    sim.infer(clamps(net))
    net.edges["hidden1->hidden2"].module.register_full_backward_hook(lambda *given: called.append(given))
    sim.infer(clamps(net))
    assert called
    with pytest.raises(GraphError, match="hook on it would never run"):
        net["hidden1"].register_forward_hook(print)


class TestModes:
    def test_change_by_train_and_eval_and_come_back(self) -> None:
        class Merging(nn.Linear):
            merged = False

            def train(self, mode: bool = True) -> nn.Module:
                assert mode == self.merged or mode != self.training, "only where it has to change"
                self.merged = not mode
                return super().train(mode)

        net = pcsim.Network()
        for name in "xyz":
            net.add_node(name, (4,))
        net.add_edge("x", "y", Merging(4, 4))
        frozen = nn.BatchNorm1d(4).eval()
        net.add_edge("y", "z", nn.Sequential(nn.Linear(4, 4), frozen))
        before = [module.training for module in net.modules()]
        pcsim.Simulator(net).predict({"x": torch.randn(3, 4)})
        assert [module.training for module in net.modules()] == before
        assert not net.edges["x->y"].module.merged

    def test_a_trainer_s_validation_brings_them_back(self) -> None:
        class Merging(nn.Linear):
            merged = False

            def train(self, mode: bool = True) -> nn.Module:
                self.merged = not mode
                return super().train(mode)

        net = pair((4,), (3,), Merging(4, 3))
        data = [(torch.randn(5, 4), torch.randn(5, 3))]
        optimizer = optim.SGD(net.parameters(), 0.01)
        trainer = pcsim.Trainer(pcsim.Simulator(net), optimizer, inputs="x", target="y", progress=False)
        trainer.fit(data, epochs=1, validation=data)
        assert net.training
        assert not net.edges["x->y"].module.merged

    def test_predictions_from_threads_are_right(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Linear(32, 3))
        net = pcsim.from_sequential(model, input_shape=(6,))
        sim = pcsim.Simulator(net)
        inputs = [torch.randn(8, 6) for _ in range(60)]
        expected = [sim.predict({"input": x})["output"] for x in inputs]
        got: dict[int, Tensor] = {}

        def serve(start: int) -> None:
            for place in range(start, len(inputs), 4):
                got[place] = sim.predict({"input": inputs[place]})["output"]

        threads = [threading.Thread(target=serve, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert net.training
        for place, value in got.items():
            torch.testing.assert_close(value, expected[place])


class TestDrawsAndStates:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_draws_are_held_whatever_the_strength_was(self, engine: str) -> None:
        dropout = nn.Dropout(0.0)
        net = chain()
        net.edges["hidden1->hidden2"].module = nn.Sequential(dropout, nn.Linear(5, 5))
        sim = pcsim.Simulator(net, pcsim.Relaxation(20, 0.05), engine=engine)
        sim.infer(clamps(net))
        dropout.p = 0.5
        energies = sim.infer(clamps(net), record=True).free_energies
        assert (energies.diff() <= 1e-6 * energies[0]).all()

    @pytest.mark.parametrize("how", ["hook", "forward"])
    def test_draws_of_what_is_put_on_a_module_later_are_held(self, how: str) -> None:
        net = chain()
        module, given = net.edges["hidden1->hidden2"].module, clamps(net)
        sim = pcsim.Simulator(net, pcsim.Relaxation(4, 0.1))
        sim.infer(given)
        if how == "hook":
            module.register_forward_hook(lambda _, __, output: output + torch.randn_like(output))
        else:
            module.forward = lambda value: nn.functional.linear(value, module.weight) + torch.randn(5)
        sim.infer(given)
        assert torch.equal(net["hidden2"].prediction, net["hidden2"].prediction)
        before = net["hidden2"].prediction
        sim.infer(given)
        assert not torch.equal(net["hidden2"].prediction, before)

    @pytest.mark.parametrize("engine", ENGINES)
    def test_buffers_move_once_per_batch(self, engine: str) -> None:
        torch.manual_seed(0)
        linear = parametrizations.spectral_norm(nn.Linear(6, 3))
        net = pair((6,), (3,), linear)
        vector = linear.parametrizations.weight[0]._u
        sim = pcsim.Simulator(net, engine=engine)
        x, y = torch.randn(4, 6), torch.randn(4, 3)
        before = vector.clone()
        sim.infer({"x": x, "y": y})
        _ = net["y"].error, net.edges["x->y"].message
        assert torch.equal(vector, before)
        twin = copy.deepcopy(linear)
        sim.learn(optim.SGD(net.parameters(), 0.0))
        twin(x)
        torch.testing.assert_close(vector, twin.parametrizations.weight[0]._u)

    def test_a_buffer_that_stays_stays_though_it_holds_nan(self) -> None:
        module = nn.Linear(3, 3)
        module.register_buffer("unknown", torch.full((2,), torch.nan))
        net = pcsim.Network()
        for name in ("x", "y"):
            net.add_node(name, (3,))
        assert not net.add_edge("x", "y", module).moves

    def test_a_membrane_kept_as_a_buffer(self) -> None:
        class Leaky(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("membrane", torch.zeros(4))

            def forward(self, value: Tensor) -> Tensor:
                self.membrane.mul_(0.9).add_(value.mean(0).detach())
                return torch.tanh(value + self.membrane)

        results = []
        for engine in ENGINES:
            net = pair((4,), (4,), Leaky())
            sim = pcsim.Simulator(net, engine=engine)
            given = clamps(net)
            for _ in range(3):
                sim.infer(given)
                sim._fill_gradients(sim._require_learnable())
            results.append(net.edges["x->y"].module.membrane)
        torch.testing.assert_close(*results)
        torch.testing.assert_close(results[0], given["x"].mean(0) * (1 + 0.9 + 0.81))

    def test_a_state_kept_elsewhere_is_refused_by_name(self) -> None:
        class Leaky(nn.Module):
            membrane = None

            def forward(self, value: Tensor) -> Tensor:
                self.membrane = value if self.membrane is None else 0.9 * self.membrane + value
                return torch.tanh(self.membrane)

        with pytest.raises(GraphError, match="keeps a state in its attribute 'membrane'"):
            pair((4,), (4,), Leaky())

    def test_what_a_module_notes_of_its_last_input_is_no_state(self) -> None:
        class Noting(nn.Linear):
            def forward(self, value: Tensor) -> Tensor:
                self.seen = value
                return super().forward(value)

        net = pair((4,), (3,), Noting(4, 3))
        assert not hasattr(net.edges["x->y"].module, "seen")
        pcsim.Simulator(net).update(clamps(net), optim.SGD(net.parameters(), 0.1))


class TestModules:
    def test_lazy_ones_start_as_in_pytorch(self) -> None:
        torch.manual_seed(3)
        net = pcsim.Network()
        for name in "abc":
            net.add_node(name, (8,))
        edges = net.add_edge("a", "b", nn.LazyLinear(8)), net.add_edge("b", "c", nn.LazyLinear(8))
        torch.manual_seed(3)
        lazy = [nn.LazyLinear(8), nn.LazyLinear(8)]
        for edge, module in zip(edges, lazy, strict=True):
            module(torch.zeros(2, 8))
            assert torch.equal(edge.module.weight, module.weight)
            assert not edge.stochastic

    def test_reentrant_checkpoints_are_refused_and_others_right(self) -> None:
        class Block(nn.Module):
            def __init__(self, reentrant: bool) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.body, self.reentrant = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)), reentrant

            def forward(self, value: Tensor) -> Tensor:
                return checkpoint(self.body, value, use_reentrant=self.reentrant)

        given = {"x": torch.randn(3, 4), "y": torch.randn(3, 4)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sim = pcsim.Simulator(pair((4,), (4,), Block(True)))
            with pytest.raises(GraphError, match=r"(?s)'x->y'.*use_reentrant=False"):
                sim.infer(given)
        for engine in ENGINES:
            net = pair((4,), (4,), Block(False))
            sim = pcsim.Simulator(net, engine=engine)
            sim.infer(given)
            found = sim.gradients()
            body = net.edges["x->y"].module.body
            loss = 0.5 * (body(given["x"]) - given["y"]).square().sum() / 3
            for parameter, gradient in zip(
                body.parameters(), torch.autograd.grad(loss, body.parameters()), strict=True
            ):
                torch.testing.assert_close(found[parameter], gradient)

    @pytest.mark.parametrize("module", [nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))], ids=str)
    def test_one_sample_where_the_batch_is_normalised_is_refused(self, module: nn.Module) -> None:
        net = pair((3,), (3,), module)
        one = {"x": torch.randn(1, 3), "y": torch.randn(1, 3)}
        with pytest.raises(ClampError, match="'x->y' normalises over the batch"):
            pcsim.Simulator(net).infer(one)
        net.eval()
        pcsim.Simulator(net).infer(one)

    def test_one_sample_at_a_normalisation_of_one_s_own(self) -> None:
        class Standard(nn.Module):
            def forward(self, value: Tensor) -> Tensor:
                return (value - value.mean(0)) / value.std(0)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sim = pcsim.Simulator(pair((3,), (3,), Standard()))
            with pytest.raises(ClampError, match="normalises over the batch"):
                sim.infer({"x": torch.randn(1, 3), "y": torch.randn(1, 3)})

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_numbers_of_nodes_follow_the_dtype_of_the_modules(self, dtype: torch.dtype, engine: str) -> None:
        net = pcsim.Network()
        net.add_node("cause", (3,), prior=0.5)
        net.add_node("x", (3,), precision=torch.full((3,), 2.0, dtype=torch.float64))
        net.add_node("y", (2,), precision=pcsim.LearnedPrecision(2.0, per_unit=True))
        net.add_edge("cause", "x", nn.Linear(3, 3, dtype=dtype))
        net.add_edge("x", "y", nn.Linear(3, 2, dtype=dtype))
        optimizer = optim.SGD(net.parameters(), 0.1)
        before = net["y"].own_precision.detach()[0].item()
        sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), engine=engine)
        sim.update({"y": torch.ones(4, 2, dtype=dtype)}, optimizer)
        assert net["y"].own_precision.detach()[0].item() != before
        assert {tensor.dtype for tensor in net.state_dict().values()} == {dtype}
        assert net["x"].value.dtype == dtype
        net["y"].own_precision = pcsim.LearnedPrecision()
        sim.infer({"y": torch.ones(4, 2, dtype=dtype)})
        assert net["y"].own_precision.dtype == dtype

    def test_a_prior_that_learns_in_another_dtype_is_refused_by_name(self) -> None:
        net = pcsim.Network()
        net.add_node("cause", (3,), prior=nn.Parameter(torch.zeros(3, dtype=torch.float64)))
        net.add_node("x", (3,))
        net.add_edge("cause", "x", nn.Linear(3, 3))
        with pytest.raises(GraphError, match=r"'cause' has parameters of torch.float64.*network.to"):
            pcsim.Simulator(net).infer({"x": torch.ones(4, 3)})

    def test_autocast_is_refused_in_one_sentence(self) -> None:
        net = chain()
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(SettingError, match="autocast is on"):
            pcsim.Simulator(net).infer(clamps(net))

    def test_a_network_is_not_called(self) -> None:
        with pytest.raises(GraphError, match="to_module"):
            chain()(torch.randn(2, 4))


class TestEnergies:
    def test_a_free_node_without_a_minimum_is_told(self) -> None:
        net = pcsim.Network()
        net.add_node("x", (6,))
        net.add_node("label", (4,), energy=pcsim.CrossEntropy())
        net.add_node("z", (3,))
        net.add_edge("x", "label", nn.Linear(6, 4))
        net.add_edge("label", "z", nn.Linear(4, 3))
        with pytest.warns(EnergyWarning, match="'label'"):
            pcsim.Simulator(net).infer({"x": torch.randn(3, 6), "z": torch.randn(3, 3)})

    @pytest.mark.parametrize("keep", [False, True])
    def test_one_that_sums_too_much_is_refused(self, keep: bool) -> None:
        class PerSample(pcsim.Energy):
            def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
                return 0.5 * (value - prediction).square().sum(1, keepdim=keep)

        with pytest.raises(GraphError, match=r"'h'.*one number"):
            pcsim.Network().add_node("h", (4,), energy=PerSample(), precision=torch.arange(1.0, 5.0))

    @pytest.mark.parametrize("trials", [False, True])
    def test_one_of_a_whole_sample_is_weighed_once(self, trials: bool) -> None:
        @attrs.frozen
        class Whole(pcsim.Energy):
            rests_at_prediction = True

            def unit_energy(self, value: Tensor, prediction: Tensor) -> Tensor:
                return 0.5 * (value - prediction).square().sum(1, keepdim=True)

        values = []
        for energy, engine in ((Whole(), "batched"), (Whole(), "reference"), (pcsim.Gaussian(), "batched")):
            net = chain().double()
            net["hidden1"].energy, net["hidden1"].precision = energy, torch.tensor(2.0)
            sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1), engine=engine)
            own = torch.arange(1.0, 5.0, dtype=torch.float64)
            given = {name: value.double() for name, value in clamps(net).items()}
            sim.infer(given, precision={"hidden1": own} if trials else None)
            values.append(net["hidden1"].value)
        torch.testing.assert_close(values[0], values[2])
        torch.testing.assert_close(values[1], values[2])

    @pytest.mark.parametrize("engine", ENGINES)
    def test_nan_of_a_module_or_an_energy_is_not_blamed_on_the_rate(self, engine: str) -> None:
        class Root(nn.Module):
            def forward(self, value: Tensor) -> Tensor:
                return torch.sqrt(value - 0.1)

        net = chain(3, 3, 3)
        net.edges["hidden1->output"].module = Root()
        given = {"input": torch.randn(4, 3), "output": torch.randn(4, 3)}
        with pytest.raises(PCError, match=r"'hidden1->output': its module, Root.*made NaN") as told:
            pcsim.Simulator(net, engine=engine).infer(given)
        assert "smaller rate" not in str(told.value)


class TestWhatIsGiven:
    def test_numpy_integers_lists_and_arrays(self) -> None:
        net = pcsim.Network()
        net.add_node("a", np.array([2, 3]))
        net.add_node("b", (np.int64(4),), prior=[1, 2, 3, 4])
        net.add_node("c", (2,), prior=np.array([0.5, 1.0]))
        assert [node.shape for node in net.nodes.values()] == [(2, 3), (4,), (2,)]
        assert net["b"].prior.tolist() == [1.0, 2.0, 3.0, 4.0]
        assert net["b"].prior.dtype == net["c"].prior.dtype == torch.float32
        with pytest.raises(GraphError, match="'d': prior"):
            net.add_node("d", (2,), prior=["one", "two"])

    def test_sparse_clamps_are_refused_by_name(self) -> None:
        net = chain()
        with pytest.raises(ClampError, match=r"'input'.*to_dense"):
            pcsim.Simulator(net).infer({**clamps(net), "input": clamps(net)["input"].to_sparse()})

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(KeyError, match=r"'typo' is not in the network.*'hidden1'"):
            chain().nodes["typo"]

    def test_a_network_that_was_changed_is_relaxed_again(self) -> None:
        net = chain()
        sim = pcsim.Simulator(net)
        sim.infer(clamps(net))
        net["hidden1"].energy_weight = 2.0
        with pytest.raises(StateError, match="infer again"):
            sim.learn(optim.SGD(net.parameters(), 0.1))


def test_a_plan_is_asked_without_consequence() -> None:
    net = chain()
    sim = pcsim.Simulator(net, pcsim.Relaxation(6, 0.1, tolerance=1e-9))
    sim.infer(clamps(net))
    before = str(sim.plan)
    for steps in (3, 1, 5, 0):
        sim.plan.learning(steps)
        sim.plan.closing(steps)
    assert str(sim.plan) == before
    reference = pcsim.Simulator(net, engine="reference")
    reference.infer(clamps(net))
    with pytest.raises(StateError, match="without a plan"):
        _ = reference.plan


@pytest.mark.parametrize("form", ["tuple", "dictionary"])
def test_a_state_in_a_container_is_refused_by_name(form: str) -> None:
    class Cell(nn.Module):
        state = None

        def forward(self, value: Tensor) -> Tensor:
            before = 0.0 if self.state is None else next(iter(self.state.values() if form != "tuple" else self.state))
            now = 0.5 * before + value
            self.state = (now, now) if form == "tuple" else {"membrane": now}
            return now

    with pytest.raises(GraphError, match=r"keeps a state in its attribute ['\"]state"):
        pair((4,), (4,), Cell())


def test_numbers_of_numpy_are_taken() -> None:
    net = chain()
    net["hidden1"].energy_weight, net["hidden1"].own_precision = np.float32(2.0), np.float64(0.5)
    net.edges["hidden1->hidden2"].gain = np.int64(2)
    assert (net["hidden1"].energy_weight, net["hidden1"].own_precision) == (2.0, 0.5)
    with pytest.raises(AttributeError, match="cannot be set"):
        net["hidden1"].value = nn.Parameter(torch.ones(2))


def test_weights_of_another_shape_are_refused_by_name() -> None:
    net = chain()
    sim = pcsim.Simulator(net)
    sim.infer(clamps(net))
    net.edges["hidden1->hidden2"].module.weight = nn.Parameter(torch.ones(7, 6))
    with pytest.raises(GraphError, match="'hidden1->hidden2'"):
        sim.infer(clamps(net))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_compiled_module_stands_on_an_edge(rule: pcsim.LearningRule) -> None:
    torch.manual_seed(0)
    found = []
    last = nn.Sequential(nn.Linear(6, 3), nn.SiLU())
    first = nn.Linear(6, 6)
    given = {"x": torch.randn(5, 6), "y": torch.randn(5, 3)}
    for module in (last, torch.compile(last, backend="eager")):
        net = pcsim.Network()
        for name, size in (("x", 6), ("h", 6), ("y", 3)):
            net.add_node(name, (size,))
        net.add_edge("x", "h", first)
        net.add_edge("h", "y", module)
        sim = pcsim.Simulator(net, pcsim.Relaxation(3, 0.1), rule)
        for _ in range(2):
            sim.infer(given)
        sim.compute_gradients()
        found.append([parameter.grad for parameter in (*first.parameters(), *last.parameters())])
    for compiled, plain in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_learned_twice_counts_its_batch_once_and_accumulates_only_when_asked(engine: str) -> None:
    net = chain()
    net["hidden1"].transfer = nn.BatchNorm1d(5)
    sim, optimizer = pcsim.Simulator(net, engine=engine), optim.SGD(net.parameters(), 0.0)
    weight = net.edges["hidden1->hidden2"].module.weight
    weight.register_hook(lambda gradient: gradient)
    sim.infer(clamps(net))
    sim.learn(optimizer)
    once = [parameter.grad.clone() for parameter in net.parameters()]
    sim.learn(optimizer)
    sim.compute_gradients()
    for parameter, gradient in zip(net.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert int(net["hidden1"].transfer.num_batches_tracked) == 1
    one = {"input": clamps(net)["input"][:1]}
    assert sim.predict(one)["output"].shape == (1, 3)
    sim.rule = pcsim.ForwardUpdate()
    with pytest.raises(StateError, match="the rule is ForwardUpdate since"):
        sim.gradients()


def test_a_trial_that_is_forgotten_leaves_nothing_to_the_next() -> None:
    net = pcsim.topologies.mlp([3, 4, 2])
    sim = pcsim.Simulator(net, pcsim.Relaxation(5, 0.1, start="previous"))
    clamps = {"input": torch.randn(2, 3), "output": torch.randn(2, 2)}
    sim.infer(clamps)
    first = net["hidden1"].value.clone()
    sim.infer(clamps)
    assert not torch.equal(net["hidden1"].value, first)
    sim.forget()
    with pytest.raises(pcsim.errors.StateError, match="run Simulator"):
        _ = net["hidden1"].value
    sim.infer(clamps)
    assert torch.equal(net["hidden1"].value, first)
