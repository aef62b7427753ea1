"""Modules of torch that copy or initialise what they are given: they are kept with the very parts that they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", nn.TransformerEncoder, nn.TransformerDecoder)


def _stack(module: nn.TransformerEncoder | nn.TransformerDecoder) -> dict[str, Any]:
    return {"layers": list(module.layers), "norm": module.norm}


def _encoder(module: nn.TransformerEncoder) -> dict[str, Any]:
    settings = ("enable_nested_tensor", "use_nested_tensor", "mask_check")
    return {**_stack(module), **{name: getattr(module, name) for name in settings}}


def _built_encoder(layers: list[nn.Module], norm: nn.Module | None, **settings: bool) -> nn.TransformerEncoder:
    # Whether it uses nested tensors it decides by its first layer, which may have changed since: put in as it was.
    made = nn.TransformerEncoder(None, 0, norm, enable_nested_tensor=False)  # type: ignore[arg-type]
    for name, setting in settings.items():
        setattr(made, name, setting)
    return _with_layers(made, layers)


def _built_decoder(layers: list[nn.Module], norm: nn.Module | None) -> nn.TransformerDecoder:
    return _with_layers(nn.TransformerDecoder(None, 0, norm), layers)  # type: ignore[arg-type]


def _with_layers(made: M, layers: list[nn.Module]) -> M:
    made.layers, made.num_layers = nn.ModuleList(layers), len(layers)
    return made


def _transformer(module: nn.Transformer) -> dict[str, Any]:
    return {name: getattr(module, name) for name in ("d_model", "nhead", "batch_first", "encoder", "decoder")}


def _built_transformer(encoder: nn.Module, decoder: nn.Module, **settings: Any) -> nn.Transformer:
    # What its constructor is given it initialises anew, so the parts come after it.
    made = nn.Transformer(custom_encoder=nn.Identity(), custom_decoder=nn.Identity(), **settings)
    made.encoder, made.decoder = encoder, decoder
    return made


COPYING: Mapping[type, tuple[Callable[[Any], Mapping[str, Any]], Callable[..., Any]]] = {
    nn.Transformer: (_transformer, _built_transformer),
    nn.TransformerDecoder: (_stack, _built_decoder),
    nn.TransformerEncoder: (_encoder, _built_encoder),
}
"""How each is told, and how it is built."""
