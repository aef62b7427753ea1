"""Kernels against autograd: at every option of their modules, and wherever a module does more than its type says."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune

import pcsim
from pcsim import verify
from pcsim.arguments import OF_PLACE, constructor_arguments
from pcsim.engine.batched.engine import BatchedEngine
from pcsim.engine.kernels import pooled as pooled_activation
from pcsim.engine.kernels import products
from pcsim.engine.kernels.kernel import _KERNELS, Call, kernel_for
from pcsim.engine.kernels.pooled import PooledActivation
from pcsim.errors import SettingError

TABLE: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(4, 3), (4,)),
    (nn.Linear(4, 3, bias=False), (4,)),
    (nn.Linear(4, 3), (2, 4)),
    (nn.Linear(4, 3, bias=False), (2, 5, 4)),
    (nn.Tanh(), (4,)),
    (nn.ReLU(), (2, 3)),
    (nn.GELU(), (4,)),
    (nn.GELU(approximate="tanh"), (4,)),
    (nn.SiLU(), (2, 3)),
    (nn.Sigmoid(), (4,)),
    (nn.Softplus(), (4,)),
    (nn.Softplus(beta=3.0, threshold=1.0), (2, 3)),
    (nn.LeakyReLU(), (4,)),
    (nn.LeakyReLU(0.3), (2, 3)),
    (nn.ELU(), (4,)),
    (nn.ELU(alpha=0.4), (2, 3)),
    (nn.AvgPool2d(2), (3, 4, 4)),
    (nn.AvgPool2d((3, 2), stride=2, padding=1, ceil_mode=True, count_include_pad=False), (2, 6, 5)),
    (nn.AvgPool2d(2, divisor_override=3), (2, 4, 4)),
    (nn.AvgPool2d(2), (4, 4)),
    (nn.ConvTranspose2d(3, 5, 2, stride=2), (3, 4, 4)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False), (4, 3, 5)),
    (nn.ConvTranspose2d(2, 3, 3, dilation=2), (2, 4, 4)),
    (nn.Conv2d(3, 5, 1, stride=2), (3, 5, 5)),
    (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 5, 5)),
    (nn.Conv2d(2, 3, (3, 1), padding=(2, 0), dilation=(2, 1)), (2, 5, 5)),
    (nn.Conv2d(2, 4, 3, groups=2, bias=False), (2, 5, 5)),
    (nn.Conv2d(2, 3, 3, padding="same"), (2, 5, 5)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), (2, 5, 5)),
    (nn.MaxPool2d(2), (2, 4, 4)),
    (nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), (2, 6, 6)),
    (nn.MaxPool2d((2, 1), stride=1, dilation=(2, 1)), (2, 5, 5)),
    (nn.MaxPool2d(2, ceil_mode=True), (2, 5, 5)),
    (nn.MaxPool2d(2), (4, 4)),
    (nn.LayerNorm(4), (3, 4)),
    (nn.LayerNorm((3, 4), bias=False, eps=0.1), (3, 4)),
    (nn.LayerNorm(4, elementwise_affine=False), (4,)),
    (nn.BatchNorm1d(4), (4,)),
    (nn.BatchNorm1d(4, eps=0.1), (4,)),
    (nn.BatchNorm1d(4, momentum=None), (4, 3)),
    (nn.BatchNorm1d(4, affine=False).eval(), (4,)),
    (nn.BatchNorm2d(3, eps=0.1), (3, 4, 4)),
    (nn.BatchNorm2d(3, eps=0.1).eval(), (3, 4, 4)),
    (nn.BatchNorm2d(3, affine=False, momentum=0.3), (3, 2, 2)),
    (nn.BatchNorm1d(4, track_running_stats=False), (4,)),
    (nn.BatchNorm2d(3, track_running_stats=False).eval(), (3, 4, 4)),
    (nn.Flatten(), (2, 3, 3)),
    (nn.Flatten(start_dim=2), (2, 3, 3)),
    (nn.Flatten(end_dim=2), (2, 3, 3)),
]
"""Modules, and the shape of a value. A kernel takes each, or leaves it to autograd."""

REFUSED = (nn.MaxPool2d(2, return_indices=True), (2, 4, 4))
"""What no edge can have, since it gives two tensors."""


NO_CHOICE = {nn.ConvTranspose2d: {"padding_mode"}}
"""Options that torch itself refuses at any other value."""


def engines_agree(module: nn.Module, shape: tuple[int, ...]) -> None:
    """On two nodes joined by a module, read by a third, so that it predicts, sends and learns."""
    with torch.no_grad():
        made = module(torch.zeros(2, *shape)).shape[1:]
    net = pcsim.Network()
    for name, size in (("x", shape), ("h", shape), ("y", tuple(made))):
        net.add_node(name, size)
    net.add_edge("x", "h")
    net.add_edge("h", "y", module)
    draw = torch.Generator().manual_seed(0)
    clamps = {name: torch.randn(3, *net[name].shape, generator=draw).double() for name in "xy"}
    verify.check_engines_agree(verify.Case(net.double(), clamps, pcsim.Relaxation(3, 0.1)))


@pytest.mark.parametrize(("module", "shape"), TABLE, ids=str)
def test_kernels_equal_autograd(module: nn.Module, shape: tuple[int, ...]) -> None:
    if kernel_for(module, shape) is None:
        engines_agree(module, shape)
    else:
        verify.check_kernel(module, shape)


def test_the_table_has_every_option_of_every_kernel_at_another_value_than_its_default() -> None:
    told: dict[type, set[str]] = {}
    for module, _ in (*TABLE, REFUSED):
        told.setdefault(type(module), set()).update(constructor_arguments(module)[1])
    assert kernel_for(*REFUSED) is None
    for kind in (kind for kind in _KERNELS if kind.__module__.startswith("torch.nn") and kind is not nn.Identity):
        options = inspect.signature(kind).parameters.values()
        optional = {option.name for option in options if option.default is not option.empty}
        assert told[kind] >= optional - {*OF_PLACE, "inplace"} - NO_CHOICE.get(kind, set()), kind


def parametrized(module: nn.Module) -> None:
    parametrizations.weight_norm(module)


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.5)


def retied(module: nn.Module) -> None:
    weight = module.weight.detach().clone()
    del module._parameters["weight"]
    module.weight = 2 * weight


def own_forward(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda value: 3 * before(value)


MORE_THAN_THEIR_TYPE: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda m: m.register_forward_hook(lambda _, given, output: 2 * output),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda _, given: (2 * given[0],)),
    "full backward hook": lambda m: m.register_full_backward_hook(lambda _, ours, theirs: (2 * ours[0],)),
    "full backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda _, theirs: (2 * theirs[0],)),
    "forward of its own": own_forward,
    "parametrization": parametrized,
    "pruning": pruned,
    "weight that is no parameter": retied,
}


@pytest.mark.parametrize("how", MORE_THAN_THEIR_TYPE)
def test_a_module_that_does_more_than_its_type_says_goes_through_autograd(how: str) -> None:
    torch.manual_seed(0)
    weighted = [(nn.Linear(4, 4), (4,)), (nn.Conv2d(2, 2, 3, padding=1), (2, 4, 4))]
    others: list[tuple[nn.Module, tuple[int, ...]]] = [(nn.Tanh(), (3,))]
    if how in ("parametrization", "pruning", "weight that is no parameter"):
        others = [(nn.LayerNorm(4), (4,)), (nn.BatchNorm1d(4), (4,))] if how.startswith("weight") else []
    for module, shape in (*weighted, *others):
        assert kernel_for(module, shape) is not None
        MORE_THAN_THEIR_TYPE[how](module)
        assert kernel_for(module, shape) is None
        if how != "weight that is no parameter":
            engines_agree(module, shape)


GLOBAL_HOOKS = {
    "forward": lambda: torch_module.register_module_forward_hook(_doubled),
    "forward pre": lambda: torch_module.register_module_forward_pre_hook(lambda m, given: None),
    "full backward": lambda: torch_module.register_module_full_backward_hook(lambda m, ours, theirs: None),
    "full backward pre": lambda: torch_module.register_module_full_backward_pre_hook(lambda m, theirs: None),
}


def _doubled(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output if type(module) is nn.Tanh else output


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_a_hook_on_all_modules_is_honoured_while_it_is_there(kind: str) -> None:
    handle = GLOBAL_HOOKS[kind]()
    try:
        assert kernel_for(nn.Tanh(), (3,)) is None
        engines_agree(nn.Tanh(), (3,))
    finally:
        handle.remove()
    assert kernel_for(nn.Tanh(), (3,)) is not None


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Linear(4, 4), (4,)), (nn.Conv2d(2, 2, 3, padding=1), (2, 4, 4)), (nn.ConvTranspose2d(2, 2, 1), (2, 3, 3))],
    ids=str,
)
@pytest.mark.parametrize("equal", [1, 3], ids=["alone", "stacked"])
def test_rounded_messages_differ_from_exact_ones_by_a_little(
    module: nn.Module, shape: tuple[int, ...], equal: int
) -> None:
    values = []
    for dtype in (None, torch.float32):
        net = pcsim.Network()
        torch.manual_seed(0)
        for k in range(equal):
            net.add_node(f"h{k}", shape)
            net.add_node(f"y{k}", shape)
            net.add_edge(f"h{k}", f"y{k}", type(module)(*_sizes(module)))
        draw = torch.Generator().manual_seed(0)
        clamps = {f"y{k}": torch.randn(2, *shape, generator=draw).double() for k in range(equal)}
        sim = pcsim.Simulator(
            net.double(), pcsim.Relaxation(3, 0.2), engine=partial(BatchedEngine, message_dtype=dtype)
        )
        sim.infer(clamps)
        values.append([net[f"h{k}"].value for k in range(equal)])
    for exact, rounded in zip(*values, strict=True):
        apart = (exact - rounded).abs().max()
        assert 1e-12 < float(apart) < 1e-6


def _sizes(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels, module.kernel_size[0], 1, module.padding[0]


@pytest.mark.parametrize("mode", [False, True])
def test_normalisation_at_the_head_of_an_edge_counts_each_batch_once(mode: bool) -> None:
    """Running statistics of both engines, in training mode; in evaluation mode they stay."""
    net = pcsim.topologies.mlp([3, 4, 2])
    norm = nn.BatchNorm1d(4, momentum=None).train(mode)
    net.edges["hidden1->output"].module = nn.Sequential(norm, nn.Linear(4, 2))
    clamps = {"input": torch.randn(5, 3).double(), "output": torch.randn(5, 2).double()}
    verify.check_engines_agree(verify.Case(net.double(), clamps, pcsim.Relaxation(4, 0.2), pcsim.SettledUpdate()))


ACTIVATIONS = [nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Softplus(), nn.ELU()]
ACTIVATIONS += [nn.LeakyReLU(), nn.LeakyReLU(-0.5), nn.ELU(alpha=-0.5)]
POOLINGS = [nn.MaxPool2d(2), nn.MaxPool2d((3, 2), stride=(2, 1), padding=1, dilation=(1, 2), ceil_mode=True)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_an_activation_and_its_pooling_as_one_equal_autograd(
    activation: nn.Module, pooling: nn.Module, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("ACTIVATED_PART", "PULLED_PART"):
        monkeypatch.setattr(pooled_activation, part, 1000)
    kernels = [kernel_for(module, (3, 6, 5)) for module in (activation, pooling)]
    assert [type(kernel).__name__ for kernel in kernels] == [type(activation).__name__, "MaxPool2d"]
    kernel, both = PooledActivation(*kernels), nn.Sequential(activation, pooling)  # type: ignore[arg-type]
    call = Call(both, {}, {})
    for again in range(2):  # the second time into what the first has made
        image = (2 * torch.randn(4, 3, 6, 5).double()).to(memory_format=layout).requires_grad_()
        expected = both(image)
        delta = torch.randn_like(expected)
        given = image.detach().clone(memory_format=torch.preserve_format)
        pooled = kernel.forward(call, given, torch.empty_like(delta) if again else None)
        sent = kernel.message(call, delta, delta, pooled, torch.empty_like(given) if again else None)
        torch.testing.assert_close(given, image.detach(), rtol=0, atol=0)
        torch.testing.assert_close(pooled, expected.detach())
        torch.testing.assert_close(sent, torch.autograd.grad(expected, image, delta)[0])


@pytest.mark.parametrize("side", [181, 182])
@pytest.mark.parametrize(
    "module", [nn.MaxPool2d(2), nn.Sequential(nn.GELU(), nn.MaxPool2d(2))], ids=["alone", "activated"]
)
def test_images_of_more_units_than_two_bytes_number(module: nn.Module, side: int) -> None:
    """Of 181 by 181 units the last has number 2¹⁵ - 8, of 182 by 182 number 2¹⁵ + 355."""
    image = torch.randn(2, 1, side, side).double().requires_grad_()
    expected = module(image)
    delta = torch.randn_like(expected)
    parts = [kernel_for(part, (1, side, side)) for part in (module if isinstance(module, nn.Sequential) else [module])]
    kernel, call = PooledActivation(*parts) if len(parts) == 2 else parts[0], Call(module, {}, {})  # type: ignore[arg-type]
    assert kernel is not None
    for _ in range(2):
        pooled = kernel.forward(call, image.detach(), torch.empty_like(delta))
        sent = kernel.message(call, delta, image.detach(), pooled)
        torch.testing.assert_close(sent, torch.autograd.grad(expected, image, delta, retain_graph=True)[0])


@pytest.mark.parametrize("inside", [nn.Tanh(), nn.Identity()], ids=str)
@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU()], ids=str)
def test_what_is_pooled_is_let_go_only_where_nothing_reads_it(activation: nn.Module, inside: nn.Module) -> None:
    net = pcsim.Network()
    image, features, output = net.add_node("x", (2, 4, 4)), net.add_node("h", (3, 2, 2)), net.add_node("y", (3,))
    features.transfer = nn.Sequential(activation, nn.MaxPool2d(2))
    net.add_edge(image, features, nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), inside))
    net.add_edge(features, output, nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    clamps = {"y": torch.randn(5, 3).double()}
    relaxation = pcsim.Relaxation(5, 0.2)
    verify.check_engines_agree(verify.Case(net.double(), clamps, relaxation, pcsim.SettledUpdate()))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        *((module, (3, 4, 4)) for module in (nn.Conv2d(3, 2, 3), nn.ConvTranspose2d(3, 2, 3), nn.BatchNorm2d(3))),
        *((module, (3, 4, 4)) for module in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten())),
        *((module, (3,)) for module in (nn.Linear(3, 2), nn.BatchNorm1d(3), nn.LayerNorm(3))),
        *((module, (3,)) for module in (nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.LeakyReLU(), nn.ELU(), nn.GELU())),
        *((module, (3,)) for module in (nn.SiLU(), nn.Softplus(), nn.Identity())),
    ],
    ids=str,
)
def test_what_the_page_on_speed_names_has_a_kernel(module: nn.Module, shape: tuple[int, ...]) -> None:
    assert kernel_for(module, shape) is not None


class TestProductsByOneDNN:
    """PyTorch's private linear map of oneDNN: all that pcsim takes for granted of it is looked at here."""

    @pytest.fixture(autouse=True)
    def _afresh(self) -> Iterator[None]:
        for known in (products.amd_family, products.works):
            known.cache_clear()
        yield
        for known in (products.amd_family, products.works):
            known.cache_clear()

    def test_it_is_there_under_the_signature_that_is_called(self) -> None:
        schema = str(torch.ops.mkldnn._linear_pointwise.default._schema)
        arguments = "Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm"
        assert schema == f"mkldnn::_linear_pointwise({arguments}) -> Tensor Y"
        assert products.works()

    @pytest.mark.parametrize("bias", [True, False])
    def test_every_product_is_the_usual_one(self, bias: bool) -> None:
        module = nn.Linear(130, 70, bias=bias)
        weights = {name: p.detach() for name, p in module.named_parameters()}
        value, delta = torch.randn(40, 130), torch.randn(40, 70)
        kernel = kernel_for(module, (130,))
        assert kernel is not None
        results = []
        for library in ("torch", "onednn"):
            call = Call(module, weights, {}, library)  # type: ignore[arg-type]
            gradients = {name: torch.empty_like(weight) for name, weight in weights.items()}
            kernel.gradients(call, delta, value, -0.5, gradients)
            added, written = torch.ones(40, 130), torch.full((40, 130), 7.0)
            kernel.adding(call, delta, added, -0.5)()
            kernel.adding(call, delta, written, -0.5, over=True)()
            sent = kernel.message(call, delta, value, delta)
            results.append([kernel.forward(call, value), sent, added, written, *gradients.values()])
        for usual, other in zip(*results, strict=True):
            assert float((usual - other).norm() / usual.norm()) < 1e-6

    def test_an_engine_by_it_agrees_with_the_other(self) -> None:
        net = pcsim.topologies.mlp([12, 9, 9, 4])
        clamps = {"input": torch.randn(5, 12), "output": torch.randn(5, 4)}
        found = []
        for library in ("torch", "onednn"):
            engine = partial(BatchedEngine, products=library)  # type: ignore[arg-type]
            sim = pcsim.Simulator(copy.deepcopy(net), pcsim.Relaxation(6, 0.2), engine=engine)
            sim.infer(clamps)
            assert isinstance(sim.engine, BatchedEngine)
            assert all(program.native for program in sim.engine.programs(sim.engine.shown))
            for parameter in sim.network.parameters():
                parameter.data = parameter.data.flip(0)  # elsewhere, and another
            for _ in range(3):
                sim.infer(clamps)
            found.append([sim.network["hidden1"].value, *sim.gradients().values()])
        for usual, other in zip(*found, strict=True):
            assert float((usual - other).norm() / usual.norm()) < 1e-5

    @pytest.mark.parametrize(
        ("vendor", "family", "capability", "size", "dtype", "taken"),
        [
            ("AuthenticAMD", 26, "AVX512", 128, torch.float32, True),
            ("AuthenticAMD", 26, "AVX512", 64, torch.float32, False),
            ("AuthenticAMD", 26, "AVX512", 128, torch.float64, False),
            ("AuthenticAMD", 26, "AVX2", 128, torch.float32, False),
            ("AuthenticAMD", 25, "AVX512", 128, torch.float32, False),
            ("GenuineIntel", 26, "AVX512", 128, torch.float32, False),
        ],
    )
    def test_which_products_it_takes_by_itself(
        self,
        vendor: str,
        family: int,
        capability: str,
        size: int,
        dtype: torch.dtype,
        taken: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        told = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 17\n"
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(products.Path, "read_text", lambda *_, **__: told)
        rows = torch.zeros(size, size, dtype=dtype)
        assert products.by_onednn("auto", rows, size) == taken
        assert not products.by_onednn("torch", rows, size)
        assert products.by_onednn("onednn", rows, 1) == (dtype == torch.float32)
        assert not products.by_onednn("onednn", rows.to("meta"), size)

    @pytest.mark.parametrize(
        ("family", "capability", "units", "dtype", "taken"),
        [
            (25, "AVX512", 2**17, torch.float32, True),
            (25, "AVX512", 2**17 - 2, torch.float32, False),
            (25, "AVX512", 2**17, torch.float64, False),
            (25, "AVX2", 2**17, torch.float32, False),
        ],
    )
    def test_whose_hyperbolic_tangents_it_takes_by_itself(
        self, family: int, capability: str, units: int, dtype: torch.dtype, taken: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told = f"vendor_id\t: AuthenticAMD\ncpu family\t: {family}\n"
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(products.Path, "read_text", lambda *_, **__: told)
        value = torch.zeros(2, units // 2, dtype=dtype)
        assert products.tanh_by_onednn("auto", value, value) == taken
        assert not products.tanh_by_onednn("torch", value, value)
        assert products.tanh_by_onednn("onednn", value[:, :3].contiguous(), value[:, :3].clone()) == (
            dtype == torch.float32
        )
        assert not products.tanh_by_onednn("onednn", value, value[:, ::2])
        assert not products.tanh_by_onednn("onednn", value.to("meta"), value)

    @pytest.mark.parametrize("units", [1, 2**17, 2**18 + 3])
    def test_its_hyperbolic_tangent_is_as_exact(self, units: int) -> None:
        value = torch.cat([torch.logspace(-30, 2, units), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])])
        value = torch.cat([value, -value])
        exact, found = torch.tanh(value.double()), torch.empty_like(value)
        kernel = kernel_for(nn.Tanh(), (len(value),))
        assert kernel is not None
        kernel.predicting(Call(nn.Tanh(), {}, {}, "onednn"), value, found)()
        torch.testing.assert_close(found.double(), exact, rtol=2e-7, atol=0)
        nowhere = torch.full((1, 2), torch.nan)
        kernel.predicting(Call(nn.Tanh(), {}, {}, "onednn"), nowhere, nowhere)()
        assert nowhere.isnan().all()

    @pytest.mark.parametrize("library", ["torch", "onednn"])
    def test_an_activation_and_its_pooling_hold_to_the_choice(
        self, library: products.Products, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        monkeypatch.setattr(products, "tanh_by_onednn", lambda chosen, *_: bool(asked.append(chosen)))
        net = pcsim.Network()
        net.add_node("image", (1, 4, 4))
        net.add_node("pooled", (2, 2, 2), transfer=nn.Sequential(nn.Tanh(), nn.MaxPool2d(2)))
        net.add_edge("image", "pooled", nn.Conv2d(1, 2, 3, padding=1))
        pcsim.Simulator(net, engine=partial(BatchedEngine, products=library)).predict(
            {"image": torch.randn(2, 1, 4, 4)}
        )
        assert set(asked) == {library}

    @pytest.mark.parametrize("wrong", ["missing", "another answer"])
    def test_where_it_is_missing_or_wrong_it_is_left_alone(self, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def instead(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if wrong == "missing":
                raise AttributeError("no such operator")
            return 1.001 * (rows @ weight.mT)

        monkeypatch.setattr(products, "linear", instead)
        assert not products.by_onednn("onednn", torch.zeros(4, 4), 4)

    def test_another_library_is_refused(self) -> None:
        with pytest.raises(SettingError, match="products='mkl' given, expected one of 'auto', 'torch', 'onednn'"):
            BatchedEngine(pcsim.topologies.mlp([2, 2]), products="mkl")  # type: ignore[arg-type]
