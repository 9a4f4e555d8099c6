"""What a user may call a model -> a ModelSpec -> an nn.Module.

References are `timm:NAME`, `torchvision:NAME`, `sepress:NAME` (a registry each) or `pkg.module:factory`
(the user's own code). Reading a reference and its arguments is cheap; torch and the registries are only
imported when a spec or a net is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sepress.errors import InputError
from sepress.types import JSON, ModelSpec, Preprocessing

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["build", "build_net", "build_spec", "check_kwargs", "factory_reference", "parse_reference"]

Source = Literal["timm", "torchvision", "sepress", "user"]
REGISTRIES: tuple[Source, ...] = ("timm", "torchvision", "sepress")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")

# The plain structural keyword arguments that a user or a file may give, and the values they may take: never
# weights, addresses or paths. The bounds keep a hostile file from asking for memory or time.
STRUCTURAL_KWARGS: dict[str, tuple[type, Any, Any]] = {
    "num_classes": (int, 1, 1_000_000),
    "in_chans": (int, 1, 1024),
    "width": (int, 1, 4096),
    "width_mult": (float, 0.01, 16),
    "depth": (int, 1, 1000),
    "reduction": (int, 1, 1024),
    "cardinality": (int, 1, 1024),
    "base_width": (int, 1, 1024),
    "img_size": (int, 1, 4096),
    "output_stride": (int, 1, 64),
    "drop_rate": (float, 0, 1),
    "drop_path_rate": (float, 0, 1),
    "dropout": (float, 0, 1),
    "global_pool": (str, 0, 32),  # the length of the name
    "aux_logits": (bool, 0, 1),
}

IMAGENET = Preprocessing(
    input_size=(3, 224, 224),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bilinear",
    crop_pct=0.875,
    origin="assumed: ImageNet's usual figures, since the factory states none",
)


# ---- references ---------------------------------------------------------------------------------
def parse_reference(text: str) -> tuple[Source, str]:
    """Split a reference into its source and architecture; looks nothing up.

    Raises InputError for a bare name, with the references it may have meant.
    """
    source, colon, name = text.partition(":")
    if colon and source in REGISTRIES:
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise InputError(
                f"'{text}' does not name an architecture", remedy=f"Write {source}:NAME with a plain name."
            )
        return source, name
    if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", text):
        return "user", text
    if re.fullmatch(r"\w[\w.-]*", text):
        meant = ", ".join(f"{registry}:{text}" for registry in REGISTRIES)
        raise InputError(
            f"'{text}' alone does not say where the architecture comes from",
            remedy=f"Perhaps you meant {meant}, a file, or pkg.module:factory for your own code.",
        )
    raise InputError(
        f"'{text}' is not a reference to an architecture",
        remedy="Write timm:NAME, torchvision:NAME, sepress:NAME, or pkg.module:factory for your own code.",
    )


def factory_reference(factory: Callable[..., nn.Module]) -> str:
    """The `pkg.module:factory` by which a callable is recorded in a spec (it is never run from a file)."""
    name = getattr(factory, "__qualname__", type(factory).__qualname__)
    name = re.sub(r"<(\w+)>", r"\1", name)  # a lambda or a local function has no name to import it by
    return f"{getattr(factory, '__module__', None) or '__main__'}:{name}"


def check_kwargs(
    kwargs: Mapping[str, JSON], *, where: str = "the architecture's arguments"
) -> dict[str, JSON]:
    """Return the arguments as a dict, all of them plain structural ones within bounds; else InputError."""
    for name, value in kwargs.items():
        if name not in STRUCTURAL_KWARGS:
            raise InputError(
                f"{where}: '{name}' is not an argument that sepress passes on",
                remedy=f"Allowed are {', '.join(STRUCTURAL_KWARGS)}; else write your own pkg.module:factory.",
            )
        kind, low, high = STRUCTURAL_KWARGS[name]
        if kind is str:
            good = (
                isinstance(value, str) and re.fullmatch(rf"\w{{{low},{high}}}", value, re.ASCII) is not None
            )
        else:
            plain = type(value) is kind or (kind is float and type(value) is int)
            good = plain and low <= value <= high  # nan fails the comparison
        if not good:
            wanted = (
                f"a word of {low} to {high} letters" if kind is str else f"{kind.__name__}, {low} to {high}"
            )
            raise InputError(f"{where}: {name}={value!r} is not allowed; expected {wanted}")
    return dict(kwargs)


# ---- spec ---------------------------------------------------------------------------------------
def build_spec(
    reference: str,
    *,
    num_classes: int | None = None,
    kwargs: Mapping[str, JSON] | None = None,
    overrides: Mapping[str, JSON] | None = None,
    class_names: Sequence[str] | None = None,
    trained: bool = True,
) -> ModelSpec:
    """Find the architecture and how its images are prepared; nothing is built and nothing is fetched.

    `overrides` are preprocessing figures the user typed: input_size (a number for a square, (H, W), or
    the whole (C, H, W)), mean, std, interpolation, crop_pct. A registry's default class count is always
    written into the spec's kwargs; a user's factory gets `num_classes` only where it was given.
    Raises InputError for an unknown architecture (with close matches) or a bad argument.
    """
    source, arch = parse_reference(reference)
    arguments = check_kwargs(
        {**({"num_classes": num_classes} if num_classes is not None else {}), **(kwargs or {})}
    )
    if num_classes is not None and arguments["num_classes"] != num_classes:
        raise InputError(f"num_classes is given twice: {num_classes} and {arguments['num_classes']}")
    names: tuple[str, ...] | None = None
    if source == "user":
        preprocessing = IMAGENET
    else:
        from sepress.models import sources

        facts = sources.look_up(source, arch, arguments)
        preprocessing, names = facts.preprocessing, facts.class_names if trained else None
        arguments.setdefault("num_classes", facts.num_classes)
    if class_names is not None:
        names = tuple(class_names)
    count = arguments.get("num_classes")
    if class_names is not None and count is not None and len(class_names) != count:
        raise InputError(f"{len(class_names)} class names for {count} classes")
    return ModelSpec(
        source=source,
        arch=arch,
        kwargs=arguments,
        preprocessing=override_preprocessing(with_channels(preprocessing, arguments), overrides or {}),
        class_names=names if names is not None and len(names) == (count or len(names)) else None,
        trained=trained,
    )


def with_channels(preprocessing: Preprocessing, kwargs: Mapping[str, JSON]) -> Preprocessing:
    """The same preprocessing for `in_chans` channels; new channels get the mean of the stated figures."""
    channels: int = kwargs.get("in_chans", preprocessing.input_size[0])
    if channels == preprocessing.input_size[0]:
        return preprocessing

    def spread(values: tuple[float, ...]) -> tuple[float, ...]:
        return (sum(values) / len(values),) * channels

    return replace(
        preprocessing,
        input_size=(channels, *preprocessing.input_size[1:]),
        mean=spread(preprocessing.mean),
        std=spread(preprocessing.std),
        origin=f"{preprocessing.origin}, spread over {channels} channels",
    )


def override_preprocessing(
    preprocessing: Preprocessing, overrides: Mapping[str, JSON], *, by: str = "typed"
) -> Preprocessing:
    """The preprocessing with other figures in place of the stated ones, and its origin saying `by` whom."""
    typed = {key: value for key, value in overrides.items() if value is not None}
    known = ("input_size", "mean", "std", "interpolation", "crop_pct")
    if unknown := sorted(set(typed) - set(known)):
        raise InputError(
            f"unknown preprocessing figure '{unknown[0]}'", remedy=f"Known are {', '.join(known)}."
        )
    if not typed:
        return preprocessing
    if "input_size" in typed:
        typed["input_size"] = _whole_size(typed["input_size"], preprocessing.input_size)
    channels = typed.get("input_size", preprocessing.input_size)[0]
    for key in ("mean", "std"):
        if key in typed:
            values = typed[key]
            values = (
                tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
            )
            typed[key] = values * channels if len(values) == 1 else values
    origin = f"{by}: {', '.join(sorted(typed))}"
    if len(typed) < len(known):
        origin += f"; the rest from {preprocessing.origin}"
    return check_preprocessing(replace(preprocessing, **typed, origin=origin))


def _whole_size(value: JSON, default: tuple[int, ...]) -> tuple[JSON, ...]:
    """(C, H, W) from a number (a square), (H, W) or the whole thing."""
    if type(value) is int:
        return (default[0], *([value] * (len(default) - 1)))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (default[0], *value) if len(value) == 2 else tuple(value)
    raise InputError(f"input size {value!r} is not a size", remedy="Give a number, H W, or C H W.")


def check_preprocessing(preprocessing: Preprocessing) -> Preprocessing:
    """Return it if its figures can prepare an image; else InputError naming the figure."""
    size = preprocessing.input_size
    if not 2 <= len(size) <= 4 or not all(type(n) is int and 1 <= n <= 16384 for n in size):
        raise InputError(f"input size {size} is not 2 to 4 whole numbers from 1 to 16384")
    for key in ("mean", "std"):
        values = getattr(preprocessing, key)
        if len(values) != size[0]:
            raise InputError(f"{key} has {len(values)} figures for {size[0]} channels")
        if not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            raise InputError(f"{key} {values} is not made of finite numbers")
    if not all(v > 0 for v in preprocessing.std):
        raise InputError(f"std {preprocessing.std} must be above 0")
    if preprocessing.interpolation not in INTERPOLATIONS:
        raise InputError(
            f"unknown interpolation '{preprocessing.interpolation}'",
            remedy=f"Choose one of {', '.join(INTERPOLATIONS)}.",
        )
    crop = preprocessing.crop_pct
    if type(crop) not in (int, float) or not 0 < crop <= 2:
        raise InputError(f"crop_pct {crop!r} is not in 0..2")
    return preprocessing


# ---- net ----------------------------------------------------------------------------------------
def build_net(
    spec: ModelSpec,
    *,
    pretrained: bool = False,
    device: str | torch.device = "cpu",
    factory: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """Build the unpruned architecture in eval mode, with random or the registry's pretrained weights.

    On the meta device nothing is allocated, save by a constructor that cannot run there: then every
    tensor is moved to meta afterwards. `factory` stands in for the code that a user's spec names.
    Raises InputError when the constructor fails or pretrained weights can't be had.
    """
    from sepress.models import sources

    arguments = check_kwargs(spec.kwargs)
    if spec.source == "user":
        if pretrained:
            raise InputError(f"{spec.arch} has no registry of pretrained weights")
        with current_folder_importable():
            make: Callable[..., Any] = factory or sources.import_factory(spec.arch)
            return sources.construct(make, arguments, device=device, reference=spec.reference)
    sources.look_up(spec.source, spec.arch, arguments)  # a spec may come from a file: only registry names
    if pretrained:
        return sources.construct_pretrained(spec, arguments).to(device)
    return sources.construct(
        sources.constructor(spec.source, spec.arch), arguments, device=device, reference=spec.reference
    )


def build(reference: str, *, pretrained: bool = False, **kwargs: JSON) -> nn.Module:
    """Build an architecture by its reference, with random or pretrained weights, in eval mode.

    `kwargs` are its plain structural arguments (`num_classes`, `in_chans`, `width`, ...).

    >>> import sepress
    >>> net = sepress.build("sepress:se_resnet8", num_classes=10, in_chans=1)
    >>> net.fc
    Linear(in_features=64, out_features=10, bias=True)
    """
    return build_net(build_spec(reference, kwargs=kwargs), pretrained=pretrained)


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Let the user's module be imported from the folder they stand in, as `python -m` would."""
    import sys

    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
