"""A net -> MACs and parameters; this machine -> facts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sepress.modes import evaluating
from sepress.types import JSON

Inputs = Tensor | tuple[Tensor, ...]


# ---- size and work of a net -----------------------------------------------------------------------
def count_macs(net: nn.Module, inputs: Inputs) -> int:
    """Count the multiply-accumulates of one image: convolutions and matrix products, as torch counts them.

    `inputs` are one or more tensors (N, ...) on the net's device, of which the first image is used.
    """
    images = inputs if isinstance(inputs, tuple) else (inputs,)
    with evaluating(net), FlopCounterMode(display=False) as counter:
        net(*(x[:1] for x in images))
    return int(counter.get_total_flops()) // 2  # torch counts a multiply-accumulate as two


def count_params(net: nn.Module) -> int:
    """Count the parameters; one that is used twice counts once."""
    return sum(p.numel() for p in net.parameters())


def file_bytes(path: Path) -> int:
    """Return the size of a file in bytes."""
    return path.stat().st_size


# ---- the machine ----------------------------------------------------------------------------------
PACKAGES = (
    "sepress",
    "torch",
    "torchvision",
    "timm",
    "torch-pruning",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
)


def environment() -> dict[str, JSON]:
    """Return what a figure depends on: versions, hardware, threads, the working directory's commit.

    No path, user or host name is in it, so that a report can be passed on.
    """
    return {
        **_installed_versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "git_commit": _git_commit(),
    }


@cache
def _installed_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def cpu_model() -> str:
    """Return the processor's name as its maker gives it, or the architecture where it can't be asked."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    if platform.system() == "Darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Return the commit checked out here, with '-dirty' where tracked files differ; None elsewhere."""
    return _output_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
