"""What each kind of gate is, beyond Squeeze-and-Excitation: found by data flow, pruned, judged or said."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable

import nets
import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepress.calibrate import calibrate
from sepress.coupling import Coupling, apply_removal, check_removal, trace
from sepress.criteria import rank
from sepress.errors import InputError
from sepress.folding import fold
from sepress.gates import Taps
from sepress.train.polarise import Polarisation

CPU = torch.device("cpu")


class Around(nn.Module):
    """A gate between two layers: 8 channels, of the group `a.0`."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.a, self.gate, self.b, self.head = nets.conv_bn(3, 8), gate, nets.conv_bn(8, 6), nets.Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.gate(self.a(x).relu())).relu())


class Excite(nn.Module):
    """Squeezed (N, C) in, excitation (N, C) out."""

    def __init__(self, channels: int = 8, outputs: int = 8) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class Eca(nn.Module):
    """Efficient channel attention: a convolution along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        s = self.conv(x.mean((2, 3))[:, None]).sigmoid()  # (N, 1, C)
        return x * s.transpose(1, 2)[..., None]


class Context(nn.Module):
    """Global context: positions are weighed by a softmax; `sums` chooses the form of the weighted pooling."""

    def __init__(self, *, add: bool, multiply: bool, sums: str = "matmul") -> None:
        super().__init__()
        self.logit = nn.Conv2d(8, 1, 1)
        self.scale, self.shift = Excite() if multiply else None, Excite() if add else None
        self.sums = sums

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weight = self.logit(x).view(n, 1, h * w).softmax(-1)
        if self.sums == "matmul":
            context = (x.view(n, c, h * w) @ weight.transpose(1, 2)).flatten(1)
        elif self.sums == "einsum":
            context = torch.einsum("nchw,nhw->nc", x, weight.view(n, h, w))
        else:
            context = (x * weight.view(n, 1, h, w)).sum((2, 3))
        if self.scale is not None:
            x = x * self.scale(context).sigmoid()[..., None, None]
        if self.shift is not None:
            x = x + self.shift(context)[..., None, None]
        return x


class Gather(nn.Module):
    """Gather-excite: by average pooling over windows, or by strided depthwise convolutions (and its end)."""

    def __init__(self, gather: nn.Module, *, before: bool = False) -> None:
        super().__init__()
        self.gather, self.before = gather, before
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = self.fc2(self.fc1(self.gather(x)).relu())
        if self.before:
            return x * F.interpolate(s.sigmoid(), size=x.shape[-2:])
        return x * F.interpolate(s, size=x.shape[-2:], mode="bilinear").sigmoid()


class GlobalGather(nn.Module):
    """Gather-excite of global extent with parameters: one filter a channel, as large as the map."""

    def __init__(self) -> None:
        super().__init__()
        self.gather = nn.Conv2d(8, 8, 12, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gather(x).sigmoid()


class Dfc(nn.Module):
    """GhostNetV2's attention: computed from the block's input, at half its size."""

    def __init__(self) -> None:
        super().__init__()
        self.ghost = nets.conv_bn(8, 8)
        self.short = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, (1, 5), padding=(0, 2), groups=8),
            nn.Conv2d(8, 8, (5, 1), padding=(2, 0), groups=8),
        )

    def forward(self, x: Tensor) -> Tensor:
        s = self.short(F.avg_pool2d(x, 2)).sigmoid()
        return self.ghost(x) * F.interpolate(s, size=x.shape[-2:], mode="nearest")


class Selective(nn.Module):
    """Two branches, weighed channel by channel: `stacked` as timm has it, or written out, or by sigmoids."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.one, self.two, self.fc, self.form = (
            nets.conv_bn(8, 8),
            nets.conv_bn(8, 8, 5),
            Excite(8, 16),
            form,
        )

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x).relu(), self.two(x).relu()
        logits = self.fc((one + two).mean((2, 3))).view(x.size(0), 2, -1)
        s = (logits.sigmoid() if self.form == "sigmoid" else logits.softmax(1))[..., None, None]
        if self.form == "written":
            return one * s[:, 0] + two * s[:, 1]
        return (torch.stack([one, two], 1) * s).sum(1)


