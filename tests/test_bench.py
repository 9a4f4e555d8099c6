"""What `sepress bench` times, what it says about it, and what it refuses; no time itself is asserted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import sepress
from sepress import cli
from sepress.bench import SCHEMA, Bench, bench_models
from sepress.errors import InputError
from sepress.export import export_onnx
from sepress.models import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.pt, net.onnx, and weights.pth without their architecture: all of one se_resnet8."""
    path = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    net = build("sepress:se_resnet8", in_chans=1, num_classes=3)
    sepress.save(net, path / "net.pt", arch="sepress:se_resnet8", kwargs={"in_chans": 1})
    export_onnx(net, path / "net.onnx", example=torch.zeros(1, 1, 28, 28))
    torch.save(build("sepress:se_mobile", num_classes=3).state_dict(), path / "weights.pth")
    return path


# ---- what is timed --------------------------------------------------------------------------------
def test_files_weights_and_names_are_timed_beside_each_other_in_every_cell(folder: Path):
    found = bench_models(
        folder / "net.onnx",
        folder / "net.pt",
        folder / "weights.pth",
        "sepress:se_mobile",
        arch="sepress:se_mobile",
        batches=(1, 4),
        rounds=6,
        provider="cpu",
    )
    labels = ["net.onnx", "net.pt", "weights.pth", "sepress:se_mobile"]
    cells = [(1, 1), (1, 4)]  # threads, batch
    assert [(r["threads"], r["batch"], r["label"]) for r in found.rows] == [
        (*cell, label) for cell in cells for label in labels
    ]
    for row in found.rows:
        assert row["ratio_to"] == "net.onnx"
        assert (row["verdict"] is None) == (row["label"] == "net.onnx")
        assert row["provider"] == "CPUExecutionProvider"
        image = [1, 28, 28] if row["label"].startswith("net") else [3, 32, 32]
        assert row["input_shape"] == [row["batch"], *image]
        assert row["rounds"] == 6
        assert row["images_per_s"] * row["median_ms"] == pytest.approx(1000 * row["batch"])
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert (row["peak_bytes"] is None) == ("peak_bytes" in row["reasons"])
    assert found.notes == (
        "UNTRAINED (built with random weights, which is enough for latency): sepress:se_mobile.",
    )
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["schema"] == SCHEMA == "sepress.bench/1"
    assert len(value["rows"]) == 8


def test_on_torch_models_run_as_modules_and_a_file_of_onnx_is_left_to_its_runtime(folder: Path):
    before = torch.get_num_threads()
    found = bench_models(
        folder / "net.onnx",
        folder / "net.pt",
        "sepress:se_mobile",
        runtimes=("torch", "onnxruntime"),
        threads=(2,),
        rounds=6,
        device="cpu",
    )
    assert torch.get_num_threads() == before
    rows = [(r["runtime"].split()[0], r["label"], r["ratio_to"]) for r in found.rows]
    assert rows == [
        ("torch", "net.pt", "net.pt"),
        ("torch", "sepress:se_mobile", "net.pt"),
        ("onnxruntime", "net.onnx", "net.onnx"),
        ("onnxruntime", "net.pt", "net.onnx"),
        ("onnxruntime", "sepress:se_mobile", "net.onnx"),
    ]
    assert (found.rows[0]["provider"], found.rows[0]["threads"]) == ("cpu", 2)
    assert found.rows[0]["peak_bytes"] is None
    assert "On ONNX Runtime only: net.onnx." in found.notes


def test_compiling_gives_rows_of_its_own(monkeypatch: pytest.MonkeyPatch):
    compiled: list[torch.nn.Module] = []

    def compile_(net: torch.nn.Module, **options: Any) -> torch.nn.Module:
        compiled.append(net)
        return net

    monkeypatch.setattr(torch, "compile", compile_)  # the real one takes a minute
    found = bench_models("sepress:se_resnet8", runtimes=("torch-compile",), rounds=6, device="cpu")
    assert found.rows[0]["runtime"].startswith("torch.compile ")
    assert len(compiled) == 1


