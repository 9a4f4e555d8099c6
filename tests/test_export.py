"""One checked file that says nothing of this machine, and parity that can fail."""

from __future__ import annotations

import dataclasses
import json
import logging
import site
import sys
import warnings
from pathlib import Path

import onnx
import pytest
import timm
import torch
from nets import SmallNet, images
from torch import Tensor, nn

from sepress.device import seeded
from sepress.errors import CheckError, InputError, SepressError
from sepress.export import Exporter, export_onnx, repeated, without_paths
from sepress.parity import check_onnx_parity
from sepress.runtime import open_session
from sepress.types import ModelSpec, Preprocessing


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


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_fixed_batch_is_what_was_asked_for_and_parity_feeds_it_so(
    exporter: Exporter, net: nn.Module, tmp_path: Path
):
    path = tmp_path / "fixed.onnx"
    export_onnx(net, path, example=images(1), batch=2, exporter=exporter)
    assert open_session(path).get_inputs()[0].shape == [2, 3, 12, 12]
    assert open_session(path).get_outputs()[0].shape == [2, 5]
    assert check_onnx_parity(net, path, images(5)).passed
    assert check_onnx_parity(net, path, images(1)).passed is None


def test_too_few_images_are_repeated_in_their_order():
    x = torch.arange(3)[:, None]
    assert repeated(x, 7).flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert repeated(x, 2).flatten().tolist() == [0, 1]


@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_either_exporter_writes_the_opset_asked_for(
    exporter: Exporter, opset: int, net: nn.Module, tmp_path: Path
):
    path = tmp_path / "net.onnx"
    export_onnx(net, path, example=images(), opset=opset, exporter=exporter)
    assert [entry.version for entry in onnx.load(path).opset_import if entry.domain == ""] == [opset]
    assert check_onnx_parity(net, path, images()).passed


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_several_inputs_and_a_dataclass_of_outputs_are_named(exporter: Exporter, tmp_path: Path):
    path = tmp_path / "two.onnx"
    export_onnx(TwoInputs(), path, example=(images(), images()), exporter=exporter)
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
    with pytest.raises(SepressError, match="batch=N"):
        export_onnx(FixedBatch(), path, example=images(2, 4))
    assert list(tmp_path.iterdir()) == []
    export_onnx(FixedBatch(), path, example=images(2, 4), batch=2)
    assert path.exists()


def test_a_recorded_forward_that_fixes_the_batch_is_found_out_by_parity(tmp_path: Path):
    path, net = tmp_path / "net.onnx", FixedBatch()
    export_onnx(net, path, example=images(2, 4), exporter="torchscript")
    net.forward = net.fc.forward  # what the file promises
    with pytest.raises(CheckError, match="can't run the file on a batch of 1"):
        check_onnx_parity(net, path, images(5, 4))


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
