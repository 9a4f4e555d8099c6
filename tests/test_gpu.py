"""What needs an accelerator: the same job on it (`pytest -m gpu`; elsewhere these are skipped)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sepress
from sepress import stages
from sepress.models import build
from sepress.recipe import Recipe

DEVICES = [
    name
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
    if there
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DEVICES, reason="neither CUDA nor an Apple GPU is here"),
]


def test_a_net_on_the_accelerator_is_pruned_there_as_on_the_cpu_and_stays_there() -> None:
    torch.manual_seed(0)
    net, images = build("sepress:se_resnet8", in_chans=1), torch.randn(32, 1, 28, 28)
    there = build("sepress:se_resnet8", in_chans=1)
    there.load_state_dict(net.state_dict())
    there.to(DEVICES[0])
    on_cpu = sepress.prune(net, calibration=images, ratio=0.3, device="cpu")
    on_device = sepress.prune(there, calibration=images.to(DEVICES[0]), ratio=0.3, device=DEVICES[0])
    assert on_device.plan.removed == on_cpu.plan.removed
    assert on_device.report.checks["masked_equals_removed"].passed is True
    assert {p.device.type for p in on_device.net.parameters()} == {DEVICES[0]}


def test_the_whole_job_runs_on_the_accelerator(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "gpu",
            "device": DEVICES[0],
            "data": {"path": "digits", "batch_size": 64},
            "model": {"source": "sepress:se_resnet8"},
            "stages": [
                {"train": {"epochs": 2}},
                {"prune": {"target_macs": 0.5}},
                {"finetune": {"epochs": 1}},
                "export",
            ],
        }
    )
    report = stages.run_recipe(recipe, out=tmp_path / "run").report
    assert report.environment["device"].startswith(DEVICES[0])
    assert all(check.passed for check in report.checks.values())


@pytest.mark.skipif("cuda" not in DEVICES, reason="CUDA is not here")
@pytest.mark.parametrize("runtime", ["onnxruntime", "torch", "torch-compile"])
def test_models_are_timed_on_the_gpu_and_the_rows_say_so(runtime: str) -> None:
    models = ("sepress:se_resnet8", "sepress:se_mobile")
    found = sepress.bench_models(*models, runtimes=(runtime,), provider="cuda", device="cuda", batches=(1, 8))
    assert [(row["label"], row["batch"]) for row in found.rows] == [(m, b) for b in (1, 8) for m in models]
    for row in found.rows:
        assert row["provider"].lower().startswith("cuda")
        assert row["gpu"]
        if runtime == "onnxruntime":
            assert row["reasons"]["peak_bytes"]
        else:
            assert row["peak_bytes"] > 4 * 3 * 32 * 32 * row["batch"]  # the images alone
