"""What a checkpoint, or the file beside it, says of the architecture that its weights belong to.

Training scripts keep their arguments in the checkpoint: timm's and torchvision's under 'args', PyTorch's
ImageNet example under 'arch', Lightning's under 'hyper_parameters'; the Hugging Face hub has timm's
config.json beside the weights; a pickled network is its own witness. Clues are plain values that anybody
may have written: an architecture is only believed where its tensors are those of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sepress.bundle.pickled import find_source
from sepress.models import INTERPOLATIONS, STRUCTURAL_KWARGS
from sepress.types import JSON

# Under which names programs keep the architecture's, and where they keep their arguments.
NAMES = ("arch", "model", "architecture", "model_name", "backbone")
ARGUMENTS = ("args", "hyper_parameters", "hparams", "config")
CONFIG_BYTES = 1 << 20  # a config.json of the hub has a few kB; one with 21,000 class names less than this


@dataclass(frozen=True)
class Clues:
    """An architecture and what goes with it, as stated."""

    references: tuple[str, ...] = ()  # the likeliest first
    said_by: str = ""  # where it stands, in words
    kwargs: Mapping[str, JSON] = field(default_factory=dict)
    figures: Mapping[str, JSON] = field(default_factory=dict)  # preprocessing it was validated with
    class_names: tuple[str, ...] | None = None
    unknown: tuple[str, ...] = ()  # arguments that change the net and that no spec can hold

    def figures_for(self, channels: int) -> dict[str, JSON]:
        """The figures for a net of so many input channels, which a statement may not have known of.

        Means and deviations of another number of channels become one for all: their average.
        """
        figures = dict(self.figures)
        for name in ("mean", "std"):
            values = figures.get(name)
            if isinstance(values, (list, tuple)) and len(values) not in (1, channels) and _numbers(values):
                figures[name] = [sum(values) / len(values)]
        size = figures.get("input_size")
        if isinstance(size, (list, tuple)) and len(size) == 3:
            figures["input_size"] = list(size[1:])
        return figures


def _numbers(values: Any) -> bool:
    return bool(values) and all(type(value) in (int, float) for value in values)


def find_clues(content: Any, module: nn.Module | None, path: Path) -> Clues:
    """The first of what a pickled network, the checkpoint and the hub's config.json state."""
    found: list[Clues] = []
    if module is not None:
        said_by = f"the pickled {type(module).__name__}"
        references, figures = find_source(module)
        found.append(Clues(references, said_by, figures=_figures_of_timm(figures)))
    if isinstance(content, Mapping):
        found += [_from_arguments(_plain(content.get(key)), f"its '{key}'") for key in ARGUMENTS]
        found.append(_from_arguments(content, "it"))
    found.append(_from_hub(path.with_name("config.json")))
    return next((clues for clues in found if clues.references), Clues())


def _plain(value: Any) -> Mapping[str, Any]:
    """A mapping as it stands, a Namespace's attributes, or nothing."""
    return value if isinstance(value, Mapping) else getattr(value, "__dict__", {})


def _from_arguments(values: Mapping[str, Any], said_by: str) -> Clues:
    """A training script's arguments, by the names that timm's and torchvision's give them."""
    names = [values[key] for key in NAMES if isinstance(values.get(key), str)]
    of_torchvision = "val_crop_size" in values
    order = ("torchvision", "timm") if of_torchvision else ("timm", "torchvision")
    references = tuple(f"{source}:{name}" for name in names for source in order)
    if of_torchvision:
        crop, resize = values["val_crop_size"], values.get("val_resize_size")
        figures = {"input_size": crop, "interpolation": values.get("interpolation")}
        if type(crop) is int and type(resize) is int and resize > 0:
            figures["crop_pct"] = crop / resize
        return Clues(references, said_by, figures=_stated(figures))
    more = _plain(values.get("model_kwargs"))
    kwargs = {name: value for name, value in more.items() if name in STRUCTURAL_KWARGS}
    if isinstance(values.get("gp"), str):
        kwargs["global_pool"] = values["gp"]
    unknown = [name for name in ("bn_eps",) if values.get(name) is not None]
    unknown += [str(name) for name in more if name not in STRUCTURAL_KWARGS]
    return Clues(references, said_by, kwargs, _figures_of_timm(values), unknown=tuple(unknown))


def _figures_of_timm(values: Mapping[str, Any]) -> dict[str, JSON]:
    """The preprocessing of timm's arguments and configurations."""
    names = ("input_size", "mean", "std", "interpolation", "crop_pct")
    figures = {name: values.get(name) for name in names}
    if figures["input_size"] is None:
        figures["input_size"] = values.get("img_size")
    return _stated(figures)


def _stated(figures: Mapping[str, Any]) -> dict[str, JSON]:
    """Without what is not stated, and without training's random choice of an interpolation."""
    return {
        name: value
        for name, value in figures.items()
        if value is not None and (name != "interpolation" or value in INTERPOLATIONS)
    }


def _from_hub(path: Path) -> Clues:
    """timm's config.json, as the Hugging Face hub has it beside a file of weights."""
    try:
        if path.stat().st_size > CONFIG_BYTES:
            return Clues()
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none, or another program's
        return Clues()
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        return Clues()
    more = _plain(config.get("model_args"))
    names = config.get("label_names")
    named = names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
    return Clues(
        references=(f"timm:{config['architecture']}",),
        said_by="the config.json beside it",
        kwargs={name: value for name, value in more.items() if name in STRUCTURAL_KWARGS},
        figures=_figures_of_timm(_plain(config.get("pretrained_cfg"))),
        class_names=tuple(named) if named else None,
        unknown=tuple(name for name in more if name not in STRUCTURAL_KWARGS),
    )
