"""One checked file that says nothing of this machine, and parity that can fail."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import re
import site
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import Tensor, nn

from sepress.device import seeded
from sepress.errors import InputError, SepressError
from sepress.export import (
    check_onnx_parity,
    check_single_runtime,
    compare_outputs,
    export_onnx,
    judge_in_float64,
    measure_onnx_latency,
    named_outputs,
    open_session,
    quiet,
    without_paths,
)
from sepress.types import ModelSpec, Preprocessing


class SmallNet(nn.Module):
    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.conv, self.norm, self.fc = conv(3, 8, 3), norm(8), nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().flatten(2).mean(2)

    def forward(self, x: Tensor) -> object:
        return self.fc(self.features(x))


@dataclasses.dataclass
class Output:
    logits: Tensor
    features: Tensor | None = None


class TwoInputs(SmallNet):
    def forward(self, x: Tensor, y: Tensor) -> Output:
        features = self.features(x + y)
        return Output(self.fc(features), features)


class DictOfLists(SmallNet):
    def forward(self, x: Tensor) -> dict[str, object]:
        features = self.features(x)
        return {"logits": self.fc(features), "levels": [features, 2 * features]}


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(2, 4))


class DataDependent(FixedBatch):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


def images(count: int = 6, *shape: int) -> Tensor:
    with seeded(0):
        return torch.randn(count, *(shape or (3, 12, 12)))


@pytest.fixture
def net() -> nn.Module:
    with seeded(1):
        return SmallNet()


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the net that the fixture `net` gives."""
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    with seeded(1):
        export_onnx(SmallNet(), path, example=images())
    return path


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


# ---- the file -------------------------------------------------------------------------------------
def test_a_timm_net_becomes_one_checked_file_that_names_nothing_of_this_machine(tmp_path: Path):
    with seeded(0):
        mobile = timm.create_model("mobilenetv3_small_050", num_classes=7).train()
    path = tmp_path / "out" / "model.onnx"
    export_onnx(
        mobile, path, example=images(1, 3, 64, 64), lineage={"data": {"path": str(tmp_path / "photos")}}
    )
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(path, full_check=True)
    content = path.read_bytes()
    local = [
        Path.home(),
        Path.cwd(),
        tmp_path,
        *site.getsitepackages(),
        sys.prefix,
        "site-packages",
        '.py", line',
    ]
    assert [name for name in map(str, local) if name.encode() in content and name != "/"] == []
    assert mobile.training
    check = check_onnx_parity(mobile, path, images(5, 3, 64, 64))
    assert check.passed
    assert check.relative_error < 1e-4
    assert check.argmax_agreement == 1.0
    assert mobile.training


def test_input_and_logits_have_these_names_and_a_free_batch(small_file: Path):
    graph = onnx.load(small_file).graph
    assert [node.name for node in graph.input] == ["input"]
    assert [node.name for node in graph.output] == ["logits"]
    sizes = [
        [d.dim_param or d.dim_value for d in n.type.tensor_type.shape.dim]
        for n in (*graph.input, *graph.output)
    ]
    assert sizes == [["batch", 3, 12, 12], ["batch", 5]]
    session = open_session(small_file, providers="cpu")
    assert session.run(None, {"input": images(3).numpy()})[0].shape == (3, 5)


def test_a_fixed_batch_is_the_examples_and_parity_feeds_it_so(net: nn.Module, tmp_path: Path):
    path = tmp_path / "fixed.onnx"
    export_onnx(net, path, example=images(2), dynamic_batch=False)
    assert open_session(path).get_inputs()[0].shape == [2, 3, 12, 12]
    assert check_onnx_parity(net, path, images(5)).passed
    assert check_onnx_parity(net, path, images(1)).passed is None


def test_several_inputs_and_a_dataclass_of_outputs_are_named(tmp_path: Path):
    path = tmp_path / "two.onnx"
    export_onnx(TwoInputs(), path, example=(images(), images()))
    session = open_session(path)
    assert [node.name for node in session.get_inputs()] == ["input_0", "input_1"]
    assert [node.name for node in session.get_outputs()] == ["logits", "features"]
    assert [node.shape[0] for node in session.get_inputs()] == ["batch", "batch"]


