"""VGG and ResNet: counted, shaped and placed as the paper's tables say."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

import pcsim
from pcsim.errors import GraphError
from pcsim.topologies import Convolution, VGGDesign, resnet, vgg
from pcsim.topologies.vgg import scaled_width

# (channels, pooled) of each convolution, written out from the paper's table apart from the library's own notation.
VGG_LAYERS: dict[str, list[tuple[int, bool]]] = {
    "VGG5": [(128, True), (256, True), (512, True), (512, True)],
    "VGG7": [(128, True), (128, False), (256, True), (256, False), (512, True), (512, False)],
    "VGG9": [
        *((64, True), (128, False), (128, True), (256, False)),
        *((256, True), (512, False), (512, True), (512, False)),
    ],
    "VGG10": [
        *((64, False), (128, False), (128, True), (128, False), (256, True)),
        *((256, False), (256, True), (256, False), (512, True)),
    ],
}
VGG_LAYERS["VGG11"] = [*VGG_LAYERS["VGG10"], (512, False)]
VGG_LAYERS["VGG13"] = [(128, False), *VGG_LAYERS["VGG11"][1:], (512, True), (512, False)]
VGG_LAYERS["VGG15"] = [
    *((64, False), (64, True), (128, False), (128, True), (256, False), (256, False), (256, True)),
    *((512, False), (512, False), (512, True)) * 2,
]
VGG_LAYERS["VGG19"] = [
    *((64, False), (64, True), (128, False), (128, True)),
    *((256, False), (256, False), (256, False), (256, True)),
    *((512, False), (512, False), (512, False), (512, True)) * 2,
]
UNPADDED = {"VGG7": (4, 6)}
WEIGHT_LAYERS = {"VGG5": 5, "VGG7": 7, "VGG9": 9, "VGG10": 10, "VGG11": 11, "VGG13": 13, "VGG15": 15, "VGG19": 17}
RESNET_BLOCKS = {"ResNet10": 1, "ResNet18": 2}


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def sizes_of(name: str, size: int) -> list[int]:
    """Height and width of each convolution's node."""
    found = []
    for place, (_, pooled) in enumerate(VGG_LAYERS[name], start=1):
        size -= 2 if place in UNPADDED.get(name, ()) else 0
        size //= 2 if pooled else 1
        found.append(size)
    return found


def fits(name: str, size: int) -> bool:
    return min(sizes_of(name, size)) >= 1


def vgg_parameters(name: str, classes: int, size: int) -> int:
    """Closed formula: 9 c c' + c' for each convolution, and the head."""
    channels = [3, *(c for c, _ in VGG_LAYERS[name])]
    convolutions = sum(9 * a * b + b for a, b in pairwise(channels))
    widths = [channels[-1] * sizes_of(name, size)[-1] ** 2, *([4096] if name == "VGG15" else []), classes]
    return convolutions + sum(a * b + b for a, b in pairwise(widths))


@pytest.mark.parametrize("name", VGG_LAYERS)
def test_vgg_has_the_papers_layers(name: str) -> None:
    with torch.device("meta"):
        net = vgg(name, classes=100)
    depth, convolutions = WEIGHT_LAYERS[name], len(VGG_LAYERS[name])
    hidden = ["linear1"] if name == "VGG15" else []
    assert list(net.nodes) == ["input", *(f"conv{i + 1}" for i in range(convolutions)), *hidden, "output"]
    assert len(net.edges) == depth
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in net.modules()) == depth
    assert net.levels() == {node: depth - place for place, node in enumerate(net.nodes)}
    assert count(net) == vgg_parameters(name, 100, 32)
    for place, ((channels, pooled), size) in enumerate(zip(VGG_LAYERS[name], sizes_of(name, 32), strict=True), start=1):
        node = net[f"conv{place}"]
        (edge,) = node.incoming
        assert node.shape == (channels, size, size)
        assert isinstance(edge.module, nn.Conv2d)
        assert edge.module.padding == ((0, 0) if place in UNPADDED.get(name, ()) else (1, 1))
        assert (edge.module.kernel_size, edge.module.stride) == ((3, 3), (1, 1))
        parts = list(node.transfer) if isinstance(node.transfer, nn.Sequential) else [node.transfer]
        assert [type(part) for part in parts] == [nn.GELU, *([nn.MaxPool2d] if pooled else [])]
        assert parts[0].approximate == "tanh"
    assert isinstance(net["output"].transfer, nn.Identity)


