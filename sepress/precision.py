"""A float ONNX file -> the same net in float16, or in int8 for ONNX Runtime.

float16 by onnxruntime.transformers.float16, int8 by onnxruntime.quantization: static, as pairs of
QuantizeLinear and DequantizeLinear (QDQ), activations unsigned and asymmetric, weights signed, one scale a
channel. Inputs and outputs stay as they are in the float file. Nothing here judges: whether a file is worth
keeping is for whoever can measure it.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from sepress import console
from sepress.errors import InputError
from sepress.export import write_model
from sepress.runtime import check_single_runtime, open_session

CalibrationMethod = Literal["minmax", "entropy", "percentile"]
METHODS: tuple[CalibrationMethod, ...] = ("minmax", "entropy", "percentile")
Ranges = Any  # onnxruntime.quantization.TensorsData: tensor name -> its range, .range_value
Images = Iterable[Any] | Tensor  # images (N, C, H, W), batches of them, or a loader of (images, targets)

FLOAT16_LARGEST, FLOAT16_NORMAL = 65504.0, 2.0**-14
HEADROOM = 2.0  # images beyond the calibration set may reach higher
PIECE_VALUES = 2**19  # of the input, run at once: every activation of a piece is held
# entropy chooses among thresholds that hold between 128 bins and all: with the library's 128 it has no choice
HISTOGRAM_BINS = {"entropy": 512, "percentile": 2048}
# one value a channel out of a larger map, where the shapes say so
_POOLINGS = {
    "GlobalAveragePool",
    "GlobalMaxPool",
    "AveragePool",
    "MaxPool",
    "ReduceMean",
    "ReduceMax",
    "ReduceSum",
}


# ---- the two conversions --------------------------------------------------------------------------
def to_fp16(path: str | Path, out: str | Path, *, calibration: Images) -> tuple[str, ...]:
    """Write the file's net in float16; returns the names of the nodes that stay in float32.

    Inputs and outputs stay float32. Operators whose weights, or activations over the calibration images
    (N, C, H, W) with HEADROOM, float16 can't hold stay float32, and so does what goes from one to the next.
    Raises SepressError where the result is not valid.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    source = load_named(path)
    ranges = measure_ranges(path, calibration, method="minmax", every_operator=True)
    unfit = _unfit(source, ranges)
    kept = tuple(node.name for node in source.graph.node if not unfit.isdisjoint((*node.input, *node.output)))
    with console.silenced():
        model = convert_float_to_float16(
            copy.deepcopy(source),
            keep_io_types=True,
            op_block_list=DEFAULT_OP_BLOCK_LIST,
            node_block_list=list(kept),
        )
        _join_float32(model.graph)
        del model.graph.value_info[:]  # those of what was joined are no longer true
    _write(model, source, Path(out), precision="fp16")
    return kept


def to_int8(
    path: str | Path,
    out: str | Path,
    *,
    calibration: Images | None = None,
    method: CalibrationMethod = "minmax",
    ranges: Ranges | None = None,
    only: Collection[str] = (),
    in_float: Collection[str] = (),
    precision: str = "int8",
) -> None:
    """Write the file's net in int8, with activations' ranges from calibration images (N, C, H, W).

    `ranges` of an earlier `measure_ranges` save measuring them again. Of the nodes named in `only`
    (all, where it is empty) those in `in_float` stay float. Weights take 7 bits where this machine's kernels
    saturate with 8. Raises InputError without images or ranges, and SepressError where the result is no valid
    ONNX.
    """
    from onnxruntime.quantization import QDQQuantizer, QuantType

    if ranges is None:
        if calibration is None:
            raise InputError(
                "int8 needs calibration images", remedy="Pass calibration=: 128 or more images like yours."
            )
        ranges = measure_ranges(path, calibration, method=method)
    source = load_named(path)
    with console.silenced():
        quantizer = QDQQuantizer(
            copy.deepcopy(source),
            per_channel=True,
            reduce_range=kernels_saturate(),
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=ranges,
            nodes_to_quantize=list(only),
            nodes_to_exclude=list(in_float),
            op_types_to_quantize=_quantised_operators(),
            extra_options={},
        )
        quantizer.quantize_model()
    _write(quantizer.model.model, source, Path(out), precision=precision)


def load_named(path: str | Path) -> onnx.ModelProto:
    """The file's model with shapes inferred and a name of its own for every node, the same each time."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}"
        taken.add(node.name)
    return model


def _write(model: onnx.ModelProto, source: onnx.ModelProto, out: Path, *, precision: str) -> None:
    """Save what is valid, with the float file's metadata."""
    from onnxruntime.transformers.onnx_model import OnnxModel

    OnnxModel.graph_topological_sort(model.graph)  # both libraries append their nodes at the end
    model.producer_name, model.producer_version = source.producer_name, source.producer_version
    properties = {entry.key: entry.value for entry in source.metadata_props}
    helper.set_model_props(model, properties | {"sepress.precision": precision})
    write_model(model, out)


