"""One package of ONNX Runtime, the provider that really runs, and the conditions of a latency."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import pytest
from nets import SmallNet, images

from sepress.device import seeded
from sepress.errors import InputError
from sepress.export import export_onnx
from sepress.runtime import check_single_runtime, measure_onnx_latency, open_session


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the net that the fixture `net` gives."""
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    with seeded(1):
        export_onnx(SmallNet(), path, example=images())
    return path


def test_two_packages_of_the_runtime_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.0")
    with pytest.raises(InputError, match="both installed") as caught:
        check_single_runtime()
    assert re.search(r"pip uninstall -y onnxruntime onnxruntime-gpu", caught.value.remedy)


@pytest.mark.parametrize("installed", ["onnxruntime", "onnxruntime-gpu"])
def test_one_package_of_the_runtime_is_fine(installed: str, monkeypatch: pytest.MonkeyPatch):
    def version(package: str) -> str:
        if package != installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    check_single_runtime()


def test_a_provider_that_does_not_run_is_refused_where_it_was_asked_for(small_file: Path):
    assert open_session(small_file, providers="auto").get_providers()[-1] == "CPUExecutionProvider"
    with pytest.raises(InputError, match="unknown provider 'gpu'"):
        open_session(small_file, providers="gpu")
    with pytest.raises(InputError, match="can't run on NoSuchExecutionProvider"):
        open_session(small_file, providers=["NoSuchExecutionProvider"])


def test_latency_carries_the_conditions_it_holds_under(small_file: Path):
    figures = measure_onnx_latency({"base": small_file, "pruned": small_file}, images(2), rounds=5, threads=1)
    assert list(figures) == ["base", "pruned"]
    row = figures["pruned"]
    assert row["runtime"].startswith("onnxruntime ")
    assert (row["provider"], row["threads"], row["batch"]) == ("CPUExecutionProvider", 1, 2)
    assert (row["input_shape"], row["rounds"], row["ratio_to"]) == ([2, 3, 12, 12], 5, "base")
    assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    assert row["cpu"]
    json.dumps(figures, allow_nan=False)