def test_what_torch_can_not_run_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def compile_(net: torch.nn.Module, **options: Any) -> Any:
        def broken(x: torch.Tensor) -> None:
            raise RuntimeError("\nno C++ compiler found\nat length")

        return broken

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(InputError, match=r"net.pt: torch can't run it on \[1, 1, 28, 28\]: RuntimeError: no"):
        bench_models(folder / "net.pt", runtimes=("torch-compile",), device="cpu")


def test_files_are_called_by_what_tells_them_apart(folder: Path, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "net.onnx", tmp_path / name / "net.onnx")
    shutil.copy(folder / "net.onnx", tmp_path / "other.onnx")
    paths = [tmp_path / name for name in ("a/net.onnx", "b/net.onnx", "other.onnx", "a/net.onnx")]
    found = bench_models(*paths, rounds=6)
    assert [row["label"] for row in found.rows] == ["a/net.onnx", "b/net.onnx", "other.onnx", "a/net.onnx #2"]


def test_a_file_with_bytes_as_input_is_timed_beside_one_with_floats(folder: Path, tmp_path: Path):
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", ["image"], ["y"], to=onnx.TensorProto.FLOAT)],
        "bytes",
        [info("image", onnx.TensorProto.UINT8, ["n", "h", "w", 3])],
        [info("y", onnx.TensorProto.FLOAT, ["n", "h", "w", 3])],
    )
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "bytes.onnx")
    found = bench_models(
        folder / "net.onnx", tmp_path / "bytes.onnx", input_size=(3, 8, 6), batches=(2,), rounds=6
    )
    assert [row["input_shape"] for row in found.rows] == [[2, 1, 28, 28], [2, 8, 6, 3]]


