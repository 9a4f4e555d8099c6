"""A net -> one checked ONNX file.

What comes out holds the weights, the preprocessing and where it comes from, and nothing about the machine
that made it.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import onnx
import torch
from torch import Tensor, nn

from sepress import __version__, console
from sepress.defaults import EXPORTER, OPSET
from sepress.errors import InputError, SepressError
from sepress.files import replacing
from sepress.measure import Inputs
from sepress.modes import evaluating
from sepress.outputs import named_outputs
from sepress.parity import as_tuple, on_cpu
from sepress.simplify import simplify
from sepress.types import JSON, ModelSpec

Exporter = Literal["dynamo", "torchscript"]

_BATCH_REMEDY = "Nothing was written. Where the forward fixes the batch size, export with that one: batch=N."


# ---- export ---------------------------------------------------------------------------------------
def export_onnx(
    net: nn.Module,
    path: str | Path,
    *,
    example: Inputs,
    spec: ModelSpec | None = None,
    lineage: Mapping[str, JSON] | None = None,
    opset: int = OPSET,
    batch: int | None = None,
    exporter: Exporter = EXPORTER,
) -> None:
    """Write the net as one simplified ONNX file that passes the checker; the net given is left as it was.

    `example` is one input (N, C, H, W; also 3- or 5-dimensional) or a tuple of them. A single input is
    called `input`, a single output `logits`; several are `input_0`, ... and `output_0`, ... or what the keys
    of a dict say. The first axis has the size `batch`; None leaves it free, under the name `batch`.
    `exporter` is one of torch's: `dynamo` captures the graph and refuses what it can't prove of the forward;
    `torchscript` records what one run does, so only parity on images (parity.check_onnx_parity) can tell
    whether another run does the same. `spec` and `lineage` go into the metadata under `sepress.*`; paths of
    this machine in the lineage are cut to their last part. Raises InputError for an example or an opset that
    can't be used, and SepressError with the exporter's first cause; then nothing is written.

    >>> import sepress, torch
    >>> net = sepress.build("sepress:se_resnet8", in_chans=1)
    >>> sepress.export_onnx(net, "net.onnx", example=torch.randn(1, 1, 28, 28))
    """
    images = as_tuple(example)
    if not images or any(x.dim() < 2 or not len(x) for x in images):
        raise InputError(
            "the example to export with holds no image",
            remedy="Pass a batch of inputs, say (1, 3, 224, 224).",
        )
    net, images = on_cpu(net), tuple(x.detach().cpu() for x in images)
    if batch is None:  # two images: an example of one would be taken for the constant 1
        images = tuple(torch.cat([x[:1], x[-1:]]) for x in images)
    else:
        images = tuple(repeated(x, batch) for x in images)
    with evaluating(net):
        model = _exported(net, images, opset=opset, free=batch is None, exporter=exporter)
    model = simplify(model)
    _strip(model)
    _set_metadata(model, images, spec=spec, lineage=lineage)
    write_model(model, Path(path))


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Write the model as one file that passes the checker; SepressError, and no file, where it does not."""
    with replacing(path) as temporary:
        onnx.save(model, temporary)
        try:
            onnx.checker.check_model(temporary, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise SepressError(
                f"the exported ONNX file is not valid: {_first_line(error)}",
                remedy="Nothing was written. Try another opset, and please report this net.",
            ) from error


def repeated(images: Tensor, count: int) -> Tensor:
    """`count` images: those given (N, ...), again from the first where there are fewer."""
    return images[torch.arange(count) % len(images)]


class _Flat(nn.Module):
    """The net with its outputs as a flat tuple: torch.export knows no dataclasses of the user's."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(named_outputs(self.net(*inputs)).values())


def _exported(
    net: nn.Module, images: tuple[Tensor, ...], *, opset: int, free: bool, exporter: Exporter
) -> onnx.ModelProto:
    """The model as the exporter gives it; `free` leaves the first axis of every input open."""
    result = net(*images)
    inputs = ["input"] if len(images) == 1 else [f"input_{i}" for i in range(len(images))]
    outputs = list(named_outputs(result))
    plain = net if isinstance(result, Tensor) else _Flat(net)
    run = _captured if exporter == "dynamo" else _recorded
    try:
        with console.silenced():
            model = run(plain, images, inputs, outputs, opset=opset, free=free)
    except Exception as error:  # the exporter raises whatever the graph capture met
        raise SepressError(
            f"torch can't export this net to ONNX: {_first_cause(error)}", remedy=_BATCH_REMEDY
        ) from error
    _check_promises(model, opset=opset, free=free)
    return model


def _captured(
    net: nn.Module,
    images: tuple[Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    *,
    opset: int,
    free: bool,
) -> onnx.ModelProto:
    shapes: tuple[Any, ...] = tuple({0: torch.export.Dim("batch")} for _ in images)
    if isinstance(net, _Flat):
        shapes = (shapes,)  # a variadic forward has one argument: the tuple
    program = torch.onnx.export(
        net,
        images,
        dynamo=True,
        verbose=False,
        input_names=inputs,
        output_names=outputs,
        opset_version=opset,
        dynamic_shapes=shapes if free else None,
    )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def _recorded(
    net: nn.Module,
    images: tuple[Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    *,
    opset: int,
    free: bool,
) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "recorded.onnx"
        torch.onnx.export(
            net,
            images,
            written,
            dynamo=False,
            input_names=inputs,
            output_names=outputs,
            opset_version=opset,
            dynamic_axes={name: {0: "batch"} for name in (*inputs, *outputs)} if free else None,
        )
        model: onnx.ModelProto = onnx.load(written)
    return model


def _check_promises(model: onnx.ModelProto, *, opset: int, free: bool) -> None:
    """Raise where the exporter, which only logs it, gave another opset or a fixed batch."""
    written = next(entry.version for entry in model.opset_import if entry.domain == "")
    if written != opset:
        raise InputError(
            f"this net can't be converted to ONNX opset {opset}",
            remedy=f"Nothing was written. Opset {written} works.",
        )
    fixed = [node.name for node in model.graph.input if not node.type.tensor_type.shape.dim[0].dim_param]
    if free and fixed:
        raise SepressError(f"the net's forward fixes the batch size of '{fixed[0]}'", remedy=_BATCH_REMEDY)


def _first_cause(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


# ---- what the file says ---------------------------------------------------------------------------
def _strip(message: Any) -> None:
    """Clear doc strings and metadata everywhere in the model: torch stores stack traces with file names."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else [value]:
                _strip(part)


def _set_metadata(
    model: onnx.ModelProto,
    images: tuple[Tensor, ...],
    *,
    spec: ModelSpec | None,
    lineage: Mapping[str, JSON] | None,
) -> None:
    facts: dict[str, JSON] = {"input_size": list(images[0].shape[1:])}
    if spec is not None:
        preprocessing = dataclasses.asdict(spec.preprocessing)
        facts |= {key: preprocessing[key] for key in ("mean", "std", "interpolation", "crop_pct")}
        facts |= {"class_names": spec.class_names, "trained": spec.trained}
    if lineage is not None:
        facts["lineage"] = without_paths(lineage)
    model.producer_name, model.producer_version = "sepress", __version__
    onnx.helper.set_model_props(
        model,
        {
            f"sepress.{key}": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in facts.items()
            if value is not None
        },
    )


def without_paths(value: JSON) -> JSON:
    """Return the JSON value with every absolute path in it cut to its last part."""
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute() or value.startswith("~"):
                return kind(value).name
        return value
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(child) for child in value]
    return value
