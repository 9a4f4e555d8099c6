"""A pickled network -> the architecture that builds it again, and whether that computes the same.

Only for files whose code the user chose to run: what is here calls the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sepress.device import seeded
from sepress.errors import InputError
from sepress.models.registry import ARCHITECTURES

TOLERANCE = 1e-4  # of the largest output: the same operations on the same weights, perhaps in another order


def find_source(module: nn.Module) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """References that may build the network, and the configuration that timm keeps in it.

    A wrapper (DataParallel, torch.compile, an average) is looked into as long as it adds no tensors but a
    count. timm's networks know their name, torchvision's and ours only their class: then every name of that
    class is given.
    """
    config = getattr(module, "pretrained_cfg", None)
    if config:
        figures = config if isinstance(config, Mapping) else vars(config)
        if isinstance(figures.get("architecture"), str):
            return (f"timm:{figures['architecture']}",), figures
    home = type(module).__module__
    if home.startswith("torchvision.models."):
        return tuple(f"torchvision:{name}" for name in _of_torchvision(module)), {}
    if home.startswith("sepress.models."):
        return tuple(f"sepress:{name}" for name in ARCHITECTURES), {}
    for name, child in module.named_children():
        held = f"{name}."
        if all(key.startswith(held) or key == "n_averaged" for key in module.state_dict()):
            return find_source(child)
    return (), {}


def _of_torchvision(module: nn.Module) -> list[str]:
    """The names under which torchvision builds this class, the nearest in size first.

    The class count changes a size less than the names differ, so that the first is mostly the right one, and
    the largest (of 644 M parameters) is not built to tell the smallest.
    """
    import torchvision
    from torchvision.models import get_model_builder, get_model_weights, list_models

    count = sum(parameter.numel() for parameter in module.parameters())
    home = type(module).__module__
    sizes = {
        name: get_model_weights(name).DEFAULT.meta["num_params"]
        for name in list_models(module=torchvision.models)
        if get_model_builder(name).__module__ == home
    }
    return sorted(sizes, key=lambda name: abs(sizes[name] - count))


def describe(module: nn.Module) -> str:
    """What to do about a network that no registry builds: name what does."""
    kind = type(module)
    return (
        f"Name what builds it: --arch {kind.__module__}:{kind.__qualname__}, if that needs no arguments but "
        "num_classes; else a function of yours that returns it, --arch pkg.module:factory."
    )


def check_function(module: nn.Module, net: nn.Module, size: tuple[int, ...], *, where: str) -> str:
    """Run the pickled network and the rebuilt one on the same noise, (2, *size); returns a note.

    Weights do not tell a stride, an activation or a pooling that was changed after building. Raises
    InputError where the outputs differ by more than TOLERANCE of the largest.
    """
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), seeded(0):
            theirs = _outputs(module.float().eval()(images))
    except Exception as error:  # noqa: BLE001 - a network of other versions may raise anything
        return f"the pickled network could not be run to compare ({type(error).__name__}: {error})"
    with torch.no_grad(), seeded(0):
        ours = _outputs(net(images))
    found = [_distance(a, b) for a, b in zip(theirs, ours, strict=False)]
    if len(theirs) != len(ours) or not all(distance <= TOLERANCE for distance in found):  # nan is neither
        raise InputError(
            f"{where}: the pickled {type(module).__name__} and the architecture rebuilt from its weights "
            f"compute different outputs (relative differences {', '.join(f'{d:.1e}' for d in found)})",
            remedy="It was changed after it was built: pass what builds it so, --arch pkg.module:factory.",
        )
    return f"the rebuilt network computes what the pickled one does (largest difference {max(found):.0e})"


def _outputs(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    scale = float(a.abs().max()) if a.numel() else 0.0
    return float((a - b).abs().max()) / (scale or 1.0) if a.numel() else 0.0
