"""What a native model file says about its tensors: a header of JSON values, checked field by field.

Nothing in a header is executed; it is checked against the architecture before memory is allocated for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from sepress.digests import tensor_digest
from sepress.errors import InputError
from sepress.models import check_kwargs, check_preprocessing, parse_reference
from sepress.types import JSON, AttributePatch, Layout, ModelSpec

FORMAT = "sepress.bundle/1"


@dataclass(frozen=True)
class Header:
    """All of a bundle but its tensors."""

    spec: ModelSpec
    layout: Layout  # the names and shapes of exactly the tensors in the file
    lineage: Mapping[str, JSON]
    aliases: Mapping[
        str, str
    ]  # tied parameters and buffers: further name -> the name of the tensor it shares
    fixed: tuple[str, ...]  # parameters that don't require a gradient


HEADER: TypeAdapter[Header] = TypeAdapter(Header)


def header_to_json(header: Header) -> str:
    """The header as strict JSON text."""
    return json.dumps(HEADER.dump_python(header, mode="json"), allow_nan=False, ensure_ascii=False)


def header_from_json(text: str, *, where: str) -> Header:
    """Read a header; InputError names the first field that is wrong."""
    try:
        json.loads(text, parse_constant=_refuse_constant)
        header = HEADER.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: its header is not valid: {field}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: its header is not valid JSON: {error}") from error
    check_spec(header.spec, where=where)
    if stray := [f"{a} -> {b}" for a, b in header.aliases.items() if b not in header.layout.shapes]:
        raise InputError(f"{where}: its header ties {stray[0]}, which is not in the file")
    return header


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def check_spec(spec: ModelSpec, *, where: str) -> None:
    """Refuse a spec whose names or figures could not have been written by us."""
    try:
        named = parse_reference(spec.reference) == (spec.source, spec.arch)
    except InputError:
        named = False
    if not named:
        raise InputError(f"{where}: its header names no architecture: {spec.reference!r}")
    check_kwargs(spec.kwargs, where=f"{where}: its architecture's arguments")
    check_preprocessing(spec.preprocessing)


# ---- the tensors of a net -----------------------------------------------------------------------
def named_tensors(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers (the non-persistent too) by their first names, and aliases of tied ones."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in chain(
        net.named_parameters(remove_duplicate=False), net.named_buffers(remove_duplicate=False)
    ):
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, aliases


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header and every tensor: a flipped bit anywhere is noticed."""
    return hashlib.sha256(f"{text}\n{tensor_digest(tensors)}".encode()).hexdigest()


