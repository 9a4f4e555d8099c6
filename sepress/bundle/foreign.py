"""Checkpoints of other programs -> a state dict that fits an architecture.

A bare state dict, those of timm, torchvision and Lightning, with averaged weights (EMA), under the
prefixes of DistributedDataParallel, torch.compile or a wrapping module.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sepress.bundle.header import check_tensors, named_tensors
from sepress.errors import InputError
from sepress.models import build_net, build_spec
from sepress.models.sources import import_factory
from sepress.types import JSON, ModelSpec

# Where training programs keep the weights; averaged ones first, since they are what those programs evaluate.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
PLAIN = ("state_dict", "model", "model_state_dict", "net", "network", "weights")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a foreign file as they are named there."""

    state: Mapping[str, Tensor]
    arch: str | None  # what the file calls its architecture
    notes: tuple[str, ...]  # what was chosen, for the person and the lineage


def find_checkpoint(content: Any, *, path: Path) -> Checkpoint:
    """Find the state dict in what a file held; InputError tells what is there instead."""
    if isinstance(content, nn.Module):
        return Checkpoint(content.state_dict(), None, ("took the weights of a pickled network",))
    if isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
        return _checked(Checkpoint(content, None, ()), path)
    found = {}
    if isinstance(content, Mapping):
        for key in (*AVERAGED, *PLAIN):
            value = content.get(key)
            value = value.state_dict() if isinstance(value, nn.Module) else value
            if isinstance(value, Mapping) and value and all(isinstance(v, Tensor) for v in value.values()):
                found[key] = value
    if not found:
        keys = (
            f"its keys are {', '.join(map(str, list(content)[:6]))}"
            if isinstance(content, Mapping)
            else (f"it holds a {type(content).__name__}")
        )
        raise InputError(
            f"{path}: no weights found; {keys}", remedy="Save net.state_dict() and pass that file."
        )
    chosen = next(iter(found))
    notes = []
    if chosen in AVERAGED:
        others = f", not those under '{', '.join(k for k in found if k != chosen)}'" if len(found) > 1 else ""
        notes.append(f"took the averaged (EMA) weights under '{chosen}'{others}")
    arch = content.get("arch")
    return _checked(Checkpoint(found[chosen], arch if isinstance(arch, str) else None, tuple(notes)), path)


