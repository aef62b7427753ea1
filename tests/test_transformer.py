"""Transformers: what PyTorch's own layers compute, learned by local rules that equal autograd's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import pcsim
from pcsim import verify
from pcsim.errors import ClampError, GraphError, SettingError
from pcsim.targets import target_values
from pcsim.topologies import Patches, Positions, transformer

RATE = 0.5
Clamped = tuple[pcsim.Network, dict[str, Tensor]]


def decoder(norm_first: bool = True, blocks: int = 1) -> Clamped:
    torch.manual_seed(0)
    net = transformer(
        vocabulary=5, length=3, width=4, heads=2, blocks=blocks, hidden=6, norm_first=norm_first, activation=nn.Tanh
    )
    tokens = torch.randint(5, (2, 4))
    return net.double(), {"input": tokens[:, :-1], "output": one_hot(tokens[:, 1:], 5).double()}


def encoder(norm_first: bool = True, blocks: int = 1) -> Clamped:
    torch.manual_seed(0)
    net = transformer(
        image=(2, 4, 6), patch=2, classes=3, width=4, heads=2, blocks=blocks, hidden=6, norm_first=norm_first
    )
    return net.double(), {"input": torch.randn(2, 2, 4, 6).double(), "output": torch.eye(3)[:2].double()}


MAKERS = {"decoder": decoder, "encoder": encoder}
making = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def of_torch(net: pcsim.Network, norm_first: bool, causal: bool) -> Callable[[Tensor], Tensor]:
    """The same by nn.TransformerEncoderLayer, from the stem to the last sum, with the network's weights."""
    layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, torch.tanh if causal else "gelu", 1e-5, True, norm_first)
    parts = [net.edges[f"{'norm1a' if norm_first else 'stem'}->{name}1"].module for name in ("query", "key", "value")]
    norms = [net[f"sum1{half}"].transfer for half in "ab"]
    into_mlp = f"{'norm1b' if norm_first else 'sum1a'}->mlp1"
    if norm_first:
        norms = [net.edges["stem->norm1a"].module, net.edges["sum1a->norm1b"].module]
    mlp, state = net.edges[into_mlp].module, {}
    for kind in ("weight", "bias"):
        state[f"self_attn.in_proj_{kind}"] = torch.cat([getattr(part, kind) for part in parts])
        state[f"self_attn.out_proj.{kind}"] = getattr(net["attention1"].transfer, kind)
        state |= {f"norm{k}.{kind}": getattr(norm, kind) for k, norm in enumerate(norms, start=1)}
        state |= {f"linear1.{kind}": getattr(mlp[0], kind), f"linear2.{kind}": getattr(mlp[2], kind)}
    layer.double().load_state_dict(state)
    mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64) if causal else None
    return lambda z: layer(z, src_mask=mask)


@making
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_block_computes_what_torchs_layer_does(make: Callable[..., Clamped], norm_first: bool) -> None:
    net, clamps = make(norm_first)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    values = pcsim.Simulator(net).predict({"input": clamps["input"]})
    expected = of_torch(net, norm_first, make is decoder)(values["stem"])
    torch.testing.assert_close(values["sum1b"], expected)


def test_it_has_the_nodes_that_are_told_and_three_auxiliary_neurons_a_block() -> None:
    net, _ = decoder(blocks=2)
    block = "norm{0}a query{0} key{0} value{0} attention{0} sum{0}a norm{0}b mlp{0} sum{0}b"
    assert list(net.nodes) == ["input", "stem", *f"{block.format(1)} {block.format(2)}".split(), "norm", "output"]
    deterministic = {name for name, node in net.nodes.items() if node.deterministic}
    assert deterministic == {name for name in net.nodes if name.startswith(("norm", "sum"))}
    assert net.levels()["stem"] == 3 * 2 + 1
    balanced = pcsim.balance_paths(net, RATE)
    auxiliary = [name for name, node in balanced.nodes.items() if pcsim.is_auxiliary(node)]
    assert auxiliary == [f"skip{k}{place}" for k in (1, 2) for place in ("a/aux1", "a/aux2", "b/aux1")]
    assert not balanced.unequal_paths()
    assert "norm" not in decoder(norm_first=False)[0]


def test_weights_start_as_it_says() -> None:
    torch.manual_seed(0)
    net = transformer(vocabulary=50, length=40, width=64, blocks=3)
    mlp = net.edges["norm2b->mlp2"].module
    stds = {
        net.edges["norm2a->key2"].module.weight: 1 / 8,
        net["attention2"].transfer.weight: 1 / math.sqrt(6 * 64),
        mlp[0].weight: 1 / 8,
        mlp[2].weight: 1 / math.sqrt(6 * 256),
        net.edges["input->stem"].module[0].weight: 1.0,
        net.edges["input->stem"].module[1].weight: 1.0,
    }
    assert mlp[0].out_features == 256
    for weight, std in stds.items():
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert not mlp[2].bias.any()


