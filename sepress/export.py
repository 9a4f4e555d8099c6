"""A net -> one checked ONNX file -> parity with ONNX Runtime, and the latency that will be deployed.

What comes out holds the weights, the preprocessing and where it comes from, and nothing about the machine
that made it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from sepress import __version__, console
from sepress.defaults import OPSET
from sepress.errors import InputError, SepressError
from sepress.files import replacing
from sepress.measure import (
    Inputs,
)
from sepress.modes import evaluating
from sepress.parity import as_tuple, named_outputs, on_cpu
from sepress.types import JSON, ModelSpec

_BATCH_REMEDY = (
    "Nothing was written. Where the forward fixes the batch size, export with dynamic_batch=False."
)


# ---- export ---------------------------------------------------------------------------------------
def export_onnx(
    net: nn.Module,
    path: str | Path,
    *,
    example: Inputs,
    spec: ModelSpec | None = None,
    lineage: Mapping[str, JSON] | None = None,
    opset: int = OPSET,
    dynamic_batch: bool = True,
) -> None:
    """Write the net as one ONNX file that passes the checker; the net given is left as it was.

    `example` is one input (N, C, H, W; also 3- or 5-dimensional) or a tuple of them. A single input is
    called `input`, a single output `logits`; several are `input_0`, ... and `output_0`, ... or what the keys
    of a dict say. With `dynamic_batch` the first axis is `batch`, otherwise it has the example's size.
    `spec` and `lineage` go into the metadata under `sepress.*`; paths of this machine in the lineage are cut
    to their last part. Raises InputError for an example or an opset that can't be used, and SepressError
    with the exporter's first cause; then nothing is written.

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
    with evaluating(net):
        model = _exported(net, images, opset=opset, dynamic_batch=dynamic_batch)
    _strip(model)
    _set_metadata(model, images, spec=spec, lineage=lineage)
    with replacing(Path(path)) as temporary:
        onnx.save(model, temporary)
        try:
            onnx.checker.check_model(temporary, full_check=True)  # by path: models over 2 GB pass too
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise SepressError(
                f"the exported ONNX file is not valid: {_first_line(error)}",
                remedy=f"Nothing was written. Try another opset than {opset}, and please report this net.",
            ) from error


class _Flat(nn.Module):
    """The net with its outputs as a flat tuple: torch.export knows no dataclasses of the user's."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(named_outputs(self.net(*inputs)).values())


def _exported(
    net: nn.Module, images: tuple[Tensor, ...], *, opset: int, dynamic_batch: bool
) -> onnx.ModelProto:
    result = net(*images)
    plain = isinstance(result, Tensor)
    names = ["input"] if len(images) == 1 else [f"input_{i}" for i in range(len(images))]
    if dynamic_batch:  # two images: an example of one would be taken for the constant 1
        images = tuple(torch.cat([x[:1], x[-1:]]) for x in images)
    shapes: tuple[Any, ...] = tuple({0: torch.export.Dim("batch")} for _ in images)
    if not plain:
        shapes = (shapes,)  # a variadic forward has one argument: the tuple
    try:
        with console.silenced():
            program = torch.onnx.export(
                net if plain else _Flat(net),
                images,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=list(named_outputs(result)),
                opset_version=opset,
                dynamic_shapes=shapes if dynamic_batch else None,
            )
    except Exception as error:  # the exporter raises whatever the graph capture met
        raise SepressError(
            f"torch can't export this net to ONNX: {_first_cause(error)}", remedy=_BATCH_REMEDY
        ) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _check_promises(model, opset=opset, dynamic_batch=dynamic_batch)
    return model


def _check_promises(model: onnx.ModelProto, *, opset: int, dynamic_batch: bool) -> None:
    """Raise where the exporter, which only logs it, gave another opset or a fixed batch."""
    written = next(entry.version for entry in model.opset_import if entry.domain == "")
    if written != opset:
        raise InputError(
            f"this net can't be converted to ONNX opset {opset}",
            remedy=f"Nothing was written. Opset {written} works.",
        )
    fixed = [node.name for node in model.graph.input if not node.type.tensor_type.shape.dim[0].dim_param]
    if dynamic_batch and fixed:
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
