"""What a thing was constructed from, read off the thing: for files that keep it and for code that builds it again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

OF_PLACE = ("device", "dtype")
"""Arguments of torch's modules that say where their tensors are, and not what they compute."""

_OF_FUNCTIONAL = (
    "celu cosine_similarity elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish "
    "pairwise_distance relu relu6 rrelu selu sigmoid silu softplus softshrink softsign tanh tanhshrink"
)
_OF_TORCH = "abs arctan asinh atan celu cos erf exp expm1 log1p relu rrelu selu sigmoid sign sin square tanh"

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    f"{home}.{name}": getattr(room, name)
    for home, room, names in (("torch.nn.functional", functional, _OF_FUNCTIONAL), ("torch", torch, _OF_TORCH))
    for name in names.split()
}
"""Functions that a module may be given, by name: activations and distances, which do nothing but compute."""

_LAYER_OF_TRANSFORMER: Mapping[str, Callable[[Any], object]] = {
    "d_model": attrgetter("self_attn.embed_dim"),
    "nhead": attrgetter("self_attn.num_heads"),
    "dim_feedforward": attrgetter("linear1.out_features"),
    "dropout": attrgetter("dropout.p"),
    "layer_norm_eps": attrgetter("norm1.eps"),
    "batch_first": attrgetter("self_attn.batch_first"),
    "bias": lambda layer: layer.linear1.bias is not None,
}
ELSEWHERE: Mapping[type, Mapping[str, Callable[[Any], object]]] = {
    nn.AdaptiveLogSoftmaxWithLoss: {"cutoffs": lambda module: module.cutoffs[:-1]},
    nn.MultiheadAttention: {
        "bias": lambda attention: attention.in_proj_bias is not None,
        "add_bias_kv": lambda attention: attention.bias_k is not None,
    },
    nn.PairwiseDistance: {"p": attrgetter("norm")},
    nn.TransformerDecoder: {"decoder_layer": lambda decoder: decoder.layers[0]},
    nn.TransformerDecoderLayer: _LAYER_OF_TRANSFORMER,
    nn.TransformerEncoder: {"encoder_layer": lambda encoder: encoder.layers[0]},
    nn.TransformerEncoderLayer: _LAYER_OF_TRANSFORMER,
}
"""Where modules of torch keep an argument that is no attribute of the same name."""

_NONLINEARITY = inspect.Parameter("nonlinearity", inspect.Parameter.KEYWORD_ONLY, default="tanh")


def constructor_arguments(thing: object) -> tuple[list[object], dict[str, object]]:
    """Arguments from which the class of a thing makes the like of it: those by position, and those by name.

    They are read from the attributes of their names; those that are the default are left out, and so is what the thing
    does not keep though there is a default. Whoever uses them has to compare: a class may make something else of them.

    Raises:
        LookupError: an argument without a default is kept nowhere.
        TypeError, ValueError: the class does not say what it takes.
    """
    placed: list[object] = []
    named: dict[str, object] = {}
    for parameter in _parameters(type(thing)):
        value = _kept(thing, parameter)
        if value is parameter.empty:
            raise LookupError(f"it does not keep its argument {parameter.name!r} as an attribute")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            placed.append(value)
        elif not _same(value, parameter.default):
            named[parameter.name] = value
    return placed, named


def function_name(value: object) -> str | None:
    """The name in :data:`FUNCTIONS` of a function; None for all others."""
    return next((name for name, function in FUNCTIONS.items() if function is value), None)


def _parameters(kind: type) -> Iterator[inspect.Parameter]:
    """Of a constructor, those that can be told; torch's recurrent networks pass theirs on to what they derive from."""
    recurrent = kind in (nn.RNN, nn.LSTM, nn.GRU)
    for parameter in inspect.signature(nn.RNNBase if recurrent else kind).parameters.values():
        several = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        of_place = parameter.name in OF_PLACE and issubclass(kind, nn.Module)
        if not several and not of_place and not (recurrent and parameter.name == "mode"):
            yield parameter
    if kind is nn.RNN:
        yield _NONLINEARITY


def _kept(thing: object, parameter: inspect.Parameter) -> object:
    elsewhere = ELSEWHERE.get(type(thing), {}).get(parameter.name)
    value = getattr(thing, parameter.name, parameter.default) if elsewhere is None else elsewhere(thing)
    if inspect.ismethod(value) and value.__self__ is thing:
        return parameter.default  # a method that happens to have the argument's name
    if isinstance(parameter.default, bool) and (value is None or isinstance(value, Tensor)):
        return value is not None  # bias=True says that there is one, and the attribute is the bias itself
    return value


def _same(value: object, default: object) -> bool:
    if type(value) is not type(default) or isinstance(value, Tensor | np.ndarray):
        return False
    return bool(value == default)
