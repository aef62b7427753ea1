"""Every class of torch.nn, with every option: it comes back from a file alike or is refused, and is written as code."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

import pcsim
from pcsim import io
from pcsim.errors import FileError
from pcsim.saving import load_network, register_module, registry, save_network
from pcsim.verify.writing import Writer


class Holder(nn.Module):
    """Holds a module of any number of inputs, where a network's edge has one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, value: Tensor) -> Tensor:
        return value


@pytest.fixture(autouse=True)
def registered_holder() -> Iterator[None]:
    before = dict(registry.RECIPES)
    register_module(Holder)
    yield
    registry.RECIPES.clear()
    registry.RECIPES.update(before)


def there_and_back(module: nn.Module, path: Path) -> nn.Module:
    net = pcsim.Network()
    net.add_node("a", (2,))
    net.add_node("b", (2,))
    net.add_edge("a", "b", Holder(module))
    save_network(net, path)
    inner = load_network(path).edges["a->b"].module.inner
    assert isinstance(inner, nn.Module)
    return inner


def outcome(module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """All tensors that a module returns, in training mode and in evaluation mode, with the same draws."""
    tensors: list[Tensor] = []

    def gather(result: Any) -> None:
        if isinstance(result, Tensor):
            tensors.append(result)
        elif isinstance(result, tuple | list):
            for item in result:
                gather(item)

    for mode in (True, False):
        torch.manual_seed(3)
        gather(module.train(mode)(*(given.clone() if isinstance(given, Tensor) else given for given in inputs)))
    return tensors


def check_same(one: nn.Module, other: nn.Module, inputs: tuple[Any, ...] | None) -> None:
    assert type(one) is type(other)
    assert repr(one) == repr(other)
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert [(n, p.requires_grad) for n, p in one.named_parameters()] == [
        (n, p.requires_grad) for n, p in other.named_parameters()
    ]
    for (_, part), (_, again) in zip(one.named_modules(), other.named_modules(), strict=True):
        settings, found = (
            {name: value for name, value in vars(of).items() if not name.startswith("_") and name != "training"}
            for of in (part, again)
        )
        assert settings.keys() == found.keys()
        for name, value in settings.items():
            assert found[name] == value, (name, value)
            assert type(found[name]) is type(value), (name, value)
    if inputs is not None:
        results = outcome(one, inputs), outcome(other, inputs)
        assert len(results[0]) == len(results[1]) > 0
        for ours_too, theirs_too in zip(*results, strict=True):
            assert torch.equal(ours_too.nan_to_num(), theirs_too.nan_to_num())


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) + 0.1


@attrs.frozen(eq=False)
class Entry:
    """One class: the arguments that it needs, values of its options beyond those that follow, and inputs for it."""

    inputs: tuple[Any, ...] | None = None
    needed: Mapping[str, Any] = attrs.field(factory=dict)
    options: Mapping[str, list[Any]] = attrs.field(factory=dict)


def entry(*inputs: Any, needed: Mapping[str, Any] | None = None, **options: list[Any]) -> Entry:
    return Entry(inputs or None, needed or {}, options)


def given(**needed: Any) -> dict[str, Any]:
    return needed


LEGACY = {"size_average", "reduce", "min_value", "max_value", "_weight", "_freeze", "process_group", "options"}
"""Options that torch itself deprecates, or keeps for itself."""

