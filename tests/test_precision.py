"""Files in other precisions: valid, near to the float one, and kept only where they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from nets import SmallNet, images, lively
from onnx import numpy_helper
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import sepress
from sepress import precision, stages, variants
from sepress.cli import app
from sepress.device import seeded
from sepress.errors import InputError
from sepress.lock import NAME as LOCK
from sepress.precision import (
    answering,
    find_gate_nodes,
    fixed_batch,
    kernels_saturate,
    load_named,
    measure_ranges,
    to_fp16,
    to_int8,
)
from sepress.recipe import Recipe
from sepress.report import render_report, report_from_json, report_to_json, report_to_markdown
from sepress.runtime import open_session
from sepress.types import Report
from sepress.variants import fewest_loud

WEIGHTS = ("conv1.weight", "stages.0.0.conv1.weight", "fc.weight")


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A squeeze-and-excitation net with weights that matter."""
    with seeded(0):
        net = lively(sepress.build("sepress:se_resnet8", width=8))
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    sepress.export_onnx(net, path, example=images(1, 3, 24, 24), lineage={"stage": "base"})
    return path


def run(path: Path, x: Tensor) -> Tensor:
    return answering(open_session(path, providers="cpu", threads=1))(x)[0]


def relative_error(path: Path, other: Path, x: Tensor) -> float:
    a, b = run(path, x), run(other, x)
    return float((a - b).norm() / (a - a.mean(0)).norm())


def elements(path: Path) -> dict[str, int]:
    graph = onnx.load(path).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}


