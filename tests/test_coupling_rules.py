"""Each rule on a net whose channels are known by hand."""

from __future__ import annotations

import copy
import math

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepress.coupling import Coupling, apply_removal, check_removal, trace
from sepress.errors import InputError

Slot = tuple[str, int]


def slots_of(coupling: Coupling, name: str) -> dict[Slot, list[int]]:
    """The unit at each index of each (parameter, dim) that a group lives on."""
    members = coupling.group(name).members
    assert all((np.diff(member.index) > 0).all() for member in members)
    return {(m.parameter, m.dim): m.unit[np.argsort(m.index)].tolist() for m in members}


def traced(name: str) -> Coupling:
    return trace(*nets.build(name))


def conv_norm(name: str) -> list[Slot]:
    norm = ("weight", "bias", "running_mean", "running_var")
    return [(f"{name}.0.weight", 0), *[(f"{name}.1.{part}", 0) for part in norm]]


def expect(coupling: Coupling, name: str, slots: dict[Slot, list[int]]) -> None:
    assert slots_of(coupling, name) == slots


def straight(width: int, *slots: Slot) -> dict[Slot, list[int]]:
    return {slot: list(range(width)) for slot in slots}


def test_a_layer_makes_channels_that_its_norm_scales_and_the_next_layer_reads() -> None:
    coupling = traced("plain")
    expect(coupling, "a.0", straight(8, *conv_norm("a"), ("b.0.weight", 1)))
    expect(coupling, "b.0", straight(6, *conv_norm("b"), ("head.fc.weight", 1)))
    head = coupling.group("head.fc")
    assert (head.role, head.frozen_because) == ("frozen", "network output")


def test_layers_that_meet_at_an_add_share_their_channels() -> None:
    slots = straight(8, *conv_norm("stem"), *conv_norm("outer"), ("inner.0.weight", 1), ("head.fc.weight", 1))
    coupling = traced("residual")
    expect(coupling, "stem.0", slots)
    assert coupling.group("stem.0").producers == ("stem.0", "outer.0")
    expect(coupling, "inner.0", straight(6, *conv_norm("inner"), ("outer.0.weight", 1)))


def test_a_gate_ties_its_squeeze_and_expand_to_the_stream_and_its_hidden_layer_is_its_own() -> None:
    coupling = traced("se residual")
    slots = slots_of(coupling, "stem.0")
    se = [("se.squeeze.weight", 1), ("se.expand.weight", 0), ("se.expand.bias", 0)]
    assert all(slots[slot] == list(range(8)) for slot in se)
    hidden = [("se.squeeze.weight", 0), ("se.squeeze.bias", 0), ("se.expand.weight", 1)]
    expect(coupling, "se.squeeze", straight(4, *hidden))
    assert coupling.group("se.squeeze").role == "se_hidden"


def test_a_depthwise_convolution_passes_channels_on() -> None:
    coupling = traced("inverted bottleneck")
    slots = slots_of(coupling, "expand.0")
    for slot in [*conv_norm("expand"), *conv_norm("depthwise"), ("project.0.weight", 1)]:
        assert slots[slot] == list(range(12))
    assert ("depthwise.0.weight", 1) not in slots


def members_of(coupling: Coupling, group: str, parameter: str) -> list[list[int]]:
    """The indices of a parameter's one flat dim that go with each unit."""
    (dim,) = {m.dim for m in coupling.group(group).members if m.parameter == parameter and m.dim}
    found: list[list[int]] = [[] for _ in range(coupling.group(group).units)]
    for m in coupling.group(group).members:
        if (m.parameter, m.dim) == (parameter, dim):
            for unit, index in zip(m.unit.tolist(), m.index.tolist(), strict=True):
                found[unit].append(index)
    return found


def test_a_flat_bank_of_weights_has_an_output_and_an_input_axis_on_its_one_dim() -> None:
    """conditional: x (8) -> expand (12 out, 8 in, 9 taps flat) -> depthwise -> project -> x, 3 experts."""
    coupling = traced("conditional")
    rows = np.arange(12 * 8 * 9).reshape(12, 8, 9)
    assert members_of(coupling, "expand", "expand.weight") == [rows[o].ravel().tolist() for o in range(12)]
    assert members_of(coupling, "stem.0", "expand.weight") == [rows[:, i].ravel().tolist() for i in range(8)]
    taps = np.arange(12 * 9).reshape(12, 9).tolist()
    assert members_of(coupling, "expand", "depthwise.weight") == taps
    assert members_of(coupling, "expand", "depthwise.bias") == [[channel] for channel in range(12)]
    experts = {(m.parameter, m.dim) for m in coupling.group("routing").members}
    assert {(f"{layer}.weight", 0) for layer in ("routing", "expand", "depthwise", "project")} <= experts