ANY = noise(3, 4)
IMAGES = {1: noise(2, 4, 9), 2: noise(2, 4, 9, 9), 3: noise(2, 4, 5, 5, 5)}
WITHOUT_NEEDS = (
    "AlphaDropout CELU Dropout ELU FeatureAlphaDropout Hardshrink Hardsigmoid Hardswish Identity LeakyReLU LogSigmoid "
    "Mish ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink"
)
TABLE: dict[str, Entry] = {name: entry(ANY) for name in WITHOUT_NEEDS.split()}
TABLE |= {name: entry(ANY, needed=given(dim=1)) for name in ("LogSoftmax", "Softmax", "Softmin")}
TABLE |= {
    "Bilinear": entry(noise(3, 2), noise(3, 4), needed=given(in1_features=2, in2_features=4, out_features=3)),
    "Linear": entry(ANY, needed=given(in_features=4, out_features=3)),
    "GELU": entry(ANY, approximate=["tanh"]),
    "GLU": entry(ANY, dim=[1]),
    "Hardtanh": entry(ANY, min_val=[-2, 0.5], max_val=[2, float("inf")]),
    "RReLU": entry(ANY, lower=[0, 0.2], upper=[1, 0.5]),
    "Flatten": entry(IMAGES[2], start_dim=[2], end_dim=[2]),
    "PReLU": entry(ANY, num_parameters=[4]),
    "Softmax2d": entry(IMAGES[2]),
    "Threshold": entry(ANY, needed=given(threshold=0.5, value=2)),
    "Unflatten": entry(
        ANY, needed=given(dim=1, unflattened_size=(2, 2)), unflattened_size=[[2, 2], torch.Size([2, 2]), (4, 1)]
    ),
    "ChannelShuffle": entry(IMAGES[2], needed=given(groups=2)),
    "PixelShuffle": entry(IMAGES[2], needed=given(upscale_factor=2)),
    "PixelUnshuffle": entry(noise(2, 4, 4, 4), needed=given(downscale_factor=2)),
    "Upsample": entry(
        IMAGES[2],
        needed=given(scale_factor=2, mode="bilinear"),
        size=[],
        scale_factor=[1.5, (2.0, 3.0)],
        mode=["bicubic"],
        align_corners=[True],
        recompute_scale_factor=[True],
    ),
    "UpsamplingBilinear2d": entry(IMAGES[2], needed=given(size=5), size=[(5, 6)], scale_factor=[]),
    "UpsamplingNearest2d": entry(IMAGES[2], needed=given(scale_factor=2), size=[], scale_factor=[(2.0, 3.0)]),
    "Fold": entry(
        noise(2, 16, 9), needed=given(output_size=(4, 4), kernel_size=2), dilation=[], padding=[], stride=[(1, 1)]
    ),
    "Unfold": entry(IMAGES[2], needed=given(kernel_size=2), stride=[(1, 2)], padding=[(1, 0)], dilation=[2]),
    "Embedding": entry(
        torch.tensor([[0, 2], [1, 1]]),
        needed=given(num_embeddings=4, embedding_dim=3),
        padding_idx=[0, -1],
        max_norm=[1, 0.5],
    ),
    "EmbeddingBag": entry(
        torch.tensor([[0, 2], [1, 1]]),
        needed=given(num_embeddings=4, embedding_dim=3),
        padding_idx=[0, -1],
        max_norm=[1, 0.5],
        mode=["max", "sum"],
        include_last_offset=[],
    ),
    "GroupNorm": entry(IMAGES[2], needed=given(num_groups=2, num_channels=4)),
    "LayerNorm": entry(ANY, needed=given(normalized_shape=4), normalized_shape=[(4,), [3, 4], torch.Size([4])]),
    "RMSNorm": entry(ANY, needed=given(normalized_shape=4), eps=[1e-3, 1]),
    "LocalResponseNorm": entry(IMAGES[2], needed=given(size=2)),
    "CrossMapLRN2d": entry(IMAGES[2], needed=given(size=2), k=[2, 1.5]),
    "SyncBatchNorm": entry(needed=given(num_features=4), momentum=[None, 1, 0.3]),
    "CosineSimilarity": entry(ANY, ANY + 1, dim=[0]),
    "PairwiseDistance": entry(ANY, ANY.flip(0), p=[1, 1.0, float("inf")]),
    "MultiheadAttention": entry(
        *[noise(3, 2, 4)] * 3,
        needed=given(embed_dim=4, num_heads=2),
        kdim=[4],
        vdim=[4],
    ),
    "LSTMCell": entry(noise(3, 2), needed=given(input_size=2, hidden_size=3)),
    "GRUCell": entry(noise(3, 2), needed=given(input_size=2, hidden_size=3)),
    "RNNCell": entry(noise(3, 2), needed=given(input_size=2, hidden_size=3), nonlinearity=["relu"]),
    "FractionalMaxPool2d": entry(
        IMAGES[2], needed=given(kernel_size=2, output_size=3), output_ratio=[], _random_samples=[noise(2, 4, 2) / 2]
    ),
    "FractionalMaxPool3d": entry(
        IMAGES[3], needed=given(kernel_size=2, output_ratio=0.5), output_size=[], _random_samples=[noise(2, 4, 3) / 2]
    ),
    "LPPool1d": entry(IMAGES[1], needed=given(norm_type=2, kernel_size=2), stride=[1], norm_type=[1.5]),
    "LPPool2d": entry(IMAGES[2], needed=given(norm_type=2, kernel_size=2), stride=[1, (1, 2)]),
    "LPPool3d": entry(IMAGES[3], needed=given(norm_type=2, kernel_size=2), stride=[1]),
    "AdaptiveLogSoftmaxWithLoss": entry(
        noise(3, 16),
        torch.tensor([0, 3, 5]),
        needed=given(in_features=16, n_classes=6, cutoffs=[2, 3]),
        div_value=[2, 1.5],
    ),
    "TransformerEncoderLayer": entry(
        noise(3, 2, 4),
        needed=given(d_model=4, nhead=2, dim_feedforward=5),
        activation=["gelu", F.gelu, F.silu, torch.tanh, nn.GELU(), nn.PReLU(init=0.5)],
    ),
    "TransformerDecoderLayer": entry(
        noise(3, 2, 4),
        noise(3, 2, 4) + 1,
        needed=given(d_model=4, nhead=2, dim_feedforward=5),
        activation=["gelu", F.gelu, F.silu, torch.tanh, nn.GELU(), nn.PReLU(init=0.5)],
    ),
    "TransformerEncoder": entry(
        noise(3, 2, 4),
        needed=given(encoder_layer=nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), num_layers=2),
        norm=[nn.LayerNorm(4)],
        num_layers=[1],
        encoder_layer=[nn.TransformerEncoderLayer(4, 2, 5, activation=nn.GELU(), bias=False)],
    ),
    "TransformerDecoder": entry(
        noise(3, 2, 4),
        noise(3, 2, 4) + 1,
        needed=given(decoder_layer=nn.TransformerDecoderLayer(4, 2, 5), num_layers=2),
        norm=[nn.LayerNorm(4)],
    ),
    "Transformer": entry(
        noise(3, 2, 4),
        noise(3, 2, 4) + 1,
        needed=given(d_model=4, nhead=2, dim_feedforward=5, num_encoder_layers=1, num_decoder_layers=2),
        activation=["gelu", F.gelu],
        custom_encoder=[nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 3, batch_first=True), 1)],
        custom_decoder=[nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 1, 3), 1)],
    ),
    "RNNBase": entry(needed=given(mode="GRU", input_size=4, hidden_size=3), dropout=[0.5], proj_size=[0]),
    "Sequential": entry(ANY, needed={}),
    "ModuleList": entry(needed={}, modules=[[nn.Tanh(), nn.Linear(2, 3)]]),
    "ModuleDict": entry(needed={}, modules=[{"a": nn.Tanh(), "b": nn.Linear(2, 3)}]),
    "ParameterList": entry(needed={}, values=[]),
    "ParameterDict": entry(needed={}, parameters=[]),
}
for recurrent in ("LSTM", "GRU", "RNN"):
    TABLE[recurrent] = entry(
        noise(3, 2, 4),
        needed=given(input_size=4, hidden_size=3, num_layers=2),
        num_layers=[1],
        bias=[False],
        batch_first=[True],
        dropout=[0.5, 1],
        bidirectional=[True],
        **({"proj_size": [2]} if recurrent == "LSTM" else {}),
        **({"nonlinearity": ["relu"]} if recurrent == "RNN" else {}),
    )