# ---- float16 --------------------------------------------------------------------------------------
def test_an_fp16_file_is_valid_half_as_large_near_to_the_float_one_and_float_outside(
    float_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "fp16.onnx"
    x = images(8, 3, 24, 24)
    assert to_fp16(float_file, path, calibration=x) == ()
    onnx.checker.check_model(path, full_check=True)
    assert elements(path) == {"input": onnx.TensorProto.FLOAT, "logits": onnx.TensorProto.FLOAT}
    weights = [w for w in onnx.load(path).graph.initializer if w.data_type == onnx.TensorProto.FLOAT16]
    assert len(weights) >= 20
    assert path.stat().st_size < 0.6 * float_file.stat().st_size
    assert 0 < relative_error(float_file, path, x) < 0.02


def test_a_file_in_another_precision_keeps_the_metadata_and_names_its_precision(
    float_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "fp16.onnx"
    to_fp16(float_file, path, calibration=images(2, 3, 24, 24))
    before, after = (
        {entry.key: entry.value for entry in onnx.load(p).metadata_props} for p in (float_file, path)
    )
    assert after == before | {"sepress.precision": "fp16"}


class Large(nn.Module):
    """Activations, or a weight, far beyond float16 (and far below it) on the way to outputs within."""

    def __init__(self, *, weight: bool) -> None:
        super().__init__()
        self.small, self.weight = SmallNet(), weight
        self.scale = nn.Parameter(torch.full((8, 1, 1), 1e6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.small.norm(self.small.conv(x))
        y = (y * 1e-6) * self.scale if self.weight else ((y * 1e6).relu() + 3e5) * 1e-6
        return self.small.fc(y.relu().flatten(2).mean(2))


@pytest.mark.parametrize("weight", [False, True], ids=["activations", "a weight"])
def test_what_float16_can_t_hold_stays_float32_and_nothing_is_lost_between(
    weight: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with seeded(0):
        net = Large(weight=weight).eval()
    source, path, x = tmp_path / "float.onnx", tmp_path / "fp16.onnx", images(6)
    sepress.export_onnx(net, source, example=x)
    assert to_fp16(source, path, calibration=x)
    onnx.checker.check_model(path, full_check=True)
    assert relative_error(source, path, x) < 0.01
    monkeypatch.setattr(precision, "_unfit", lambda *_: set())  # the library alone: it is not so
    assert to_fp16(source, path, calibration=x) == ()
    assert not relative_error(source, path, x) < 0.5


# ---- int8 -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_an_int8_file_has_u8_activations_and_s8_weights_by_channel_and_is_near(
    method: Any, float_file: Path, tmp_path: Path
) -> None:
    path, x = tmp_path / "int8.onnx", images(16, 3, 24, 24)
    to_int8(float_file, path, calibration=x, method=method)
    onnx.checker.check_model(path, full_check=True)
    assert elements(path) == elements(float_file)
    graph = onnx.load(path).graph
    held = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
    for name in WEIGHTS:
        quantised = held[f"{name}_quantized"]
        assert quantised.dtype == np.int8
        assert held[f"{name}_scale"].size == len(quantised)
    points = {held[node.input[2]].dtype for node in graph.node if node.op_type == "QuantizeLinear"}
    assert points == {np.dtype(np.uint8)}
    assert path.stat().st_size < 0.7 * float_file.stat().st_size
    limit = 0.8 if method == "entropy" else 0.4  # it clips: this net's tails matter
    assert 0 < relative_error(float_file, path, x) < limit


def test_weights_take_seven_bits_where_the_kernels_saturate(
    float_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for saturate in (False, True):
        monkeypatch.setattr(precision, "kernels_saturate", lambda answer=saturate: answer)
        path = tmp_path / f"{saturate}.onnx"
        to_int8(float_file, path, calibration=images(4, 3, 24, 24))
        held = {w.name: numpy_helper.to_array(w) for w in onnx.load(path).graph.initializer}
        found.append(max(np.abs(held[f"{name}_quantized"].astype(int)).max() for name in WEIGHTS))
    assert found == [127, 64]


@pytest.mark.parametrize(("pair", "saturates"), [(2 * 255 * 127, False), (2**15 - 1, True)])
def test_saturation_is_what_the_product_of_the_largest_values_shows(
    pair: int, saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        def run(self, *_: object) -> list[np.ndarray]:
            return [np.full((64, 64), 32 * pair, np.int32)]  # 64 products, added in pairs first

    monkeypatch.setattr(precision, "open_session", lambda *_, **__: Session())
    assert kernels_saturate.__wrapped__() is saturates


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_ranges_do_not_depend_on_how_images_are_cut_into_pieces(
    method: Any, float_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(9, 3, 24, 24)
    whole = measure_ranges(float_file, x, method=method)
    monkeypatch.setattr(precision, "PIECE_VALUES", 2 * x[0].numel())
    pieces = measure_ranges(float_file, [(x[:5], None), (x[5:], None)], method=method)
    assert list(whole.keys()) == list(pieces.keys())
    for name in whole.keys():  # noqa: SIM118 (no mapping)
        a, b = (np.ravel(ranges[name].range_value) for ranges in (whole, pieces))
        assert np.abs(a - b).max() <= (1e-6 if method == "minmax" else 0.01) * np.ptp(a)


def test_minmax_ranges_are_those_of_the_images_themselves(float_file: Path) -> None:
    x = images(5, 3, 24, 24)
    found = measure_ranges(float_file, x, method="minmax")["input"].range_value
    assert np.ravel(found).tolist() == [x.min().item(), x.max().item()]


def test_nodes_named_stay_float_and_those_alone_can_be_quantised(float_file: Path, tmp_path: Path) -> None:
    x = images(8, 3, 24, 24)
    ranges = measure_ranges(float_file, x, method="minmax")
    gate = next(iter(find_gate_nodes(load_named(float_file)).values()))

    def weights(**choice: Any) -> set[str]:
        path = tmp_path / "int8.onnx"
        to_int8(float_file, path, ranges=ranges, **choice)
        names = {w.name for w in onnx.load(path).graph.initializer}
        return {name.removesuffix("_quantized") for name in names if name.endswith("weight_quantized")}

    of_gate = {f"stages.0.0.se.{layer}.weight" for layer in ("reduce", "expand")}
    assert weights(only=gate) == of_gate
    assert weights(in_float=gate) == weights() - of_gate


def test_int8_without_images_or_for_an_unknown_method_says_what_to_pass(
    float_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="calibration images"):
        to_int8(float_file, tmp_path / "x.onnx")
    with pytest.raises(InputError, match="no calibration images"):
        to_int8(float_file, tmp_path / "x.onnx", calibration=[])
    with pytest.raises(InputError, match=r"unknown calibration method .*middle"):
        to_int8(float_file, tmp_path / "x.onnx", calibration=images(1, 3, 24, 24), method="middle")
    assert not list(tmp_path.iterdir())


def test_a_file_with_a_fixed_batch_is_calibrated_and_answers_for_any_number_of_images(
    float_file: Path, tmp_path: Path
) -> None:
    with seeded(0):
        net = lively(sepress.build("sepress:se_resnet8", width=8))
    fixed, x = tmp_path / "fixed.onnx", images(6, 3, 24, 24)
    sepress.export_onnx(net, fixed, example=x[:4], batch=4)
    assert (fixed_batch(fixed), fixed_batch(float_file)) == (4, None)
    assert torch.allclose(run(fixed, x), run(float_file, x), rtol=1e-4, atol=1e-4)
    to_int8(fixed, tmp_path / "int8.onnx", calibration=x)
    assert run(tmp_path / "int8.onnx", x).shape == (6, 10)
    with pytest.raises(InputError, match="fewer than the file's fixed batch"):
        to_int8(fixed, tmp_path / "x.onnx", calibration=x[:3])


# ---- gates in the graph ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "reference", ["sepress:se_resnet8", "sepress:se_mobile", "timm:mobilenetv3_small_050"]
)
def test_the_graph_has_the_gates_that_the_engine_finds_in_the_net(reference: str, tmp_path: Path) -> None:
    with seeded(0):
        net = lively(
            timm.create_model("mobilenetv3_small_050", num_classes=4)
            if reference.startswith("timm:")
            else sepress.build(reference)
        )
    x = images(2, 3, 64, 64)
    sepress.export_onnx(net, tmp_path / "model.onnx", example=x, exporter="torchscript")
    model = load_named(tmp_path / "model.onnx")
    gates = find_gate_nodes(model)
    assert len(gates) == len(sepress.find_gates(net, x[:1])) > 0
    kinds = {node.name: node.op_type for node in model.graph.node}
    for product, nodes in gates.items():
        assert kinds[product] == "Mul"
        assert [kinds[node] for node in nodes if kinds[node] in ("Conv", "Gemm", "Relu")] == [
            "Conv",
            "Relu",
            "Conv",
        ]
        assert kinds[nodes[-1]] in ("Sigmoid", "HardSigmoid", "Clip", "Mul", "Div")


def test_a_head_after_a_global_pooling_is_no_gate(tmp_path: Path) -> None:
    sepress.export_onnx(SmallNet().eval(), tmp_path / "model.onnx", example=images())
    assert find_gate_nodes(load_named(tmp_path / "model.onnx")) == {}


@pytest.mark.parametrize(
    ("errors", "expected"),
    [([5.0, 91.0, 4.0], [1]), ([50.0, 41.0, 9.0], [0, 1]), ([1.0, 1.0], [0, 1]), ([0.0, 0.0], []), ([], [])],
)
def test_the_loudest_gates_are_the_fewest_that_add_nine_tenths(
    errors: list[float], expected: list[int]
) -> None:
    assert fewest_loud(errors) == expected


# ---- the stage ------------------------------------------------------------------------------------
def recipe(*stage_list: Any, **fields: Any) -> Recipe:
    return Recipe.model_validate({"name": "test", "device": "cpu", "stages": list(stage_list), **fields})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A net trained for one epoch on the embedded digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train = {"train": {"epochs": 1, "lr": 0.1, "warmup_epochs": 0.2, "ema_decay": None}}
    net = {"source": "sepress:se_resnet8", "kwargs": {"in_chans": 1, "width": 8}}
    stages.run_recipe(recipe(train, data={"path": "digits"}, model=net), out=folder)
    return folder / "base.pt"


EXPORT = {"latency_rounds": 6, "exporter": "torchscript"}  # the quicker one


def variants_of(model: Path, out: Path, **settings: Any) -> Report:
    given = {"range_images": 64, "latency_rounds": 6, **settings}
    made = recipe({"export": EXPORT}, {"precision": given}, model={"source": str(model)})
    report = stages.run_recipe(made, out=out).report
    assert report is not None
    return report


def test_what_holds_is_kept_beside_the_float_file_and_measured_on_test_once(
    trained: Path, tmp_path: Path
) -> None:
    report = variants_of(trained, tmp_path / "run", within="top1_drop<=0.05")
    exported, fp16, int8 = report.variants
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.onnx", "model.fp16.onnx", "model.int8.onnx"} <= names
    assert [name for name in names if name.startswith(".")] == [LOCK]
    assert [v.precision for v in report.variants] == ["float32", "fp16", "int8"]
    for variant in (fp16, int8):
        path = tmp_path / "run" / f"model.{variant.precision}.onnx"
        onnx.checker.check_model(path, full_check=True)
        assert variant.kept
        assert variant.reason.startswith("top1_drop<=0.05: met at ")
        assert variant.validation.bytes == path.stat().st_size < exported.validation.bytes
        assert variant.validation.split == "val"
        assert variant.final.split == "test"
        assert variant.agreement > 0.9
        assert variant.validation.latency["ratio_to"] == "float32"
        assert report.artifacts[f"onnx_{variant.precision}"] == str(path.resolve())
    tried = [note for note in report.notes if note.startswith("int8 tried, ")]
    assert {note.split(", ")[1].split(" ")[0] for note in tried} == {"minmax", "entropy", "percentile"}
    assert any("all 3 gates in float" in note for note in tried)
    assert report.measurements[-1].label == "base"  # the variants are not the run's nets


def test_a_file_that_loses_too_much_is_rejected_with_its_figures_and_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaging(path: Path, out: Path, **settings: Any) -> None:
        to_int8(path, out, **settings)
        model = onnx.load(out)
        for weight in model.graph.initializer:
            if weight.name == "fc.weight_quantized":
                weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
        onnx.save(model, out)

    monkeypatch.setattr(variants, "to_int8", damaging)
    report = variants_of(trained, tmp_path / "run", calibration="minmax")
    _, fp16, int8 = report.variants
    assert fp16.kept
    assert not int8.kept
    assert int8.reason.startswith("top1_drop<=0.01: not met at ")
    assert int8.final is None
    assert report.artifacts["onnx_int8"] is None
    assert [p.name for p in (tmp_path / "run").rglob("*.onnx") if "int8" in p.name] == []
    assert "int8 NOT KEPT" in report_to_markdown(report)


def test_a_file_whose_outputs_are_not_finite_is_rejected(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(path: Path, out: Path, *, calibration: Any) -> tuple[str, ...]:
        model = onnx.load(path)
        for weight in model.graph.initializer:
            if weight.name == "fc.bias":
                values = np.full_like(numpy_helper.to_array(weight), np.inf)
                weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        onnx.save(model, out)
        return ()

    monkeypatch.setattr(variants, "to_fp16", overflowing)
    fp16 = variants_of(trained, tmp_path / "run", int8=False).variants[1]
    assert not fp16.kept
    assert "can't be told, top1 of fp16 is unknown: the outputs are not finite" in fp16.reason
    assert fp16.agreement == 0.0


def test_any_constraint_that_a_file_can_be_held_to_decides_and_others_are_refused(
    trained: Path, tmp_path: Path
) -> None:
    report = variants_of(trained, tmp_path / "small", int8=False, within="bytes_ratio<=0.1")
    assert report.variants[1].reason.startswith("bytes_ratio<=0.1: not met at 0.")
    assert report.variants[1].reason.count("float32") == 1
    with pytest.raises(InputError, match=r"macs_ratio<=0\.5 can't be told of a file"):
        variants_of(trained, tmp_path / "macs", int8=False, within="macs_ratio<=0.5")


def test_without_labels_a_file_can_t_be_held_to_accuracy_and_nothing_is_started(
    trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (28, 28), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{i}.png")
    made = recipe(
        "export", "precision", model={"source": str(trained)}, data={"path": str(tmp_path / "flat")}
    )
    with pytest.raises(InputError, match=r"a file held to top1_drop<=0\.01 needs labels"):
        stages.run_recipe(made, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("order", [["precision"], ["precision", "export"], ["evaluate", "precision"]])
def test_a_recipe_has_an_export_before_precision(order: list[str]) -> None:
    with pytest.raises(ValueError, match="put an export before it"):
        recipe(*order, model={"source": "model.pt"})


def test_a_precision_stage_makes_something() -> None:
    with pytest.raises(ValueError, match="nothing is left to make"):
        recipe("export", {"precision": {"fp16": False, "int8": False}}, model={"source": "model.pt"})


def test_the_verb_says_what_a_lone_within_lacks(trained: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(trained), "--within", "top1_drop<=0.01"])
    assert done.exit_code == 2
    assert "--within is about fp16 and int8 files" in done.stderr


def test_variants_survive_json_and_are_shown_with_their_ratios(trained: Path, tmp_path: Path) -> None:
    from rich.console import Console

    report = variants_of(trained, tmp_path / "run", fp16=False, calibration="minmax")
    value = report_to_json(report)
    assert report_from_json(value).variants == tuple(
        sepress.types.Variant(v.precision, v.kept, v.how, v.reason, v.agreement, v.validation, v.final)
        for v in report.variants
    )
    del value["variants"]  # as an older version wrote it
    assert report_from_json(value).variants == ()
    console = Console(width=60)
    with console.capture() as captured:
        console.print(render_report(report))
    shown, text = captured.get(), report_to_markdown(report)
    assert max(map(len, shown.splitlines())) <= 60
    assert "int8" in shown
    assert "Same class" in shown
    assert "## Precision" in text
    assert "| **int8** |" in text