@pytest.mark.parametrize(("layer", "inputs"), [("a", "stem.0"), ("b", "a"), ("c", "b")])
def test_a_bank_mixed_by_a_sum_an_einsum_or_a_product_keeps_its_axes(layer: str, inputs: str) -> None:
    coupling = traced("dynamic")
    outputs = coupling.group(layer)
    assert outputs.role == "ungated"
    assert (f"{layer}.weight", 1) in slots_of(coupling, layer)
    assert (f"{layer}.weight", 2) in slots_of(coupling, inputs)
    assert "softmax" in str(coupling.group(f"{layer}.attend").frozen_because)


def test_a_depthwise_multiple_makes_several_channels_of_one() -> None:
    slots = slots_of(traced("depthwise"), "a.0")
    twice = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert slots["depthwise.weight", 0] == slots["depthwise.bias", 0] == twice
    assert slots["head.fc.weight", 1] == twice


def test_concatenated_channels_stay_separate_and_are_read_side_by_side() -> None:
    coupling = traced("dense")
    assert [group.name for group in coupling.prunable()] == ["a.0", "b.0", "c.0"]
    for name, first, width in (("a.0", 0, 6), ("b.0", 6, 4), ("c.0", 10, 4)):
        members = {(m.parameter, m.dim): m for m in coupling.group(name).members}
        assert members["head.fc.weight", 1].index.tolist() == list(range(first, first + width))


def test_blocks_of_a_grouped_convolution_lose_the_same_offsets() -> None:
    coupling = traced("grouped")
    read = slots_of(coupling, "a.0")
    assert read["a.0.weight", 0] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert read["grouped.0.weight", 1] == [0, 1, 2, 3, 4, 5]
    made = slots_of(coupling, "grouped.0")
    assert made["grouped.0.weight", 0] == [0, 1, 2, 3, 0, 1, 2, 3]
    group = coupling.group("grouped.0")
    assert (group.width, group.units, group.unit_width) == (8, 4, 2)


def test_a_transposed_convolution_reads_with_its_first_axis() -> None:
    coupling = traced("transposed")
    assert slots_of(coupling, "a.0")["up.weight", 0] == list(range(6))
    assert slots_of(coupling, "up")["up.weight", 1] == list(range(8))


def test_a_flattened_map_is_read_by_runs_of_columns() -> None:
    slots = slots_of(traced("flattened"), "a.0")
    assert slots["hidden.weight", 1] == np.repeat(np.arange(6), 16).tolist()


def test_a_tied_weight_is_one_parameter() -> None:
    coupling = traced("tied")
    slots = slots_of(coupling, "a.0")
    assert slots["one.weight", 0] == slots["one.weight", 1] == list(range(6))
    assert "two.weight" not in coupling.shapes
    assert slots["two.bias", 0] == list(range(6))


def test_a_gain_kept_as_a_plain_parameter_belongs_to_its_channels() -> None:
    assert slots_of(traced("layer scale"), "a.0")["gain", 0] == list(range(6))


def test_halves_of_a_chunk_lose_the_same_offsets_and_a_shuffle_follows_them() -> None:
    slots = slots_of(traced("shuffle"), "a.0")
    assert slots["a.0.weight", 0] == [0, 1, 2, 3, 4, 5] * 2
    assert slots["b.0.weight", 0] == slots["b.0.weight", 1] == [0, 1, 2, 3, 4, 5]
    assert slots["head.fc.weight", 1] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]  # interleaved


def test_parts_of_stored_sizes_keep_their_own_channels() -> None:
    coupling = traced("stored split")
    slots = slots_of(coupling, "a.0")
    assert slots["a.0.weight", 0] == list(range(12))
    assert slots["b.0.weight", 1] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert slots["c.0.weight", 1] == [8, 9, 10, 11]


def test_weight_norm_ties_length_and_direction() -> None:
    slots = slots_of(traced("weight norm"), "a")
    prefix = "parametrizations.weight.original"
    assert slots[f"a.{prefix}0", 0] == slots[f"a.{prefix}1", 0] == slots["a.bias", 0] == list(range(8))
    assert slots[f"b.{prefix}1", 1] == list(range(8))


