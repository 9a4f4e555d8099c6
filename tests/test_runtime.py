"""One package of ONNX Runtime, the provider that really runs, and the conditions of a latency."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import SmallNet, images

from sepress.device import seeded
from sepress.errors import InputError
from sepress.export import export_onnx
from sepress.runtime import (
    check_single_runtime,
    make_feeds,
    make_runner,
    measure_onnx_latency,
    measure_peak_bytes,
    open_session,
)


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
    figures = measure_onnx_latency({"base": small_file, "pruned": small_file}, images(2), rounds=8, threads=1)
    assert list(figures) == ["base", "pruned"]
    row = figures["pruned"]
    assert row["runtime"].startswith("onnxruntime ")
    assert (row["provider"], row["threads"], row["batch"]) == ("CPUExecutionProvider", 1, 2)
    assert (row["input_shape"], row["rounds"], row["ratio_to"]) == ([2, 3, 12, 12], 8, "base")
    assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    assert row["cpu"]
    json.dumps(figures, allow_nan=False)


def test_without_an_example_a_file_gets_the_inputs_that_it_declares(small_file: Path):
    row = measure_onnx_latency({"a": small_file}, batch=3, rounds=6)["a"]
    assert (row["input_shape"], row["batch"]) == ([3, 3, 12, 12], 3)


def test_a_file_that_is_none_is_one_plain_error(tmp_path: Path, small_file: Path):
    with pytest.raises(InputError, match="there is no file"):
        open_session(tmp_path / "missing.onnx")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(small_file.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"can't open .*cut\.onnx: ") as caught:
        open_session(cut)
    assert "[ONNXRuntimeError]" not in str(caught.value)


# ---- made-up inputs -------------------------------------------------------------------------------
def identities(path: Path, *inputs: tuple[str, int, list[int | str]], metadata: str | None = None) -> Path:
    """A file that passes its inputs (name, type, shape) on."""
    values = [onnx.helper.make_tensor_value_info(*value) for value in inputs]
    outputs = [onnx.helper.make_tensor_value_info(f"{name}_", kind, dims) for name, kind, dims in inputs]
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}_"]) for name, _, _ in inputs]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "identities", values, outputs),
        opset_imports=[onnx.helper.make_opsetid("", 18)],
        ir_version=9,
    )
    if metadata is not None:
        onnx.helper.set_model_props(model, {"sepress.input_size": metadata})
    onnx.save(model, path)
    return path


T = onnx.TensorProto


def feeds(path: Path, **options: object) -> dict[str, np.ndarray]:
    session = open_session(path, providers="cpu")
    found = make_feeds(session, **options)
    make_runner(session, found, label="it")()
    return found


def test_inputs_have_the_declared_types_and_a_free_first_axis_is_the_batch(tmp_path: Path):
    path = identities(
        tmp_path / "many.onnx",
        ("image", T.FLOAT16, ["n", 3, 4, 4]),
        ("pixels", T.UINT8, ["n", 4, 4, 3]),
        ("index", T.INT64, ["n"]),
        ("scale", T.FLOAT, []),
    )
    found = feeds(path, batch=2)
    assert {name: (x.shape, x.dtype.name) for name, x in found.items()} == {
        "image": ((2, 3, 4, 4), "float16"),
        "pixels": ((2, 4, 4, 3), "uint8"),
        "index": ((2,), "int64"),
        "scale": ((), "float32"),
    }
    assert found["pixels"].max() > 127
    assert not found["index"].any()
    np.testing.assert_array_equal(found["image"], feeds(path, batch=2)["image"])


def test_free_sizes_are_those_of_the_metadata_or_as_passed_channels_first_or_last(tmp_path: Path):
    first = ("x", T.FLOAT, ["n", 3, "h", "w"])
    last = ("x", T.UINT8, ["n", "h", "w", 3])
    assert feeds(identities(tmp_path / "a.onnx", first, metadata="[3, 5, 7]"))["x"].shape == (1, 3, 5, 7)
    path = identities(tmp_path / "b.onnx", last, metadata="[3, 5, 7]")
    assert feeds(path, batch=4)["x"].shape == (4, 5, 7, 3)
    assert feeds(path, input_size=(3, 9, 8))["x"].shape == (1, 9, 8, 3)
    path = identities(tmp_path / "c.onnx", ("x", T.UINT8, ["h", "w", 3]), metadata="[3, 5, 7]")
    assert feeds(path)["x"].shape == (5, 7, 3)
    with pytest.raises(InputError, match="takes batches of 1 only, not of 2"):
        feeds(path, batch=2)
    with pytest.raises(InputError, match=r"leaves the size of images free \(n x 3 x h x w\)") as caught:
        feeds(identities(tmp_path / "d.onnx", first))
    assert "--input-size" in caught.value.remedy


def test_a_fixed_batch_and_an_input_that_is_no_array_of_numbers_are_refused(tmp_path: Path):
    path = identities(tmp_path / "fixed.onnx", ("x", T.FLOAT, [2, 3, 4, 4]))
    assert feeds(path, batch=2)["x"].shape == (2, 3, 4, 4)
    with pytest.raises(InputError, match=r"net: its input 'x' takes batches of 2 only, not of 1") as caught:
        feeds(path, label="net")
    assert "--batch 2" in caught.value.remedy
    with pytest.raises(InputError, match=r"its input 'x' is a tensor\(string\)"):
        feeds(identities(tmp_path / "text.onnx", ("x", T.STRING, ["n"])))


def test_what_can_not_run_on_its_inputs_says_so(small_file: Path):
    session = open_session(small_file, providers="cpu")
    with pytest.raises(InputError, match=r"net: ONNX Runtime can't run it on \[1, 3\]: "):
        make_runner(session, {"input": np.zeros((1, 3), np.float32)}, label="net")


def test_peak_memory_is_that_of_the_file_alone(tmp_path: Path):
    small = identities(tmp_path / "small.onnx", ("x", T.FLOAT, ["n", 1]))
    peak, reason = measure_peak_bytes(small, batch=1, threads=1)
    if peak is None:
        assert reason
        return
    large, _ = measure_peak_bytes(small, batch=50_000_000, threads=1)  # 200 MB read, and as much written
    assert 350e6 < large - peak < 450e6
    assert measure_peak_bytes(tmp_path / "missing.onnx", batch=1, threads=1)[0] is None
