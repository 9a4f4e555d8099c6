"""Remove units physically: one index_select per (parameter, dim), and the Python numbers that count them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sepress.coupling.groups import Coupling, SizeUse
from sepress.errors import SepressError
from sepress.types import AttributePatch, Removed


def apply_removal(net: nn.Module, coupling: Coupling, removed: Removed) -> None:
    """Remove units from a net in place; parameters keep dtype, device and requires_grad, gradients go.

    What makes queries takes a factor where their width scaled the attention. Raises InputError where
    `removed` does not fit the coupling.
    """
    coupling.check_removed(removed)
    places = _places(net)
    for (name, dim), factors in coupling.factors(removed).items():
        _multiply(places[name], dim, factors)
    take_out(net, coupling, removed)


def take_out(net: nn.Module, coupling: Coupling, removed: Removed) -> None:
    """Take units out of a net in place as `apply_removal` does, and leave what stays as it is."""
    coupling.check_removed(removed)
    places = _places(net)
    for (name, dim), indices in _removed_indices(coupling, removed).items():
        _take_out(places[name], dim, indices)
    patches = attribute_patches(coupling, removed)
    for patch in patches:
        apply_patch(net, patch)
    sync_attributes(net)


Place = tuple[dict[str, Any], str]  # a module's dict of parameters or buffers, and a key of it


def _places(net: nn.Module) -> dict[str, list[Place]]:
    """Return, for every name, all places that hold the same tensor (tied ones several)."""
    by_memory: dict[object, list[Place]] = defaultdict(list)
    places = {}
    for path, module in net.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None:
                    memory = (tensor.data_ptr(), tensor.shape) if tensor.data_ptr() else id(tensor)
                    by_memory[memory].append((held, key))
                    places[f"{path}.{key}".lstrip(".")] = by_memory[memory]
    return places


def _removed_indices(coupling: Coupling, removed: Removed) -> dict[tuple[str, int], np.ndarray]:
    parts: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
    for group in coupling.groups:
        units = removed.get(group.name, ())
        gone = np.isin(np.arange(group.units), units)
        for member in group.members if len(units) else ():
            indices = member.index[gone[member.unit]]
            if len(indices):
                parts[member.parameter, member.dim].append(indices)
    return {key: np.concatenate(indices) for key, indices in parts.items()}


def _take_out(places: list[Place], dim: int, indices: np.ndarray) -> None:
    """Shrink one parameter or buffer along a dim."""
    old = _held(places)
    kept = np.ones(old.shape[dim], dtype=bool)
    kept[indices] = False
    data = old.detach().index_select(dim, torch.from_numpy(kept).nonzero().flatten().to(old.device))
    if not old.is_contiguous() and old.dim() in (4, 5):
        data = data.contiguous(
            memory_format=torch.channels_last if old.dim() == 4 else torch.channels_last_3d
        )
    _put(places, data)


def _multiply(places: list[Place], dim: int, factors: np.ndarray) -> None:
    """Multiply one parameter by a factor for each index of a dim."""
    old = _held(places)
    shape = [-1 if axis == dim else 1 for axis in range(old.dim())]
    _put(places, old.detach() * torch.from_numpy(factors).to(old).view(shape))


def _held(places: list[Place]) -> Tensor:
    held, key = places[0]
    tensor: Tensor = held[key]
    return tensor


def _put(places: list[Place], data: Tensor) -> None:
    """Put a tensor in the place of one parameter or buffer, wherever it is held."""
    old = _held(places)
    new = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
    for held, key in places:
        held[key] = new


def attribute_patches(coupling: Coupling, removed: Removed) -> tuple[AttributePatch, ...]:
    """Return the Python numbers that change and that no parameter's shape tells."""
    gone = coupling.gone(removed)
    patches = []
    for use in coupling._sizes:
        if gone[use.ids].any():
            patches.append(AttributePatch(use.module, use.attribute, use.index, _size(use, gone)))
            if use.attribute == "groups":  # of a depthwise convolution: as many channels come in
                patches.append(AttributePatch(use.module, "in_channels", None, _size(use, gone)))
    return tuple(patches)


def _size(use: SizeUse, gone: np.ndarray) -> int:
    size = int((~gone[use.ids]).sum()) / use.factor
    if size.denominator != 1:
        raise SepressError(
            f"'{use.module}.{use.attribute}' would become {float(size)}: no whole number of channels is left"
        )
    return size.numerator


def apply_patch(net: nn.Module, patch: AttributePatch) -> None:
    """Write one number into a module."""
    module = net.get_submodule(patch.module)
    if patch.index is None:
        setattr(module, patch.attribute, patch.value)
        return
    values = list(getattr(module, patch.attribute))
    values[patch.index] = patch.value
    setattr(module, patch.attribute, type(getattr(module, patch.attribute))(values))


def sync_attributes(net: nn.Module) -> None:
    """Set the widths that torch's layers keep (in_channels, num_features, ...) from their weights' shapes."""
    for module in net.modules():
        shape = _weight_shape(module)
        if shape is None:
            continue
        if isinstance(module, nn.modules.conv._ConvNd):
            first, second = shape[0], shape[1] * module.groups
            if module.transposed:
                module.in_channels, module.out_channels = first, second
            else:
                module.out_channels, module.in_channels = first, second
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_features = shape[0]
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = shape
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = shape[0]
        elif isinstance(module, nn.PReLU):
            module.num_parameters = shape[0]


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of a layer's weight, without computing a parametrized one."""
    own = module._parameters
    if "weight_g" in own and "weight_v" in own:  # torch.nn.utils.weight_norm
        weight: Tensor | None = own["weight_v"]
    elif own.get("weight") is not None:
        weight = own["weight"]
    elif "parametrizations" in module._modules:  # the last original has the weight's shape
        originals = dict(module.named_parameters())
        weight = next((originals[name] for name in reversed(originals) if ".weight.original" in name), None)
    else:
        weight = module._buffers.get("running_mean")
    return None if weight is None else tuple(weight.shape)
