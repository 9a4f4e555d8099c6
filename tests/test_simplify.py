"""A simplified graph computes the same with less, whichever exporter wrote it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from nets import images, lively
from onnx import helper, numpy_helper
from torch import Tensor, nn

from sepress.export import export_onnx
from sepress.parity import check_onnx_parity
from sepress.simplify import simplify

EXPORTERS = ("dynamo", "torchscript")


class HandWritten(nn.Module):
    """An SE block as people write it, with views and a spread-out gate, before and behind norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Linear(8, 4)
        self.norm_1d = nn.BatchNorm1d(4)
        self.expand = nn.Linear(4, 8)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        n, c, _, _ = x.shape
        s = F.adaptive_avg_pool2d(x, 1).view(n, c)
        s = self.expand(self.norm_1d(self.squeeze(s)).relu()).sigmoid().view(n, c, 1, 1)
        return self.fc(self.dropout((x * s.expand_as(x)).mean((2, 3))))


class Normed(nn.Module):
    """One layer, its norm, and what makes logits of that."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.fc = layer, norm, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.layer(x)).flatten(2).mean(2))


class ReadTwice(Normed):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.fc((self.norm(y) + y).flatten(2).mean(2))


class Tied(Normed):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.other = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.layer(x)).relu() + self.other(self.layer(x.flip(3)))
        return self.fc(y.flatten(2).mean(2))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def export(net: nn.Module, path: Path, example: Tensor, exporter: str) -> Counter[str]:
    """Export, hold the file to torch, and count its operators."""
    export_onnx(net, path, example=example, exporter=exporter)
    assert check_onnx_parity(net, path, torch.cat([example, example.flip(0) + 0.1, 2 * example])).passed
    return operators(path)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_block_written_by_hand_is_left_with_nothing_but_its_arithmetic(exporter: str, tmp_path: Path):
    found = export(lively(HandWritten()), tmp_path / "net.onnx", images(4, 3, 8, 8), exporter)
    arithmetic = {"Conv": 1, "Relu": 2, "GlobalAveragePool": 2, "Gemm": 3, "Sigmoid": 1, "Mul": 1}
    shapes = {"Reshape": 2, "Flatten": 1}
    assert found == arithmetic | shapes


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    ("layer", "norm", "axes"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), 2),
        (nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False), 2),
        (nn.ConvTranspose2d(4, 8, 2, stride=2), nn.BatchNorm2d(8), 2),
        (nn.ConvTranspose2d(4, 8, 2, groups=2, bias=False), nn.BatchNorm2d(8), 2),
        (nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), 1),
        (nn.Conv3d(4, 8, 2), nn.BatchNorm3d(8), 3),
    ],
    ids=["grouped", "no-bias-no-affine", "transposed", "transposed-grouped", "1d", "3d"],
)
def test_the_norm_behind_a_convolution_goes_into_it(
    layer: nn.Module, norm: nn.Module, axes: int, exporter: str, tmp_path: Path
):
    net = lively(Normed(layer, norm))
    found = export(net, tmp_path / "net.onnx", images(3, 4, *[5] * axes), exporter)
    assert found["BatchNormalization"] == 0


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    ("net", "left"),
    [(Dense(), 0), (Tied(), 0), (ReadTwice(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 1)],
    ids=["linear", "one-convolution-two-norms", "read-before-the-norm-too"],
)
def test_norms_go_where_nothing_else_reads_what_they_read(
    net: nn.Module, left: int, exporter: str, tmp_path: Path
):
    found = export(lively(net), tmp_path / "net.onnx", images(3, 3, 4, 4), exporter)
    assert found["BatchNormalization"] == left


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "seresnet18", "efficientnet_b0", "regnety_002"])
def test_both_exporters_end_at_the_same_operators(name: str, tmp_path: Path):
    net = lively(timm.create_model(name, num_classes=7))
    found = []
    for exporter in EXPORTERS:
        export_onnx(net, tmp_path / "net.onnx", example=images(1, 3, 64, 64), exporter=exporter)
        found.append(operators(tmp_path / "net.onnx"))
    assert found[0] == found[1]
    left = {"BatchNormalization", "Identity", "Dropout", "Constant", "Expand", "Cast", "Shape", "ReduceMean"}
    assert not left & set(found[0])


# ---- graphs made by hand --------------------------------------------------------------------------
def model(
    nodes: list[onnx.NodeProto], shape: list[Any], result: list[Any], **constants: np.ndarray
) -> onnx.ModelProto:
    values = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes)
        for name, axes in (("x", shape), ("y", result))
    ]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], values)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def test_only_a_mean_over_all_positions_is_a_pooling():
    for axes, expected in (
        ([2, 3], ["GlobalAveragePool"]),
        ([-1, -2], ["GlobalAveragePool"]),
        ([3], ["ReduceMean"]),
        ([1, 2, 3], ["ReduceMean"]),
    ):
        shape = [1 if axis in {a % 4 for a in axes} else size for axis, size in enumerate(["n", 3, 4, 4])]
        mean = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=1)
        given = model([mean], ["n", 3, 4, 4], shape, axes=np.array(axes))
        assert [node.op_type for node in simplify(given).graph.node] == expected


def test_an_expand_that_enlarges_the_product_stays():
    nodes = [
        helper.make_node("Expand", ["x", "target"], ["spread"]),
        helper.make_node("Mul", ["x", "spread"], ["y"]),
    ]
    given = model(nodes, [1, 3, 1, 1], [1, 3, 4, 4], target=np.array([1, 3, 4, 4]))
    made = simplify(given)
    assert [node.op_type for node in made.graph.node] == ["Expand", "Mul"]
    assert list(made.graph.node[1].input) == ["x", "spread"]


def test_what_a_subgraph_reads_is_kept():
    inner = helper.make_graph(
        [helper.make_node("Mul", ["pooled", "pooled"], ["inside"])],
        "then",
        [],
        [helper.make_tensor_value_info("inside", onnx.TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["pooled"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=inner, else_branch=inner),
    ]
    made = simplify(model(nodes, ["n", 3], ["n", 3], zero=np.float32(0)))
    assert "Relu" in [node.op_type for node in made.graph.node]
    onnx.checker.check_model(made, full_check=True)