# ---- float16: what does not fit --------------------------------------------------------------------
def _unfit(model: onnx.ModelProto, ranges: Ranges) -> set[str]:
    """Names of the tensors that float16 can't hold.

    It would clamp a weight that is too large, and overflow in an activation; where a whole activation lies
    under its smallest normal number, few bits of any value are left.
    """
    weights = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and np.abs(numpy_helper.to_array(tensor)).max(initial=0.0) > FLOAT16_LARGEST
    }
    reach = {
        name: HEADROOM * max(abs(float(np.asarray(bound).max())) for bound in ranges[name].range_value)
        for name in ranges.keys()  # noqa: SIM118 (no mapping)
    }
    return weights | {n for n, x in reach.items() if x > 0 and not FLOAT16_NORMAL <= x <= FLOAT16_LARGEST}


def _join_float32(graph: onnx.GraphProto) -> None:
    """Hand a tensor from one float32 operator to the next as it is.

    The conversion casts down what a float32 operator gives, and up what one reads: between two of them a
    value that float16 can't hold would be lost.
    """
    down = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Cast" and _cast_to(node) == TensorProto.FLOAT16
    }
    joined = {
        node.output[0]: down[node.input[0]]
        for node in graph.node
        if node.op_type == "Cast" and _cast_to(node) == TensorProto.FLOAT and node.input[0] in down
    }
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = joined.get(name, name)
    read = outputs | {name for node in graph.node for name in node.input}
    unread = [node for node in graph.node if node.op_type == "Cast" and node.output[0] not in read]
    for node in unread:
        graph.node.remove(node)
    read = outputs | {name for node in graph.node for name in node.input}
    for node in [n for n in graph.node if n.op_type == "Cast" and n.output[0] not in read]:
        graph.node.remove(node)


def _cast_to(node: onnx.NodeProto) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == "to")


# ---- int8: ranges ----------------------------------------------------------------------------------
def measure_ranges(
    path: str | Path, images: Images, *, method: CalibrationMethod, every_operator: bool = False
) -> Ranges:
    """The range of every activation that int8 would hold (of all, with `every_operator`), by the method.

    Images go through the file in pieces, and of a piece only ranges or histograms are kept: memory does not
    depend on their number. Raises InputError where there is no image.
    """
    check_single_runtime()
    from onnxruntime.quantization import CalibrationMethod as Known
    from onnxruntime.quantization import create_calibrator

    if method not in METHODS:
        raise InputError(
            f"unknown calibration method '{method}'", remedy=f"Choose one of {', '.join(METHODS)}."
        )
    known = {"minmax": Known.MinMax, "entropy": Known.Entropy, "percentile": Known.Percentile}
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / "named.onnx"
        onnx.save(load_named(path), named)
        with console.silenced():
            calibrator = create_calibrator(
                named,
                None if every_operator else _quantised_operators(),
                augmented_model_path=str(Path(folder) / "augmented.onnx"),
                calibrate_method=known[method],
                extra_options={"symmetric": False, "num_bins": HISTOGRAM_BINS.get(method)},
            )
        feeds = _feeds(calibrator.infer_session, _pieces(images))
        count = 0
        for feed in console.track(feeds, f"calibrating ({method})"):
            with console.silenced():
                calibrator.collect_data(_Once(feed))
            count += 1
        if not count:
            raise InputError("there are no calibration images, or fewer than the file's fixed batch")
        with console.silenced():
            return calibrator.compute_data()


class _Once:
    """A calibration reader of one piece: the calibrator holds all activations of what a reader gives."""

    def __init__(self, feed: Mapping[str, np.ndarray]) -> None:
        self._left = iter([feed])

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        return next(self._left, None)


