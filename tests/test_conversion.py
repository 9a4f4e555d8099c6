"""`sepress convert`: what comes out is a file of ours, which holds the same net and needs no trust."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from typer.testing import CliRunner

from sepress import cli
from sepress.bundle import load_bundle
from sepress.conversion import default_path
from sepress.errors import InputError

TIMM = "mobilenetv3_small_050"
NETS = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes=2):
        pool = nn.AdaptiveAvgPool2d(1)
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, num_classes))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a user's module `mynets` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynets.py").write_text(NETS)
    yield tmp_path
    sys.modules.pop("mynets", None)


def call(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="sepress", terminal_width=200)


def test_a_pickled_net_becomes_a_native_file_that_needs_no_trust(folder: Path) -> None:
    net = timm.create_model(TIMM, num_classes=3).eval()
    torch.save(net, "whole.pth.tar")
    refused = call("convert", "whole.pth.tar")
    assert refused.exit_code == InputError.exit_code
    assert "sepress convert whole.pth.tar --trust-pickle" in refused.stderr
    done = call("convert", "whole.pth.tar", "--trust-pickle", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert (found["schema"], found["path"]) == ("sepress.convert/1", "whole-native.pt")
    assert (found["reference"], found["kwargs"]) == (f"timm:{TIMM}", {"num_classes": 3})
    assert (found["input_size"], found["parameters"]) == ([3, 224, 224], parameters)
    assert "took the weights of the pickled MobileNetV3" in found["notes"]
    again = load_bundle("whole-native.pt").net.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in net.state_dict().items())
    assert call("convert", "whole.pth.tar", "--trust-pickle").exit_code == InputError.exit_code  # it is there


def test_a_class_of_the_users_own_is_converted_with_what_builds_it(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    try:
        import mynets  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(folder))
    torch.save(mynets.Net(num_classes=5).eval(), "whole.pt")
    sys.modules.pop("mynets")
    refused = call("convert", "whole.pt", "--trust-pickle")
    assert refused.exit_code == InputError.exit_code
    assert "--arch mynets:Net" in refused.stderr
    done = call("convert", "whole.pt", "--trust-pickle", "--arch", "mynets:Net", "--out", "net.safetensors")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("mynets:Net, num_classes=5: input 3 x 224 x 224, 137 parameters\n")
    assert "each use of the file needs --arch mynets:Net again" in done.stdout
    assert load_bundle("net.safetensors", arch="mynets:Net").spec.kwargs == {"num_classes": 5}


def test_a_native_file_is_converted_between_its_two_formats(folder: Path) -> None:
    assert call("convert", "sepress:se_resnet8", "--random-weights", "--out", "a.pt").exit_code == 0
    assert call("convert", "a.pt", "--out", "b.safetensors").exit_code == 0
    a, b = load_bundle("a.pt"), load_bundle("b.safetensors")
    assert (a.spec, a.lineage) == (b.spec, b.lineage)
    assert all(torch.equal(value, b.net.state_dict()[name]) for name, value in a.net.state_dict().items())
    refused = call("convert", "a.pt", "--out", "c.pth")
    assert refused.exit_code == InputError.exit_code
    assert not Path("c.pth").exists()


def test_the_default_name_drops_every_suffix_of_a_checkpoint(folder: Path) -> None:
    for name, expected in {
        "runs/model_best.pth.tar": "model_best-native.pt",
        "model.safetensors": "model-native.pt",
        "epoch=3.step=9.ckpt": "epoch=3.step=9-native.pt",
        "timm:seresnet50.a1_in1k": "seresnet50.a1_in1k-native.pt",
    }.items():
        if ":" not in name:
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).touch()
        assert default_path(name) == Path(expected)