def test_groups_of_a_group_norm_lose_the_same_offsets() -> None:
    slots = slots_of(traced("standardised"), "a")
    assert slots["a.weight", 0] == slots["norm.weight", 0] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_layer_norm_over_channels_is_scaled_per_channel() -> None:
    slots = slots_of(traced("layer norm"), "a")
    assert slots == straight(
        8, ("a.weight", 0), ("a.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("b.weight", 1)
    )


def test_every_output_of_a_dict_with_a_tuple_stays() -> None:
    coupling = traced("two outputs")
    assert {group.name for group in coupling.groups if group.role == "frozen"} == {"map", "head.fc"}
    assert {group.name for group in coupling.prunable()} == {"a.0", "b.0"}


def test_heads_of_an_attention_lose_the_same_offsets() -> None:
    coupling = traced("attention")
    slots = slots_of(coupling, "qkv")
    assert slots["qkv.weight", 0] == [0, 1, 2, 3, 4, 5] * 6  # q, k, v times two heads
    assert slots["out.weight", 1] == [0, 1, 2, 3, 4, 5] * 2


def test_channels_beside_padded_zeros_stay_and_the_shortcut_s_own_go() -> None:
    coupling = traced("padded shortcut")
    frozen = coupling.group("b.0")
    assert (frozen.role, frozen.width) == ("frozen", 4)
    assert "padded" in str(frozen.frozen_because)
    slots = slots_of(coupling, "a.0")
    assert slots["b.0.weight", 0] == list(range(6))


class Custom(nn.Module):
    """conv a -> a function of its map -> conv b."""

    def __init__(self, function: object, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(width, 6, 3), nets.Head(6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.function(self.a(x))))  # type: ignore[operator]


def custom(function: object, width: int = 8) -> Coupling:
    return trace(nets.lively(Custom(function, width)), torch.randn(1, 3, 12, 12))


@pytest.mark.parametrize(
    ("function", "read"),
    [
        (lambda x: F.max_pool2d(x, 2), [*range(8)]),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), [*range(8)]),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), [*range(8)]),
        (lambda x: x.flip(1), [7, 6, 5, 4, 3, 2, 1, 0]),
        (lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), [*range(8)]),
        (lambda x: x.clone().relu_().mul_(2).add_(x), [*range(8)]),
        (lambda x: torch.stack([x, x]).amax(0), [*range(8)]),
        (lambda x: x.repeat(1, 2, 1, 1), [*range(8), *range(8)]),
        (lambda x: torch.where(x > 0, x, 0.1 * x), [*range(8)]),
        (lambda x: F.pixel_unshuffle(x, 2), np.repeat(np.arange(8), 4).tolist()),
        (lambda x: F.pixel_shuffle(x, 2), [0, 1]),  # four channels become positions of one
        (lambda x: F.instance_norm(x), [*range(8)]),
    ],
)
def test_operations_pass_each_channel_on(function: object, read: list[int]) -> None:
    coupling = custom(function, len(read))
    assert slots_of(coupling, "a")["b.weight", 1] == read


@pytest.mark.parametrize(
    ("function", "width", "reason"),
    [
        (lambda x: torch.cumsum(x, 1), 8, "no rule for operation 'cumsum'"),
        (lambda x: x[:, :6], 6, "cut at a position written in the code"),
        (lambda x: x[:, ::2], 4, "cut at a position written in the code"),
        (lambda x: torch.cat(x.split([2, 6], 1), 1), 8, "split at sizes written in the code"),
        (lambda x: x[:, [0, 2, 1, 3, 4, 5, 6, 7]], 8, "picked by stored positions"),
        (lambda x: x.roll(1, 1), 8, "picked by stored positions"),
        (lambda x: x.softmax(1), 8, "softmax over channels"),
        (lambda x: x.view(1, 8, 10, 10), 8, "a width written in the code"),
        (lambda x: x[None].unflatten(2, (8, 1)).flatten(2, 3)[0], 8, "a width written in the code"),
        (lambda x: x / math.sqrt(x.size(1)), 8, "computed with as a number"),
        (lambda x: x * x.shape[1] ** -0.5, 8, "computed with as a number"),
        (lambda x: x * (1 / x.size(1)), 8, "computed with as a number"),
        (lambda x: x / x.shape[1], 8, "computed with as a number"),
        (lambda x: F.conv2d(x, torch.ones(8, 1, 3, 3), groups=8), 8, "a weight that is not a parameter"),
    ],
)
def test_what_code_fixes_is_frozen_with_the_reason(function: object, width: int, reason: str) -> None:
    groups = [group for group in custom(function, width).groups if group.producers == ("a",)]
    frozen = [group for group in groups if group.role == "frozen"]
    assert sum(group.width for group in groups) == 8
    assert sum(group.width for group in frozen) == (6 if width == 6 else 8)  # the last two aren't counted
    assert reason in str(frozen[0].frozen_because)