def _quantised_operators() -> list[str]:
    """Those that onnxruntime.quantization knows how to quantise, which is its own default."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QDQRegistry, *QLinearOpsRegistry})


@functools.cache
def kernels_saturate() -> bool:
    """Whether this machine's u8 x s8 products overflow their 16 bits, as on x86 without VNNI.

    There two products are added in 16 bits: 2 x 255 x 127 does not fit, and ONNX Runtime advises weights of
    7 bits (onnxruntime.ai, "Quantize ONNX models", on U8S8 and reduce_range). Measured, since what decides is
    which kernel runs.
    """
    n = 64
    a, b = np.full((n, n), 255, np.uint8), np.full((n, n), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [n, n])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [n, n])],
        [numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        onnx.save(model, path)
        (y,) = open_session(path, providers="cpu", threads=1).run(None, {"a": a})
    return bool((y != 255 * 127 * n).any())


# ---- int8: the gates in the graph ------------------------------------------------------------------
def find_gate_nodes(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """The nodes of each gate, between its pooling and the product: {the product's name: nodes}.

    The pooling is not among them: left in float it takes time and hardly changes what comes out. As in
    coupling/gating.py no name decides: marked is what descends only from a global pooling, and where a marked
    signal multiplies a map that is not, that is a gate. Expects `load_named`'s shapes and names.
    """
    graph = model.graph
    constant = {tensor.name for tensor in graph.initializer} | {""}
    maker: dict[str, onnx.NodeProto | None] = {}  # of every marked tensor, None for a pooling
    gates: dict[str, tuple[str, ...]] = {}
    shapes = _shapes(graph)
    for node in graph.node:  # in topological order
        signals = [name for name in node.input if name not in constant]
        if not signals or node.op_type == "Shape":
            constant.update(node.output)
            continue
        marked = [name for name in signals if name in maker]
        if len(marked) == len(signals):
            maker |= dict.fromkeys(node.output, node)
        elif _pools_globally(node, shapes):
            maker |= dict.fromkeys(node.output)
        elif node.op_type == "Mul" and len(marked) == 1:
            gates[node.name] = _behind(marked[0], maker)
    return gates


def _behind(tensor: str, maker: Mapping[str, onnx.NodeProto | None]) -> tuple[str, ...]:
    """Names of the marked nodes that a marked tensor descends from, in the order of the graph."""
    found: dict[str, onnx.NodeProto] = {}
    todo = [tensor]
    while todo:
        node = maker.get(todo.pop())
        if node is not None and node.name not in found:
            found[node.name] = node
            todo.extend(node.input)
    order = list(dict.fromkeys(node.name for node in maker.values() if node is not None))
    return tuple(sorted(found, key=order.index))


def _shapes(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Known shapes; a size that is not fixed is 0."""
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
    }


def _pools_globally(node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> bool:
    before, after = shapes.get(node.input[0], []), shapes.get(node.output[0], [])
    one_each = len(after) >= 2 and all(size == 1 for size in after[2:]) and after[1] != 1
    return node.op_type in _POOLINGS and one_each and any(size != 1 for size in before[2:])


# ---- running a file --------------------------------------------------------------------------------
def fixed_batch(path: str | Path) -> int | None:
    """The batch size that the file takes, None where it takes any."""
    return _batch_of(open_session(path, providers="cpu").get_inputs()[0])


def _batch_of(node: Any) -> int | None:
    return node.shape[0] if isinstance(node.shape[0], int) else None


def answering(session: Any) -> Callable[[Tensor], list[Tensor]]:
    """A function from images (N, C, H, W) to the file's outputs for them, whatever batch the file fixes."""
    (node,) = session.get_inputs()
    fixed = _batch_of(node)

    def answer(images: Tensor) -> list[Tensor]:
        count = len(images)
        step = fixed or max(1, count)
        if fixed and count % fixed:  # filled up, and cut off again
            images = torch.cat([images, images[-1:].expand(fixed - count % fixed, *images.shape[1:])])
        batches = images.cpu().numpy()
        parts = [
            session.run(None, {node.name: batches[start : start + step]})
            for start in range(0, len(batches), step)
        ]
        return [torch.from_numpy(np.concatenate(output)[:count]) for output in zip(*parts, strict=True)]

    return answer


def _pieces(images: Images) -> Iterator[Tensor]:
    """Batches of any size, or a loader's (images, targets, ...), as pieces of at most PIECE_VALUES."""
    for batch in [images] if isinstance(images, Tensor) else images:
        tensor = batch if isinstance(batch, Tensor) else batch[0]
        if len(tensor):
            yield from tensor.split(max(1, PIECE_VALUES // tensor[0].numel()))


def _feeds(session: Any, pieces: Iterable[Tensor]) -> Iterator[dict[str, np.ndarray]]:
    """What a session takes; where its batch is fixed, as many images as fill one."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise InputError(
            f"the file has {len(inputs)} inputs, and calibration images are one",
            remedy="Only nets with one input can be made fp16 or int8.",
        )
    fixed = _batch_of(inputs[0])
    left: Tensor | None = None
    for piece in pieces:
        if fixed is None:
            yield {inputs[0].name: piece.numpy()}
            continue
        left = piece if left is None else torch.cat([left, piece])
        while len(left) >= fixed:
            yield {inputs[0].name: left[:fixed].numpy()}
            left = left[fixed:]
