"""Model files -> Bundle -> model files: tensors and JSON values, nothing executable.

`.pt` and `.safetensors` are equal citizens. Loading builds the architecture on the meta device, checks the
file against it, and only then gives it the file's tensors; a pruned net is its architecture, narrowed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sepress.bundle import foreign
from sepress.bundle.header import (
    FORMAT,
    Header,
    apply_patches,
    check_architecture,
    check_layout,
    check_tensors,
    digest,
    find_patches,
    header_from_json,
    header_to_json,
    merge_patches,
    named_tensors,
)
from sepress.bundle.reading import NativeFile, read_file
from sepress.console import log
from sepress.coupling import sync_attributes
from sepress.device import seeded
from sepress.errors import InputError, SepressError
from sepress.files import replacing
from sepress.models import build_net, build_spec, factory_reference, override_preprocessing, parse_reference
from sepress.models.folded import apply_replacements, find_replacements
from sepress.types import JSON, AttributePatch, Bundle, Layout, ModelSpec

__all__ = [
    "Header",
    "load_bundle",
    "load_model",
    "make_bundle",
    "new_folder",
    "read_meta",
    "save_bundle",
    "save_net",
]

SUFFIXES = (".pt", ".safetensors")
MODEL_SUFFIXES = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".tar", ".pkl", ".pt2", ".onnx")


# ---- making and saving --------------------------------------------------------------------------
def make_bundle(
    net: nn.Module,
    spec: ModelSpec | None,
    *,
    lineage: Mapping[str, JSON],
    attributes: Iterable[AttributePatch] = (),
    factory: Callable[..., nn.Module] | None = None,
) -> Bundle:
    """Join a net with what builds it again, and make sure that it does.

    The modules that folding put in are told by their types, and the numbers that pruning rewrote by comparing
    the net with its architecture; `attributes` are only needed, all that there ever were and in order, where
    a user's factory can't be imported by its name and is not given as `factory` either. Raises InputError
    for a net without a spec, and for one that its spec does not build.
    """
    if spec is None:
        raise InputError(
            "this net came without a factory, so a file of it could not be loaded again",
            remedy="Say what builds it (arch='pkg.module:factory', or the callable itself), or export ONNX.",
        )
    if extra := [key for key in net.state_dict() if key.endswith("_extra_state")]:
        raise InputError(f"'{extra[0]}' is state that is not a tensor, which a model file can't hold")
    tensors, _ = named_tensors(net)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layout = Layout(shapes, merge_patches(attributes), find_replacements(net))
    outline = _outline(spec, factory)
    if outline is not None:
        where = f"this {type(net).__name__}"
        apply_replacements(outline, layout.replaced, where=where)
        header = _header(net, spec, layout, lineage)
        check_architecture(outline, header, tensors, where=where)
        check_layout(header, tensors, where=where)
        narrow(outline, {n: torch.empty_like(t, device="meta") for n, t in tensors.items()}, header)
        patches = merge_patches((*layout.attributes, *find_patches(net, outline)))
        layout = replace(layout, attributes=patches)
    return Bundle(spec=spec, layout=layout, lineage=lineage, net=net)


def _outline(spec: ModelSpec, factory: Callable[..., nn.Module] | None) -> nn.Module | None:
    """The unpruned architecture on meta; None where the user's factory is a local function or is gone."""
    try:
        with seeded(0):  # a constructor that can't run on meta must not move the caller's random state
            return build_net(spec, device="meta", factory=factory)
    except InputError:
        if spec.source == "user":
            return None
        raise


def _header(net: nn.Module, spec: ModelSpec, layout: Layout, lineage: Mapping[str, JSON]) -> Header:
    tensors, aliases = named_tensors(net)
    fixed = [n for n, t in tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad]
    return Header(spec, layout, lineage, aliases, tuple(fixed))


def save_net(
    net: nn.Module | Bundle,
    path: Path | str,
    *,
    arch: str | Callable[..., nn.Module] | None = None,
    num_classes: int | None = None,
    kwargs: Mapping[str, JSON] | None = None,
    overrides: Mapping[str, JSON] | None = None,
    class_names: Sequence[str] | None = None,
    trained: bool = True,
    lineage: Mapping[str, JSON] | None = None,
    overwrite: bool = False,
) -> None:
    """Save a net, pruned or not, as `.pt` or `.safetensors`; `sepress.load(path)` gives it back.

    `arch` is what built the net before any pruning: a reference (`timm:NAME`, `torchvision:NAME`,
    `sepress:NAME`, `pkg.module:factory`) or the callable itself, with its structural `kwargs`; the class
    count and the input channels are read from the net. A bundle, which `sepress.load` returns, knows it all.

    >>> import sepress, tempfile
    >>> net = sepress.build("sepress:se_resnet8", num_classes=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sepress.save(net, folder + "/net.safetensors", arch="sepress:se_resnet8")
    ...     sepress.load(folder + "/net.safetensors").spec.kwargs
    {'num_classes': 3}
    """
    if isinstance(net, Bundle):
        if arch is not None:
            raise InputError("a bundle knows its architecture", remedy="Leave arch out, or pass bundle.net.")
        save_bundle(make_bundle(net.net, net.spec, lineage=net.lineage), path, overwrite=overwrite)
        return
    spec, factory = None, arch if callable(arch) else None
    if arch is not None:
        reference = factory_reference(arch) if callable(arch) else arch
        arguments = foreign.read_arguments(
            named_tensors(net)[0], reference, factory=factory, num_classes=num_classes, kwargs=kwargs or {}
        )
        spec = build_spec(
            reference,
            kwargs=arguments,
            overrides=overrides,
            class_names=class_names,
            trained=trained,
        )
    bundle = make_bundle(net, spec, lineage=lineage or {}, factory=factory)
    save_bundle(bundle, path, overwrite=overwrite)


