"""The registries behind a reference: timm, torchvision, our own, and a user's module."""

from __future__ import annotations

import difflib
import importlib
import os
import socket
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from sepress.errors import InputError
from sepress.models.registry import ARCHITECTURES
from sepress.types import JSON, ModelSpec, Preprocessing


@dataclass(frozen=True)
class ArchitectureFacts:
    """What a registry states about an architecture."""

    preprocessing: Preprocessing
    num_classes: int
    class_names: tuple[str, ...] | None = None  # of the pretrained weights, in output order


CIFAR = Preprocessing(
    input_size=(3, 32, 32),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    origin="sepress: CIFAR-10's training images",
)
DIGITS = Preprocessing(
    input_size=(1, 28, 28), mean=(0.1307,), std=(0.3081,), origin="sepress: MNIST's training images"
)
# Some of torchvision's constructors swallow arguments that they don't know, and build something else.
TORCHVISION_KWARGS = {"num_classes", "width_mult", "dropout", "aux_logits"}


# ---- looking up ---------------------------------------------------------------------------------
def look_up(source: str, arch: str, kwargs: Mapping[str, JSON]) -> ArchitectureFacts:
    """The facts a registry holds about `arch`; InputError with close matches where it holds none."""
    return {"timm": _look_up_timm, "torchvision": _look_up_torchvision, "sepress": _look_up_sepress}[source](
        arch, kwargs
    )


def _unknown(source: str, arch: str, known: list[str]) -> InputError:
    close = difflib.get_close_matches(arch, known, n=4, cutoff=0.5)
    return InputError(
        f"{source} has no architecture '{arch}'",
        remedy=f"Close: {', '.join(f'{source}:{name}' for name in close)}."
        if close
        else f"{source} knows, for example, {', '.join(known[:4])}.",
    )


def _look_up_timm(arch: str, kwargs: Mapping[str, JSON]) -> ArchitectureFacts:
    import timm
    from timm.data import resolve_data_config

    if not timm.is_model(arch):
        raise _unknown("timm", arch, timm.list_models())
    try:
        config = timm.get_pretrained_cfg(arch)
    except RuntimeError as error:  # the name is known and its tag is not
        name = arch.split(".")[0]
        tags = timm.list_models(f"{name}.*", pretrained=True)
        raise InputError(
            f"timm has no weights named '{arch}'",
            remedy=f"Known: {', '.join(f'timm:{tag}' for tag in tags) or f'timm:{name}'}.",
        ) from error
    figures = config.to_dict() if config is not None else {}
    resolved = resolve_data_config({}, pretrained_cfg=figures)
    size = tuple(resolved["input_size"])
    if "img_size" in kwargs:
        size = (size[0], kwargs["img_size"], kwargs["img_size"])
    tag = figures.get("tag")
    return ArchitectureFacts(
        Preprocessing(
            input_size=size,
            mean=tuple(resolved["mean"]),
            std=tuple(resolved["std"]),
            interpolation=resolved["interpolation"],
            crop_pct=resolved["crop_pct"],
            origin=f"timm: {arch.split('.')[0]}{f'.{tag}' if tag else ''}",
        ),
        num_classes=figures.get("num_classes", 1000),
    )


def _look_up_torchvision(arch: str, kwargs: Mapping[str, JSON]) -> ArchitectureFacts:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)  # the classifiers of images
    if arch not in known:
        raise _unknown("torchvision", arch, known)
    if foreign := sorted(set(kwargs) - TORCHVISION_KWARGS):
        raise InputError(
            f"torchvision's {arch} takes no '{foreign[0]}'",
            remedy=f"It may take {', '.join(sorted(TORCHVISION_KWARGS))}.",
        )
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    transform = weights.transforms()
    (crop,), (resize,) = transform.crop_size, transform.resize_size
    names = tuple(weights.meta["categories"])
    return ArchitectureFacts(
        Preprocessing(
            input_size=(3, crop, crop),
            mean=tuple(transform.mean),
            std=tuple(transform.std),
            interpolation=transform.interpolation.value,
            crop_pct=crop / resize,
            origin=f"torchvision: {weights}",
        ),
        num_classes=len(names),
        class_names=names,
    )


def _look_up_sepress(arch: str, kwargs: Mapping[str, JSON]) -> ArchitectureFacts:
    if arch not in ARCHITECTURES:
        raise _unknown("sepress", arch, list(ARCHITECTURES))
    return ArchitectureFacts(DIGITS if kwargs.get("in_chans") == 1 else CIFAR, num_classes=10)


