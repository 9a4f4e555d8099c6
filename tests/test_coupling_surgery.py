"""Removed units are gone from every parameter, number and count; everything else is as it was."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sepress.coupling import Coupling, apply_patch, apply_removal, attribute_patches, sync_attributes, trace
from sepress.errors import InputError
from sepress.types import Removed


def every_other(coupling: Coupling) -> dict[str, tuple[int, ...]]:
    return {g.name: tuple(range(0, g.units - 1, 2)) for g in coupling.prunable()}


def pruned_copy(net: nn.Module, coupling: Coupling, removed: Removed) -> nn.Module:
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    return pruned


def macs(net: nn.Module, inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(inputs[:1])
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", nets.NETS)
def test_a_pruned_net_keeps_its_outputs_shape_trains_and_costs_what_was_predicted(name: str) -> None:
    net, inputs = nets.build(name)
    coupling = trace(net, inputs)
    removed = every_other(coupling)
    assert removed
    pruned = pruned_copy(net, coupling, removed)
    for model, gone in ((net, {}), (pruned, removed)):
        assert coupling.count_macs(gone) == macs(model, inputs)
        assert coupling.count_params(gone) == sum(p.numel() for p in model.parameters())
    assert coupling.count_macs(removed) < coupling.count_macs({})
    before, after = tree_leaves(net(inputs)), tree_leaves(pruned(inputs))
    assert [x.shape for x in before] == [x.shape for x in after]
    sum(x.square().sum() for x in tree_leaves(pruned.train()(inputs))).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())


@pytest.mark.parametrize("name", nets.NETS)
def test_a_pruned_net_can_be_traced_and_pruned_again(name: str) -> None:
    net, inputs = nets.build(name)
    coupling = trace(net, inputs)
    pruned = pruned_copy(net, coupling, {g.name: (0,) for g in coupling.prunable()})
    again = trace(pruned, inputs)
    assert [(g.name, g.role) for g in again.groups] == [(g.name, g.role) for g in coupling.groups]
    assert [g.units for g in again.groups] == [g.units - (g.role != "frozen") for g in coupling.groups]
    assert len(again.gates) == len(coupling.gates)


def test_exactly_the_removed_rows_and_columns_go() -> None:
    net, inputs = nets.build("plain")
    weight, bias = net.b[0].weight.detach().clone(), net.a[1].bias.detach().clone()
    pruned = pruned_copy(net, trace(net, inputs), {"a.0": (1, 6), "b.0": (0,)})
    assert torch.equal(pruned.b[0].weight, weight[1:][:, [0, 2, 3, 4, 5, 7]])
    assert torch.equal(pruned.a[1].bias, bias[[0, 2, 3, 4, 5, 7]])
    assert torch.equal(net.b[0].weight, weight)
    assert (pruned.a[0].out_channels, pruned.a[1].num_features, pruned.b[0].in_channels) == (6, 6, 6)
    assert (pruned.head.fc.in_features, pruned.head.fc.out_features) == (5, 5)


def test_a_grouped_convolution_keeps_its_groups_and_a_depthwise_one_loses_some() -> None:
    net, inputs = nets.build("grouped")
    grouped = pruned_copy(net, trace(net, inputs), {"a.0": (0, 5), "grouped.0": (1,)}).grouped[0]
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 8, 6)
    net, inputs = nets.build("depthwise")
    depthwise = pruned_copy(net, trace(net, inputs), {"a.0": (0, 5)}).depthwise
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (4, 4, 8)


def test_stored_sizes_are_rewritten() -> None:
    net, inputs = nets.build("stored split")
    assert pruned_copy(net, trace(net, inputs), {"a.0": (0, 1, 9)}).widths == [6, 3]
    net, inputs = nets.build("flattened")
    assert pruned_copy(net, trace(net, inputs), {"a.0": (0, 1)}).width == 4
    net, inputs = nets.build("attention")
    pruned = pruned_copy(net, trace(net, inputs), {"qkv": (0, 1)})
    assert (pruned.heads, pruned.head_width, pruned.scale) == (2, 4, 6**-0.5)


def test_tied_parameters_stay_tied() -> None:
    net, inputs = nets.build("tied")
    pruned = pruned_copy(net, trace(net, inputs), {"a.0": (2,)})
    assert pruned.one.weight is pruned.two.weight
    assert pruned.one.weight.shape == (5, 5, 3, 3)


def test_what_a_parameter_was_it_stays() -> None:
    net, inputs = nets.build("plain")
    coupling = trace(net, inputs)
    net.to(memory_format=torch.channels_last).to(torch.bfloat16)
    net.b[0].weight.requires_grad_(False)
    net.a[0].weight.grad = torch.ones_like(net.a[0].weight)
    apply_removal(net, coupling, {"a.0": (0,)})
    assert net.b[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert net.b[0].weight.dtype is torch.bfloat16
    assert not net.b[0].weight.requires_grad
    assert net.a[0].weight.requires_grad
    assert net.a[0].weight.grad is None
    assert not net.training


@pytest.mark.parametrize("name", ["inverted bottleneck", "stored split", "layer norm", "standardised"])
def test_shapes_and_patches_rebuild_every_number_of_a_pruned_net(name: str) -> None:
    net, inputs = nets.build(name)
    coupling = trace(net, inputs)
    removed = every_other(coupling)
    pruned = pruned_copy(net, coupling, removed)
    rebuilt = nets.NETS[name]().eval()
    for path, tensor in [*pruned.named_parameters(), *pruned.named_buffers()]:
        module, _, key = path.rpartition(".")
        owner = rebuilt.get_submodule(module)
        (owner._parameters if key in owner._parameters else owner._buffers)[key] = tensor
    sync_attributes(rebuilt)
    for patch in attribute_patches(coupling, removed):
        apply_patch(rebuilt, patch)
    assert torch.equal(rebuilt(inputs), pruned(inputs))
    for ours, theirs in zip(rebuilt.modules(), pruned.modules(), strict=True):
        public = [key for key in vars(ours) if not key.startswith("_")]
        assert {key: getattr(ours, key) for key in public} == {key: getattr(theirs, key) for key in public}


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"nowhere": (0,)}, "no coupling group 'nowhere'"),
        ({"a.0": (8,)}, "units 0..7"),
        ({"a.0": (-1,)}, "units 0..7"),
        ({"a.0": (1, 1)}, "units 0..7"),
        ({"a.0": tuple(range(8))}, "empty"),
        ({"head.fc": (0,)}, "network output"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(removed: Removed, message: str) -> None:
    net, inputs = nets.build("plain")
    coupling = trace(net, inputs)
    shapes = [p.shape for p in net.parameters()]
    with pytest.raises(InputError, match=message):
        apply_removal(net, coupling, {"b.0": (0,), **removed})
    assert [p.shape for p in net.parameters()] == shapes


def test_a_group_frozen_later_keeps_its_place_and_says_why() -> None:
    coupling = trace(*nets.build("plain"))
    frozen = coupling.with_frozen({"a.0": "because"})
    assert [group.name for group in frozen.prunable()] == ["b.0"]
    assert frozen.group("a.0").frozen_because == "because"
    assert [group.name for group in frozen.groups] == [group.name for group in coupling.groups]
    assert frozen.count_macs({"b.0": (0,)}) == coupling.count_macs({"b.0": (0,)})
    with pytest.raises(InputError, match="no coupling group"):
        coupling.with_frozen({"nowhere": "because"})


def test_windows_laid_into_the_batch_count_in_full() -> None:
    class Windows(nets.Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            n, c, h, w = x.shape
            x = x.view(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(n * 4, c, h // 2, w // 2)
            return self.head(self.b(x)).view(n, 4, 5).mean(1)

    net, inputs = nets.lively(Windows()), torch.randn(2, 3, 12, 12)
    coupling = trace(net, inputs)
    assert coupling.count_macs({}) == macs(net, inputs)
    removed = every_other(coupling)
    assert coupling.count_macs(removed) == macs(pruned_copy(net, coupling, removed), inputs)