for axes in (1, 2, 3):
    image, two = IMAGES[axes], (2,) + (1,) * (axes - 1)
    for kind in ("Conv", "ConvTranspose"):
        transposed = kind == "ConvTranspose"
        TABLE[f"{kind}{axes}d"] = entry(
            image,
            needed=given(in_channels=4, out_channels=2, kernel_size=3, **({"stride": 2} if transposed else {})),
            kernel_size=[two],
            stride=[3, two] if transposed else [2, two],
            padding=[1, two] if transposed else [1, two, "same", "valid"],
            dilation=[2, two],
            groups=[2],
            padding_mode=[] if transposed else ["reflect", "circular", "replicate"],
            **({"output_padding": [1]} if transposed else {}),
        )
    TABLE[f"BatchNorm{axes}d"] = entry(image, needed=given(num_features=4), momentum=[None, 1, 0.3])
    TABLE[f"InstanceNorm{axes}d"] = entry(image, needed=given(num_features=4), momentum=[1, 0.3])
    TABLE[f"Dropout{axes}d"] = entry(image)
    TABLE[f"AvgPool{axes}d"] = entry(
        image,
        needed=given(kernel_size=2),
        stride=[1, two],
        padding=[1],
        **({} if axes == 1 else {"divisor_override": [3]}),
    )
    TABLE[f"MaxPool{axes}d"] = entry(
        image, needed=given(kernel_size=2), stride=[1, two], padding=[1], dilation=[2], return_indices=[True]
    )
    TABLE[f"AdaptiveAvgPool{axes}d"] = entry(
        image,
        needed=given(output_size=2),
        output_size=[(2,) * axes, (2, *[None] * (axes - 1)), torch.Size((2,) * axes)],
    )
    TABLE[f"AdaptiveMaxPool{axes}d"] = entry(image, needed=given(output_size=2), return_indices=[True])
    TABLE[f"MaxUnpool{axes}d"] = entry(
        *getattr(nn, f"MaxPool{axes}d")(2, return_indices=True)(
            image.flatten(2)[..., : 4**axes].unflatten(2, (4,) * axes)
        ),
        needed=given(kernel_size=2),
        stride=[2],
        padding=[0],
    )
    for kind in ("Constant", "Zero", "Reflection", "Replication", "Circular"):
        value = {"value": 2} if kind == "Constant" else {}
        TABLE[f"{kind}Pad{axes}d"] = entry(image, needed=given(padding=1, **value), padding=[(1, 2) * axes])
