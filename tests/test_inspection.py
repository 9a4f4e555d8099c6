"""What `inspect` says of a net's structure."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from sepress.bundle import load_model
from sepress.inspection import inspect_bundle
from sepress.measure import count_macs, count_params


def test_json_counts_gates_groups_macs_and_params_and_shares_add_up_to_one() -> None:
    bundle = load_model("timm:mobilenetv3_small_050", weights="none")
    found = inspect_bundle(bundle)
    value = found.to_json()
    assert len(value["gates"]) == 9  # SE in 9 of MobileNetV3-small's 11 blocks (Howard et al. 2019, table 2)
    assert all({"name", "channels"} <= gate.keys() for gate in value["gates"])
    assert all({"name", "role", "width", "gates"} <= group.keys() for group in value["groups"])
    assert value["macs"] == count_macs(bundle.net, torch.randn(1, 3, 224, 224))
    assert value["params"] == count_params(bundle.net)
    named = {gate["name"] for gate in value["gates"]}
    assert {name for group in value["groups"] for name in group["gates"]} == named
    assert abs(sum(found.shares().values()) - 1) < 1e-9


def test_a_net_without_gates_is_said_to_have_none_and_what_is_frozen_says_why() -> None:
    found = inspect_bundle(load_model("torchvision:mobilenet_v2", weights="none"))
    text = io.StringIO()
    Console(file=text, width=100).print(found.render())
    assert "No Squeeze-and-Excitation gate was found" in text.getvalue()
    assert "frozen: network output" in text.getvalue()
    assert found.to_json()["gates"] == []
