"""Masked = removed holds on every structure, and fails wherever surgery goes wrong."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepress.coupling import Coupling, apply_removal, check_removal, trace
from sepress.coupling.check import TOLERANCE


def third(coupling: Coupling, seed: int = 0) -> dict[str, tuple[int, ...]]:
    generator = np.random.default_rng(seed)
    return {
        g.name: tuple(sorted(generator.permutation(g.units)[: max(1, g.units // 3)].tolist()))
        for g in coupling.prunable()
    }


@pytest.mark.parametrize("name", nets.NETS)
def test_masked_and_removed_channels_give_equal_outputs(name: str) -> None:
    net, inputs = nets.build(name)
    coupling = trace(net, inputs)
    removed = third(coupling)
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    check, culprits = check_removal(net, pruned, coupling, removed, inputs)
    assert check.passed
    assert check.relative_error is not None
    assert check.relative_error <= TOLERANCE
    assert culprits == {}


def shifted(coupling: Coupling, group: int, member: int) -> Coupling:
    """The same coupling with one slot list rolled by one."""
    wrong = coupling.groups[group].members[member]
    members = list(coupling.groups[group].members)
    members[member] = replace(wrong, index=np.roll(wrong.index, 1))
    groups = list(coupling.groups)
    groups[group] = replace(groups[group], members=tuple(members))
    return replace(coupling, groups=tuple(groups))


def outputs(net: nn.Module, inputs: Tensor) -> Tensor:
    leaves = torch.utils._pytree.tree_leaves(net(inputs))
    return torch.cat(
        [x.detach().double().flatten(1) if x.dim() > 1 else x.detach()[:, None] for x in leaves], 1
    )


def test_one_slot_list_shifted_by_one_fails_the_check() -> None:
    """The negative control: every member of every group of every small net, one at a time (358 of 361 fail).

    A shift that leaves the pruned net's outputs as they were (the removed slots stay the same, or
    they take no part in the outputs) is no error; all others must fail, and the culprits must name
    a group of the net.
    """
    wrong = caught = 0
    for name in nets.NETS:
        net, inputs = nets.build(name)
        coupling = trace(net, inputs)
        removed = third(coupling)
        right = copy.deepcopy(net)
        apply_removal(right, coupling, removed)
        expected = outputs(right, inputs)
        for number, group in enumerate(coupling.groups):
            for member in range(len(group.members)) if group.name in removed else ():
                bad = copy.deepcopy(net)
                apply_removal(bad, shifted(coupling, number, member), removed)
                if torch.allclose(outputs(bad, inputs), expected, rtol=1e-3, atol=1e-6):
                    continue
                wrong += 1
                check, culprits = check_removal(net, bad, coupling, removed, inputs)
                caught += check.passed is False
                assert culprits
                assert set(culprits) <= set(removed)
    assert wrong >= 300
    assert caught == wrong


def test_survivors_along_a_convolution_of_channels_become_neighbours_and_pass_the_check() -> None:
    net, inputs = nets.build("channel conv")
    coupling = trace(net, inputs, eca_neighbours=True)
    removed, kept = {"a.0": (1, 2, 6)}, [0, 3, 4, 5, 7]
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    a = net.a(inputs).relu()[:, kept]
    s = F.conv1d(a.mean((2, 3))[:, None], net.along.weight, padding=1).sigmoid()[:, 0, :, None, None]
    x = net.b[1](F.conv2d(a * s, net.b[0].weight[:, kept], padding=1)).relu()
    torch.testing.assert_close(pruned(inputs), net.head(x))
    assert check_removal(net, pruned, coupling, removed, inputs)[0].passed
    shift = shifted(coupling, 0, 0)  # the first filters go from their places, one further on
    wrong = copy.deepcopy(net)
    apply_removal(wrong, shift, removed)
    assert check_removal(net, wrong, coupling, removed, inputs)[0].passed is False


def test_the_first_wrong_layer_names_its_groups() -> None:
    net, inputs = nets.build("plain")
    coupling = trace(net, inputs)
    removed = {"a.0": (1,), "b.0": (2,)}
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    with torch.no_grad():
        pruned.b[1].bias[0] += 1
    check, culprits = check_removal(net, pruned, coupling, removed, inputs)
    assert check.passed is False
    assert list(culprits) == ["b.0"]
    assert "b.1" in culprits["b.0"]


def test_a_forward_that_breaks_names_the_groups_it_breaks_at() -> None:
    net, inputs = nets.build("plain")
    coupling = trace(net, inputs)
    removed = {"a.0": (1,)}
    pruned = copy.deepcopy(net)
    check, culprits = check_removal(net, pruned, coupling, removed, inputs)  # nothing was removed
    assert check.passed is False
    assert list(culprits) == ["a.0"]
    pruned.b[0].weight = nn.Parameter(pruned.b[0].weight[:, 1:].detach())
    check, culprits = check_removal(net, pruned, coupling, removed, inputs)
    assert check.relative_error is None
    assert "fails" in str(check.reason)
    assert list(culprits) == ["a.0"]


def test_outputs_that_hardly_depend_on_the_image_make_the_check_vacuous() -> None:
    net, inputs = nets.build("plain")
    with torch.no_grad():
        net.head.fc.weight.mul_(1e-9)
    coupling = trace(net, inputs)
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, {"a.0": (1,)})
    check, culprits = check_removal(net, pruned, coupling, {"a.0": (1,)}, inputs)
    assert (check.passed, check.relative_error, culprits) == (None, None, {})
    assert "same for every image" in str(check.reason)
    with torch.no_grad():
        pruned.head.fc.bias.add_(1)
    assert check_removal(net, pruned, coupling, {"a.0": (1,)}, inputs)[0].passed is False


def test_tiny_outputs_hide_nothing() -> None:
    net, inputs = nets.build("plain")
    with torch.no_grad():
        net.head.fc.weight.mul_(1e-9)
        net.head.fc.bias.zero_()
    coupling = trace(net, inputs)
    removed = {"a.0": (1,)}
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    assert check_removal(net, pruned, coupling, removed, inputs)[0].passed
    with torch.no_grad():
        pruned.b[0].weight.mul_(1.01)
    assert check_removal(net, pruned, coupling, removed, inputs)[0].passed is False


def test_one_image_is_enough() -> None:
    net, inputs = nets.build("se residual")
    coupling = trace(net, inputs)
    removed = third(coupling)
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    assert check_removal(net, pruned, coupling, removed, inputs[:1])[0].passed


def test_rounding_is_told_from_errors_in_float64() -> None:
    net, inputs = nets.build("plain")
    coupling = trace(net, inputs)
    removed = third(coupling)
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    half, other = copy.deepcopy(net).bfloat16(), copy.deepcopy(pruned).bfloat16()
    check, _ = check_removal(half, other, coupling, removed, inputs.bfloat16())
    assert check.passed
    assert check.relative_error is not None
    assert check.relative_error < 1e-9


def test_a_device_with_operations_of_its_own_is_traced_and_checked_on_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, inputs = nets.build("plain")
    expected = trace(net, inputs)
    removed = third(expected)
    pruned = copy.deepcopy(net)
    apply_removal(pruned, expected, removed)
    tracing = importlib.import_module("sepress.coupling.trace")
    monkeypatch.setattr(tracing, "OWN_OPERATIONS", frozenset({"cpu"}))  # as if this were mps
    homes: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: homes.append(module))
    try:
        coupling = trace(net, inputs)
        check, culprits = check_removal(net, pruned, coupling, removed, inputs)
    finally:
        handle.remove()
    assert [(g.name, g.units) for g in coupling.groups] == [(g.name, g.units) for g in expected.groups]
    assert check.passed
    assert culprits == {}
    assert homes
    assert not {*homes} & {*net.modules(), *pruned.modules()}


def test_the_check_leaves_both_nets_as_they_were() -> None:
    net, inputs = nets.build("standardised")
    coupling = trace(net, inputs)
    removed = third(coupling)
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    pruned.train()
    before = [{key: value.clone() for key, value in n.state_dict().items()} for n in (net, pruned)]
    check_removal(net, pruned, coupling, removed, inputs)
    for state, model in zip(before, (net, pruned), strict=True):
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert pruned.training
    assert not net.training


def test_a_cache_filled_by_the_first_forward_does_not_change_the_path_of_the_next() -> None:
    class Cached(nets.Plain):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.seen = nn.Parameter(torch.ones(4)), {}

        def forward(self, x: Tensor) -> Tensor:
            if "shift" not in self.seen:
                self.seen["shift"] = self.shift.cumsum(0)[1].reshape(1, 1, 1, 1)
            return super().forward(x + self.seen["shift"])

    net, inputs = nets.lively(Cached()), torch.randn(2, 3, 12, 12)
    coupling = trace(net, inputs)
    assert net.seen == {}
    removed = third(coupling)
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    assert check_removal(net, pruned, coupling, removed, inputs)[0].passed
    assert net.seen == {}


def test_statistics_of_a_flat_weight_change_with_what_is_read_alone() -> None:
    """timm's ScaledStdConv flattens (in, k, k): input channels gone alone change them."""

    class FlatStandardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            w = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
            return F.conv2d(x, w, self.bias, self.stride, self.padding, 1, self.groups)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), FlatStandardised(8, 12, 3, groups=2)
            self.head = nets.Head(12)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x).relu()).relu())

    net, inputs = nets.lively(Net()), nets.images(3)
    coupling = trace(net, inputs)
    for removed in ({"a": (1,)}, {"b": (2,)}, {"a": (0, 3), "b": (0,)}):
        pruned = copy.deepcopy(net)
        apply_removal(pruned, coupling, removed)
        check, culprits = check_removal(net, pruned, coupling, removed, inputs)
        assert check.passed, (removed, check, culprits)


def test_a_bias_of_attention_that_a_layer_makes_keeps_its_heads() -> None:
    class Biased(nn.Module):
        """MaxViT's: a bias for every head and pair of positions, from a table of offsets."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.qkv, self.bias = nn.Conv2d(3, 12, 4, stride=4), nn.Linear(12, 36), nn.Linear(2, 3)
            self.head = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
            places = torch.arange(9.0)
            offsets = torch.stack([places[:, None] - places, places[:, None] + places], -1)  # (9, 9, 2)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(offsets).permute(2, 0, 1)[None])
            return self.head(y.transpose(1, 2).reshape(x.shape).mean(1))

    coupling = trace(nets.lively(Biased()), nets.images(1))
    assert "heads that no layer made" in str(coupling.group("bias").frozen_because)
