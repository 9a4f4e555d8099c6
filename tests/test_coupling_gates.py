"""Gates are found by what flows where, never by class names."""

from __future__ import annotations

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepress.coupling import find_gates, trace
from sepress.types import Gate


def only_gate(net: nn.Module, inputs: Tensor) -> Gate:
    gates = find_gates(net, inputs)
    assert len(gates) == 1
    return gates[0]


@pytest.mark.parametrize(
    ("name", "module", "channels", "activation", "producer", "group"),
    [
        ("se residual", "se", 8, "sigmoid", "outer.0", "stem.0"),
        ("inverted bottleneck", "se", 12, "sigmoid", "depthwise.0", "expand.0"),
        ("inline se", "net", 8, "clamp", "a.0", "a.0"),
        ("se 1d", "net", 8, "sigmoid", "a", "a"),
        ("se 3d", "net", 8, "sigmoid", "a", "a"),
        ("scale and shift", "net", 8, "sigmoid", "a.0", "a.0"),
    ],
)
def test_a_gate_is_described(
    name: str, module: str, channels: int, activation: str, producer: str, group: str
) -> None:
    net, inputs = nets.build(name)
    gate = only_gate(net, inputs)
    found = (gate.name, gate.channels, gate.activation, gate.producer, gate.group)
    assert found == (module, channels, activation, producer, group)
    assert gate.units.tolist() == list(range(channels))
    assert gate.kind == ("scale-shift" if name == "scale and shift" else "scale")
    assert trace(net, inputs).group(group).gates == (gate.name,)
    assert trace(net, inputs).group(group).role == "gated"


@pytest.mark.parametrize("name", ["plain", "residual", "dense", "layer scale", "attention", "layer norm"])
def test_nets_without_gates_have_none(name: str) -> None:
    assert find_gates(*nets.build(name)) == ()


def test_two_gates_of_one_module_have_two_names_and_judge_the_same_stream() -> None:
    coupling = trace(*nets.build("gated identity"))
    assert [gate.name for gate in coupling.gates] == ["net", "net#2"]
    assert [gate.activation for gate in coupling.gates] == ["tanh", "hardsigmoid"]
    assert coupling.group("a.0").gates == ("net", "net#2")
    second = coupling.gates[1].site
    assert (second.function, second.operand, second.axis) == ("mul_", 1, 3)  # channels last


class Written(nn.Module):
    """A gate as users write it: `pool` gives (N, C), `squash` and `scale` are functions."""

    def __init__(self, pool: object, squash: object, scale: object) -> None:
        super().__init__()
        self.a, self.fc, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nets.Head(8)
        self.pool, self.squash, self.scale = pool, squash, scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        s = self.squash(self.fc(self.pool(x).flatten(1)))  # type: ignore[operator]
        return self.head(self.scale(x, s[:, :, None, None]))  # type: ignore[operator]


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def times(x: Tensor, s: Tensor) -> Tensor:
    return x * s


@pytest.mark.parametrize(
    ("pool", "scale", "operand"),
    [
        (mean, times, 1),
        (lambda x: x.view(*x.shape[:2], -1).mean(-1), times, 1),
        (lambda x: F.adaptive_avg_pool2d(x, 1), times, 1),
        (lambda x: F.avg_pool2d(x, x.shape[2:]), times, 1),
        (lambda x: F.adaptive_max_pool2d(x, 1), times, 1),
        (lambda x: x.amax((2, 3)), times, 1),
        (lambda x: x.sum((2, 3)), times, 1),
        (lambda x: x.permute(0, 2, 3, 1).mean((1, 2)), times, 1),
        (mean, lambda x, s: s * x, 0),
        (mean, lambda x, s: x.mul_(s), 1),
        (mean, torch.mul, 1),
        (mean, lambda x, s: x * s.expand_as(x), 1),
        (mean, lambda x, s: torch.mul(input=x, other=s.expand(1, 8, 10, 10)), 1),
    ],
)
def test_poolings_and_products_as_people_write_them(pool: object, scale: object, operand: int) -> None:
    net = nets.lively(Written(pool, torch.sigmoid, scale))
    gate = only_gate(net, torch.randn(2, 3, 12, 12))
    assert (gate.channels, gate.activation, gate.site.operand, gate.site.axis) == (8, "sigmoid", operand, 1)


@pytest.mark.parametrize(
    ("squash", "name"),
    [
        (torch.sigmoid, "sigmoid"),
        (F.hardsigmoid, "hardsigmoid"),
        (lambda x: F.relu6(x + 3) / 6, "relu6"),
        (lambda x: F.hardtanh(x, 0, 1), "clamp"),
        (lambda x: (x / 6 + 0.5).clamp(0, 1), "clamp"),
        (torch.tanh, "tanh"),
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: x, "none"),
        (F.relu, "none"),
    ],
)
def test_the_last_squash_before_the_product_is_named(squash: object, name: str) -> None:
    net = nets.lively(Written(mean, squash, times))
    assert only_gate(net, torch.randn(1, 3, 12, 12)).activation == name


def test_a_gate_over_concatenated_layers_belongs_to_the_group_with_most_of_its_channels() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 2, 3), nets.Head(8)
            self.se = nets.SqueezeExcite(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.se(torch.cat([self.b(x), self.a(x)], 1)))

    gate = only_gate(nets.lively(Wide()), torch.randn(1, 3, 8, 8))
    assert gate.group == "a"
    assert gate.units.tolist() == [-1, -1, 0, 1, 2, 3, 4, 5]


def test_a_head_after_the_last_pooling_is_no_gate_branch() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.hidden, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.hardswish(self.hidden(self.a(x).mean((2, 3)))))

    coupling = trace(nets.lively(Headed()), torch.randn(1, 3, 8, 8))
    assert coupling.gates == ()
    assert coupling.group("hidden").role == "ungated"
    assert not any(reader.pooled for reader in coupling.readers)