def save_bundle(bundle: Bundle, path: Path | str, *, overwrite: bool = False) -> None:
    """Write a bundle whole or not at all, in the format of the path's suffix.

    Raises InputError for another suffix, a file that is already there (an input is never overwritten by
    accident) and a folder that can't be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: a model is saved as {' or '.join(SUFFIXES)}")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: it exists already", remedy="Choose another name.")
    tensors, _ = named_tensors(bundle.net)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != bundle.layout.shapes:
        raise SepressError("the net has changed its shape since its bundle was made")
    # clones, since views and shared storages would drag along what is not theirs
    tensors = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    text = header_to_json(_header(bundle.net, bundle.spec, bundle.layout, bundle.lineage))
    facts = {"format": FORMAT, "meta": text, "digest": digest(text, tensors)}
    try:
        with replacing(path) as temporary:
            if path.suffix == ".safetensors":
                save_file(tensors, temporary, metadata=facts)
            else:
                torch.save({**facts, "tensors": tensors}, temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise InputError(f"{path}: can't be written: {error}") from error


# ---- loading ------------------------------------------------------------------------------------
def read_meta(path: Path | str) -> Header:
    """A native file's spec, layout and lineage, without its tensors and without building anything."""
    found = read_file(Path(path), peek=True)
    if not isinstance(found, NativeFile):
        raise InputError(f"{path}: sepress did not write this file", remedy="Pass it as MODEL with --arch.")
    return header_from_json(found.header, where=str(path))


def load_bundle(
    path: Path | str,
    *,
    arch: str | Callable[..., nn.Module] | None = None,
    num_classes: int | None = None,
    kwargs: Mapping[str, JSON] | None = None,
    trust_pickle: bool = False,
    overrides: Mapping[str, JSON] | None = None,
) -> Bundle:
    """Read a model file: one of ours, or a foreign checkpoint together with `arch`. The net is in eval mode.

    `arch` is a reference or the callable that builds the net; a file of ours that names a user's factory
    needs it again. `overrides` are preprocessing figures (see `sepress.models.build_spec`).
    Raises InputError for every file that is not what it should be; no code in a file ever runs, unless
    `trust_pickle` says so.

    >>> import sepress, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sepress.save(sepress.build("sepress:se_mobile"), folder + "/net.pt", arch="sepress:se_mobile")
    ...     bundle = sepress.load(folder + "/net.pt")
    >>> bundle.spec.reference, bundle.spec.preprocessing.input_size
    ('sepress:se_mobile', (3, 32, 32))
    """
    path = Path(path)
    reference = factory_reference(arch) if callable(arch) else arch
    factory = arch if callable(arch) else None
    if reference is not None:
        parse_reference(reference)
    found = read_file(path, trust_pickle=trust_pickle)
    if isinstance(found, NativeFile):
        if kwargs:
            raise InputError(f"{path}: its architecture's arguments are in the file; don't pass them again")
        with seeded(0):  # building must not move the caller's random state
            bundle = _load_native(
                found, path=path, reference=reference, factory=factory, num_classes=num_classes
            )
        preprocessing = override_preprocessing(bundle.spec.preprocessing, overrides or {})
        return replace(bundle, spec=replace(bundle.spec, preprocessing=preprocessing))
    with seeded(0):
        spec, net, notes = foreign.fit(
            found.content,
            path=path,
            reference=reference,
            factory=factory,
            num_classes=num_classes,
            kwargs=kwargs or {},
            overrides=overrides or {},
        )
    for note in notes:
        log(f"{path.name}: {note}")
    lineage = {"origin": {"file": path.name, "notes": list(notes)}}
    return make_bundle(net, spec, lineage=lineage, factory=factory)


