"""What `inspect` says of a net's structure."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from sepress.bundle import load_model
from sepress.coupling import trace
from sepress.inspection import ChannelShares, channel_shares, inspect_bundle
from sepress.measure import count_macs, count_params
from tests import nets


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        # conv a makes 8, conv b 6, the head 5 outputs
        ("plain", ChannelShares(gated=0, ungated=14, se_hidden=0, frozen=0, outputs=5)),
        # stem 8, outer 8 and expand 8 share the gated stream; inner 6, squeeze 4
        ("se residual", ChannelShares(gated=24, ungated=6, se_hidden=4, frozen=0, outputs=5)),
    ],
)
def test_shares_count_what_every_layer_makes(name: str, shares: ChannelShares) -> None:
    counted = channel_shares(trace(*nets.build(name)))
    assert counted == shares
    assert counted.free == 1


def test_a_layer_that_nothing_follows_counts_as_frozen() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nets.conv_bn(3, 8), nets.Head(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.conv2d(self.a(x), torch.ones(6, 8, 3, 3)))

    coupling = trace(Computed().eval(), nets.images())
    shares = channel_shares(coupling)
    assert shares == ChannelShares(gated=0, ungated=0, se_hidden=0, frozen=8 + 6, outputs=5)
    assert (shares.free, shares.share("frozen")) == (0, 1)
    opaque = coupling.producers[-1]
    assert (opaque.module, str(opaque.reason)) == ("", "convolution with a weight that is not a parameter")


def test_a_net_of_outputs_only_is_free() -> None:
    shares = channel_shares(trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), torch.randn(1, 3, 2, 2)))
    assert shares == ChannelShares(gated=0, ungated=0, se_hidden=0, frozen=0, outputs=4)
    assert (shares.free, shares.share("ungated")) == (1, 0)


@pytest.mark.parametrize("name", ["seresnet18", "mobilenetv3_small_050", "regnety_002", "ghostnet_050"])
def test_shares_add_up_to_the_output_channels_of_all_layers(name: str) -> None:
    net = load_model(f"timm:{name}", weights="none").net
    shares = channel_shares(trace(net.eval(), torch.randn(1, 3, 64, 64)))
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    made = sum(m.out_channels if isinstance(m, nn.Conv2d) else m.out_features for m in layers)
    assert shares.total + shares.outputs == made
    assert shares.outputs == 1000


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
