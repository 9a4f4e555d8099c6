"""torch-pruning's groups are ours, channel by channel, or the difference is shown to be its error."""

from __future__ import annotations

import peers
import pytest
import torch
from nets import Head, conv_bn, lively
from torch import Tensor, nn

from sepress.coupling import Coupling, trace

SAMPLE = (
    "timm:mobilenetv3_small_050",  # inverted bottlenecks
    "timm:seresnet18",  # residual streams
    "timm:regnety_002",  # grouped convolutions
    "timm:ese_vovnet19b_slim_dw",  # dense concatenation
    "timm:test_efficientnet_gn",  # group norm
    "timm:test_nfnet",  # weights that are computed
)


@pytest.mark.parametrize("reference", SAMPLE)
def test_groups_are_torch_prunings_channel_by_channel(reference: str) -> None:
    comparison = peers.compare_named(reference)
    assert comparison.same > 100
    assert comparison.differences == ()


UNDECIDED = {
    "timm:regnetz_c16_evos": "EvoNorm's statistics change with removal, so a difference shows nothing"
}


@pytest.mark.zoo
@pytest.mark.timeout(0)  # a child's own limits hold
@pytest.mark.parametrize(
    "reference",
    [
        pytest.param(name, marks=pytest.mark.xfail(reason=UNDECIDED[name], strict=True))
        if name in UNDECIDED
        else name
        for name in peers.NETS
    ],
)
def test_every_difference_is_torch_prunings_error(reference: str) -> None:
    graph = peers.in_child(peers.peer_finishes, reference, seconds=60)
    if graph is not True:
        pytest.skip(f"torch-pruning alone: {graph}")
    comparison = peers.in_child(peers.compare_named, reference, seconds=240)
    assert not isinstance(comparison, str), f"not compared, though torch-pruning has a graph: {comparison}"
    assert comparison.same > 0
    assert comparison.ours_to_answer == ()


class Parts(nn.Module):
    """Splits at widths that it keeps as numbers, which torch-pruning doesn't know of."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = [4, 8]
        self.stem = conv_bn(3, 12)
        self.left, self.right = conv_bn(4, 6), conv_bn(8, 6)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).relu().split(self.widths, 1)
        return self.head((self.left(left) + self.right(right)).relu())


def test_a_unit_that_torch_pruning_cuts_wrong_is_told_from_one_that_both_cut_right() -> None:
    comparison = peers.compare(lively(Parts()), torch.randn(4, 3, 8, 8))
    assert comparison.same == 6  # of the sum
    assert {d.verdict for d in comparison.differences} == {"torch-pruning: the forward fails"}
    assert all(d.we_say == "exact" for d in comparison.differences)
    assert sum(d.times * len(d.ours) for d in comparison.differences) == 12
    assert comparison.ours_to_answer == ()


def test_channels_that_only_torch_pruning_can_remove_are_ours_to_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_careful(net: nn.Module, images: Tensor) -> Coupling:
        return trace(net, images).with_frozen({"0.0": "for a test"})

    monkeypatch.setattr(peers, "trace", too_careful)
    net = lively(nn.Sequential(conv_bn(3, 5), nn.ReLU(), conv_bn(5, 7), nn.ReLU(), Head(7)))
    comparison = peers.compare(net, torch.randn(4, 3, 8, 8))
    assert comparison.same == 7
    (difference,) = comparison.ours_to_answer
    assert (difference.times, difference.we_say, difference.they_say) == (5, "frozen: for a test", "exact")


def test_a_difference_that_statistics_may_make_is_held_against_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "judge", lambda *_: "differs from the masked net by 0.1 of its spread")
    monkeypatch.setattr(peers, "trace", lambda net, x: trace(net, x).with_frozen({"0.0": "for a test"}))
    for norm, counts in ((nn.BatchNorm2d(5), 0), (nn.GroupNorm(1, 5), 1)):
        net = lively(
            nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3), norm), nn.ReLU(), conv_bn(5, 7), Head(7))
        )
        assert len(peers.compare(net, torch.randn(4, 3, 8, 8)).ours_to_answer) == counts


def spin() -> None:
    while True:
        pass


def test_a_child_that_takes_too_long_or_fails_is_told() -> None:
    assert peers.in_child(spin, seconds=1) == "not done in 1 s of CPU"
    assert peers.in_child(int, "x", seconds=20).startswith("ValueError")
    assert peers.in_child(int, "7", seconds=20) == 7