# ---- building -----------------------------------------------------------------------------------
def constructor(source: str, arch: str) -> Callable[..., nn.Module]:
    """The function that builds a registry's architecture with random weights from keyword arguments."""
    if source == "sepress":
        return ARCHITECTURES[arch]
    if source == "timm":
        import timm

        return lambda **kwargs: cast(nn.Module, timm.create_model(arch, pretrained=False, **kwargs))
    import torchvision

    return lambda **kwargs: cast(nn.Module, torchvision.models.get_model(arch, weights=None, **kwargs))


def import_factory(reference: str) -> Callable[..., Any]:
    """Import the user's `pkg.module:factory`; InputError says what is missing."""
    module_name, _, path = reference.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        raise InputError(
            f"--arch {reference}: importing {module_name} failed: {type(error).__name__}: {error}",
            remedy="The current folder is importable; check the module's name and what it imports.",
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise InputError(f"--arch {reference}: {module_name} has no '{path}'")
        found = getattr(found, name)
    if not callable(found):
        raise InputError(
            f"--arch {reference}: it is a {type(found).__name__}, not a function that builds a net"
        )
    return cast(Callable[..., Any], found)


def construct(
    make: Callable[..., Any], kwargs: Mapping[str, JSON], *, device: str | torch.device, reference: str
) -> nn.Module:
    """Call a constructor on a device; whatever it raises becomes an InputError that names the reference."""
    net: Any = None
    if torch.device(device).type == "meta":
        try:
            with torch.device("meta"):
                net = make(**kwargs)
        except Exception:  # noqa: BLE001 - a constructor that reads values can't run on meta; below it can
            net = None
    if net is None:
        try:
            net = make(**kwargs)
        except Exception as error:  # the constructor is not ours and may raise anything
            given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
            raise InputError(f"{reference}({given}) failed: {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise InputError(
            f"{reference} returned a {type(net).__name__}, expected an nn.Module",
            remedy="Name a function or class that returns the network itself.",
        )
    return net.to(device).eval()


def construct_pretrained(spec: ModelSpec, kwargs: Mapping[str, JSON]) -> nn.Module:
    """A registry's net with the weights it publishes; a failed download is an InputError with the way out."""
    if spec.source == "sepress":
        raise InputError(
            f"{spec.reference} has no pretrained weights",
            remedy="Train it (sepress train), or type --random-weights to go on untrained.",
        )
    try:
        if spec.source == "timm":
            return _pretrained_timm(spec.arch, kwargs)
        return _pretrained_torchvision(spec, kwargs)
    except InputError:
        raise
    except Exception as error:  # hubs raise their own and their libraries' errors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"the pretrained weights of {spec.reference} can't be had: {reason}",
            remedy=f"Connect to the network, pass a local weights file with --arch {spec.reference}, "
            "or type --random-weights to go on untrained.",
        ) from error


def _pretrained_timm(arch: str, kwargs: Mapping[str, JSON]) -> nn.Module:
    import timm

    with _no_retries_without_network():
        return cast(nn.Module, timm.create_model(arch, pretrained=True, **kwargs)).eval()


@contextmanager
def _no_retries_without_network() -> Iterator[None]:
    """Look in the hub's local cache only where its host has no address: its retries take most of a minute."""
    from huggingface_hub import constants

    reachable = True
    if not urllib.request.getproxies():
        try:
            socket.getaddrinfo(
                constants.ENDPOINT.partition("://")[2].partition("/")[0].partition(":")[0], 443
            )
        except OSError:
            reachable = False
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _pretrained_torchvision(spec: ModelSpec, kwargs: Mapping[str, JSON]) -> nn.Module:
    """Load the published weights, all but a classifier of another class count.

    torchvision's own constructors refuse another class count, so the weights pass through a donor.
    """
    import torchvision

    donor = torchvision.models.get_model(spec.arch, weights="DEFAULT", progress=os.isatty(2)).state_dict()
    net = construct(constructor(spec.source, spec.arch), kwargs, device="cpu", reference=spec.reference)
    own = net.state_dict()
    fitting = {k: v for k, v in donor.items() if k in own and own[k].shape == v.shape}
    left = [k for k in own if k not in fitting and not k.startswith(("aux", "AuxLogits"))]
    rows = [k for k in left if k in donor and own[k].shape[1:] == donor[k].shape[1:]]  # of other classes
    if rows != left:
        raise InputError(
            f"the pretrained weights of {spec.reference} don't fit it with {dict(kwargs)}: {left[0]} differs",
            remedy="Leave the structural arguments at their defaults.",
        )
    net.load_state_dict(fitting, strict=False)
    return net