@pytest.mark.parametrize("size", [28, 32, 33, 64])
@pytest.mark.parametrize("name", VGG_LAYERS)
def test_vgg_fits_or_says_what_would(name: str, size: int) -> None:
    if fits(name, size):
        with torch.device("meta"):
            net = vgg(name, image=(3, size, size), width=1 / 64)
        last = len(VGG_LAYERS[name])
        assert net[f"conv{last}"].shape[1:] == (sizes_of(name, size)[-1],) * 2
        return
    first = next(place for place, left in enumerate(sizes_of(name, size), start=1) if left < 1)
    least = next(enough for enough in range(size, 1000) if fits(name, enough))
    with pytest.raises(GraphError, match=rf"'conv{first}' .* {size}x{size} is given, and at least {least}x{least} is"):
        vgg(name, image=(3, size, size), width=1 / 64)


def test_some_vgg_does_not_fit_28() -> None:
    assert fits("VGG5", 28)
    assert not fits("VGG19", 28)


def test_width_scales_channels_and_leaves_one() -> None:
    half, least = vgg("VGG15", width=0.25, image=(1, 32, 32)), vgg("VGG5", width=1e-9)
    assert half["conv3"].shape == (32, 16, 16)
    assert half["linear1"].shape == (1024,)
    assert [node.shape[0] for node in least.nodes.values()] == [3, 1, 1, 1, 1, 10]
    assert resnet("ResNet10", width=0.5)["sum4"].shape == (256, 4, 4)
    assert resnet([1, 1], width=1e-9)["sum2"].shape == (1, 16, 16)


