"""An exported ONNX graph -> one that computes the same with less: for the file itself, whatever runs it.

The general part (constants, identities, unused nodes, most norms) is onnxscript's optimizer, which torch's
own exporter ends with. What it leaves of nets written by hand is done here, each rule on one kind of node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Shapes = Mapping[str, "list[int | str]"]  # tensor -> its axes, by size or by name; unknown ones are missing

_BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div"})


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model simplified; names of inputs and outputs, the opset and the metadata stay.

    Constants are folded; batch norms go into the convolution or linear layer before them where nothing else
    reads it; a spread-out gate (Expand) is left to the product's own broadcasting; Reshapes that carry one
    free axis along get a constant shape; a mean over all positions is the pooling that it is (ONNX Runtime
    keeps its blocked layout through a GlobalAveragePool, and not through a ReduceMean).
    """
    import onnxscript.optimizer

    model = onnxscript.optimizer.optimize(model)
    shapes = _infer_shapes(model)
    _leave_out_expands(model.graph, shapes)
    _fix_reshapes(model.graph, shapes)
    _fold_norms(model.graph)
    _name_pooling(model.graph, shapes)
    _remove_unused(model.graph)
    return model


# ---- rules ----------------------------------------------------------------------------------------
def _leave_out_expands(graph: onnx.GraphProto, shapes: Shapes) -> None:
    """An Expand to the shape of what it is multiplied with (`x * s.expand_as(x)`) is a map too many."""
    expands = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Expand"}
    for node in graph.node:
        if node.op_type not in _BROADCASTING:
            continue
        for here, other in ((0, 1), (1, 0)):
            spread, map_ = node.input[here], node.input[other]
            if spread in expands and spread in shapes and shapes[spread] == shapes.get(map_):
                node.input[here] = expands[spread]


def _fix_reshapes(graph: onnx.GraphProto, shapes: Shapes) -> None:
    """A shape that is computed while running, but for one axis known beforehand: write it down."""
    constants = {entry.name for entry in graph.initializer}
    for node in graph.node:
        axes = shapes.get(node.output[0], [])
        free = sum(isinstance(axis, str) for axis in axes)
        if node.op_type != "Reshape" or node.input[1] in constants or not axes or free > 1 or 0 in axes:
            continue
        target = np.array([-1 if isinstance(axis, str) else axis for axis in axes], dtype=np.int64)
        node.input[1] = _add_constant(graph, f"{node.output[0]}.shape", target)


def _fold_norms(graph: onnx.GraphProto) -> None:
    """Norm(Layer(x)) -> Layer'(x), in float64 and rounded once."""
    constants = _constants(graph)
    readers = Counter(_read_names(graph))
    makers = {node.output[0]: node for node in graph.node}
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        layer = makers.get(norm.input[0])
        figures = [constants.get(name) for name in norm.input[1:]]
        if layer is None or readers[layer.output[0]] > 1 or any(value is None for value in figures):
            continue
        scale, shift, mean, var = (np.asarray(value, dtype=np.float64) for value in figures)
        weight = constants.get(layer.input[1]) if len(layer.input) > 1 else None
        bias = constants.get(layer.input[2]) if len(layer.input) > 2 else np.zeros(())
        if weight is None or bias is None:
            continue
        scale = scale / np.sqrt(var + _attribute(norm, "epsilon", 1e-5))
        factors = _output_scales(layer, weight.shape, scale)
        if factors is None:
            continue
        name, kind = norm.output[0], weight.dtype
        weight_name = _add_constant(graph, f"{name}.weight", (weight * factors).astype(kind))
        bias_name = _add_constant(graph, f"{name}.bias", ((bias - mean) * scale + shift).astype(kind))
        layer.input[1:] = [weight_name, bias_name]
        layer.output[0] = name
        graph.node.remove(norm)


def _output_scales(layer: onnx.NodeProto, shape: tuple[int, ...], scale: np.ndarray) -> np.ndarray | None:
    """What scales the layer's outputs when its weight is multiplied with it; None for no such layer."""
    ones = [1] * (len(shape) - 2)
    if layer.op_type == "Conv":  # (out, in / groups, ...)
        return scale.reshape(-1, *ones, 1)
    if layer.op_type == "ConvTranspose":  # (in, out / groups, ...), the groups' inputs one after the other
        groups = _attribute(layer, "group", 1)
        return scale.reshape(groups, -1, *ones).repeat(shape[0] // groups, axis=0)
    if layer.op_type == "Gemm" and _attribute(layer, "alpha", 1.0) == _attribute(layer, "beta", 1.0) == 1.0:
        return scale[:, None] if _attribute(layer, "transB", 0) else scale
    return None


def _name_pooling(graph: onnx.GraphProto, shapes: Shapes) -> None:
    """ReduceMean over all positions of (N, C, ...) -> GlobalAveragePool, and Flatten where the axes go."""
    constants = _constants(graph)
    for node in [node for node in graph.node if node.op_type == "ReduceMean" and len(node.input) == 2]:
        rank, axes = len(shapes.get(node.input[0], [])), constants.get(node.input[1])
        if rank < 3 or axes is None or {int(axis) % rank for axis in axes} != set(range(2, rank)):
            continue
        kept, result = _attribute(node, "keepdims", 1), node.output[0]
        pool = helper.make_node("GlobalAveragePool", [node.input[0]], [result], name=node.name)
        made = [pool]
        if not kept:
            pool.output[0] = f"{result}.pooled"
            made.append(helper.make_node("Flatten", [pool.output[0]], [result], axis=1))
        at = list(graph.node).index(node)
        graph.node.remove(node)
        for offset, new in enumerate(made):
            graph.node.insert(at + offset, new)


def _remove_unused(graph: onnx.GraphProto) -> None:
    """Nodes, constants and noted shapes that nothing reads any more."""
    while True:
        read = set(_read_names(graph))
        idle = [node for node in graph.node if not read & set(node.output)]
        if not idle:
            break
        for node in idle:
            graph.node.remove(node)
    for entry in [entry for entry in graph.initializer if entry.name not in read]:
        graph.initializer.remove(entry)
    for info in [info for info in graph.value_info if info.name not in read]:
        graph.value_info.remove(info)


# ---- reading and writing a graph ------------------------------------------------------------------
def _infer_shapes(model: onnx.ModelProto) -> Shapes:
    """What is known of every tensor's shape, computed shapes followed too."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, list[int | str]] = {}
    for info in (*graph.input, *graph.output, *graph.value_info):
        axes = info.type.tensor_type.shape.dim
        known = [axis.dim_param or (axis.dim_value if axis.HasField("dim_value") else None) for axis in axes]
        if info.type.tensor_type.HasField("shape") and None not in known:
            shapes[info.name] = [axis for axis in known if axis is not None]
    return shapes


def _read_names(graph: onnx.GraphProto) -> Iterator[str]:
    """What nodes, their subgraphs, and the graph's outputs read, each reading once."""
    yield from (info.name for info in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _read_names(inner)


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    return {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}


def _add_constant(graph: onnx.GraphProto, name: str, value: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _attribute(node: onnx.NodeProto, name: str, otherwise: float) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), otherwise)