@pytest.mark.parametrize(
    ("function", "width", "held"),  # what the number counts
    [
        (lambda x: x[:, :6], 6, [0, 1, 2, 3, 4, 5]),
        (lambda x: x[:, 5:], 3, [0, 1, 2, 3, 4]),
        (lambda x: x[:, :-2], 6, [6, 7]),
        (lambda x: x[:, -3:], 3, [5, 6, 7]),
        (lambda x: x[:, 2:-3], 3, [0, 1, 5, 6, 7]),
    ],
)
def test_a_cut_at_a_number_holds_what_the_number_counts(
    function: object, width: int, held: list[int]
) -> None:
    net, inputs = nets.lively(Custom(function, width)), torch.randn(2, 3, 12, 12)
    coupling = trace(net, inputs)
    frozen = next(g for g in coupling.groups if g.role == "frozen" and g.producers == ("a",))
    member = next(m for m in frozen.members if m.parameter == "a.weight")
    assert sorted(member.index.tolist()) == held
    assert "test_coupling_rules.py, line" in str(frozen.frozen_because)
    removed = {group.name: (0,) for group in coupling.prunable()}
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    assert check_removal(net, pruned, coupling, removed, inputs)[0].passed


def test_a_convolution_along_channels_freezes_them_and_names_the_flag_that_lets_them_go() -> None:
    net, inputs = nets.build("channel conv")
    assert "--eca-neighbours" in str(trace(net, inputs).group("a.0").frozen_because)
    coupling = trace(net, inputs, eca_neighbours=True)
    group = coupling.group("a.0")
    assert (group.role, group.units, group.frozen_because) == ("gated", 8, None)
    assert coupling.along_channels == {"a.0": ("along",)}
    assert trace(net, inputs).count_macs({}) == coupling.count_macs({})


def test_a_decision_on_data_names_the_module_and_the_line() -> None:
    class Decides(Custom):
        def forward(self, x: Tensor) -> Tensor:
            if x.mean() > 0:
                return self.head(self.b(self.a(x)))
            return self.head(self.b(-self.a(x)))

    net = nn.Sequential(Decides(None)).eval()
    with pytest.raises(InputError, match=r"'0'.*test_coupling_rules\.py.*if x\.mean\(\) > 0"):
        trace(net, torch.randn(1, 3, 12, 12))


def test_a_forward_that_fails_is_the_user_s_input() -> None:
    with pytest.raises(InputError, match=r"\(1, 4, 12, 12\)"):
        trace(nets.lively(nets.Plain()), torch.randn(1, 4, 12, 12))


def test_a_trace_leaves_the_net_and_the_random_state_as_they_were() -> None:
    class Restless(nets.Flattened):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x.shape[0] * self.width
            return super().forward(x + 0 * torch.rand_like(x))

    net = nets.lively(Restless()).train()
    net.a.eval()
    for parameter in net.fc.parameters():
        parameter.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    attributes = {name: dict(module.__dict__) for name, module in net.named_modules()}
    inputs, random = torch.randn(2, 3, 12, 12), torch.get_rng_state()
    kept = inputs.clone()
    trace(net, inputs)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(inputs, kept)
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    for name, module in net.named_modules():
        assert module.__dict__ == attributes[name]
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert type(net.width) is int
    assert net.training
    assert not net.a.training


def test_parameters_in_one_storage_are_told_apart_and_overlapping_ones_are_frozen() -> None:
    net = nets.lively(nets.Plain())
    flat = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    start = 0
    for parameter in net.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    coupling = trace(net, torch.randn(1, 3, 12, 12))
    expect(coupling, "a.0", straight(8, *conv_norm("a"), ("b.0.weight", 1)))
    net.b[1].bias.data = net.b[1].weight.data[:6].flip(0).as_strided((6,), (1,))
    net.a[1].bias.data = flat[1:9]  # lies over other parameters
    assert trace(net, torch.randn(1, 3, 12, 12)).group("a.0").role == "frozen"


def test_channels_last_weights_give_the_same_groups() -> None:
    net, inputs = nets.build("inverted bottleneck")
    plain = trace(net, inputs)
    last = trace(net.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last))
    assert [group.name for group in plain.groups] == [group.name for group in last.groups]
    for group in plain.groups:
        assert slots_of(plain, group.name) == slots_of(last, group.name)


