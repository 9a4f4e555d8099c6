"""The networks that people deploy, from their registries, through the whole chain, seven by name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import sepress
from sepress.export import export_onnx
from sepress.models import build_net, build_spec
from sepress.parity import check_onnx_parity

GATES = {  # architecture -> SE gates, counted by hand in its paper's or library's block table
    "timm:mobilenetv3_large_100": 8,
    "timm:efficientnet_b0": 16,
    "timm:seresnet50": 16,
    "timm:regnety_016": 27,
    "timm:seresnext50_32x4d": 16,
    "torchvision:mobilenet_v3_large": 8,
    "torchvision:efficientnet_b0": 16,
}
ALWAYS = "timm:mobilenetv3_large_100"  # the quickest that has hard-sigmoid gates and depthwise convolutions


@pytest.mark.parametrize(
    "reference", [r if r == ALWAYS else pytest.param(r, marks=pytest.mark.zoo) for r in GATES]
)
def test_a_named_net_is_pruned_exactly_trains_saves_and_exports(reference: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = build_spec(reference, trained=False, overrides={"input_size": 96})
    net = build_net(spec)
    _spread_statistics(net)
    images = torch.randn(12, 3, 96, 96)
    assert len(sepress.find_gates(net, images[:1])) == GATES[reference]

    result = sepress.prune(net, calibration=images, ratio=0.3)
    check = result.report.checks["masked_equals_removed"]
    assert check.passed is True, check
    base, pruned = result.report.measurements
    assert pruned.macs < 0.6 * base.macs
    assert result.net(images[:3]).shape == (3, 1000)

    path = tmp_path / "pruned.safetensors"
    sepress.save(result.net, path, arch=reference)
    loaded = sepress.load(path).net
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images[:2]), result.net.eval()(images[:2]))

    trained = copy.deepcopy(loaded).train()
    nn.functional.cross_entropy(trained(images[:4]), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained.parameters())

    onnx = tmp_path / "pruned.onnx"
    export_onnx(loaded, onnx, example=images[:1])
    parity = check_onnx_parity(loaded, onnx, images[:8])
    assert parity.passed is True, parity
    assert parity.relative_error <= 1e-4


def _spread_statistics(net: nn.Module) -> None:
    """Give batch norms the statistics of some images, as training would: else outputs hardly vary."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    net.train()
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None
        net(torch.randn(8, 3, 96, 96))
    net.eval()