def test_parity_holds_for_every_output_of_a_nested_one(tmp_path: Path):
    path, net = tmp_path / "dict.onnx", DictOfLists()
    export_onnx(net, path, example=images(1))
    assert [node.name for node in open_session(path).get_outputs()] == ["logits", "levels_0", "levels_1"]
    assert check_onnx_parity(net, path, images()).passed


@pytest.mark.parametrize(("dims", "shape"), [(1, (3, 20)), (3, (3, 5, 6, 7))])
def test_one_and_three_dimensional_nets_export(dims: int, shape: tuple[int, ...], tmp_path: Path):
    path, net = tmp_path / "net.onnx", SmallNet(dims)
    export_onnx(net, path, example=images(1, *shape))
    assert check_onnx_parity(net, path, images(5, *shape)).passed


def test_metadata_tells_how_to_feed_the_net_and_where_it_comes_from(net: nn.Module, tmp_path: Path):
    path = tmp_path / "net.onnx"
    spec = ModelSpec(
        source="timm",
        arch="some_net",
        kwargs={"num_classes": 5},
        preprocessing=Preprocessing((3, 12, 12), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "bicubic", 0.875),
        class_names=("ape", "bär", "cat", "dog", "emu"),
        trained=False,
    )
    lineage = {"data": {"path": "/home/someone/photos", "n": 3}, "plans": [{"removed": {"conv": [1, 2]}}]}
    export_onnx(net, path, example=images(), spec=spec, lineage=lineage, opset=20)
    found = metadata(path)
    assert found.pop("sepress.interpolation") == "bicubic"
    assert {key.removeprefix("sepress."): json.loads(value) for key, value in found.items()} == {
        "input_size": [3, 12, 12],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1],
        "crop_pct": 0.875,
        "class_names": ["ape", "bär", "cat", "dog", "emu"],
        "trained": False,
        "lineage": {"data": {"path": "photos", "n": 3}, "plans": [{"removed": {"conv": [1, 2]}}]},
    }
    assert [entry.version for entry in onnx.load(path).opset_import if entry.domain == ""] == [20]


def test_absolute_paths_are_cut_and_other_texts_are_kept():
    given = {"/home/me/a.pt": ["~/b", "C:\\data\\c", "digits", "timm:x/y", 3, None, True, 0.5]}
    assert without_paths(given) == {"a.pt": ["b", "c", "digits", "timm:x/y", 3, None, True, 0.5]}