class Split(nn.Module):
    """Split attention: the branches are halves of one convolution's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nets.conv_bn(8, 16, groups=2), Excite(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = self.conv(x).relu().reshape(n, 2, -1, h, w)
        s = self.fc(x.sum(1).mean((2, 3))).view(n, 1, 2, -1).transpose(1, 2).softmax(1).reshape(n, -1, 1, 1)
        return (x * s.reshape(n, 2, -1, 1, 1)).sum(1)


class SplitAsPublished(Split):
    """The authors' code: halves are split off, and each is multiplied by its own part of the excitation."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        n, width = x.shape[:2]
        halves = torch.split(x, width // 2, dim=1)
        logits = self.fc(F.adaptive_avg_pool2d(sum(halves), 1).flatten(1))
        s = logits.view(n, 1, 2, -1).transpose(1, 2).softmax(1).reshape(n, -1, 1, 1)
        return sum(part * half for part, half in zip(torch.split(s, width // 2, dim=1), halves, strict=True))


class SelectiveAsReimplemented(nn.Module):
    """A layer for each branch's excitation, and all that has branches put together one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList([nets.conv_bn(8, 8), nets.conv_bn(8, 8, 5)])
        self.fc, self.fcs = nn.Linear(8, 4), nn.ModuleList([nn.Linear(4, 8), nn.Linear(4, 8)])

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([path(x).unsqueeze_(1) for path in self.paths], 1)
        z = self.fc(maps.sum(1).mean(-1).mean(-1))
        s = torch.cat([fc(z).unsqueeze_(1) for fc in self.fcs], 1).softmax(1)
        return (maps * s[..., None, None]).sum(1)


class Pyramid(nn.Module):
    """The squeeze pools at two scales, so that it is no global pooling alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(40, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        bins = [F.adaptive_avg_pool2d(x, size).view(n, -1, 1, 1) for size in (1, 2)]
        return x * self.fc2(self.fc1(torch.cat(bins, 1)).relu()).sigmoid()


class Bottleneck(nn.Module):
    """BAM: channel and spatial logits are multiplied first, so that no value is one channel's."""

    def __init__(self) -> None:
        super().__init__()
        self.channel, self.spatial = Excite(), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        channel = self.channel(x.mean((2, 3)))[..., None, None].expand_as(x)
        return x * (1 + (channel * self.spatial(x).expand_as(x)).sigmoid())


class Concurrent(nn.Module):
    """scSE: the channel part is a gate, the spatial part is none."""

    def __init__(self) -> None:
        super().__init__()
        self.channel, self.spatial = Excite(), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.channel(x.mean((2, 3))).sigmoid()[..., None, None] + x * self.spatial(x).sigmoid()


class Coordinate(nn.Module):
    """Coordinate attention: one value a channel and row, one a channel and column."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.rows, self.columns = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True)
        y = self.mix(torch.cat([rows, columns.transpose(2, 3)], 2)).relu()
        rows, columns = y.split([x.size(2), x.size(3)], 2)
        return x * self.rows(rows).sigmoid() * self.columns(columns.transpose(2, 3)).sigmoid()


class Style(nn.Module):
    """Style recalibration: mean and deviation of each channel, and two weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(8, 8, 2, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        style = torch.stack([x.mean((2, 3)), x.std((2, 3))], 2)  # (N, C, 2)
        return x * self.mix(style).sigmoid()[..., None]


class Applied(nn.Module):
    """An excitation from a global mean, applied by a function of (x, s), s (N, outputs)."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor], outputs: int = 8) -> None:
        super().__init__()
        self.fc, self.apply_ = Excite(8, outputs), apply

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_(x, self.fc(torch.einsum("nchw->nc", x) / (x.size(2) * x.size(3))))


def strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
    )


def scale_and_shift(x: Tensor, s: Tensor) -> Tensor:
    scale, shift = s[..., None, None].chunk(2, 1)
    return x * (1 + scale.tanh()) + shift


def shift_and_scale_at_once(x: Tensor, s: Tensor) -> Tensor:
    scale, shift = s[..., None, None].chunk(2, 1)
    return torch.addcmul(shift, x, scale.sigmoid())


def repeated(x: Tensor, s: Tensor) -> Tensor:
    return x * s.sigmoid()[..., None, None].repeat(1, 1, *x.shape[2:])


def by_einsum(x: Tensor, s: Tensor) -> Tensor:
    return torch.einsum("nchw,nc->nchw", x, s.sigmoid())


def channels_last(x: Tensor, s: Tensor) -> Tensor:
    return (x.permute(0, 2, 3, 1) * s.clamp(min=0).clamp_max(1)[:, None, None]).permute(0, 3, 1, 2)


# name -> the module, and for each gate: kind, squash, axis of the channels at its site
KINDS: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str, int]]]] = {
    "eca": (Eca, [("channel-conv", "sigmoid", 1)]),
    "context multiplied": (lambda: Context(add=False, multiply=True), [("context", "sigmoid", 1)]),
    "context by einsum": (
        lambda: Context(add=False, multiply=True, sums="einsum"),
        [("context", "sigmoid", 1)],
    ),
    "context by a sum": (
        lambda: Context(add=False, multiply=True, sums="sum"),
        [("context", "sigmoid", 1)],
    ),
    "context added": (lambda: Context(add=True, multiply=False), [("shift", "none", 1)]),
    "context both": (lambda: Context(add=True, multiply=True), [("scale-shift", "sigmoid", 1)]),
    "gather over windows": (
        lambda: Gather(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        [("local", "sigmoid", 1)],
    ),
    "gather by filters": (lambda: Gather(strided()), [("local", "sigmoid", 1)]),
    "gather, squashed before": (
        lambda: Gather(nn.MaxPool2d(4), before=True),
        [("local", "sigmoid", 1)],
    ),
    "global gather by filters": (GlobalGather, [("scale", "sigmoid", 1)]),
    "dfc": (Dfc, [("local", "sigmoid", 1)]),
    "selective kernels": (lambda: Selective("stacked"), [("branch", "softmax", 2)]),
    "selective by sigmoid": (lambda: Selective("sigmoid"), [("branch", "sigmoid", 2)]),
    "selective, written out": (
        lambda: Selective("written"),
        [("branch", "softmax", 1), ("branch", "softmax", 1)],
    ),
    "split attention": (Split, [("branch", "softmax", 2)]),
    "split attention, as published": (SplitAsPublished, [("branch", "softmax", 1)] * 2),
    "selective, as reimplemented": (SelectiveAsReimplemented, [("branch", "softmax", 2)]),
    "pyramid": (Pyramid, [("scale", "sigmoid", 1)]),
    "bam": (Bottleneck, []),
    "scse": (Concurrent, [("scale", "sigmoid", 1)]),
    "coordinate": (Coordinate, [("local", "sigmoid", 1), ("local", "sigmoid", 1)]),
    "style": (Style, [("scale", "sigmoid", 1)]),
    "scale and shift": (lambda: Applied(scale_and_shift, 16), [("scale-shift", "tanh", 1)]),
    "scale and shift in one": (
        lambda: Applied(shift_and_scale_at_once, 16),
        [("scale-shift", "sigmoid", 1)],
    ),
    "repeated": (lambda: Applied(repeated), [("scale", "sigmoid", 1)]),
    "einsum": (lambda: Applied(by_einsum), [("scale", "sigmoid", 1)]),
    "channels last": (lambda: Applied(channels_last), [("scale", "clamp", 3)]),
    "cbam": (lambda: timm.layers.cbam.CbamModule(8, rd_channels=4), [("scale", "sigmoid", 1)]),
    "timm gather-excite": (
        lambda: timm.layers.GatherExcite(8, extent=2, use_mlp=False),
        [("local", "sigmoid", 1)],
    ),
    "timm global context": (
        lambda: timm.layers.GlobalContext(8, rd_channels=4),
        [("context", "sigmoid", 1)],
    ),
    "timm circular eca": (lambda: timm.layers.CecaModule(8), [("channel-conv", "sigmoid", 1)]),
}
FROZEN = {"eca", "timm circular eca"}  # a convolution along channels freezes them


def build(name: str) -> tuple[nn.Module, Tensor]:
    net = nets.lively(Around(KINDS[name][0]()))
    return net, torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def gated_names(coupling: Coupling) -> set[str]:
    return {gate.group for gate in coupling.gates}


@pytest.mark.parametrize("name", KINDS)
def test_a_gate_has_its_kind_and_its_squash_and_every_channel_a_unit(name: str) -> None:
    net, x = build(name)
    coupling = trace(net, x)
    assert [(g.kind, g.activation, g.site.axis) for g in coupling.gates] == KINDS[name][1]
    for gate in coupling.gates:
        assert gate.channels == 8
        assert gate.units.tolist() == list(range(8))
        group = coupling.group(gate.group)
        assert gate.name in group.gates
        expected = "frozen" if name in FROZEN else "ungated" if gate.kind == "shift" else "gated"
        assert group.role == expected


@pytest.mark.parametrize("name", KINDS)
def test_thirty_percent_go_exactly_and_the_wrong_channels_fail(name: str) -> None:
    net, x = build(name)
    coupling = trace(net, x)
    removed = {g.name: tuple(range(max(1, round(0.3 * g.units)))) for g in coupling.prunable()}
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    check, culprits = check_removal(net, pruned, coupling, removed, x)
    assert check.passed, (check, culprits)
    assert len(trace(pruned, x).gates) == len(coupling.gates)
    for group in gated_names(coupling) & removed.keys():
        wrong = {**removed, group: tuple(unit + 1 for unit in removed[group])}
        assert check_removal(net, pruned, coupling, wrong, x)[0].passed is False


@pytest.mark.parametrize("name", KINDS)
def test_a_gate_is_judged_by_its_values_or_the_ranking_says_why_not(name: str) -> None:
    net, x = build(name)
    coupling = trace(net, x)
    stats = calibrate(net, coupling, [x], evidence=frozenset({"excitation"}), device=CPU)
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), Taps(net, coupling, on_gate=lambda gate, s: seen.update({gate.name: s})):
        net(x)
    for gate in coupling.gates:
        if gate.silent_because is None:
            s = seen[gate.name].movedim(gate.site.axis, 0).flatten(1)
            torch.testing.assert_close(stats.mean_excitation(gate).float(), s.mean(1))
            assert s.min() >= (-1 if gate.activation == "tanh" else 0)
    if not coupling.gates:
        with pytest.raises(InputError, match="judges channels by their gates, and this net has none"):
            rank(coupling, stats, criterion="mean-excitation", net=net)
        return
    ranking = rank(coupling, stats, criterion="mean-excitation", net=net)
    for group in gated_names(coupling) & ranking.evidence.keys():
        kinds = {(gate.kind, gate.activation) for gate in coupling.gates}
        evidence = ranking.evidence[group]
        if kinds == {("shift", "none")}:
            assert evidence == "L2 of weights (its gate is added, not multiplied)"
        elif kinds == {("branch", "softmax")}:
            assert evidence == "L2 of weights (its gate shares a channel out between branches, 1 in all)"
        else:
            assert evidence == f"mean of {len(coupling.gates)} gate" + "s" * (len(coupling.gates) > 1)
        assert (group in ranking.mean_excitation) == evidence.startswith("mean of")


def test_softmax_branches_share_each_channel_out_so_their_mean_tells_nothing() -> None:
    net, x = build("selective kernels")
    coupling = trace(net, x)
    seen = []
    with torch.no_grad(), Taps(net, coupling, on_gate=lambda gate, s: seen.append(s)):
        net(x)
    torch.testing.assert_close(seen[0].sum(1), torch.ones(3, 8, 1, 1))
    stats = calibrate(net, coupling, [x], evidence=frozenset({"excitation"}), device=CPU)
    assert stats.sums == {}
    warnings = rank(coupling, stats, criterion="mean-excitation", net=net).warnings
    assert warnings[0] == (
        "no excitation was found, since every gate shares a channel out between branches, 1 in all: "
        "channels are judged without it"
    )


UNFOLDABLE = {
    "shift": "it does not multiply: what it adds depends on the image",
    "scale-shift": "it also shifts: what it adds depends on the image",
    "branch": "it weighs branches: one constant a channel can't stand for one a channel and branch",
    "local": "its values depend on the position: one constant a channel can't stand for them",
}
IN_FORWARD = {"scse", "channels last"}  # no module can give way to a constant


@pytest.mark.parametrize("name", [name for name, (_, gates) in KINDS.items() if len(gates) == 1])
def test_gates_that_only_multiply_by_one_value_a_channel_fold_and_others_say_why_not(name: str) -> None:
    net, x = build(name)
    kind = KINDS[name][1][0][0]
    if kind in UNFOLDABLE:
        why = UNFOLDABLE[kind]
    elif name == "einsum":
        why = "its multiplication is part of another call (einsum)"
    elif name in IN_FORWARD:
        why = "its excitation and its multiplication are written into the forward"
    else:
        result = fold(net, calibration=x, device="cpu")
        assert result.check.passed
        assert trace(result.net, x).gates == ()
        return
    with pytest.raises(InputError, match=re.escape(why)):
        fold(net, calibration=x, device="cpu")


def test_polarising_leaves_alone_and_names_the_gates_that_it_cannot_drive_apart() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.select, self.context = (
                nets.conv_bn(3, 8),
                Selective("stacked"),
                Context(add=True, multiply=False),
            )
            self.se, self.head = nets.SqueezeExcite(8, 4), nets.Head(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.se(self.context(self.select(self.a(x)))))

    coupling = trace(nets.lively(Three()), torch.randn(1, 3, 12, 12))
    penalty = Polarisation(coupling, strength=1.0)
    assert [gate.name for gate in penalty.gates] == ["se"]
    assert penalty.left_alone == [
        "select shares a channel out between branches, 1 in all",
        "context is added, not multiplied",
    ]


# ---- what is none --------------------------------------------------------------------------------
def spatial(x: Tensor) -> Tensor:
    pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * pooled.sum(1, keepdim=True).sigmoid()


NO_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "spatial attention": spatial,
    "swish by hand": lambda x: x * x.sigmoid(),
    "gated linear unit": lambda x: torch.cat([x[:, :4] * x[:, 4:].sigmoid()] * 2, 1),
    "swish of a resized map": lambda x: (y := F.interpolate(x, scale_factor=2)) * y.sigmoid(),
    "product of maps": lambda x: x * F.interpolate(F.avg_pool2d(x, 2), scale_factor=2),
    "centred": lambda x: x - x.mean((2, 3), keepdim=True),
    "mean added": lambda x: x + x.mean((2, 3), keepdim=True),
    "separable attention": lambda x: x.relu()
    * (x * x[:, :1].flatten(2).softmax(-1).view_as(x[:, :1])).sum((2, 3), keepdim=True),
    "dynamic relu": lambda x: (
        x[..., None] * x.mean((2, 3))[:, :, None, None, None].expand(-1, -1, 1, 1, 2).sigmoid()
    ).amax(-1),
    "relu6": lambda x: F.relu6(x) * F.avg_pool2d(x, 3, 1, 1),
}


@pytest.mark.parametrize("name", NO_GATES)
def test_a_product_or_sum_that_weighs_no_channel_is_no_gate(name: str) -> None:
    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return NO_GATES[name](x)

    assert trace(nets.lively(Around(Function())), torch.randn(1, 3, 12, 12)).gates == ()


def test_a_module_that_is_never_called_is_no_gate_and_one_called_twice_is_two() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nets.conv_bn(3, 8), nets.conv_bn(8, 8), nets.Head(8)
            self.se, self.unused = nets.SqueezeExcite(8, 4), nets.SqueezeExcite(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.se(self.b(self.se(self.a(x)).relu())))

    coupling = trace(nets.lively(Calls()), torch.randn(1, 3, 12, 12))
    assert [(gate.name, gate.producer) for gate in coupling.gates] == [("se", "a.0"), ("se#2", "b.0")]
    assert len({gate.site.index for gate in coupling.gates}) == 2


@pytest.mark.parametrize("place", ["before", "after", "identity", "sum"])
def test_a_gate_stands_before_or_after_the_activation_on_the_identity_or_after_the_add(place: str) -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nets.conv_bn(3, 8), nets.conv_bn(8, 6), nets.conv_bn(6, 8)
            self.se, self.head = nets.SqueezeExcite(8, 4), nets.Head(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.b(self.a(x).relu())
            if place == "before":
                y = self.se(y).relu()
            elif place == "after":
                y = self.se(y.relu())
            x = self.se(x) if place == "identity" else x
            return self.head(self.se(x + y) if place == "sum" else x + y)

    net, x = nets.lively(Placed()), torch.randn(3, 3, 12, 12)
    coupling = trace(net, x)
    (gate,) = coupling.gates
    assert (gate.name, gate.kind, gate.group) == ("se", "scale", "stem.0")
    removed = {g.name: (0,) for g in coupling.prunable()}
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    assert check_removal(net, pruned, coupling, removed, x)[0].passed


def test_a_gate_taken_for_another_kind_is_judged_by_figures_that_say_nothing() -> None:
    """The negative control: called a plain scale, a softmax over branches ties all channels."""
    net, x = build("selective kernels")
    coupling = trace(net, x)
    wrong = dataclasses.replace(
        coupling, gates=tuple(dataclasses.replace(gate, kind="scale") for gate in coupling.gates)
    )
    stats = calibrate(net, wrong, [x], evidence=frozenset({"excitation"}), device=CPU)
    torch.testing.assert_close(stats.mean_excitation(wrong.gates[0]).float(), torch.full((8,), 0.5))


# ---- published nets -------------------------------------------------------------------------------
# reference -> (how many gates of each kind and squash), as counted in timm's definitions
PUBLISHED = {
    "ecaresnet26t": {("channel-conv", "sigmoid"): 8},
    "gcresnext26ts": {("shift", "none"): 8},
    "skresnet18": {("branch", "softmax"): 8},
    "resnest14d": {("branch", "softmax"): 4},
    "ghostnetv2_100": {("local", "sigmoid"): 14, ("scale", "hardsigmoid"): 7},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_net_has_its_gates_and_is_pruned_exactly(name: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name)
    images = torch.randn(4, 3, 64, 64)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
    with torch.no_grad():
        net.train()(images)
    net.eval()
    coupling = trace(net, images)
    kinds = [(gate.kind, gate.activation) for gate in coupling.gates]
    assert {kind: kinds.count(kind) for kind in kinds} == PUBLISHED[name]
    assert all(gate.group and (gate.units >= 0).all() for gate in coupling.gates)
    if name != "ecaresnet26t":  # whose gates freeze what they scale
        frozen = [group.frozen_because for group in coupling.groups if group.role == "frozen"]
        assert frozen == ["network output"]
    removed = {g.name: tuple(range(int(0.3 * g.units))) for g in coupling.prunable()}
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    check, culprits = check_removal(net, pruned, coupling, removed, images[:2])
    assert check.passed, (check, culprits)
