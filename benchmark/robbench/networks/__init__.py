"""Networks by name: build("resnet20", {"width": 8}, shape=(3, 32, 32), labels=10)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args, get_origin

from robbench.errors import InputError, unknown
from robbench.networks.blocks import Block
from robbench.networks.lstm import LSTM
from robbench.networks.mlp import MLP
from robbench.networks.network import (
    Network,
    Normalize,
    Shape,
    load_torchvision,
    torchvision_weights,
)
from robbench.networks.resnet import ResNet, quick, resnet, thin_resnet
from robbench.networks.vgg import VGG16
from robbench.networks.wideresnet import wideresnet

__all__ = [
    "NETWORKS", "Block", "Network", "Normalize", "ResNet", "Shape", "build", "check",
    "load_torchvision", "torchvision_weights",
]  # fmt: skip

# name -> function of (shape, labels, *, settings); its keyword-only arguments are the settings.
NETWORKS: dict[str, Callable[..., Network]] = {
    **{f"resnet{depth}": partial(thin_resnet, depth) for depth in (8, 20, 32, 44, 56, 110)},
    "resnet18": partial(resnet, (2, 2, 2, 2), False),
    "resnet34": partial(resnet, (3, 4, 6, 3), False),
    "resnet50": partial(resnet, (3, 4, 6, 3), True),
    "wideresnet34-10": wideresnet,
    "vgg16": VGG16,
    "mlp": MLP,
    "lstm": LSTM,
    "quick": quick,
}


def build(name: str, settings: Mapping[str, object], shape: Shape, labels: int) -> Network:
    """The network `name` with fresh weights, for images of shape (C, H, W) and that many labels."""
    checked = check(name, settings)
    return NETWORKS[name](shape, labels, **checked)


def check(name: str, settings: Mapping[str, object]) -> dict[str, object]:
    """The settings as the network takes them; an InputError for what it does not take."""
    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    parameters = inspect.signature(NETWORKS[name], eval_str=True).parameters.values()
    types = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    checked = {}
    for key, value in settings.items():
        if key not in types:
            raise unknown(f"setting of network {name!r}:", key, types)
        checked[key] = _checked(f"setting {key!r} of network {name!r}", value, types[key])
    return checked


def _checked(what: str, value: object, kind: Any) -> object:
    """`value` as the annotated type; whole numbers here are all sizes, other ones probabilities."""
    if get_origin(kind) is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            raise unknown(f"value for {what}:", str(value), get_args(kind))
        return value
    if get_origin(kind) is tuple:  # tuple[int, ...]; a list where it comes from TOML or JSON
        if isinstance(value, (list, tuple)) and all(_is_size(size) for size in value):
            return tuple(value)
        expected = "a list of positive whole numbers"
    elif kind is bool:
        if isinstance(value, bool):
            return value
        expected = "true or false"
    elif kind is int:
        if _is_size(value):
            return value
        expected = "a positive whole number"
    else:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1:
            return float(value)
        expected = "a number from 0 to below 1"
    raise InputError(f"{what} must be {expected}, not {value!r}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