def test_a_reader_is_found_where_its_call_reads() -> None:
    net, inputs = nets.build("flattened")
    coupling = trace(net, inputs)
    readers = {reader.parameter: reader for reader in coupling.readers}
    hidden = readers["hidden.weight"]
    assert (hidden.site.function, hidden.site.operand, hidden.site.axis) == ("linear", 0, 1)
    assert coupling.groups[hidden.group[0]].name == "a.0"
    assert hidden.unit.tolist() == np.repeat(np.arange(6), 16).tolist()
    assert coupling.calls[hidden.site.index] == "linear"
    assert not hidden.pooled


def test_only_readers_inside_a_gate_read_a_pooled_signal() -> None:
    coupling = traced("se residual")
    pooled = {reader.parameter for reader in coupling.readers if reader.pooled}
    assert pooled == {"se.squeeze.weight", "se.expand.weight"}
    assert {"inner.0.weight", "outer.0.weight", "head.fc.weight"} <= {r.parameter for r in coupling.readers}


# ---- layers -------------------------------------------------------------------------------------
def test_the_layers_of_a_net_by_hand() -> None:
    layers = traced("inverted bottleneck").layers({})  # 12 x 12 positions
    assert layers.kinds == (
        "spatial", "pointwise", "depthwise", "pointwise", "pointwise", "pointwise", "linear"
    )  # fmt: skip
    assert layers.positions.tolist() == [144, 144, 144, 1, 1, 144, 1]
    assert layers.groups.tolist() == [1, 1, 12, 1, 1, 1, 1]
    lengths = [[6, 3, 3, 3], [12, 6], [12, 3, 3], [4, 12], [12, 4], [6, 12], [6, 5]]
    assert layers.lengths.tolist() == [[*row, *[1] * (4 - len(row))] for row in lengths]
    units = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], *[[1, 1, 0, 0]] * 4]  # images have none
    assert layers.shrinking.astype(int).tolist() == units
    left = traced("inverted bottleneck").layers({"expand.0": (0, 5, 7), "se.squeeze": (2,)})
    assert left.lengths[:, :2].tolist() == [[6, 3], [9, 6], [9, 3], [3, 9], [9, 3], [6, 9], [6, 5]]


@pytest.mark.parametrize("name", sorted(nets.NETS))
def test_layers_multiply_as_often_as_is_counted_whatever_goes(name: str) -> None:
    coupling, random = traced(name), np.random.default_rng(0)
    for _ in range(5):
        removed = {g.name: tuple(range(int(random.integers(0, g.units)))) for g in coupling.prunable()}
        assert coupling.layers(removed).macs.sum() == coupling.count_macs(removed)


def test_the_sides_of_a_grouped_convolution_are_partners() -> None:
    assert traced("grouped").partners() == {"a.0": "grouped.0", "grouped.0": "a.0"}
    assert traced("depthwise").partners() == traced("plain").partners() == {}  # of one group, or of none
    layers = traced("grouped").layers({})
    assert (layers.kinds, layers.groups.tolist()) == (("spatial", "grouped", "linear"), [1, 2, 1])
    assert layers.lengths[1].tolist() == [8, 6, 3, 3]  # six of a group's inputs


@pytest.mark.parametrize(
    ("function", "width", "held"),
    [
        (lambda x: x * x[:, 3:4], 8, 4),
        (lambda x: x[:, 1:] * x[:, :1].sigmoid(), 7, 1),  # MobileViTv2's context scores
        (lambda x: (y := F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0))[:, :-1] / (1 + y[:, -1:]), 8, 0),
        (lambda x: x[:, 2:].relu() + x[:, :2].repeat(1, 3, 1, 1), 6, 8),  # two are not one
    ],
)
def test_one_channel_that_stays_can_be_spread_over_others_that_go(
    function: object, width: int, held: int
) -> None:
    net, inputs = nets.lively(Custom(function, width)), torch.randn(2, 3, 12, 12)
    coupling = trace(net, inputs)
    frozen = [g for g in coupling.groups if g.role == "frozen" and g.producers == ("a",)]
    assert sum(group.width for group in frozen) == held
    removed = {group.name: (0, 2) for group in coupling.prunable()}
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    assert check_removal(net, pruned, coupling, removed, inputs)[0].passed


def test_a_layer_over_a_stored_table_counts_although_its_widths_stay() -> None:
    class Positioned(nn.Module):
        """A bias for every position, made by a layer from a table of places, as MaxViT's RelPosMlp has it."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.places, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(2, 8), nets.Head(8)
            self.register_buffer("table", torch.rand(12, 12, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) + self.places(self.table).permute(2, 0, 1))

    net = nets.lively(Positioned())
    coupling = trace(net, nets.images(1))
    # convolution, table and head; their own channels are one where they are added
    assert coupling.count_macs({}) == 144 * 27 * 8 + 144 * 2 * 8 + 8 * 5