@pytest.mark.parametrize("build", [lambda: vgg("VGG5", width=1 / 8), lambda: resnet("ResNet10", width=1 / 8)])
def test_weights_start_uniform_within_one_over_root_fan_in(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    for module in build().modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            weight = module.weight.detach()
            assert 0.9 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
            assert module.bias is None or module.bias.abs().max() <= bound


def test_vgg_normalises_between_convolution_and_activation() -> None:
    net = vgg("VGG5", batch_norm=True, width=1 / 32)
    plain = vgg("VGG5", width=1 / 32)
    for place, channels in enumerate((4, 8, 16, 16), start=1):
        (edge,) = net[f"conv{place}"].incoming
        assert type(edge.module) is nn.Conv2d
        assert edge.module.bias is not None
        assert [type(part) for part in net[f"conv{place}"].transfer] == [nn.BatchNorm2d, nn.GELU, nn.MaxPool2d]
        assert net[f"conv{place}"].transfer[0].num_features == channels
    assert count(net) - count(plain) == 2 * (4 + 8 + 16 + 16)


def test_vgg_of_own_layers() -> None:
    design = VGGDesign((Convolution(5), Convolution(6, pool=True, padding=0), Convolution(7, padding=2)), hidden=(9, 8))
    net = vgg(design, image=(2, 8, 10), classes=3, activation=nn.Tanh, energy=pcsim.CrossEntropy())
    shapes = [node.shape for node in net.nodes.values()]
    assert shapes == [(2, 8, 10), (5, 8, 10), (6, 3, 4), (7, 5, 6), (9,), (8,), (3,)]
    assert list(net.nodes)[-3:] == ["linear1", "linear2", "output"]
    transfers = [[part for part in node.transfer.modules() if not list(part.children())] for node in net.nodes.values()]
    assert [[type(part) for part in parts] for parts in transfers] == [
        [nn.Identity],
        [nn.Tanh],
        [nn.Tanh, nn.MaxPool2d],
        *[[nn.Tanh]] * 3,
        [nn.Identity],
    ]
    assert isinstance(net["output"].energy_function, pcsim.CrossEntropy)
    assert vgg([Convolution(4)], image=(1, 4, 4))["conv1"].shape == (4, 4, 4)
    with pytest.raises(GraphError, match=r"'conv2'.*2x8 that reach it.*2x8 is given, and at least 4x4 is needed"):
        vgg(design, image=(2, 2, 8))


@pytest.mark.parametrize("name", RESNET_BLOCKS)
def test_resnet_has_the_papers_parameters_and_levels(name: str) -> None:
    with torch.device("meta"):
        net, normalised = resnet(name, classes=100), resnet(name, classes=100, batch_norm=True)
    expected, before, channels_of_blocks = 9 * 3 * 64, 64, []
    for channels in (64, 128, 256, 512):
        for _ in range(RESNET_BLOCKS[name]):
            expected += 9 * before * channels + 9 * channels**2 + (before * channels if before != channels else 0)
            channels_of_blocks.append(channels)
            before = channels
    assert count(net) == expected + 512 * 100 + 100
    assert count(normalised) - count(net) == sum(2 * 2 * channels for channels in channels_of_blocks)
    depth = int(name.removeprefix("ResNet"))
    assert net.levels()["input"] == depth == 2 * len(channels_of_blocks) + 2
    assert net["sum" + str(len(channels_of_blocks))].shape == (512, 4, 4)
    normalising = {node.name for node in normalised.nodes.values() if isinstance(node.transfer, nn.BatchNorm2d)}
    assert normalising == {f"main{k}{half}" for k in range(1, len(channels_of_blocks) + 1) for half in "ab"}
    assert sum(isinstance(module, nn.BatchNorm2d) for module in normalised.modules()) == len(normalising)


@pytest.mark.parametrize(
    ("size", "last"), [((32, 32), (4, 4)), ((28, 28), (4, 4)), ((9, 17), (2, 3)), ((1, 1), (1, 1))]
)
def test_resnet_takes_any_size(size: tuple[int, int], last: tuple[int, int]) -> None:
    net = resnet("ResNet10", image=(3, *size), width=1 / 32)
    assert net["sum4"].shape == (16, *last)
    assert [type(net.edges[f"skip{k}"].module) for k in range(1, 5)] == [nn.Identity] + [nn.Conv2d] * 3


class PlainBlock(nn.Module):
    """A pre-activation block as PyTorch users write it."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        changes = stride > 1 or before != channels
        self.skip = nn.Conv2d(before, channels, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        main = self.first_norm(self.first(nn.functional.gelu(z, approximate="tanh")))
        main = self.second_norm(self.second(nn.functional.gelu(main, approximate="tanh")))
        return main + self.skip(z)


def test_resnet_computes_what_a_plain_module_does() -> None:
    torch.manual_seed(0)
    net = resnet([2, 1], width=1 / 16, image=(3, 9, 9), classes=5, batch_norm=True).double()
    stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    blocks = [PlainBlock(4, 4, 1), PlainBlock(4, 4, 1), PlainBlock(4, 8, 2)]
    head = nn.Linear(8, 5)
    plain = nn.Sequential(stem, *blocks, nn.GELU("tanh"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    stem.load_state_dict(net.edges["input->stem"].module.state_dict())
    head.load_state_dict(net["output"].incoming[0].module[-1].state_dict())
    for k, block in enumerate(blocks, start=1):
        block.first.load_state_dict(net[f"main{k}a"].incoming[0].module[1].state_dict())
        block.second.load_state_dict(net[f"main{k}b"].incoming[0].module[1].state_dict())
        block.first_norm.load_state_dict(net[f"main{k}a"].transfer.state_dict())
        block.second_norm.load_state_dict(net[f"main{k}b"].transfer.state_dict())
        block.skip.load_state_dict(net.edges[f"skip{k}"].module.state_dict())
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    predicted = pcsim.Simulator(net).predict({"input": images})["output"]
    torch.testing.assert_close(predicted, plain.eval()(images), rtol=1e-12, atol=1e-12)


def test_vgg_learns_a_batch_by_local_rules() -> None:
    torch.manual_seed(0)
    net = vgg("VGG5", width=1 / 16, image=(3, 16, 16), classes=4, batch_norm=True)
    relaxation = pcsim.Relaxation(6, 0.5, precision=pcsim.Spiking(alpha=0.0))
    simulator = pcsim.Simulator(net, relaxation, pcsim.ForwardUpdate())
    images, labels = torch.randn(8, 3, 16, 16), torch.eye(4).repeat(2, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        simulator.infer({"input": images, "output": labels})
        losses.append((net["output"].forward_prediction - labels).square().mean().item())
        simulator.learn(optimizer)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vgg("VGG16"), "'VGG16' is unknown; choose one of VGG5, VGG7"),
        (lambda: resnet("ResNet34"), "'ResNet34' is unknown; choose one of ResNet10, ResNet18"),
        (lambda: resnet([]), "at least one stage"),
        (lambda: resnet([1, 0]), "at least one stage of at least one block"),
        (lambda: vgg("VGG5", image=(32, 32)), r"expected \(channels, height, width\)"),
        (lambda: resnet("ResNet10", image=(3, 0, 32)), "each at least 1"),
        (lambda: vgg("VGG5", width=0.0), "width 0.0 given"),
        (lambda: resnet("ResNet10", classes=0), "0 classes given"),
        (lambda: Convolution(0), "at least 1 channel"),
        (lambda: Convolution(8, padding=-1), "padding of at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        build()


# muPC (arXiv 2505.13124; SPEC §9)


def scales(net: pcsim.Network, features: int) -> list[float]:
    """Root mean square of every hidden value in a forward pass, from the input up."""
    clamps = {"input": torch.randn(64, features)}
    values = pcsim.Simulator(net).predict(clamps)
    return [float(values[name].square().mean().sqrt()) for name in net.nodes if name not in ("input", "output")]


@pytest.mark.parametrize("kind", ["mlp", "residual_mlp"])
@pytest.mark.parametrize("activation", [nn.Identity, nn.Tanh])
def test_mupc_keeps_its_scale_over_width_and_depth(kind: str, activation: type[nn.Module]) -> None:
    """From width 32 to 512 and from depth 4 to 128, in the last hidden layer as in the first."""
    last = []
    for width, depth in ((32, 4), (32, 128), (128, 32), (512, 4), (512, 64)):
        torch.manual_seed(width + depth)
        if kind == "mlp":
            sizes = [64, *[width] * (depth - 1), 10]
            net = pcsim.topologies.mlp(sizes, activation=activation, parametrisation="mupc")
        else:
            net = pcsim.topologies.residual_mlp(
                64, width, 10, blocks=depth // 2, activation=activation, parametrisation="mupc"
            )
        found = scales(net, 64)
        assert 0.8 < found[0] < 1.25
        assert max(found) < 2.2
        last.append(found[-1])
    assert max(last) / min(last) < 1.5


def test_mupc_gains_and_weights_are_those_of_its_table() -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([50, 200, 200, 200, 10], parametrisation="mupc")
    gains = {name: edge.gain for name, edge in net.edges.items()}
    hidden = 1 / math.sqrt(200 * 4)
    assert gains == {
        "input->hidden1": 1 / math.sqrt(50),
        "hidden1->hidden2": hidden,
        "skip2": 1.0,
        "hidden2->hidden3": hidden,
        "skip3": 1.0,
        "hidden3->output": 1 / 200,
    }
    weights = [p for name, p in net.named_parameters() if name.endswith("weight")]
    assert all(abs(float(weight.detach().std()) - 1) < 0.05 for weight in weights)
    branch = pcsim.topologies.residual_mlp(50, 200, 10, blocks=3, parametrisation="mupc")
    assert branch.edges["main2a->main2b"].gain == pytest.approx(1 / math.sqrt(200 * 3))
    assert branch.edges["sum1->main2a"].gain == pytest.approx(1 / math.sqrt(200))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pcsim.topologies.mlp([4, 8, 6, 2], parametrisation="mupc"), "hidden ones that are equal"),
        (lambda: pcsim.topologies.mlp([4], parametrisation="mupc"), "an input and an output size"),
        (lambda: pcsim.topologies.mlp([4, 2], parametrisation="mup"), "expected 'standard' or 'mupc'"),
        (
            lambda: pcsim.topologies.residual_mlp(4, 4, 2, blocks=1, parametrisation="mup"),  # type: ignore[arg-type]
            "expected 'standard' or 'mupc'",
        ),
    ],
)
def test_mupc_says_what_it_takes(build: Callable[[], object], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        build()


def test_widths_go_to_the_nearest_whole_number() -> None:
    assert [scaled_width(*given) for given in ((64, 0.18), (3, 0.5), (64, 0.17), (5, 0.01))] == [12, 2, 11, 1]
    net = pcsim.topologies.vgg("VGG5", image=(1, 16, 16), width=0.0118)  # 1.51, 3.02, 6.04
    assert [net[f"conv{k}"].shape[0] for k in (1, 2, 3)] == [2, 3, 6]
    assert pcsim.topologies.resnet((1,), image=(1, 4, 4), width=0.18)["stem"].shape[0] == 12


def test_weights_of_an_mlp_are_scaled_by_what_comes_in() -> None:
    torch.manual_seed(0)
    net = pcsim.topologies.mlp([400, 25, 400])
    for edge, fan_in in zip(net.edges.values(), (400, 25), strict=True):
        assert float(edge.module.weight.detach().std()) == pytest.approx(1 / math.sqrt(fan_in), rel=0.1)
