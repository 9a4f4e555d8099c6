"""The README's speed and memory, each by one command: `python tests/benchmarks.py taps|memory|startup|nets`.

Ratios of interleaved runs, never seconds alone; nothing here is a test.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEVEN = (
    "timm:seresnet50",
    "timm:mobilenetv3_large_100",
    "timm:efficientnet_b0",
    "timm:regnety_016",
    "timm:seresnext50_32x4d",
    "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0",
)
NETS = ("timm:mobilenetv3_large_100", "timm:seresnet50")


def taps() -> None:
    """Tapping every gate against a plain forward: 8 images at 128 px, one thread."""
    import torch

    from sepress.coupling import trace
    from sepress.gates import Taps
    from sepress.measure import measure_latency
    from sepress.models import build

    torch.set_num_threads(1)
    for reference in NETS:
        torch.manual_seed(0)
        net, images = build(reference).eval(), torch.randn(8, 3, 128, 128)
        coupling = trace(net, images[:1])

        def plain(net: torch.nn.Module = net, images: torch.Tensor = images) -> None:
            net(images)

        taps = Taps(net, coupling, on_gate=lambda gate, s: None)

        def tapped(net: torch.nn.Module = net, images: torch.Tensor = images, taps: Taps = taps) -> None:
            with taps:
                net(images)

        with torch.no_grad():
            figures = measure_latency({"plain": plain, "tapped": tapped}, rounds=40)
        f = figures["tapped"]
        print(
            f"{reference}: {len(coupling.gates)} gates, tapped / plain {f.ratio:.3f} "
            f"(p10 {f.ratio_p10:.3f}, p90 {f.ratio_p90:.3f}), plain {figures['plain'].median_ms:.0f} ms"
        )


def memory() -> None:
    """Peak resident memory of calibration by the number of images, a process each."""
    for images in (64, 256, 1024):
        child = [sys.executable, __file__, "calibrate", str(images)]
        printed = subprocess.run(child, check=True, capture_output=True, text=True).stdout.strip()
        print(f"{images} images: {printed}")


def calibrate_some(images: int) -> None:
    import torch

    from sepress.calibrate import calibrate
    from sepress.coupling import trace
    from sepress.models import build

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = build("timm:mobilenetv3_small_100").eval()
    coupling = trace(net, torch.randn(1, 3, 96, 96))
    batches = (torch.randn(16, 3, 96, 96) for _ in range(images // 16))
    calibrate(net, coupling, batches, evidence=frozenset({"excitation", "contribution"}), device="cpu")
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def startup() -> None:
    """`sepress --help` against importing typer and rich."""
    from sepress.measure import measure_latency

    commands = {
        "typer and rich": [sys.executable, "-c", "import typer, rich, rich.console"],
        "sepress --help": [sys.executable, "-m", "sepress", "--help"],
    }
    figures = measure_latency(
        {
            name: lambda c=command: subprocess.run(c, check=True, capture_output=True)
            for name, command in commands.items()
        },
        rounds=20,
    )
    for name, f in figures.items():
        print(f"{name}: {f.median_ms:.0f} ms, ratio {f.ratio:.2f}")


def nets() -> None:
    """Seven named nets at ratio 0.3, random weights, 224 px: what is kept, errors, relative latency."""
    import tempfile
    from pathlib import Path

    import torch

    import sepress
    from sepress.export import check_onnx_parity, measure_onnx_latency
    from sepress.models import build_net, build_spec

    torch.set_num_threads(2)
    print("| net | gates | MACs kept | params kept | masked = removed | ONNX parity | latency, 1 thread |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for reference in SEVEN:
        torch.manual_seed(0)
        net = build_net(build_spec(reference, trained=False))
        images = torch.randn(8, 3, 224, 224)
        settle(net, images)
        result = sepress.prune(net, calibration=images, ratio=0.3)
        base, pruned = result.report.measurements
        with tempfile.TemporaryDirectory() as folder:
            paths = {"base": Path(folder) / "base.onnx", "pruned": Path(folder) / "pruned.onnx"}
            sepress.export_onnx(net, paths["base"], example=images[:1])
            sepress.export_onnx(result.net.eval(), paths["pruned"], example=images[:1])
            parity = check_onnx_parity(result.net, paths["pruned"], images[:4])
            latency = measure_onnx_latency(paths, images[:1])["pruned"]
        print(
            f"| {reference} | {len(sepress.find_gates(net, images[:1]))} | {pruned.macs / base.macs:.2f} "
            f"| {pruned.params / base.params:.2f} "
            f"| {result.report.checks['masked_equals_removed'].relative_error:.0e} "
            f"| {parity.relative_error:.0e} "
            f"| {latency['ratio']:.2f} ({latency['ratio_p10']:.2f} to {latency['ratio_p90']:.2f}) |",
            flush=True,
        )


def settle(net: torch.nn.Module, images: torch.Tensor) -> None:
    """Give the batch norms of an untrained net the statistics of some images: outputs then vary."""
    import torch

    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        net.train()(images)
    net.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("taps", "memory", "startup", "nets", "calibrate"))
    parser.add_argument("images", nargs="?", type=int, default=64)
    chosen = parser.parse_args()
    if chosen.what == "calibrate":
        calibrate_some(chosen.images)
    else:
        {"taps": taps, "memory": memory, "startup": startup, "nets": nets}[chosen.what]()