# ---- what is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "there is no model to time"),
        (["missing.onnx"], {}, "there is no file missing.onnx"),
        (["missing.pt"], {}, "missing.pt"),
        (["sepress:nope"], {}, "sepress has no architecture 'nope'"),
        (["se_resnet8"], {}, "'se_resnet8' alone does not say"),
        (["cut.onnx"], {}, "can't open cut.onnx"),
        (
            ["fixed.onnx"],
            {"batches": (2, 1)},
            "fixed.onnx: its input 'input' takes batches of 2 only, not of 1",
        ),
        (["net.onnx"], {"runtimes": ("torch",)}, "files of ONNX run on ONNX Runtime only"),
        (["net.onnx", "net.pt"], {"runtimes": ("torch",)}, "files of ONNX run on ONNX Runtime only"),
        (["net.onnx"], {"runtimes": ("onnx",)}, "unknown runtime 'onnx'"),
        (["net.onnx"], {"provider": "gpu"}, "unknown provider 'gpu'"),
        (["net.onnx"], {"provider": "coreml"}, "can't run on CoreMLExecutionProvider here"),
        (["net.pt"], {"runtimes": ("torch",), "device": "tpu"}, "unknown device 'tpu'"),
        (["net.onnx"], {"batches": ()}, "--batch: expected at least 1"),
        (["net.onnx"], {"batches": (0,)}, "--batch: expected at least 1"),
        (["net.onnx"], {"threads": (0,)}, "--threads: expected at least 1"),
        (["net.onnx"], {"rounds": 5}, "--rounds: expected at least 6"),
        (["net.onnx"], {"warmup": -1}, "--warmup: expected at least 0"),
        (["net.onnx"], {"input_size": (3, 8)}, "--input-size: expected three numbers"),
        (["sepress:se_mobile"], {"arch": "timm:resnet18"}, "--arch goes with a file"),
        (["weights.pth"], {}, "does not say which architecture"),
    ],
)
def test_what_can_not_be_timed_is_one_plain_error(
    models: list[str],
    options: dict[str, Any],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    for name in ("net.onnx", "net.pt", "weights.pth"):
        (tmp_path / name).symlink_to(folder / name)
    model = onnx.load(folder / "net.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "fixed.onnx")
    (tmp_path / "cut.onnx").write_bytes((folder / "net.onnx").read_bytes()[:3000])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        bench_models(*models, **options)


# ---- what it says ---------------------------------------------------------------------------------
def row(label: str, **changes: Any) -> dict[str, Any]:
    """A row with figures that are easy to find again."""
    return {
        "label": label,
        "median_ms": 10.0,
        "p10_ms": 9.0,
        "p90_ms": 12.0,
        "ratio": 1.0,
        "ratio_p10": 1.0,
        "ratio_p90": 1.0,
        "ratio_low": 1.0,
        "ratio_high": 1.0,
        "ratio_to": "base",
        "verdict": None,
        "rounds": 30,
        "noisy": False,
        "runtime": "onnxruntime 1.20",
        "provider": "CPUExecutionProvider",
        "threads": 1,
        "batch": 1,
        "cpu": "A Processor",
        "cores": 4,
        "gpu": None,
        "governor": None,
        "cpu_mhz": [2000.0, 3000.0],
        "gpu_mhz": None,
        "load_average": [0.5, 0.6],
        "reasons": {},
        "peak_bytes": 34_000_000,
        "images_per_s": 100.0,
    } | changes


PRUNED = {"ratio": 0.5, "ratio_p10": 0.45, "ratio_p90": 0.55, "verdict": "faster", "median_ms": 5.0}
UNTOLD = {"ratio_low": 0.9, "ratio_high": 1.1, "verdict": "unclear", "noisy": True}


def written(*rows: dict[str, Any], notes: tuple[str, ...] = (), width: int = 100) -> str:
    stdout = Console(width=width, highlight=False)
    with stdout.capture() as captured:
        stdout.print(Bench(rows, notes).render())
    return captured.get()


def test_the_table_stands_under_its_conditions():
    text = written(row("base"), row("pruned", **PRUNED), notes=("a note",))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert " ".join(lines[:2]).startswith(
        "onnxruntime 1.20, CPU, 1 thread, batch 1; A Processor, 4 cores, 2000 then 3000 MHz, load average 0.5"
    )
    assert "base 10.00 (9.00-12.00) 1.00x 100 34" in lines
    assert "pruned 5.00 (9.00-12.00) 0.50x faster (0.45-0.55) 100 34" in lines
    assert lines[-1] == "a note"
    assert "noisy" not in text


def test_one_model_alone_has_no_ratio():
    assert "ratio" not in written(row("base"))
    assert written(row("base")).endswith("34\n")


def test_noise_is_said_with_the_interval_that_it_leaves():
    text = " ".join(written(row("base", noisy=True), row("b", **UNTOLD), row("c", **PRUNED)).split())
    assert "too noisy to tell the time of base within 10%" in text
    assert "than base: b (0.90x to 1.10x), at 95% confidence." in text
    assert "can't tell" in text
    assert "--rounds" in text


def test_more_threads_than_cores_are_said_to_wait():
    assert "8 threads on 4 cores: they wait for each other." in written(row("base", threads=8))
    assert "wait" not in written(row("base", threads=4))


def test_each_cell_has_its_table_and_different_providers_are_named():
    other = row(
        "b", provider="CUDAExecutionProvider", peak_bytes=None, reasons={"peak_bytes": "why"}, **PRUNED
    )
    text = written(row("base"), other, row("base", batch=8), width=200)
    assert text.count("model ") == 2
    assert "base on CPUExecutionProvider, b on CUDAExecutionProvider" in text
    assert "No peak memory: why." in text


def test_a_narrow_terminal_loses_no_figure():
    text = written(row("timm:mobilenetv3_large_100"), row("pruned", **PRUNED), width=50)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, text.splitlines())) <= 50
    for figure in ("10.00", "12.00)", "0.45-0.55", "faster", "34"):
        assert figure in text


def test_the_verb_prints_a_table_or_one_json_object(folder: Path):
    file = str(folder / "net.onnx")
    line = ["bench", file, file, "--rounds", "6", "--batch", "1, 3", "--threads", "1,2"]
    done = CliRunner().invoke(cli.app, line)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("model ") == 4
    value = json.loads(CliRunner().invoke(cli.app, [*line, "--json"]).stdout)
    cells = [(r["threads"], r["batch"]) for r in value["rows"]]
    assert cells == [(1, 1), (1, 1), (1, 3), (1, 3), (2, 1), (2, 1), (2, 3), (2, 3)]


def test_a_wrong_number_names_its_option(folder: Path):
    done = CliRunner().invoke(cli.app, ["bench", str(folder / "net.onnx"), "--batch", "1,x"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--batch 1,x: expected whole numbers with commas between" in done.stderr
