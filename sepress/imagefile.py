"""An ONNX classifier of normalised images -> one that takes the images' bytes and gives probabilities.

    image uint8 (N, H, W, C) -> normalised float (N, C, H, W) -> the net -> softmax -> probabilities (N, K)

The image has the input's size already: how to resize stands in the metadata, and in the example that the
export stage writes. Works on the graph, so on any of our files: either exporter's, float16, int8.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sepress.data.transforms import normalise
from sepress.errors import InputError
from sepress.export import write_model
from sepress.types import Preprocessing

_IN_THE_GRAPH = ("sepress.mean", "sepress.std")  # no longer for whoever feeds it
_OURS = "preprocessing"  # what the new tensors between image and probabilities begin with


def write_image_file(source: Path, path: Path, preprocessing: Preprocessing) -> None:
    """Write beside an ONNX file the one of `add_preprocessing`, checked; raises as that and `write_model`."""
    write_model(add_preprocessing(onnx.load(source), preprocessing), path)


def add_preprocessing(model: onnx.ModelProto, preprocessing: Preprocessing) -> onnx.ModelProto:
    """Return the model with the preprocessing before it and a softmax behind it; the one given stays.

    Its input is `image`, uint8 (N, H, W, C), its output `probabilities`, float32 (N, K). The arithmetic is
    that of data.transforms.normalise, in its order. Raises InputError for what is no classifier of images
    (see `why_no_classifier`), or takes images of another shape than the preprocessing makes.
    """
    if (reason := why_no_classifier(model)) is not None:
        raise InputError(
            f"preprocessing can't go into this ONNX file: {reason}",
            remedy="Export without preprocessing (with_preprocessing: false).",
        )
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    net, logits = onnx.ValueInfoProto(), onnx.ValueInfoProto()
    net.CopyFrom(graph.input[0])
    logits.CopyFrom(graph.output[0])
    batch, *rest = net.type.tensor_type.shape.dim
    shape = tuple(axis.dim_value for axis in rest)
    if shape != tuple(preprocessing.input_size):
        raise InputError(
            f"the ONNX file takes images of {shape}, and its preprocessing makes {preprocessing.input_size}",
            remedy="Pass the preprocessing that belongs to this file.",
        )
    nodes = [*_before(net), *graph.node, *_after(logits)]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(_scale(preprocessing), f"{_OURS}.scale"))
    graph.initializer.append(numpy_helper.from_array(_shift(preprocessing), f"{_OURS}.shift"))
    graph.value_info.extend([net, logits])
    channels, height, width = shape
    images, classes = batch.dim_param or batch.dim_value, logits.type.tensor_type.shape.dim[1].dim_value
    ends = (
        helper.make_tensor_value_info("image", TensorProto.UINT8, [images, height, width, channels]),
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [images, classes]),
    )
    graph.input[0].CopyFrom(ends[0])
    graph.output[0].CopyFrom(ends[1])
    facts = {entry.key: entry.value for entry in made.metadata_props if entry.key not in _IN_THE_GRAPH}
    helper.set_model_props(made, facts | {"sepress.preprocessing": "inside"})
    return made


def _before(net: onnx.ValueInfoProto) -> list[onnx.NodeProto]:
    """From `image` to the net's input; the cast comes first, since TensorRT takes bytes only so."""
    kind = net.type.tensor_type.elem_type
    normalised = net.name if kind == TensorProto.FLOAT else f"{_OURS}.normalised"
    nodes = [
        helper.make_node("Cast", ["image"], [f"{_OURS}.levels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", [f"{_OURS}.levels"], [f"{_OURS}.planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", [f"{_OURS}.planes", f"{_OURS}.scale"], [f"{_OURS}.scaled"]),
        helper.make_node("Add", [f"{_OURS}.scaled", f"{_OURS}.shift"], [normalised]),
    ]
    if kind != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [normalised], [net.name], to=kind))
    return nodes


def _after(logits: onnx.ValueInfoProto) -> list[onnx.NodeProto]:
    """From the net's output to `probabilities`, always in float32."""
    nodes, name = [], logits.name
    if logits.type.tensor_type.elem_type != TensorProto.FLOAT:
        name = f"{_OURS}.logits"
        nodes.append(helper.make_node("Cast", [logits.name], [name], to=TensorProto.FLOAT))
    return [*nodes, helper.make_node("Softmax", [name], ["probabilities"], axis=1)]


def _scale(preprocessing: Preprocessing) -> np.ndarray:
    return np.array([1 / (255 * value) for value in preprocessing.std], dtype=np.float32).reshape(1, -1, 1, 1)


def _shift(preprocessing: Preprocessing) -> np.ndarray:
    pairs = zip(preprocessing.mean, preprocessing.std, strict=True)
    return np.array([-mean / std for mean, std in pairs], dtype=np.float32).reshape(1, -1, 1, 1)


def why_no_classifier(model: onnx.ModelProto) -> str | None:
    """Why the file does not map one batch of images to one row of logits each; None where it does."""
    graph = model.graph
    if len(graph.input) != 1:
        return f"it has {len(graph.input)} inputs, expected one batch of images"
    if len(graph.output) != 1:
        return f"it has {len(graph.output)} outputs, expected logits alone"
    images, logits = (value.type.tensor_type.shape.dim for value in (graph.input[0], graph.output[0]))
    if len(images) != 4 or images[1].dim_value not in (1, 3):
        return "its input is no batch of grey or RGB images (N, C, H, W)"
    if len(logits) != 2:
        return f"its output has {len(logits)} axes, expected one row of logits an image"
    if logits[1].dim_value == 1:
        return "it gives one number an image, and a softmax over that is always 1"
    if any(node.op_type == "Softmax" and graph.output[0].name in node.output for node in graph.node):
        return "its output is a softmax already"
    return None


class FromBytes(nn.Module):
    """What the file should compute, in torch: images uint8 (N, H, W, C) -> {'probabilities': (N, K)}."""

    def __init__(self, net: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.net = net
        self._preprocessing = preprocessing

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        mean, std = self._preprocessing.mean, self._preprocessing.std
        normalised = normalise(image.permute(0, 3, 1, 2), mean=mean, std=std)
        kind = next((p.dtype for p in self.net.parameters()), torch.float32)  # float64 where noise is judged
        return {"probabilities": self.net(normalised.to(kind)).softmax(dim=1)}
