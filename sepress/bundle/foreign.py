"""Checkpoints of other programs -> a state dict that fits an architecture.

A bare state dict, those of timm, torchvision, Lightning and DeepSpeed, with averaged weights (EMA), under
the prefixes of DistributedDataParallel, FSDP, torch.compile or a wrapping module; a pickled network.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sepress.bundle import formats
from sepress.bundle.clues import Clues, find_clues
from sepress.bundle.header import check_tensors, named_tensors
from sepress.bundle.pickled import check_function, describe
from sepress.errors import InputError
from sepress.models import build_net, build_spec, override_preprocessing
from sepress.models.sources import import_factory
from sepress.types import JSON, ModelSpec

# Where training programs keep the weights; averaged ones first, since they are what those programs evaluate.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
PLAIN = ("state_dict", "model", "model_state_dict", "net", "network", "weights", "module")
# What torch.compile, FSDP and activation checkpointing put between the names of a module and its own.
WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
SHADOW = re.compile(r"(?:^|[._])(?:ema|swa|averaged?|shadow)(?=[._])")  # in a prefix: of averaged weights


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a foreign file as they are named there."""

    state: Mapping[str, Tensor]
    notes: tuple[str, ...]  # what was chosen, for the person and the lineage
    module: nn.Module | None = None  # the pickled network that the weights are of
    prefix: str = ""  # of the chosen names, where match_names dropped one


def find_checkpoint(content: Any, *, path: Path) -> Checkpoint:
    """Find the state dict in what a file held; InputError tells what is there instead."""
    if isinstance(content, nn.Module):
        note = f"took the weights of the pickled {type(content).__name__}"
        return _checked(Checkpoint(content.state_dict(), (note,), content), path)
    if isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
        return _checked(Checkpoint(content, ("took the state dict that the file is",)), path)
    found, modules = {}, {}
    if isinstance(content, Mapping):
        for key in (*AVERAGED, *PLAIN):
            value = content.get(key)
            if isinstance(value, nn.Module):
                modules[key], value = value, value.state_dict()
            if isinstance(value, Mapping) and value and all(isinstance(v, Tensor) for v in value.values()):
                found[key] = value
        if {"ds_config", "ds_version"} & content.keys() and _is_shard(found.get("module", {})):
            formats.refuse(path, formats.DEEPSPEED)
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
    return _checked(
        Checkpoint(found[chosen], _chosen_notes(content, chosen, list(found)), modules.get(chosen)), path
    )


def _is_shard(state: Mapping[str, Tensor]) -> bool:
    """Whether a rank's part of DeepSpeed lacks the weights: ZeRO's third stage leaves empty tensors."""
    return not state or any(tensor.numel() == 0 for tensor in state.values())


def _chosen_notes(content: Mapping[str, Any], chosen: str, found: list[str]) -> tuple[str, ...]:
    """Which weights were taken of those that the checkpoint holds, and which were not."""
    others = f", not those under '{', '.join(k for k in found if k != chosen)}'" if len(found) > 1 else ""
    if chosen in AVERAGED:
        return (f"took the averaged (EMA) weights under '{chosen}'{others}",)
    if chosen == "state_dict" and "current_model_state" in content:  # Lightning's WeightAveraging
        others = ", which are the averaged (EMA) ones, not those under 'current_model_state'"
    notes = [f"took the weights under '{chosen}'{others}"]
    notes += [f"'{key}' holds no named weights and was left" for key in AVERAGED if content.get(key)]
    return tuple(notes)


