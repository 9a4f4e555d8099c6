"""Files that are no weights: each is told by its content, and nothing in it runs."""

from __future__ import annotations

import argparse
import functools
import io
import json
import pickle
import shlex
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from typer.testing import CliRunner

from sepress import cli
from sepress.bundle import load_bundle
from sepress.bundle.reading import ForeignFile, read_file
from sepress.errors import InputError

IMAGE = torch.zeros(1, 3, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()


def zipped(**members: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, text in members.items():
            archive.writestr(name.replace("__", "/"), text)
    return held.getvalue()


def tarred() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pt"))
    return held.getvalue()


def torchscript(path: Path) -> None:
    torch.jit.trace(net(), IMAGE).save(str(path))  # type: ignore[no-untyped-call]


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(net(), (IMAGE,)), path.with_suffix(".pt2"))
    path.with_suffix(".pt2").replace(path)


def onnx(path: Path) -> None:
    torch.onnx.export(net(), (IMAGE,), path, dynamo=True, verbose=False, external_data=False)


def packaged(path: Path) -> None:
    with torch.package.PackageExporter(path) as package:
        package.save_pickle("model", "model.pkl", [1, 2])


WRITTEN: dict[str, tuple[Any, str, str]] = {  # what writes it, or its bytes; what it is; what to do
    "torchscript": (torchscript, "a TorchScript program", "net.state_dict()"),
    "torch.export": (exported, "torch.export", "net.state_dict()"),
    "torch.package": (packaged, "torch.package", "net.state_dict()"),
    "onnx": (onnx, "an ONNX graph", "the model it was exported from"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(500), "HDF5", "weights for PyTorch"),
    "keras": (zipped(**{"model.weights.h5": "", "config.json": "{}"}), "Keras", "weights for PyTorch"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(50), "TensorFlow Lite", "exported from"),
    "ort": (b"\x1c\0\0\0ORTM" + bytes(50), "ONNX Runtime", "exported from"),
    "executorch": (b"\x1c\0\0\0ET12" + bytes(50), "ExecuTorch", "exported from"),
    "gguf": (b"GGUF\x03\0\0\0", "GGUF", "weights for PyTorch"),
    "npz": (zipped(**{"arr_0.npy": "", "arr_1.npy": ""}), "NumPy", "torch.save"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(20), "gzip", "inside"),
    "tar": (tarred(), "a tar archive", "inside"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS", "git lfs pull"),
    "web page": (b"<!DOCTYPE html>\n<title>Sign in</title>", "a web page", "Download"),
    "another zip": (zipped(readme=""), "torch.save", "inside"),
}


@functools.cache
def sample(kind: str) -> bytes:
    """A file of that kind, made once."""
    content = WRITTEN[kind][0]
    if isinstance(content, bytes):
        return content
    with tempfile.TemporaryDirectory() as folder:
        content(Path(folder, "net"))
        return Path(folder, "net").read_bytes()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is deprecated; files of it are about
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".onnx", ""])
@pytest.mark.parametrize("kind", WRITTEN)
def test_a_file_is_told_by_its_content_whatever_it_is_called(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(sample(kind))
    with pytest.raises(InputError) as error:
        load_bundle(path, arch="sepress:se_resnet8", trust_pickle=True)
    assert WRITTEN[kind][1] in error.value.message
    assert error.value.message.startswith(f"{path}: ")
    assert WRITTEN[kind][2] in str(error.value.remedy)


def test_the_suffix_tells_where_the_content_does_not(tmp_path: Path) -> None:
    for suffix, message in {
        "engine": "TensorRT",
        "plan": "TensorRT",
        "mlmodel": "Core ML",
        "onnx": "ONNX",
        "pb": "TensorFlow",
        "safetensors": "damaged",
    }.items():
        path = tmp_path / f"net.{suffix}"
        path.write_bytes(b"\x07" * 100)
        with pytest.raises(InputError, match=message):
            load_bundle(path)


VERBS = [
    "inspect {}",
    "convert {}",
    "rank {} --data digits",
    "prune {} --data digits --ratio 0.3",
    "fold {} --data digits --all",
    "polarise {} --data digits --epochs 1",
    "finetune {} --data digits --epochs 1",
    "evaluate {} --data digits",
    "export {} --data digits",
    "profile {} --out table.json",
    "bench {}",
    "compare {} --data digits --methods l2 --ratio 0.3",
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_what_holds_no_weights_with_one_error(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ("torchscript", "torch.export", "onnx", "hdf5", "tflite"):
        Path("model.pt").write_bytes(sample(kind))
        done = CliRunner().invoke(cli.app, shlex.split(verb.format("model.pt")), prog_name="sepress")
        assert done.exit_code == InputError.exit_code, done.output
        assert done.output.count("error:") == 1
        assert "error: model.pt: " in done.stderr
        assert WRITTEN[kind][1] in done.stderr
        assert WRITTEN[kind][2] in done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]  # no empty run folder is left


def test_folders_of_shards_are_refused_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step").mkdir()
    for member, remedy in ((None, "the model file inside"), (".metadata", "dcp_to_torch")):
        if member:
            (tmp_path / "step" / member).touch()
        done = CliRunner().invoke(cli.app, ["inspect", "step"], prog_name="sepress")
        assert done.exit_code == InputError.exit_code
        assert remedy in done.stderr


def test_a_checkpoint_is_no_program_for_being_called_code(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "code.pt")  # its members are code/data.pkl, code/data/0
    assert isinstance(read_file(tmp_path / "code.pt"), ForeignFile)


def test_shards_are_refused_with_what_joins_them(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(net().state_dict(), checkpoint_id=tmp_path / "step", no_dist=True)
    for path in (tmp_path / "step", *(tmp_path / "step").iterdir()):
        with pytest.raises(InputError, match="dcp_to_torch"):
            load_bundle(path, arch="sepress:se_resnet8", trust_pickle=True)
    (tmp_path / "zero_to_fp32.py").touch()
    with pytest.raises(InputError, match=r"DeepSpeed[^$]*zero_to_fp32\.py"):
        load_bundle(tmp_path)


def test_the_arguments_of_a_training_script_are_read_without_trust(tmp_path: Path) -> None:
    arguments = argparse.Namespace(model="resnet18", output=Path("runs/1"), lr=0.1)
    torch.save({"args": arguments}, tmp_path / "a.pt")
    found: Any = read_file(tmp_path / "a.pt")
    assert vars(found.content["args"]) == {"model": "resnet18", "output": PurePosixPath("runs/1"), "lr": 0.1}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def malicious(kind: str, path: Path, mark: Path) -> None:
    """A file of that kind with a payload wherever something might unpickle it."""
    payload = pickle.dumps(Payload(mark))
    if kind == "plain":
        path.write_bytes(payload)
    elif kind in ("zip", "legacy"):
        content = {"args": argparse.Namespace(lr=Payload(mark)), "state_dict": net().state_dict()}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    else:
        programs = {
            "torchscript": ["net/code/__torch__.py"],
            "pt2": ["net/archive_format", "net/models/model.json"],
        }
        names = ["net/data.pkl", "net/constants.pkl", "net/data/sample_inputs/model.pt", "net/version"]
        with zipfile.ZipFile(path, "w") as archive:
            for name in (*names, *programs[kind]):
                archive.writestr(name, payload)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.pt2", "a.pkl", "a.safetensors"])
@pytest.mark.parametrize("kind", ["plain", "zip", "legacy", "torchscript", "pt2"])
def test_no_payload_runs_without_the_flag(
    kind: str, name: str, forced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = tmp_path / "it-ran"
    malicious(kind, tmp_path / name, mark)
    trusted = kind in ("torchscript", "pt2")  # programs are refused before anything is unpickled
    for trust in (False, trusted):
        with pytest.raises(InputError):
            load_bundle(tmp_path / name, arch="sepress:se_resnet8", trust_pickle=trust)
    assert not mark.exists()
    if not trusted:  # the control: it would have run
        with pytest.raises(InputError):
            load_bundle(tmp_path / name, arch="sepress:se_resnet8", trust_pickle=True)
        assert mark.exists()


def test_the_error_for_a_pickle_names_what_it_would_run_and_the_way_out(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "net.pth")
    with pytest.raises(InputError) as error:
        load_bundle(tmp_path / "net.pth")
    assert "torch.nn.modules.activation.ReLU" in error.value.message
    assert "sepress convert net.pth --trust-pickle" in str(error.value.remedy)


def test_a_class_of_the_script_itself_can_not_be_found_and_the_error_says_why(tmp_path: Path) -> None:
    text = b"\x80\x02c__main__\nMyNet\n)\x81."
    (tmp_path / "a.pkl").write_bytes(text)
    with pytest.raises(InputError, match=r"defined in the script itself"):
        load_bundle(tmp_path / "a.pkl", trust_pickle=True)


def test_a_saved_model_is_a_folder_and_told(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(InputError, match="SavedModel"):
        load_bundle(tmp_path)


def test_numbers_and_text_that_only_look_like_protobuf_are_no_onnx(tmp_path: Path) -> None:
    for number, content in enumerate(
        [np.arange(99).tobytes(), json.dumps({"graph": 1}).encode(), b"\x08\xff" * 9]
    ):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a model file"):
            load_bundle(path)