def _checked(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    if bad := [key for key in checkpoint.state if not isinstance(key, str)]:
        raise InputError(f"{path}: its weights are not named by strings: {bad[0]!r}")
    check_tensors(checkpoint.state, where=str(path))
    return checkpoint


# ---- names --------------------------------------------------------------------------------------
def match_names(checkpoint: Checkpoint, names: set[str]) -> Checkpoint:
    """Rename to the architecture's names: drop the prefix under which most of them are found."""
    state = {key.replace("_orig_mod.", ""): value for key, value in checkpoint.state.items()}
    prefixes = Counter(prefix for key in state for prefix, rest in _splits(key) if rest in names)
    if not prefixes:
        return replace(checkpoint, state=state)
    # the most names; of equals the shortest prefix
    prefix = min(prefixes, key=lambda p: (-prefixes[p], len(p)))
    renamed = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    notes = checkpoint.notes
    # A wrapper's further entries (a loss, metrics, the count of averaged steps) are not the network's.
    if prefix and (others := [key for key in state if not key.startswith(prefix)]):
        notes += (f"left out {len(others)} tensors outside '{prefix}' ({', '.join(others[:3])})",)
    return replace(checkpoint, state=renamed, notes=notes)


def _splits(key: str) -> list[tuple[str, str]]:
    """Every way to read a dotted key as prefix and name."""
    dots = [-1, *(i for i, letter in enumerate(key) if letter == ".")]
    return [(key[: dot + 1], key[dot + 1 :]) for dot in dots]


# ---- classes ------------------------------------------------------------------------------------
def read_num_classes(
    state: Mapping[str, Tensor],
    reference: str,
    *,
    factory: Callable[..., nn.Module] | None,
    num_classes: int | None,
    kwargs: Mapping[str, JSON],
) -> int | None:
    """The class count of weights, pruned or not: the length of the axes that grow with `num_classes`.

    None where a user's factory takes no such argument, or the weights don't agree on one count.
    Raises InputError where they contradict a count that was given.
    """
    given = num_classes if num_classes is not None else kwargs.get("num_classes")
    spec = build_spec(reference, num_classes=num_classes, kwargs=kwargs)
    if spec.source == "user" and given is None and not _takes_num_classes(reference, factory):
        return None
    declared = spec.kwargs.get("num_classes", 2)
    fewer, more = (
        named_tensors(
            build_net(
                replace(spec, kwargs={**spec.kwargs, "num_classes": count}), device="meta", factory=factory
            )
        )[0]
        for count in (declared, declared + 1)
    )
    axes = [
        (name, axis)
        for name, tensor in fewer.items()
        if name in more and name in state and state[name].dim() == tensor.dim()
        for axis in range(tensor.dim())
        if more[name].shape[axis] == tensor.shape[axis] + 1
    ]
    found = {state[name].shape[axis] for name, axis in axes}
    if given is not None and found and found != {given}:
        counts = " and ".join(map(str, sorted(found)))
        raise InputError(
            f"the weights have {counts} classes, but num_classes is {given}",
            remedy="Leave the class count out; it is read from the weights.",
        )
    return found.pop() if len(found) == 1 else given


# ---- fitting ------------------------------------------------------------------------------------
def fit(
    content: Any,
    *,
    path: Path,
    reference: str | None,
    factory: Callable[..., nn.Module] | None,
    num_classes: int | None,
    kwargs: Mapping[str, JSON],
    overrides: Mapping[str, JSON],
) -> tuple[ModelSpec, nn.Module, tuple[str, ...]]:
    """Build the architecture with the file's class count, and load its weights.

    Returns the spec, the net in eval mode, and what was chosen on the way, in words.
    Raises InputError when no architecture is known or the weights are another net's.
    """
    checkpoint = find_checkpoint(content, path=path)
    if reference is None:
        reference = infer_reference(checkpoint, path=path)
        note = f"the file names its architecture: {reference}"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    spec = build_spec(reference, num_classes=num_classes, kwargs=kwargs, overrides=overrides)
    outline = build_net(spec, device="meta", factory=factory)
    checkpoint = match_names(checkpoint, _names(outline))
    count = read_num_classes(
        checkpoint.state, reference, factory=factory, num_classes=num_classes, kwargs=kwargs
    )
    spec = build_spec(reference, num_classes=count, kwargs=kwargs, overrides=overrides)
    net = build_net(spec, factory=factory)
    load_weights(net, checkpoint.state, path=path, reference=reference)
    return spec, net, checkpoint.notes


def _names(net: nn.Module) -> set[str]:
    tensors, aliases = named_tensors(net)
    return tensors.keys() | aliases.keys()


def _takes_num_classes(reference: str, factory: Callable[..., nn.Module] | None) -> bool:
    try:
        parameters = inspect.signature(factory or import_factory(reference)).parameters
    except (TypeError, ValueError):  # no signature to read: a builtin
        return False
    return "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def infer_reference(checkpoint: Checkpoint, *, path: Path) -> str:
    """The architecture that a training script noted under 'arch', where a registry's net fits the names."""
    if checkpoint.arch is not None:
        for source in ("timm", "torchvision"):
            try:
                spec = build_spec(f"{source}:{checkpoint.arch}")
            except InputError:
                continue
            names = set(build_net(spec, device="meta").state_dict())
            if names <= match_names(checkpoint, names).state.keys():
                return spec.reference
    raise InputError(
        f"{path}: the file does not say which architecture its weights belong to",
        remedy="Pass it: --arch timm:NAME, torchvision:NAME, sepress:NAME or pkg.module:factory.",
    )


def load_weights(net: nn.Module, state: Mapping[str, Tensor], *, path: Path, reference: str) -> None:
    """load_state_dict, strict, with one InputError for everything that does not fit."""
    own = net.state_dict()
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    with torch.no_grad():
        result = net.load_state_dict({k: v for k, v in state.items() if k not in wrong}, strict=False)
    missing = [k for k in result.missing_keys if k not in wrong]
    if not (wrong or missing or result.unexpected_keys):
        return
    lines = [f"{path}: its weights don't fit {reference}"]
    for what, keys in (("missing", missing), ("unexpected", result.unexpected_keys)):
        if keys:
            lines.append(f"  {what} {len(keys)}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}")
    if wrong:
        shapes = [f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}" for k in wrong[:3]]
        lines.append(f"  other shapes {len(wrong)}: {'; '.join(shapes)}{'; ...' if len(wrong) > 3 else ''}")
    raise InputError("\n".join(lines), remedy="Is --arch the architecture that was trained?")
