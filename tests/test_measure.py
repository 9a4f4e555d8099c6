"""Exact counts by hand, and what a report says of a machine."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from sepress.measure import (
    count_macs,
    count_params,
    environment,
    file_bytes,
)


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def test_macs_are_those_of_one_image_by_hand():
    by_hand = 10 * 10 * 3 * 8 * 9 + 5 * 5 * 8 * 9 + 8 * 10
    assert count_macs(small_net(), torch.zeros(4, 3, 10, 10)) == by_hand


def test_macs_of_a_net_with_two_inputs_take_one_image_of_each():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 7)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.fc(x + y)

    assert count_macs(Sum(), (torch.zeros(5, 6), torch.zeros(5, 6))) == 42


def test_counting_leaves_modes_statistics_and_gradients_alone():
    net = small_net().train()
    net[2].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    count_macs(net, torch.randn(4, 3, 10, 10))
    assert [m.training for m in net] == [True, True, False, True, True, True]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_tied_parameter_counts_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert count_params(net) == 16 + 4 + 4


def test_bytes_are_those_of_the_file(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"12345")
    assert file_bytes(tmp_path / "a") == 5


def test_environment_names_versions_and_hardware_but_no_path_or_host():
    found = environment()
    assert found["torch"] == torch.__version__.split("+")[0]
    assert found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert any(name.startswith("onnxruntime") for name in found)
    text = json.dumps({key: value for key, value in found.items() if key not in ("platform", "cpu")})
    for private in (str(Path.home()), str(Path.cwd()), socket.gethostname()):
        assert f'"{private}' not in text
    assert "/" not in json.dumps({key: found[key] for key in ("platform", "python", "cores")})


def test_the_commit_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git_commit"] is None