def check_tensors(tensors: Mapping[str, Any], *, where: str) -> None:
    """Refuse what is not a plain dense tensor that owns memory for all its elements."""
    for name, tensor in tensors.items():
        plain = (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.layout == torch.strided
            and tensor.device.type == "cpu"
            and not tensor.is_quantized
        )
        if not plain:
            raise InputError(f"{where}: '{name}' is not a plain dense tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"{where}: '{name}' declares {tuple(tensor.shape)}, more than the file holds")


# ---- layout against file and architecture -------------------------------------------------------
def check_layout(header: Header, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """The header's shapes are those of the tensors, name by name, and its class count is among them."""
    shapes = header.layout.shapes
    if different := sorted(shapes.keys() ^ tensors.keys()):
        raise InputError(f"{where}: its header and its tensors disagree about '{different[0]}'")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise InputError(
                f"{where}: '{name}' is {tuple(tensor.shape)}, but its header says {shapes[name]}"
            )
    for new in header.layout.replaced:
        held = {name: shapes[name] for name in shapes if name.startswith(f"{new.module}.")}
        if held != ({} if new.kind == "identity" else {f"{new.module}.scale": new.shape}):
            raise InputError(
                f"{where}: its header replaces '{new.module}' by a module ({new.kind}) that does not hold "
                f"its tensors: {_first(sorted(held))}"
            )
    count = header.spec.kwargs.get("num_classes")
    # A multiple of it will do: a detector's head has channels for every class and anchor.
    if count is not None and not any(n and n % count == 0 for shape in shapes.values() for n in shape):
        raise InputError(f"{where}: its spec says {count} classes, but no tensor has so many")


def check_architecture(net: nn.Module, header: Header, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """The layout is that of `net`, narrowed: the same names, ranks and kinds, no axis longer than its own."""
    own, own_aliases = named_tensors(net)
    own |= {alias: own[name] for alias, name in own_aliases.items()}
    names = header.layout.shapes.keys() | header.aliases.keys()
    remedy = (
        f"It was saved from {header.spec.reference}; another version of that package, or other code under "
        "that name, may build another net."
    )
    if names != own.keys():
        missing, extra = sorted(own.keys() - names), sorted(names - own.keys())
        raise InputError(
            f"{where}: it is not a narrowed {header.spec.reference}: {len(missing)} of the architecture's "
            f"tensors are missing ({_first(missing)}), {len(extra)} are not of it ({_first(extra)})",
            remedy=remedy,
        )
    for name, shape in header.layout.shapes.items():
        full = tuple(own[name].shape)
        narrowed = len(shape) == len(full) and all(
            a == b or 1 <= a <= b for a, b in zip(shape, full, strict=True)
        )
        if not narrowed:
            raise InputError(
                f"{where}: '{name}' is {shape}, which can't come from pruning {full}", remedy=remedy
            )
        if tensors[name].is_floating_point() != own[name].is_floating_point():
            raise InputError(f"{where}: '{name}' holds {tensors[name].dtype}, expected {own[name].dtype}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


# ---- patched attributes -------------------------------------------------------------------------
def merge_patches(patches: Iterable[AttributePatch]) -> tuple[AttributePatch, ...]:
    """One patch for each number, the last one given."""
    last = {(p.module, p.attribute, p.index): p for p in patches}
    return tuple(last.values())


def find_patches(net: nn.Module, outline: nn.Module) -> list[AttributePatch]:
    """The plain numbers of `net` that are smaller than in `outline`, its architecture with its shapes."""
    patches = []
    for path, module in net.named_modules():
        try:
            full = vars(outline.get_submodule(path))
        except AttributeError:  # a module without tensors, added after building
            continue
        for name, value in vars(module).items():
            old: Any = full.get(name)
            if _shrunk(value, old):
                patches.append(AttributePatch(path, name, None, value))
            elif type(value) in (list, tuple) and type(old) is type(value) and len(old) == len(value):
                pairs = enumerate(zip(value, old, strict=True))
                patches += [AttributePatch(path, name, i, a) for i, (a, b) in pairs if _shrunk(a, b)]
    return patches


def _shrunk(value: Any, old: Any) -> bool:
    return type(value) is int and type(old) is int and 1 <= value < old


def apply_patches(net: nn.Module, patches: Iterable[AttributePatch], *, where: str) -> None:
    """Set the numbers that pruning rewrote; each must be there, and can only have shrunk."""
    for patch in patches:
        at = f"{patch.module or 'the net'}.{patch.attribute}" + (
            f"[{patch.index}]" if patch.index is not None else ""
        )
        try:
            attributes = vars(net.get_submodule(patch.module))
        except AttributeError as error:
            raise InputError(f"{where}: its header sets {at}, and there is no such module") from error
        holder: Any = attributes.get(patch.attribute)
        if patch.index is None:
            old = holder
        elif type(holder) in (list, tuple) and 0 <= patch.index < len(holder):
            old = holder[patch.index]
        else:
            old = None
        if type(old) is not int or not 1 <= patch.value <= old:
            raise InputError(
                f"{where}: its header sets {at} = {patch.value}, where the architecture has {old!r}"
            )
        if patch.index is None:
            attributes[patch.attribute] = patch.value
        else:
            values = list(holder)
            values[patch.index] = patch.value
            attributes[patch.attribute] = type(holder)(values)
