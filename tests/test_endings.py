"""Post-processing after the last layer is left out of the trace; a decision between layers is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sepress.coupling import Coupling, apply_removal, check_removal, trace
from sepress.errors import InputError

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Detector(nn.Module):
    """A trunk with a gate, two heads over positions, and a choice of boxes like SSD's: a threshold, top-k."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.se = nets.conv_bn(3, 8), nets.SqueezeExcite(8, 4)
        self.body = nets.conv_bn(8, 12)
        self.classes, self.boxes = nn.Conv2d(12, 3, 1), nn.Conv2d(12, 4, 1)
        self.register_buffer("anchors", torch.arange(144.0).view(1, 144, 1))

    def heads(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(self.se(self.stem(images).relu())).relu()
        return tuple(head(x).flatten(2).transpose(1, 2) for head in (self.classes, self.boxes))

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        logits, boxes = self.heads(images)
        boxes = boxes.exp() + self.anchors
        found = []
        for scores, box in zip(logits.softmax(-1), boxes, strict=True):
            best, label = scores[:, 1:].max(-1)
            keep = (best > 0.4).nonzero()[:, 0]
            if len(keep) == 0:
                keep = best.topk(2).indices
            order = best[keep].argsort(descending=True)[:10]
            size = box.mean().item()
            found.append({"boxes": box[keep][order] / size, "labels": label[keep][order]})
        return found


class TwoStages(Detector):
    """The second stage's layers read what lies in boxes that the first one chose."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.second = nets.conv_bn(12, 6), nn.Linear(6 * 4, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.body(self.se(self.stem(images).relu())).relu()
        scores = self.classes(x).mean(1).flatten()
        positions = scores.topk(3).indices
        small, large = positions[scores[positions] < 1e9], positions[scores[positions] > 1e9]
        x = self.pool(x)
        result = x.new_zeros(3, x.shape[1], 2, 2)
        start = 0
        for level in (small, large):  # no box is ever large
            regions = torch.stack([level % 12, level // 12, level % 12 + 2, level // 12 + 2], 1).to(x)
            regions = torch.cat([torch.zeros_like(regions[:, :1]), regions], 1)
            place = torch.arange(start, start + len(level))
            result[place] = torch.ops.torchvision.roi_align(x, regions, 1.0, 2, 2, 1, False)
            start += len(level)
        return self.second(result.flatten(1))


def remove_some(
    net: nn.Module, coupling: Coupling, images: Tensor = IMAGES
) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    generator = np.random.default_rng(0)
    removed = {
        g.name: tuple(sorted(generator.permutation(g.units)[: max(1, g.units // 3)].tolist()))
        for g in coupling.prunable()
    }
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    check, culprits = check_removal(net, pruned, coupling, removed, images)
    assert check.passed, check
    assert culprits == {}
    return pruned, removed


# ---- post-processing ------------------------------------------------------------------------------
def test_raw_heads_in_front_of_post_processing_are_the_outputs() -> None:
    net = nets.lively(Detector())
    coupling = trace(net, IMAGES)
    assert {g.name: g.frozen_because for g in coupling.groups if g.role == "frozen"} == {
        "classes": "network output",
        "boxes": "network output",
    }
    assert [(g.name, g.role) for g in coupling.prunable()] == [
        ("stem.0", "gated"),
        ("se.squeeze", "se_hidden"),
        ("body.0", "ungated"),
    ]


def test_a_pruned_detector_gives_boxes_of_the_same_structure_and_trains() -> None:
    net = nets.lively(Detector())
    pruned, _ = remove_some(net, trace(net, IMAGES))
    for before, after in zip(net(IMAGES), pruned(IMAGES), strict=True):
        assert before.keys() == after.keys()
        assert after["boxes"].shape[1:] == (4,)
        assert len(after["boxes"]) == len(after["labels"]) <= 10
    logits, boxes = pruned.train().heads(IMAGES)
    (logits.square().mean() + boxes.square().mean()).backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_the_check_of_a_detector_compares_its_raw_heads() -> None:
    """One box coordinate moves by 1 %: among chosen boxes that may not show, in the head it does."""
    net = nets.lively(Detector())
    coupling = trace(net, IMAGES)
    pruned, removed = remove_some(net, coupling)
    with torch.no_grad():
        pruned.boxes.bias[2] *= 1.01
    check, _ = check_removal(net, pruned, coupling, removed, IMAGES)
    assert check.passed is False


def test_logits_returned_beside_their_class_are_compared() -> None:
    class WithClass(nets.Plain):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = super().forward(x)
            return logits.argmax(1), logits

    net = nets.lively(WithClass())
    coupling = trace(net, IMAGES)
    pruned, removed = remove_some(net, coupling)
    with torch.no_grad():
        pruned.head.fc.bias[0] += 0.01
    assert check_removal(net, pruned, coupling, removed, IMAGES)[0].passed is False


def test_layers_behind_chosen_regions_are_traced_and_compared() -> None:
    pytest.importorskip("torchvision")
    net = nets.lively(TwoStages())
    coupling = trace(net, IMAGES[:1])
    pool = coupling.group("pool.0")
    assert pool.role == "ungated"
    columns = next(m for m in pool.members if m.parameter == "second.weight")
    assert columns.unit.tolist() == np.repeat(np.arange(6), 4).tolist()
    pruned, _ = remove_some(net, coupling)
    assert pruned(IMAGES[:1]).shape == (3, 5)


def test_order_and_thresholds_that_rounding_flips_fail_no_check() -> None:
    """All scores are within rounding of each other, so both nets would choose other positions."""

    class Ties(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nets.conv_bn(3, 8), nets.conv_bn(8, 6), nets.Head(6)
            self.score = nn.Conv2d(8, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            score = 1 + 1e-7 * self.score(x).flatten()
            best = score.topk(30).indices
            spread = self.b(x).flatten(2)[:, :, best]
            return self.head(spread * (score[best] > 1))

    net = nets.lively(Ties())
    remove_some(net, trace(net, IMAGES[:1]))


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_torchvisions_detectors_are_pruned_up_to_their_heads(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    net = nets.lively(models.get_model(name, weights=None, weights_backbone=None, num_classes=5))
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    coupling = trace(net, images)
    frozen = {producer for g in coupling.groups if g.role == "frozen" for producer in g.producers}
    if "ssd" in name:
        heads = {
            f"head.{kind}_head.module_list.{i}.1"
            for kind in ("classification", "regression")
            for i in range(6)
        }
        assert {g.frozen_because for g in coupling.groups if g.role == "frozen"} == {"network output"}
    else:
        heads = {"rpn.head.cls_logits", "rpn.head.bbox_pred"}
        heads |= {"roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"}
    assert frozen == heads
    assert len(coupling.gates) == 8
    pruned, _ = remove_some(net, coupling, images)
    assert [sorted(found) for found in pruned(images)] == [["boxes", "labels", "scores"]] * 2
    targets = [{"boxes": torch.tensor([[10.0, 10, 90, 90]]), "labels": torch.tensor([1])}] * 2
    losses = pruned.train()(list(images), targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


# ---- decisions ------------------------------------------------------------------------------------
def by_sum(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x * 2
    return x


def by_item(x: Tensor) -> Tensor:
    return x * x.mean().item()


def by_list(x: Tensor) -> Tensor:
    return x * max(x.flatten().tolist())


def by_array(x: Tensor) -> Tensor:
    return x * float(x.numpy().max())


def by_float(x: Tensor) -> Tensor:
    return x * float(x.max())


def by_equality(x: Tensor) -> Tensor:
    return x if torch.equal(x, x.relu()) else x.relu()


def by_loop(x: Tensor) -> Tensor:
    while x.abs().max() > 1:
        x = x / 2
    return x


def by_count(x: Tensor) -> Tensor:
    return x * int((x > 0).sum())


DECISIONS = [by_sum, by_item, by_list, by_array, by_float, by_equality, by_loop, by_count]


class Deciding(nn.Module):
    """A decision between two layers, or after the last one."""

    def __init__(self, decide: Callable[[Tensor], Tensor], *, at_the_end: bool) -> None:
        super().__init__()
        self.a, self.b, self.head = nets.conv_bn(3, 8), nets.conv_bn(8, 6), nets.Head(6)
        self.decide, self.at_the_end = decide, at_the_end

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.b(x if self.at_the_end else self.decide(x)).relu()
        x = self.head(x)
        return self.decide(x) if self.at_the_end else x


@pytest.mark.parametrize("decide", DECISIONS)
def test_a_decision_between_layers_is_refused_with_its_line(decide: Callable[[Tensor], Tensor]) -> None:
    net = nets.lively(Deciding(decide, at_the_end=False))
    with pytest.raises(InputError, match=r"test_endings\.py, line \d+: ") as caught:
        trace(net, IMAGES)
    line = re.search(r"line (\d+)", str(caught.value))
    assert line is not None
    first = decide.__code__.co_firstlineno
    assert first < int(line[1]) <= first + 2


@pytest.mark.parametrize("decide", DECISIONS)
def test_a_decision_after_the_last_layer_is_post_processing(decide: Callable[[Tensor], Tensor]) -> None:
    net = nets.lively(Deciding(decide, at_the_end=True))
    coupling = trace(net, IMAGES)
    assert coupling.group("head.fc").frozen_because == "network output"
    remove_some(net, coupling)


def test_a_decision_that_may_lead_to_layers_that_did_not_run_is_refused() -> None:
    class EarlyExit(nets.Plain):
        def __init__(self) -> None:
            super().__init__()
            self.second = nets.Plain()

        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            if logits.max() > -1e9:
                return logits
            return self.second(x)

    with pytest.raises(InputError, match=r"if logits\.max\(\) > -1e9"):
        trace(nets.lively(EarlyExit()), IMAGES)


def test_positions_picked_by_a_mask_are_followed() -> None:
    """Which positions they are depends on the image; which channels doesn't."""

    class Masked(nets.Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            bright = (x.mean(1) > x.mean()).flatten()
            x = self.b(x * 1.0).relu().flatten(2)[:, :, bright]
            return self.head(x)

    net = nets.lively(Masked())
    coupling = trace(net, IMAGES[:1])
    assert all(g.role == "ungated" for g in coupling.groups if g.name != "head.fc")
    remove_some(net, coupling)


@pytest.mark.parametrize("mask", ["channels", "everything"])
def test_channels_picked_by_a_mask_are_frozen(mask: str) -> None:
    class Masked(nets.Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            picked = x[:, x.mean((0, 2, 3)) > -1] if mask == "channels" else x[x > -1].view_as(x)
            return self.head(self.b(picked).relu())

    net = nets.lively(Masked())
    coupling = trace(net, IMAGES[:1])
    assert coupling.group("a.0").role == "frozen"
    assert coupling.group("b.0").role == "ungated"
    remove_some(net, coupling)


def test_a_path_that_depends_on_how_many_were_picked_fails_the_check_on_images_that_take_another() -> None:
    class ByCount(nets.Plain):
        def forward(self, x: Tensor) -> Tensor:
            bright = (x.mean(1) > 0.5).nonzero()
            x = self.a(x).relu()
            if len(bright) > 10:
                x = x.sqrt()
            return self.head(self.b(x).relu())

    net = nets.lively(ByCount())
    coupling = trace(net, torch.zeros(1, 3, 12, 12))
    removed = {"a.0": (1,)}
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    images = torch.stack([torch.zeros(3, 12, 12), torch.ones(3, 12, 12)])
    check, culprits = check_removal(net, pruned, coupling, removed, images)
    assert check.passed is False
    assert "takes another path" in str(check.reason)
    assert culprits