PROBABILITIES, SIGNS, CLASSES = noise(3, 4).clamp(0, 1), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0, 3, 1])
for loss, inputs in {
    "BCELoss": (PROBABILITIES, PROBABILITIES.flip(0)), "BCEWithLogitsLoss": (ANY, PROBABILITIES),
    "CosineEmbeddingLoss": (ANY, ANY.flip(0), SIGNS), "CrossEntropyLoss": (ANY, CLASSES),
    "CTCLoss": (noise(6, 2, 5).log_softmax(2), torch.tensor([[1, 2], [3, 1]]), torch.tensor([6, 6]),
                torch.tensor([2, 2])),
    "GaussianNLLLoss": (ANY, ANY.flip(0), noise(3, 4)), "HingeEmbeddingLoss": (ANY[:, 0], SIGNS),
    "HuberLoss": (ANY, 3 * ANY.flip(0)), "KLDivLoss": (ANY.log(), ANY.flip(0)), "L1Loss": (ANY, ANY.flip(0)),
    "MSELoss": (ANY, ANY.flip(0)), "MarginRankingLoss": (ANY[:, 0], ANY[:, 1], SIGNS),
    "MultiLabelMarginLoss": (ANY, torch.tensor([[0, 1, -1, 0]] * 3)),
    "MultiLabelSoftMarginLoss": (ANY, PROBABILITIES.round()), "MultiMarginLoss": (ANY, CLASSES),
    "NLLLoss": (ANY.log(), CLASSES), "PoissonNLLLoss": (ANY, ANY.flip(0)), "SmoothL1Loss": (ANY, 3 * ANY.flip(0)),
    "SoftMarginLoss": (ANY[:, 0], SIGNS), "TripletMarginLoss": (ANY, ANY.flip(0), ANY + 1),
    "TripletMarginWithDistanceLoss": (ANY, ANY.flip(0), ANY + 1),
}.items():  # fmt: skip
    TABLE[loss] = Entry(inputs, {}, {"reduction": ["sum"]})
    if "weight" in inspect.signature(getattr(nn, loss)).parameters:
        TABLE[loss].options["weight"] = [torch.tensor([1.0, 2.0, 3.0, 4.0])]  # type: ignore[index]