@pytest.mark.parametrize(("make", "reads_on"), [(decoder, False), (encoder, True)], ids=MAKERS)
def test_a_position_reads_what_comes_before_it_or_all(make: Callable[..., Clamped], reads_on: bool) -> None:
    net, clamps = make(blocks=2)
    other = clamps["input"].clone()
    if make is decoder:
        other[:, -1] = (other[:, -1] + 1) % 5
    else:
        other[..., -2:, -2:] += 1  # the last patch
    first, second = (pcsim.Simulator(net).predict({"input": x})["sum2b"] for x in (clamps["input"], other))
    assert torch.allclose(first[:, :-1], second[:, :-1], rtol=0, atol=1e-12) != reads_on
    assert not torch.allclose(first[:, -1], second[:, -1])


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_what_its_equation_says(causal: bool) -> None:
    query, key, value = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    got = pcsim.Attention(heads=3, causal=causal)(query, key, value)
    for sample in range(2):
        for head in (slice(0, 2), slice(2, 4), slice(4, 6)):
            q, k, v = (tensor[sample, :, head].numpy() for tensor in (query, key, value))
            scores = q @ k.T / np.sqrt(2)
            if causal:
                scores[np.triu_indices(5, 1)] = -np.inf
            np.testing.assert_allclose(got[sample, :, head].numpy(), special.softmax(scores, 1) @ v, rtol=1e-12)


def test_patches_are_cut_row_by_row_and_positions_added() -> None:
    image = torch.arange(2 * 4 * 6).view(1, 2, 4, 6).float()
    patches = Patches(2)(image)
    assert patches.shape == (1, 6, 8)
    assert torch.equal(patches[0, 4], image[0, :, 2:4, 2:4].flatten())
    positions = Positions(6, 8)
    assert torch.equal(positions(patches), patches + positions.weight)


class TestLocalRules:
    @making
    @pytest.mark.parametrize("norm_first", [True, False])
    def test_are_the_gradient_of_the_energy(self, make: Callable[..., Clamped], norm_first: bool) -> None:
        verify.check_gradients(*make(norm_first), pcsim.Relaxation(2, 0.1))

    @making
    def test_are_local(self, make: Callable[..., Clamped]) -> None:
        verify.check_locality(*make(), pcsim.Relaxation(2, 0.1))
        verify.check_locality(*make(), pcsim.Relaxation(2, 0.1, hold_predictions=True))

    @making
    def test_are_backprops_where_paths_are_balanced_and_where_predictions_are_held(
        self, make: Callable[..., Clamped]
    ) -> None:
        net, clamps = make(blocks=2)
        verify.check_backprop_agreement(net, clamps)
        relaxation = pcsim.Relaxation(8, RATE, precision=pcsim.Spiking.for_rate(RATE))
        verify.check_backprop_agreement(pcsim.balance_paths(net, RATE, peak=1 / RATE), clamps, relaxation)

    @making
    @pytest.mark.parametrize(
        ("rule", "precision"),
        [
            (pcsim.SettledUpdate(), pcsim.Constant()),
            (pcsim.ForwardUpdate(), pcsim.Spiking(alpha=0.0)),
            (pcsim.ArrivalUpdate(), pcsim.Spiking.for_rate(0.3)),
            (pcsim.IncrementalUpdate(), pcsim.Constant()),
        ],
        ids=lambda part: type(part).__name__,
    )
    def test_are_the_same_in_both_engines(
        self, make: Callable[..., Clamped], rule: pcsim.LearningRule, precision: pcsim.PrecisionSchedule
    ) -> None:
        net, clamps = make()
        if isinstance(precision, pcsim.Spiking):
            net = pcsim.balance_paths(net, 0.3, peak=precision.peak)
        verify.check_engines_agree(verify.Case(net, clamps, pcsim.Relaxation(5, 0.3, precision=precision), rule))

    def test_descend(self) -> None:
        verify.check_descent(*encoder(), pcsim.Relaxation(1, 0.1))


def test_forward_updates_need_auxiliary_neurons_in_every_block() -> None:
    usual = {}
    for balanced in (True, False):
        net, clamps = decoder(blocks=2)
        net = pcsim.balance_paths(net, 0.8) if balanced else net
        sim = pcsim.Simulator(net, pcsim.Relaxation(8, 0.8, precision=pcsim.Spiking(alpha=0.0)), pcsim.ForwardUpdate())
        usual[balanced] = statistics.mean(pcsim.diagnosis.update_similarity(sim, clamps).values())
    assert usual[True] > 0.9
    assert usual[False] < 0.5