def _checked(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    if bad := [key for key in checkpoint.state if not isinstance(key, str)]:
        raise InputError(f"{path}: its weights are not named by strings: {bad[0]!r}")
    sharded = [v for v in checkpoint.state.values() if type(v).__module__.startswith("torch.distributed.")]
    if sharded or any(key.endswith("flat_param") for key in checkpoint.state):
        formats.refuse(path, formats.SHARDS)
    check_tensors(checkpoint.state, where=str(path))
    return checkpoint


# ---- names --------------------------------------------------------------------------------------
def match_names(checkpoint: Checkpoint, names: set[str], *, path: Path) -> Checkpoint:
    """Rename to the architecture's names: drop the prefix under which most of them are found.

    Where several have as many, those of averaged weights are taken. Raises InputError where several
    different networks are left to choose from.
    """
    state = {WRAPPERS.sub("", key): value for key, value in checkpoint.state.items()}
    counts = Counter(prefix for key in state for prefix, rest in _splits(key) if rest in names)
    if not counts:
        return replace(checkpoint, state=state)
    most = max(counts.values())
    tied = sorted((prefix for prefix, count in counts.items() if count == most), key=len)
    averaged = [prefix for prefix in tied if SHADOW.search(prefix)]
    prefix = next(iter(averaged or tied))
    renamed = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    for other in () if averaged or not prefix else tied:
        if any(not torch.equal(renamed[name], state[other + name]) for name in names & renamed.keys()):
            raise InputError(
                f"{path}: several networks of this architecture are in it, under '{prefix}' and '{other}'",
                remedy="Save the one that you mean: its state_dict() alone.",
            )
    notes = checkpoint.notes
    if averaged:
        notes += (f"took the averaged (EMA) weights under '{prefix}'",)
    # A wrapper's further entries (a loss, metrics, the count of averaged steps) are not the network's.
    if prefix and (others := [key for key in state if not key.startswith(prefix)]):
        notes += (f"left out {len(others)} tensors outside '{prefix}' ({', '.join(others[:3])})",)
    return replace(checkpoint, state=renamed, notes=notes, prefix=prefix)


def _splits(key: str) -> list[tuple[str, str]]:
    """Every way to read a dotted key as prefix and name."""
    dots = [-1, *(i for i, letter in enumerate(key) if letter == ".")]
    return [(key[: dot + 1], key[dot + 1 :]) for dot in dots]


# ---- arguments that weights tell ------------------------------------------------------------------
def read_arguments(
    state: Mapping[str, Tensor],
    reference: str,
    *,
    factory: Callable[..., nn.Module] | None,
    num_classes: int | None,
    kwargs: Mapping[str, JSON],
) -> dict[str, JSON]:
    """`kwargs` with the class count and the input channels of weights, pruned or not.

    Each is read from the lengths of the axes that grow with it, and left as it is where a user's factory
    takes no such argument or the axes don't agree on one number. Raises InputError where the weights
    contradict a number that was given.
    """
    spec = build_spec(reference, num_classes=num_classes, kwargs=kwargs)
    given = {**kwargs} if num_classes is None else {**kwargs, "num_classes": num_classes}
    found = dict(given)
    parameters = _parameters(reference, factory) if spec.source == "user" else {}
    for name, what, usual in (
        ("num_classes", "classes", spec.kwargs.get("num_classes", 2)),
        ("in_chans", "input channels", spec.preprocessing.input_size[0]),
    ):
        if spec.source == "user" and name not in given and not _takes(parameters, name):
            continue
        if spec.source == "torchvision" and name == "in_chans":
            continue
        counts = _read_counts(state, replace(spec, kwargs={**spec.kwargs, **found}), factory, name, usual)
        if name in given and counts and counts != {given[name]}:
            numbers = " and ".join(map(str, sorted(counts)))
            raise InputError(
                f"the weights have {numbers} {what}, but {name} is {given[name]}",
                remedy=f"Leave {name} out; it is read from the weights.",
            )
        default = parameters[name].default if name in parameters else usual
        if len(counts) == 1 and (name == "num_classes" or counts != {default}):
            found[name] = counts.pop()
    return found


def _read_counts(
    state: Mapping[str, Tensor],
    spec: ModelSpec,
    factory: Callable[..., nn.Module] | None,
    name: str,
    usual: int,
) -> set[int]:
    """The values of the argument `name` that explain the lengths of the axes which grow with it."""
    at = spec.kwargs.get(name, usual)

    def shapes(count: int) -> dict[str, torch.Size]:
        grown = replace(spec, kwargs={**spec.kwargs, name: count})
        tensors, _ = named_tensors(build_net(grown, device="meta", factory=factory))
        return {key: tensor.shape for key, tensor in tensors.items()}

    fewer = shapes(at)
    if name == "in_chans" and all(state[key].shape == fewer[key] for key in fewer.keys() & state.keys()):
        return {at}  # the usual case, which a second net need not confirm
    more = shapes(at + 1)
    counts = set()
    for key in fewer.keys() & more.keys() & state.keys():
        if state[key].dim() != len(fewer[key]):
            continue
        for was, grown, has in zip(fewer[key], more[key], state[key].shape, strict=True):
            if grown > was and (has - was) % (grown - was) == 0:
                counts.add(at + (has - was) // (grown - was))
    return counts


def _parameters(reference: str, factory: Callable[..., nn.Module] | None) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory or import_factory(reference)).parameters
    except (TypeError, ValueError):  # no signature to read: a builtin
        return {}


def _takes(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    """Whether a factory takes the argument; of what it passes on unread, only the class count is usual."""
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return name in parameters or (passes_on and name == "num_classes")


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
    """Build the architecture with the file's class count and input channels, and load its weights.

    What the file says of the architecture and its preprocessing is used where it names the same one; what
    the caller says goes before it. Returns the spec, the net in eval mode, and what was chosen on the way,
    in words. Raises InputError when no architecture is known or the weights are another net's.
    """
    checkpoint = find_checkpoint(content, path=path)
    clues = find_clues(content, checkpoint.module, path)
    if reference is None:
        reference = infer_reference(checkpoint, clues, path=path)
        note = f"{clues.said_by} names the architecture: {reference}"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    elif reference not in clues.references:
        clues = Clues()
    if clues.unknown:
        raise InputError(
            f"{path}: {clues.said_by} says that the net was built with {', '.join(clues.unknown)}, which "
            f"sepress does not pass on to {reference}",
            remedy="Pass what builds it so: --arch pkg.module:factory.",
        )
    checkpoint, spec = _match(
        checkpoint, reference, {**clues.kwargs, **kwargs}, path=path, factory=factory, num_classes=num_classes
    )
    figures = clues.figures_for(spec.preprocessing.input_size[0])
    preprocessing = override_preprocessing(spec.preprocessing, figures, by=clues.said_by)
    names = clues.class_names
    spec = replace(
        spec,
        preprocessing=override_preprocessing(preprocessing, overrides),
        class_names=names if names and len(names) == spec.kwargs.get("num_classes") else spec.class_names,
    )
    net = build_net(spec, factory=factory)
    load_weights(net, checkpoint.state, path=path, reference=reference)
    notes = [*checkpoint.notes, *_width_notes(net, checkpoint.state)]
    if checkpoint.module is not None:
        module = _at_prefix(checkpoint.module, checkpoint.prefix)
        notes.append(check_function(module, net, spec.preprocessing.input_size, where=str(path)))
    return spec, net, tuple(notes)


def _match(
    checkpoint: Checkpoint,
    reference: str,
    kwargs: Mapping[str, JSON],
    *,
    path: Path,
    factory: Callable[..., nn.Module] | None = None,
    num_classes: int | None = None,
) -> tuple[Checkpoint, ModelSpec]:
    """The weights under the architecture's names, and its spec with the arguments that they tell."""
    spec = build_spec(reference, num_classes=num_classes, kwargs=kwargs)
    matched = match_names(checkpoint, _names(build_net(spec, device="meta", factory=factory)), path=path)
    found = read_arguments(matched.state, reference, factory=factory, num_classes=num_classes, kwargs=kwargs)
    return matched, build_spec(reference, kwargs=found)


def _names(net: nn.Module) -> set[str]:
    tensors, aliases = named_tensors(net)
    return tensors.keys() | aliases.keys()


def infer_reference(checkpoint: Checkpoint, clues: Clues, *, path: Path) -> str:
    """The first architecture of the clues that has the file's tensors, name by name and shape by shape.

    Where only names agree, that one: loading then says which shapes differ.
    """
    by_names = None
    for reference in clues.references:
        try:
            spec = build_spec(reference, kwargs=clues.kwargs)
            wanted = build_net(spec, device="meta").state_dict()
            if not wanted.keys() <= match_names(checkpoint, set(wanted), path=path).state.keys():
                continue
            matched, spec = _match(checkpoint, reference, clues.kwargs, path=path)
        except InputError:  # a name that no registry knows, or arguments that it does not take
            continue
        wanted = build_net(spec, device="meta").state_dict()
        if {k: v.shape for k, v in wanted.items()} == {k: v.shape for k, v in matched.state.items()}:
            return spec.reference
        by_names = by_names or spec.reference
    if by_names is not None:
        return by_names
    if checkpoint.module is not None:
        raise InputError(
            f"{path}: it holds a pickled {type(checkpoint.module).__name__}, and no registry builds that",
            remedy=describe(checkpoint.module),
        )
    raise InputError(
        f"{path}: the file does not say which architecture its weights belong to",
        remedy="Pass it: --arch timm:NAME, torchvision:NAME, sepress:NAME or pkg.module:factory.",
    )


def _at_prefix(module: nn.Module, prefix: str) -> nn.Module:
    """The part of a pickled network whose weights were taken."""
    part: nn.Module
    for name, part in module.named_modules():
        if name and WRAPPERS.sub("", f"{name}.") == prefix:
            return part
    return module


def load_weights(net: nn.Module, state: Mapping[str, Tensor], *, path: Path, reference: str) -> None:
    """load_state_dict, strict, with one InputError for everything that does not fit."""
    own = net.state_dict()
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape]
    for name in own.keys() & state.keys():
        if state[name].is_floating_point() != own[name].is_floating_point():
            raise InputError(
                f"{path}: '{name}' holds {state[name].dtype}, expected {own[name].dtype}",
                remedy="Weights that were quantized can't be pruned: pass those of before.",
            )
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
    raise InputError(
        "\n".join(lines),
        remedy="Is --arch the architecture that was trained? Where layers of it were replaced (a head, a "
        "stem), pass what builds it so: --arch pkg.module:factory.",
    )


def _width_notes(net: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """A note where the file's numbers are of another width than the net's, which are float32."""
    own = net.state_dict()
    held = {str(v.dtype) for k, v in state.items() if v.is_floating_point() and v.dtype != own[k].dtype}
    return [f"its weights are {', '.join(sorted(held))} and are held as float32"] if held else []