TABLE["BCEWithLogitsLoss"].options["pos_weight"] = [torch.tensor([1.0, 2.0, 3.0, 4.0])]  # type: ignore[index]
TABLE["TripletMarginWithDistanceLoss"].options["distance_function"] = [  # type: ignore[index]
    F.pairwise_distance, F.cosine_similarity, nn.CosineSimilarity()
]  # fmt: skip
TABLE["MultiMarginLoss"].options["p"] = [2]  # type: ignore[index]

WITHOUT_CODE = ("ModuleDict", "ModuleList", "Transformer")
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Module": (nn.Module, "a torch.nn.modules.module.Module, which cannot be kept: register it"),
    "DataParallel": (lambda: nn.DataParallel(nn.Tanh()), "DataParallel, which cannot be kept"),
    "Container": (nn.Container, "Container, which cannot be kept"),
    "NLLLoss2d": (nn.NLLLoss2d, "NLLLoss2d, which cannot be kept"),
    "RNNCellBase": (lambda: nn.RNNCellBase(2, 3, True, 2), "RNNCellBase.*does not keep its argument 'num_chunks'"),
    "LinearCrossEntropyLoss": (
        lambda: nn.LinearCrossEntropyLoss(4, 3), "LinearCrossEntropyLoss.*does not keep its argument 'in_features'"
    ),
    # Torch forgets such an activation where it copies the layer: the copy calls relu.
    "Transformer with a module as activation": (
        lambda: nn.Transformer(4, 2, 1, 1, 5, activation=nn.GELU(), batch_first=True),
        r"decoder.layers\[0\]: torch.nn.TransformerDecoderLayer is built with other modules inside than it had",
    ),
    "ParameterList of some": (lambda: nn.ParameterList([torch.rand(2)]), "ParameterList is built from its arguments"),
    "ParameterDict of some": (lambda: nn.ParameterDict({"a": torch.rand(2)}), "ParameterDict is built from"),
    "activation of one's own": (
        lambda: nn.TransformerEncoderLayer(4, 2, 5, activation=lambda x: x), "inner.activation has <function.*a module"
    ),
    "distance of one's own": (
        lambda: nn.TripletMarginWithDistanceLoss(distance_function=lambda x, y: (x - y).norm()), "distance_function has"
    ),
}  # fmt: skip
CLASSES_OF_TORCH = sorted(
    name for name, kind in vars(nn).items() if isinstance(kind, type) and issubclass(kind, nn.Module)
)


def others_than(default: Any) -> list[Any]:
    """Values of an option other than its default, an integer in the place of a float among them."""
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, float):
        return [1 if default != 1 else 2, default / 2]
    return [default + 1] if isinstance(default, int) else []


def variants(kind: type[nn.Module], entry: Entry) -> Iterator[dict[str, Any]]:
    """Arguments with one option after the other at another value than its default."""
    yield dict(entry.needed)
    options = dict(entry.options)
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in LEGACY or name in ("device", "dtype") or name in options or name in entry.needed:
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        options[name] = others_than(parameter.default)
        assert options[name], f"{kind.__name__}: the table says no value for {name}={parameter.default!r}"
    for name, values in options.items():
        for value in values:
            yield {**entry.needed, name: value}


