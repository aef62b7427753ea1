"""Kernels against autograd: at every option of their modules, and wherever a module does more than its type says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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
from pcsim.engine.kernels.kernel import _KERNELS, kernel_for

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