def _load_native(
    found: NativeFile,
    *,
    path: Path,
    reference: str | None,
    factory: Callable[..., nn.Module] | None,
    num_classes: int | None,
) -> Bundle:
    where = str(path)
    header = header_from_json(found.header, where=where)
    header = replace(header, spec=_resolve_spec(header.spec, reference, num_classes, where=where))
    check_tensors(found.tensors, where=where)
    check_layout(header, found.tensors, where=where)
    if digest(found.header, found.tensors) != found.digest:
        raise InputError(
            f"{path}: the file is damaged: its content has changed since it was written",
            remedy="Copy or download it again.",
        )
    try:
        net = build_net(header.spec, device="meta", factory=factory)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", remedy=error.remedy) from error
    apply_replacements(net, header.layout.replaced, where=where)
    check_architecture(net, header, found.tensors, where=where)
    if _has_loose_tensors(net):  # values that only the constructor knows
        net = build_net(header.spec, factory=factory)
        apply_replacements(net, header.layout.replaced, where=where)
    apply_patches(net, header.layout.attributes, where=where)
    narrow(net, found.tensors, header)
    return Bundle(header.spec, header.layout, header.lineage, net)


def _resolve_spec(
    spec: ModelSpec, reference: str | None, num_classes: int | None, *, where: str
) -> ModelSpec:
    """The file's spec, with the factory the user named again where it is the user's own."""
    if num_classes is not None and num_classes != spec.kwargs.get("num_classes", num_classes):
        raise InputError(f"{where}: it has {spec.kwargs['num_classes']} classes, not {num_classes}")
    if spec.source == "user":
        if reference is None:
            raise InputError(
                f"{where}: its architecture is your own code, {spec.arch}, which a file may not run",
                remedy=f"Name it again: --arch {spec.arch}, or sepress.load(path, arch=factory).",
            )
        source, arch = parse_reference(reference)
        return replace(spec, source=source, arch=arch)
    if reference is not None and reference != spec.reference:
        raise InputError(
            f"{where}: it holds a {spec.reference}, not a {reference}", remedy="Leave --arch out."
        )
    return spec


def _has_loose_tensors(net: nn.Module) -> bool:
    """Whether a module keeps a tensor as a plain attribute, which no file holds."""
    return any(isinstance(value, Tensor) for module in net.modules() for value in vars(module).values())


def narrow(net: nn.Module, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Put tensors in place of the net's own, whatever their shape; tied ones become one object.

    The widths that layers keep as attributes follow the shapes.
    """
    fixed = frozenset(header.fixed)
    parameters = {name for name, _ in net.named_parameters(remove_duplicate=False)}
    made: dict[str, Tensor] = {
        name: nn.Parameter(tensor, requires_grad=tensor.is_floating_point() and name not in fixed)
        if name in parameters
        else tensor
        for name, tensor in tensors.items()
    }
    for name in (*made, *header.aliases):
        owner, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(owner), leaf, made[header.aliases.get(name, name)])
    sync_attributes(net)


def load_model(
    model: str,
    *,
    arch: str | None = None,
    random_weights: bool = False,
    num_classes: int | None = None,
    kwargs: Mapping[str, JSON] | None = None,
    trust_pickle: bool = False,
    overrides: Mapping[str, JSON] | None = None,
    weights: Literal["needed", "none"] = "needed",
    seed: int = 0,
) -> Bundle:
    """Load what a user calls a model: a file, or a reference with the weights its registry publishes.

    With `random_weights`, or where no `weights` are needed, a reference is built untrained from `seed` and
    nothing is fetched; its spec says so. A user's factory comes with the weights it returns.
    """
    if _is_a_file(model):
        if random_weights:
            raise InputError(f"{model}: a file brings its weights; --random-weights goes with a name")
        return load_bundle(
            model,
            arch=arch,
            num_classes=num_classes,
            kwargs=kwargs,
            trust_pickle=trust_pickle,
            overrides=overrides,
        )
    source, _ = parse_reference(model)
    if arch is not None:
        raise InputError(f"--arch goes with a file, but '{model}' is a name", remedy="Leave --arch out.")
    pretrained = source != "user" and weights == "needed" and not random_weights
    trained = pretrained or (source == "user" and not random_weights)
    spec = build_spec(model, num_classes=num_classes, kwargs=kwargs, overrides=overrides, trained=trained)
    with seeded(seed):
        net = build_net(spec, pretrained=pretrained)
    come_from = "pretrained" if pretrained else "the factory's" if trained else f"random, seed {seed}"
    return make_bundle(net, spec, lineage={"origin": {"reference": model, "weights": come_from}})


def _is_a_file(model: str) -> bool:
    """Whether the user means a file, be it there or not."""
    if model.endswith(MODEL_SUFFIXES) or "/" in model or "\\" in model:
        return True
    try:
        return Path(model).exists()
    except (OSError, ValueError):  # not a path at all
        return False


# ---- output folders -----------------------------------------------------------------------------
def new_folder(base: Path | str) -> Path:
    """Create and return `base`, or the first of `base-2`, `base-3`, ... that does not exist yet."""
    base = Path(base)
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"{folder}: can't be created: {error.strerror}") from error
        return folder
    raise AssertionError("unreachable")