def test_each_error_is_sent_once_though_normalisations_learn_from_several() -> None:
    """What arrives at a step both moves nodes and teaches, by the same product."""
    net, clamps = decoder(blocks=2)
    sims = [pcsim.Simulator(net, pcsim.Relaxation(1, RATE), pcsim.Backprop())]
    balanced = pcsim.balance_paths(net, RATE, peak=1 / RATE)
    relaxation = pcsim.Relaxation(8, RATE, precision=pcsim.Spiking.for_rate(RATE))
    sims.append(pcsim.Simulator(balanced, relaxation, pcsim.ArrivalUpdate()))
    counts = []
    for sim in sims:
        sim.infer(clamps)
        operations = [line.split()[:2] for line in str(sim.program).splitlines()]
        kinds = (["message", "Linear"], ["message", "LayerNorm"], ["vjp", "transfer"], ["gradient", "Linear"])
        counts.append([operations.count(kind) for kind in kinds])
    assert counts[0] == counts[1]
    assert counts[0][:3] == [2 * (3 + 1) + 1, 2 * 2 + 1, 2]


class TestCrossEntropyPerPosition:
    def test_is_the_sum_over_positions(self) -> None:
        net, clamps = decoder()
        pcsim.Simulator(net, pcsim.Relaxation(1, 0.1)).infer(clamps)
        logits, target = net["output"].prediction.numpy(), clamps["output"].numpy()
        expected = -(special.log_softmax(logits, axis=-1) * target).sum((1, 2))
        np.testing.assert_allclose(net["output"].energy.numpy(), expected, rtol=1e-12)

    def test_class_numbers_become_one_hot_along_its_axis(self) -> None:
        net, clamps = decoder()
        numbers = clamps["output"].argmax(-1)
        assert torch.equal(target_values(numbers, net["output"]), clamps["output"].long())
        with pytest.raises(SettingError, match="targets from 0 to 5 given, expected class numbers from 0 to 4"):
            target_values(torch.tensor([[0, 1, 5]]), net["output"])
        with pytest.raises(ClampError, match=r"or class numbers from 0 to 4 of shape \(batch, 3\), for node 'output'"):
            target_values(numbers[:, :2], net["output"])
        first = pcsim.Network()
        first.add_node("output", (5, 3), energy=pcsim.CrossEntropy())
        assert torch.equal(target_values(numbers, first["output"]), clamps["output"].long().mT)

    def test_a_trainer_counts_positions(self) -> None:
        net, clamps = decoder()
        net.float()
        numbers = clamps["output"].argmax(-1)
        trainer = pcsim.Trainer(pcsim.Simulator(net, rule=pcsim.Backprop()), SGD(net.parameters(), 1.0), progress=False)
        pairs = DataLoader(TensorDataset(clamps["input"], numbers), 2)
        trainer.fit(pairs, epochs=3)
        output = trainer.simulator.predict({"input": clamps["input"]})["output"]
        expected = (output.argmax(-1) == numbers).double().mean().item()
        assert trainer.evaluate(pairs)["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected vocabulary and length alone, of a decoder, or image, patch and classes alone"),
        ({"vocabulary": 5}, "length=None"),
        ({"vocabulary": 5, "length": 3, "classes": 2}, "classes=2"),
        ({"image": (1, 4, 4), "patch": 2}, "classes=None"),
        ({"image": (1, 4, 6), "patch": 4, "classes": 2}, r"image \(1, 4, 6\) and patch 4 given"),
        ({"image": (4, 4), "patch": 2, "classes": 2}, "expected positive channels, height and width"),
        ({"vocabulary": 5, "length": 3, "width": 6, "heads": 4}, "width 6 and 4 heads given"),
        ({"vocabulary": 5, "length": 0}, "length=0 given"),
        ({"vocabulary": 5, "length": 3, "blocks": 0}, "blocks=0 given"),
        ({"vocabulary": 5.0, "length": 3}, r"vocabulary=5\.0 given, expected a whole number"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        transformer(**arguments)  # type: ignore[arg-type]


def test_attention_refuses_heads_that_are_none() -> None:
    with pytest.raises(GraphError, match="heads=0 given, expected a whole number of at least 1"):
        pcsim.Attention(0)


def test_it_normalises_first_unless_told_otherwise() -> None:
    net = transformer(image=(1, 4, 4), patch=2, classes=3, width=4, heads=2, blocks=1)
    assert {"norm1a", "norm1b", "norm"} <= set(net.nodes)