def test_the_table_is_complete() -> None:
    lazy = {name for name in CLASSES_OF_TORCH if name.startswith("Lazy")}
    assert set(CLASSES_OF_TORCH) - lazy <= TABLE.keys() | REFUSED.keys()
    assert TABLE.keys() <= set(CLASSES_OF_TORCH)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:dropout2d:UserWarning", "ignore:dropout option adds:UserWarning")
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning", "ignore:LSTM with projections:UserWarning")
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("name", TABLE)
def test_every_option_comes_back(name: str, tmp_path: Path) -> None:
    kind = getattr(nn, name)
    for arguments in variants(kind, TABLE[name]):
        torch.manual_seed(0)
        module = kind(**arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # loading has nothing to warn of
            again = there_and_back(module, tmp_path / "net")
        written = Writer().thing(module)
        if name not in WITHOUT_CODE:
            assert repr(eval(written, {"nn": nn, "torch": torch, "tensor": torch.tensor})) == repr(module)
        check_same(module, again, TABLE[name].inputs)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*NLLLoss2d.*")
@pytest.mark.parametrize("name", [name for name in REFUSED if " " in name or hasattr(nn, name)])
def test_what_cannot_be_told_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises(FileError, match=message) as refused:
        there_and_back(make(), tmp_path / "net")
    assert re.match("edge 'a->b': its module.inner", str(refused.value))
    assert not list(tmp_path.iterdir())


def test_changes_of_the_parts_that_a_module_builds_itself_are_refused(tmp_path: Path) -> None:
    attention = nn.TransformerEncoderLayer(4, 2, 5)
    attention.self_attn.dropout = 0.7
    with pytest.raises(FileError, match=r"self_attn cannot be kept.*dropout was 0\.7 and became 0\.1"):
        there_and_back(attention, tmp_path / "net")
    norm = nn.TransformerDecoderLayer(4, 2, 5)
    norm.norm3.eps = 0.5
    with pytest.raises(FileError, match=r"TransformerDecoderLayer.*became|norm3"):
        there_and_back(norm, tmp_path / "net")


def test_layers_of_a_transformer_may_differ_and_be_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), 3, norm=nn.LayerNorm(4))
    stack.layers[1] = stack.layers[0]
    stack.layers[2] = nn.TransformerEncoderLayer(4, 2, 7, batch_first=True, norm_first=True).eval()
    stack.layers[2].linear1.weight.requires_grad_(False)
    again = there_and_back(stack, tmp_path / "net")
    assert again.layers[1] is again.layers[0]
    assert not again.layers[2].training
    check_same(stack, again, (noise(3, 2, 4),))


def test_parameters_of_modules_that_list_them_anew_stay_tied(tmp_path: Path) -> None:
    both = nn.ModuleList([nn.LSTM(2, 3), nn.LSTM(2, 3), nn.Linear(3, 12)])
    both[1].weight_ih_l0 = both[0].weight_ih_l0
    both[2].weight = both[0].weight_hh_l0
    again = there_and_back(both, tmp_path / "net")
    assert again[0].weight_ih_l0 is again[1].weight_ih_l0
    assert again[2].weight is again[0].weight_hh_l0
    for one, other in zip(both[:2], again[:2], strict=True):
        check_same(one, other, (noise(3, 1, 2),))
    with torch.no_grad():
        again[0].weight_ih_l0.zero_()
    assert not torch.equal(again[1](noise(3, 1, 2))[0], both[1](noise(3, 1, 2))[0])


def test_numbers_of_numpy_and_numbers_that_are_none(tmp_path: Path) -> None:
    modules = nn.Sequential(nn.Linear(np.int64(2), np.int32(3)), nn.Dropout(np.float64(0.25)), nn.Threshold(0, np.nan))
    again = there_and_back(modules, tmp_path / "net")
    assert repr(again) == repr(modules)
    assert type(again[0].in_features) is int


class Initialising(nn.Module):
    """Starts what it is given with zeros, and another module beside it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        nn.init.zeros_(inner.weight)
        self.inner = inner
        np.random.rand()

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = self.inner(value)
        return result


def test_a_constructor_that_initialises_what_it_is_given_destroys_nothing(tmp_path: Path) -> None:
    register_module(Initialising)
    module = Initialising(nn.Linear(2, 2))
    nn.init.ones_(module.inner.weight)
    states = np.random.get_state()[2], torch.get_rng_state()
    again = there_and_back(module, tmp_path / "net")
    assert np.random.get_state()[2] == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    for one in (module, again):
        assert torch.equal(one.inner.weight, torch.ones(2, 2))


def test_files_name_no_other_functions(tmp_path: Path) -> None:
    net = pcsim.Network()
    net.add_node("a", (2, 4))
    net.add_node("b", (2, 4))
    net.add_edge("a", "b", nn.TransformerEncoderLayer(4, 2, 5, activation=F.gelu, batch_first=True))
    save_network(net, tmp_path / "net")
    tree = io.load(tmp_path / "net", "network")
    kept = next(record for record in tree["modules"] if record["class"] == "torch.nn.TransformerEncoderLayer")
    assert kept["config"]["mapping"]["activation"] == {"function": "torch.nn.functional.gelu"}
    kept["config"]["mapping"]["activation"] = {"function": "torch.load"}
    io.save(tmp_path / "net", "network", tree)
    with pytest.raises(FileError, match=r"torch\.load"):
        load_network(tmp_path / "net")
