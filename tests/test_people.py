"""Nets of other people's code: gates found, pruned, checked, trained, saved and exported."""

from __future__ import annotations

import copy
from pathlib import Path

import people
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import sepress
from sepress.coupling import Coupling, apply_removal, check_removal, trace
from sepress.export import export_onnx
from sepress.parity import check_onnx_parity
from sepress.types import Removed

# What stays because of how the code is written; every other group but the outputs is free.
FROZEN = {
    "computed weights": {"a": "a weight computed by 'mv'", "b": "a weight computed by 'mv'"},
}
GATED_GROUPS = {  # the groups that gates judge, by hand
    "se before and beside": {"stem"},
    "u-net": {"enc1.conv2", "enc2.conv2", "enc3.conv2", "dec1"},
    "cbam": {"stem"},
    "scse": {"body"},
    "shared module": {"a"},  # both of its calls: the module's weights tie the two streams
    "no squash": {"conv1"},  # its halves are multiplied with each other
    "ecapa-tdnn": {"stem"},
    "tied gates": {"a"},
    "mobilenetv3 in sequentials": {"features.3.conv.0", "features.4.conv.0", "features.5.conv.0"},
}


def third(coupling: Coupling) -> Removed:
    return {g.name: tuple(range(0, g.units - 1, 3)) for g in coupling.prunable()}


def removed_copy(net: nn.Module, coupling: Coupling, removed: Removed) -> nn.Module:
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    return pruned


def tensors(output: object) -> list[Tensor]:
    """Return the tensors of an output, those of a dataclass included."""
    output = vars(output) if isinstance(output, people.Prediction) else output
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", people.NETS)
def test_every_gate_is_found_and_nothing_is_frozen_without_need(name: str) -> None:
    net, inputs = people.build(name)
    coupling = trace(net, inputs)
    assert len(coupling.gates) == people.NETS[name].gates
    frozen = {
        g.name: str(g.frozen_because)
        for g in coupling.groups
        if g.role == "frozen" and g.frozen_because != "network output"
    }
    expected = FROZEN.get(name, {})
    assert frozen.keys() == expected.keys()
    assert all(frozen[group].startswith(why) for group, why in expected.items())
    if name in GATED_GROUPS:
        assert {gate.group for gate in coupling.gates} == GATED_GROUPS[name]


@pytest.mark.parametrize("name", people.NETS)
def test_a_third_of_every_group_goes_exactly_and_the_rest_trains(name: str) -> None:
    net, inputs = people.build(name)
    coupling = trace(net, inputs)
    removed = third(coupling)
    pruned = removed_copy(net, coupling, removed)
    check, culprits = check_removal(net, pruned, coupling, removed, inputs)
    assert check.passed, (check, culprits)
    before, after = tensors(net(inputs)), tensors(pruned(inputs))
    assert [x.shape for x in before] == [x.shape for x in after]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pruned(inputs[:1])
    assert coupling.count_macs(removed) == counter.get_total_flops() // 2
    assert coupling.count_params(removed) == sum(p.numel() for p in pruned.parameters())
    again = trace(pruned, inputs)
    second = {g.name: (0,) for g in again.prunable()}
    check, culprits = check_removal(pruned, removed_copy(pruned, again, second), again, second, inputs)
    assert check.passed, (check, culprits)
    torch.stack([x.square().sum() for x in tensors(pruned.train()(inputs))]).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in pruned.parameters())
    assert sum(p.grad is not None for p in pruned.parameters()) >= sum(
        1 for p in pruned.parameters() if p.requires_grad
    ) - len(list(getattr(net, "unused", nn.Identity()).parameters()))


@pytest.mark.parametrize("name", people.NETS)
def test_the_wrong_channels_fail_the_check(name: str) -> None:
    """The negative control: the same plan, but one group's units each moved on by one in the check."""
    net, inputs = people.build(name)
    coupling = trace(net, inputs)
    group = max(
        (g for g in coupling.prunable() if g.role != "se_hidden"), key=lambda g: g.units, default=None
    )
    if group is None:
        pytest.skip("only the inside of its gate can go")
    pruned = removed_copy(net, coupling, {group.name: (0,)})
    check, _ = check_removal(net, pruned, coupling, {group.name: (1,)}, inputs)
    assert check.passed is False


@pytest.mark.parametrize("name", [n for n, s in people.NETS.items() if len(s.shape) == 3])
def test_a_pruned_net_is_saved_loaded_and_exported(name: str, tmp_path: Path) -> None:
    net, inputs = people.build(name)
    images = torch.randn(12, *inputs.shape[1:], generator=torch.Generator().manual_seed(2))
    result = sepress.prune(net, calibration=images, ratio=0.3, round_to=1, min_width=1)
    assert result.report.checks["masked_equals_removed"].passed
    factory = f"people:{people.NETS[name].build.__name__}"
    sepress.save(result.net, tmp_path / "net.safetensors", arch=factory)
    loaded = sepress.load(tmp_path / "net.safetensors", arch=factory).net.eval()
    with torch.no_grad():
        for mine, theirs in zip(tensors(result.net.eval()(images)), tensors(loaded(images)), strict=True):
            assert torch.equal(mine, theirs)
    export_onnx(loaded, tmp_path / "net.onnx", example=images[:1])
    parity = check_onnx_parity(loaded, tmp_path / "net.onnx", images)
    assert parity.passed, parity