def test_the_exporter_is_silent_and_leaves_logging_and_warnings_as_they_were(
    net: nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    before = (logging.root.manager.disable, list(warnings.filters))
    export_onnx(net, tmp_path / "net.onnx", example=images())
    open_session(tmp_path / "net.onnx")  # CUDA may be listed and not load
    assert capfd.readouterr() == ("", "")
    assert (logging.root.manager.disable, list(warnings.filters)) == before


def test_quiet_gives_logging_back_after_a_failure():
    def chatter() -> None:
        print("not seen")
        warnings.warn("not seen", stacklevel=1)
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"), quiet():
        chatter()
    assert logging.root.manager.disable == logging.NOTSET


def test_export_leaves_weights_gradients_and_random_state_alone(net: nn.Module, tmp_path: Path):
    state = {key: value.clone() for key, value in net.state_dict().items()}
    random = torch.get_rng_state()
    export_onnx(net, tmp_path / "net.onnx", example=images())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


# ---- what can't be exported -----------------------------------------------------------------------
def test_a_forward_that_fixes_the_batch_is_told_so_and_leaves_no_file(tmp_path: Path):
    path = tmp_path / "net.onnx"
    with pytest.raises(SepressError, match="dynamic_batch=False"):
        export_onnx(FixedBatch(), path, example=images(2, 4))
    assert list(tmp_path.iterdir()) == []
    export_onnx(FixedBatch(), path, example=images(2, 4), dynamic_batch=False)
    assert path.exists()


def test_a_failing_export_gives_the_first_cause_and_leaves_no_file(tmp_path: Path):
    net = DataDependent()
    with pytest.raises(SepressError, match=r"can't export this net to ONNX: .*data-dependent"):
        export_onnx(net, tmp_path / "net.onnx", example=images(2, 4))
    assert list(tmp_path.iterdir()) == []
    assert net.training


def test_an_opset_that_is_not_reached_is_refused_and_the_old_file_kept(net: nn.Module, tmp_path: Path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match="opset 11"):
        export_onnx(net, path, example=images(), opset=11)
    assert path.read_bytes() == b"old"


def test_an_empty_example_is_refused(net: nn.Module, tmp_path: Path):
    with pytest.raises(InputError, match="holds no image"):
        export_onnx(net, tmp_path / "net.onnx", example=torch.zeros(0, 3, 12, 12))


def test_an_output_that_is_no_tensor_is_refused():
    with pytest.raises(InputError, match="holds a str"):
        named_outputs({"logits": torch.zeros(1), "name": "x"})


def test_outputs_are_named_by_key_field_or_position():
    x = torch.zeros(1)
    assert list(named_outputs(x)) == ["logits"]
    assert list(named_outputs((x,))) == ["logits"]
    assert list(named_outputs([x, x])) == ["output_0", "output_1"]
    assert list(named_outputs({"out": x, "aux": (x, x), "none": None})) == ["out", "aux_0", "aux_1"]


# ---- parity ---------------------------------------------------------------------------------------
def test_parity_fails_on_the_file_of_another_net(net: nn.Module, small_file: Path):
    with torch.no_grad():
        net.fc.bias[2] += 1e-3
    check = check_onnx_parity(net, small_file, images())
    assert check.passed is False
    assert check.relative_error > 1e-4
    assert "logits" in check.reason


class Cancelling(nn.Module):
    """The identity, with float32's digits lost to a large number; exact in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1e4) - 1e4


def test_float64_tells_float32_noise_from_an_error():
    net, x = Cancelling(), images(6, 4)
    own, exact = {"logits": net(x).numpy()}, {"logits": x.double().numpy()}
    noise = own["logits"] - exact["logits"]
    as_near = {"logits": exact["logits"] - noise}
    assert compare_outputs(own, as_near).passed is False
    check = judge_in_float64(net, [(x,)], own, as_near)
    assert check.passed
    assert check.relative_error == pytest.approx(compare_outputs(exact, own).relative_error)
    assert "float64" in check.reason
    assert judge_in_float64(net, [(x,)], own, {"logits": exact["logits"] + 3 * noise}) is None


def test_the_error_is_the_largest_difference_by_the_spread_over_images():
    a = np.array([[0.0, 10.0], [4.0, 10.0]])  # mean over images (2, 10): a spread of 2
    b = a + np.array([[0.0, 0.0], [0.0, 1e-4]])
    check = compare_outputs({"logits": a}, {"logits": b})
    assert check.relative_error == pytest.approx(1e-4 / 2)
    assert check.passed
    assert check.argmax_agreement == 1.0
    assert compare_outputs({"logits": a}, {"logits": a + 3e-4}).passed is False


def test_the_worst_output_counts():
    a, wide = np.array([[0.0, 2.0], [2.0, 0.0]]), np.array([[0.0], [2000.0]])
    check = compare_outputs({"wide": wide, "a": a}, {"wide": wide, "a": a + 0.5})
    assert check.relative_error == 0.5
    assert check.passed is False
    assert check.reason.startswith("'a' differs")


def test_argmax_agreement_is_the_share_of_images_with_the_same_top_class():
    a = np.eye(4)
    assert compare_outputs({"logits": a}, {"logits": a[[0, 1, 3, 2]]}).argmax_agreement == 0.5
    assert compare_outputs({"score": np.arange(4.0)}, {"score": np.arange(4.0)}).argmax_agreement is None


def test_tiny_outputs_are_judged_by_their_own_spread():
    a = 1e-9 * np.array([[1.0, 2.0], [3.0, 5.0]])
    assert compare_outputs({"logits": a}, {"logits": 1.1 * a}).passed is False


def test_parity_is_vacuous_only_where_no_image_differs_from_another():
    same = np.full((3, 2), 7.0)
    assert compare_outputs({"logits": same}, {"logits": same + 1}).passed is None
    nearly = same + np.array([[0.0], [1e-6], [0.0]])
    check = compare_outputs({"logits": nearly}, {"logits": nearly})
    assert (check.passed, check.relative_error) == (None, None)
    assert "do not tell the 3 images apart" in check.reason


def test_values_that_are_not_finite_fail():
    a = np.array([[0.0, 1.0], [1.0, 0.0]])
    check = compare_outputs({"logits": a}, {"logits": a * np.nan})
    assert (check.passed, check.relative_error) == (False, None)
    assert compare_outputs({"logits": a}, {"logits": a[:1]}).passed is False


# ---- runtime --------------------------------------------------------------------------------------
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
