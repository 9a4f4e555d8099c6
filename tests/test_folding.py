"""Gates folded into weights: the constant, its place, the proof, the files, and which gates go."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.fx
import torch.nn.functional as F
import torchvision
from nets import Head, SqueezeExcite, conv_bn, images, lively
from nets import build as build_small
from PIL import Image
from torch import Tensor, nn

import sepress
from sepress import stages
from sepress.bundle import load_bundle, make_bundle, save_bundle
from sepress.bundle.header import digest
from sepress.coupling import trace
from sepress.errors import CheckError, InputError
from sepress.export import export_onnx
from sepress.folding import fold
from sepress.folding import surgery as surgery_module
from sepress.folding.constants import measure_constants, measure_losses
from sepress.folding.surgery import check_fold, find_structure, fold_constants
from sepress.gates import Taps
from sepress.job import Job
from sepress.models.folded import ChannelScale, ConstantExcitation, FoldedIdentity
from sepress.modes import evaluating
from sepress.parity import check_onnx_parity
from sepress.recipe import FoldStage, Recipe
from sepress.train import Accuracy

CPU = torch.device("cpu")


# ---- nets whose gates are known by hand -----------------------------------------------------------
class Gated(nn.Module):
    """conv a, `act`, SE, `then`, conv b, head; with `stream`, the map before conv a is added after SE."""

    def __init__(
        self,
        act: Callable[[Tensor], Tensor],
        *,
        se: nn.Module | None = None,
        then: Callable[[Tensor], Tensor] = torch.relu,
        stream: bool = False,
    ) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 6), Head(6)
        self.se = se or SqueezeExcite(8, 4)
        self.act, self.then, self.stream = act, then, stream

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.se(self.act(self.a(x)))
        return self.head(self.b(self.then(x + y if self.stream else y)))


class LinearSE(nn.Module):
    """Linear layers, a functional sigmoid, and a view, all of it inside."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.expand = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        s = self.expand(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return x * s.view(*s.shape, 1, 1)


class Outside(nn.Module):
    """The excitation is a module's output, its multiplication the block's; layers around it are loose."""

    def __init__(self, then: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.then = then or nn.Identity()
        self.pool, self.down, self.up, self.gate = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 8, 1),
            nn.Sigmoid(),
        )
        self.a, self.b, self.head = conv_bn(3, 8), conv_bn(8, 6, 1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.softplus(self.a(x))  # neither homogeneous, nor written with products
        x = self.gate(self.up(self.down(self.pool(x)).relu())) * x
        return self.head(self.b(self.then(x)).relu())


class Chained(nn.Module):
    """Two gates on one map, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.one, self.two = conv_bn(3, 8), SqueezeExcite(8, 4), SqueezeExcite(8, 4)
        self.b, self.head = conv_bn(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.two(self.one(self.a(x)))).relu())


class Parallel(nn.Module):
    """Two gates read one map, and their products are added; with `shared`, both are one SE block."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.a, self.one = conv_bn(3, 8), SqueezeExcite(8, 4)
        self.two = None if shared else SqueezeExcite(8, 4)
        self.b, self.head = conv_bn(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        second = self.one if self.two is None else self.two
        return self.head(self.b(self.one(x) + second(x)).relu())


def with_constant_gate(net: nn.Module, p: float) -> nn.Module:
    """Make every gate exactly p, by the expanding layer: weight 0, bias logit(p)."""
    with torch.no_grad():
        for name, module in net.named_modules():
            if name.endswith(("expand", "up")):
                module.weight.zero_()
                module.bias.fill_(float(np.log(p / (1 - p))))
    return net


def folded_whole(net: nn.Module, x: Tensor, gates: tuple[str, ...] = ("*",)) -> tuple[Any, Any]:
    """Fold the gates that match; return the structure and the folding."""
    structure = find_structure(net, trace(net, x[:1]), x[:1])
    constants = measure_constants(net, structure.coupling, [x], device=CPU)
    return structure, fold_constants(structure, {g: constants[g] for g in structure.blocks}, x)


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    with evaluating(net):
        return net(x)


def assert_same(a: Tensor, b: Tensor) -> None:
    spread = (a - a.mean(0)).abs().max()
    assert (a - b).abs().max() < 1e-4 * spread


# ---- where the constant goes ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("net", "where"),
    [
        (lambda: Gated(torch.relu), "before"),  # relu(c x) = c relu(x)
        (lambda: Gated(nn.Identity()), "before"),
        (lambda: Gated(nn.Identity(), stream=True), "before"),  # the branch alone is scaled
        (lambda: Gated(F.hardswish), "after"),  # hard-swish is not homogeneous
        (lambda: Gated(F.hardswish, then=nn.MaxPool2d(2)), "after"),
        (lambda: Gated(F.hardswish, stream=True), "kept"),  # nor is an addition
        (lambda: Gated(F.hardswish, then=F.hardswish), "kept"),
        (lambda: Gated(torch.relu, se=LinearSE()), "before"),
    ],
)
def test_a_gate_that_is_constant_folds_into_its_place_and_changes_no_output(
    net: Callable[[], nn.Module], where: str
) -> None:
    whole = with_constant_gate(lively(net()), 0.3)
    x = images()
    before = outputs(whole, x)
    _, folding = folded_whole(whole, x)
    assert [step.where for step in folding.folded] == [where]
    assert folding.check.passed is True
    assert_same(before, outputs(folding.net, x))
    assert_same(before, outputs(whole, x))  # the one given is as it was
    assert not any("squeeze" in name for name in folding.net.state_dict())


def test_the_norm_before_the_gate_is_scaled_by_the_constant() -> None:
    whole = with_constant_gate(lively(Gated(torch.relu)), 0.25)
    _, folding = folded_whole(whole, images())
    for name in ("a.1.weight", "a.1.bias"):
        old, new = whole.get_parameter(name), folding.net.get_parameter(name)
        torch.testing.assert_close(new, 0.25 * old)
    assert type(folding.net.se) is FoldedIdentity


def test_the_columns_of_the_reader_are_scaled_by_the_constant() -> None:
    whole = with_constant_gate(lively(Gated(F.hardswish)), 0.25)
    _, folding = folded_whole(whole, images())
    torch.testing.assert_close(folding.net.b[0].weight, 0.25 * whole.b[0].weight)


def test_a_multiplication_that_stays_holds_the_constant() -> None:
    whole = with_constant_gate(lively(Gated(F.hardswish, stream=True)), 0.25)
    _, folding = folded_whole(whole, images())
    assert type(folding.net.se) is ChannelScale
    torch.testing.assert_close(folding.net.se.scale, torch.full((8, 1, 1), 0.25))
    assert folding.net.se.scale.requires_grad


def test_negative_constants_do_not_pass_a_relu() -> None:
    net = lively(Gated(torch.relu))
    x = images()
    structure = find_structure(net, trace(net, x[:1]), x[:1])
    folding = fold_constants(structure, {"se": torch.linspace(-1, 1, 8).double()}, x)
    assert [step.where for step in folding.folded] == ["kept"]  # relu stands on both sides


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_grouped_readers_take_each_channels_constant(groups: int) -> None:
    net = Gated(F.hardswish)
    net.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.Conv2d(8, 6, 1))
    net = lively(net)
    net.then = nn.Identity()
    x = images()
    _, folding = folded_whole(net, x)
    assert [step.where for step in folding.folded] == ["after"]
    assert folding.check.passed is True


def test_a_linear_layer_after_pooling_or_flattening_takes_the_constant() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.se, self.fc = conv_bn(3, 8), SqueezeExcite(8, 4), nn.Linear(8 * 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.adaptive_avg_pool2d(self.se(F.hardswish(self.a(x))), 2).flatten(1))

    _, folding = folded_whole(lively(Flat()), images())
    assert [(s.where, s.parameters) for s in folding.folded] == [("after", ("fc.weight",))]


def test_a_layer_that_reads_something_else_too_is_not_scaled() -> None:
    class TwoReaders(nn.Module):
        """The map before the gate goes to the head as well; so do b's weights, twice."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.se, self.head = conv_bn(3, 8), conv_bn(8, 6), SqueezeExcite(8, 4), Head(14)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = torch.cat([self.b(self.se(x)) + self.b(x), x], dim=1)
            return self.head(y)

    _, folding = folded_whole(lively(TwoReaders()), images())
    assert [step.where for step in folding.folded] == ["kept"]
    assert folding.check.passed is True


# ---- gates of other shapes ------------------------------------------------------------------------
def test_an_excitation_multiplied_elsewhere_becomes_a_single_one_and_its_layers_go(tmp_path: Path) -> None:
    net, x = lively(Outside()), images()
    _, folding = folded_whole(net, x)
    (step,) = folding.folded
    assert step.where == "after"
    assert set(step.replaced) == {"gate", "down", "up"}
    assert type(folding.net.gate) is ConstantExcitation
    assert folding.net.gate.scale.tolist() == [[[[1.0]]]]
    assert not folding.net.gate.scale.requires_grad
    assert not any(name.startswith(("down", "up")) for name in folding.net.state_dict())
    export_onnx(folding.net, tmp_path / "net.onnx", example=x[:1])
    assert "Mul" not in optimised_operators(tmp_path / "net.onnx")
    export_onnx(net, tmp_path / "whole.onnx", example=x[:1])
    assert "Mul" in optimised_operators(tmp_path / "whole.onnx")


def optimised_operators(path: Path) -> set[str]:
    """What ONNX Runtime runs of a file."""
    import onnx

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    return {node.op_type for node in graph.node}


def test_two_gates_on_one_map_fold_one_after_the_other() -> None:
    for net in (Chained(), Parallel()):
        _, folding = folded_whole(lively(net), images())
        assert len(folding.folded) == 2
        assert folding.check.passed is True
        assert not any("squeeze" in name for name in folding.net.state_dict())


@pytest.mark.parametrize(
    ("net", "gates", "reason"),
    [
        (lambda: Parallel(shared=True), 2, "runs several times"),
        (lambda: build_small("inline se")[0], 1, "written into the forward of 'the net'"),
        (lambda: build_small("scale and shift")[0], 1, "also shifts"),
        (lambda: build_small("gated identity")[0], 2, "written into the forward"),
    ],
)
def test_a_gate_that_no_module_holds_alone_is_left_with_the_reason(
    net: Callable[[], nn.Module], gates: int, reason: str
) -> None:
    whole, x = lively(net()), images()
    structure = find_structure(whole, trace(whole, x[:1]), x[:1])
    assert structure.blocks == {}
    assert len(structure.unfoldable) == gates
    assert all(reason in why for why in structure.unfoldable.values())
    with pytest.raises(InputError, match="can be folded"):
        fold(whole, calibration=x)


def test_a_gate_on_a_frozen_group_folds_since_no_channel_goes() -> None:
    class GatedHead(nn.Module):
        """The gated channels are the outputs, so their group is frozen."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.se = conv_bn(3, 8), SqueezeExcite(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.se(self.a(x)).mean((2, 3))

    net, x = lively(GatedHead()), images()
    coupling = trace(net, x[:1])
    assert coupling.group(coupling.gates[0].group).role == "frozen"
    _, folding = folded_whole(net, x)
    assert [step.where for step in folding.folded] == ["before"]


def test_signals_fold_as_maps_do() -> None:
    class Signal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 6, 3), nn.Linear(6, 5)
            self.se = LinearSE1d()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(F.silu(self.se(F.silu(self.a(x))))).mean(2))

    class LinearSE1d(LinearSE):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.expand(self.squeeze(x.mean(2)).relu()).sigmoid()[:, :, None]

    _, folding = folded_whole(lively(Signal()), images(6, 3, 24))
    assert [step.where for step in folding.folded] == ["kept"]
    assert folding.net.se.scale.shape == (8, 1)


# ---- the proof ------------------------------------------------------------------------------------
def test_a_constant_multiplied_at_the_wrong_place_fails_the_check() -> None:
    net, x = lively(Gated(torch.relu)), images()
    structure = find_structure(net, trace(net, x[:1]), x[:1])
    constants = measure_constants(net, structure.coupling, [x], device=CPU)
    right = fold_constants(structure, constants, x).net
    assert check_fold(structure, right, constants, x).passed is True
    shifted = copy.deepcopy(right)
    with torch.no_grad():
        gain = shifted.get_parameter("a.1.weight")
        c = constants["se"].float()
        gain.mul_(c.roll(1) / c)
    assert check_fold(structure, shifted, constants, x).passed is False
    forgotten = copy.deepcopy(right)
    forgotten.get_parameter("a.1.bias").data.copy_(net.get_parameter("a.1.bias"))
    assert check_fold(structure, forgotten, constants, x).passed is False


def test_a_placement_that_fails_its_check_falls_back_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = lively(Gated(F.hardswish)), images()
    real = surgery_module.placements

    def wrong_first(*args: Any) -> Any:
        for placement in real(*args):
            for factor in placement.factors.values():
                factor.mul_(2)
            yield placement

    monkeypatch.setattr(surgery_module, "placements", wrong_first)
    _, folding = folded_whole(net, x)
    assert [step.where for step in folding.folded] == ["kept"]
    torch.testing.assert_close(folding.net.b[0].weight, net.b[0].weight)  # taken back
    assert folding.check.passed is True


def test_images_that_tell_nothing_prove_nothing() -> None:
    net, x = lively(Gated(torch.relu)), images()
    same = x[:1].repeat(4, 1, 1, 1)
    structure = find_structure(net, trace(net, x[:1]), x[:1])
    constants = measure_constants(net, structure.coupling, [x], device=CPU)
    with pytest.raises(CheckError, match="can't be told"):
        fold_constants(structure, constants, same)
    assert fold_constants(structure, constants, same, allow_vacuous=True).check.passed is None


# ---- the constant ---------------------------------------------------------------------------------
def test_the_constant_is_the_least_squares_one_of_the_recalibrated_map() -> None:
    net, x = lively(Gated(nn.Identity())), images(20)
    coupling = trace(net, x[:1])
    found = measure_constants(net, coupling, [x[:7], x[7:]], device=CPU)["se"]
    with torch.no_grad():
        maps = net.a(net.stem(x).relu())
        s = net.se.expand(net.se.squeeze(maps.mean((2, 3), keepdim=True)).relu()).sigmoid()
        weight = maps.square()
        expected = (s * weight).sum((0, 2, 3)) / weight.sum((0, 2, 3))
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-6)


def test_a_channel_that_is_always_zero_gets_the_mean_excitation() -> None:
    net, x = lively(Gated(torch.relu)), images()
    with torch.no_grad():
        net.a[1].weight[2] = 0
        net.a[1].bias[2] = -1
    s = []
    coupling = trace(net, x[:1])
    found = measure_constants(net, coupling, [x], device=CPU)["se"]
    with evaluating(net), Taps(net, coupling, on_product=lambda gate, e, x: s.append(e)):
        net(x)
    torch.testing.assert_close(found[2].float(), s[0][:, 2].mean())


def test_the_cost_of_a_gate_is_the_rise_of_the_loss_and_without_labels_the_divergence() -> None:
    net, x = lively(Gated(torch.relu)), images()
    coupling = trace(net, x[:1])
    constant = {"se": torch.full((8,), 0.1).double()}
    y = torch.arange(6) % 5
    held = with_constant_gate(copy.deepcopy(net), 0.1)
    base, other = outputs(net, x).log_softmax(1), outputs(held, x).log_softmax(1)
    loss = measure_losses(net, coupling, [(x[:2], y[:2]), (x[2:], y[2:])], constant, device=CPU)["se"]
    rise = F.nll_loss(other, y) - F.nll_loss(base, y)
    divergence = (base.exp() * (base - other)).sum(1).mean()
    assert loss.cross_entropy == pytest.approx(float(rise), abs=1e-5)
    assert loss.divergence == pytest.approx(float(divergence), abs=1e-5)
    assert measure_losses(net, coupling, [x], constant, device=CPU)["se"].cross_entropy is None
    unknown = torch.tensor([0, 1, 2, -1, 0, 1])
    assert measure_losses(net, coupling, [(x, unknown)], constant, device=CPU)["se"].cross_entropy is None


# ---- which gates ----------------------------------------------------------------------------------
def cheap_and_dear() -> nn.Module:
    """Of three gates in a row, the first varies most, and the last is constant."""
    net = nn.Sequential(conv_bn(3, 8), *[Gated3(i) for i in range(3)], Head(8))
    net = lively(net)
    with torch.no_grad():
        for gain, block in zip((3.0, 1.0, 0.0), list(net)[1:4], strict=True):
            block.se.expand.weight.mul_(gain)
    return net


class Gated3(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.conv, self.se = conv_bn(8, 8), SqueezeExcite(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.se(self.conv(x))).relu()


def test_the_most_gates_that_are_accepted_are_folded_the_cheapest_first() -> None:
    net, x = cheap_and_dear(), images(24)
    seen: list[int] = []

    def accept(folded: nn.Module) -> bool:
        seen.append(sum(type(m) is FoldedIdentity for m in folded.modules()))
        return seen[-1] <= 1

    result = fold(net, calibration=x, accept=accept)
    assert seen == [3, 2, 1]
    assert result.folded == ("3.se",)
    assert result.gates[0].gate == "3.se"
    costs = [outcome.loss.figure for outcome in result.gates]
    assert costs == sorted(costs)
    assert result.gates[0].where == "before"
    assert result.gates[1].reason == "the constraint"
    assert result.params_before - result.params_after == 8 * 4 + 4 + 4 * 8 + 8
    notes = result.notes()
    assert notes[0].startswith("1 of 3 gates folded; 76 parameters fewer")
    assert notes[1] == "tried: 3 gates, not accepted; 2 gates, not accepted; 1 gate, accepted"
    assert "3.se folded: its constant multiplies the layer before it (3.conv.1.weight" in notes[2]
    assert "stays: the constraint" in notes[3]


def test_where_nothing_is_accepted_the_net_stays_as_it_was() -> None:
    net, x = cheap_and_dear(), images(24)
    result = fold(net, calibration=x, accept=lambda folded: False)
    assert result.folded == ()
    assert result.net is not net
    assert torch.equal(outputs(net, x), outputs(result.net, x))
    assert result.check.passed is None


def test_gates_are_named_by_patterns() -> None:
    net, x = cheap_and_dear(), images(24)
    result = fold(net, calibration=x, gates=["[12].*"])
    assert set(result.folded) == {"1.se", "2.se"}
    assert next(o for o in result.gates if o.gate == "3.se").reason == "it is not among the gates named"
    with pytest.raises(InputError, match=r"no gate matches 'layer9\.\*'"):
        fold(net, calibration=x, gates=["layer9.*"])
    with pytest.raises(InputError, match="no gate to fold"):
        fold(build_small("plain")[0], calibration=x)


def test_folding_leaves_modes_and_the_given_net_alone() -> None:
    net, x = cheap_and_dear(), images(24)
    net.train()
    net[0][1].eval()  # a norm that was frozen
    state = copy.deepcopy(net.state_dict())
    result = fold(net, calibration=x)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert net.training
    assert result.net.training
    assert not result.net[0][1].training
    assert result.net[1].se.training


# ---- what a folded net can do ---------------------------------------------------------------------
ZOO = {
    "timm:legacy_seresnet18": lambda: timm.create_model("legacy_seresnet18", num_classes=10),
    "timm:mobilenetv3_small_050": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "timm:efficientnet_b0": lambda: timm.create_model("efficientnet_b0", num_classes=10),
    "timm:regnety_002": lambda: timm.create_model("regnety_002", num_classes=10),
    "torchvision:mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
}


def zoo_net(reference: str, x: Tensor) -> nn.Module:
    """A registry's net with norms that matter, and statistics of the inputs."""
    torch.manual_seed(0)
    net = ZOO[reference]()
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)  # some start at 0, and a branch with them says nothing
            norm.bias.uniform_(-0.3, 0.3)
            norm.momentum = 1.0
        net.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return net.eval()


@pytest.mark.parametrize("reference", ZOO)
def test_a_registrys_net_folds_whole_and_is_saved(reference: str, tmp_path: Path) -> None:
    x = images(16, 3, 64, 64)
    net = zoo_net(reference, x)
    structure, folding = folded_whole(net, x)
    assert structure.unfoldable == {}
    assert folding.refused == {}
    assert len(folding.folded) == len(structure.coupling.gates)
    assert folding.check.passed is True
    assert folding.check.relative_error > 0  # something was compared
    folded = folding.net
    assert trace(folded, x[:1]).gates == ()
    assert all(step.where in ("before", "after") for step in folding.folded)
    hidden = {n for g in structure.coupling.groups if g.role == "se_hidden" for n in g.producers}
    assert hidden
    assert not any(name.rpartition(".")[0] in hidden for name in folded.state_dict())
    assert torch.equal(outputs(copy.deepcopy(folded), x), outputs(folded, x))
    for suffix in (".pt", ".safetensors"):
        sepress.save(folded, tmp_path / f"net{suffix}", arch=reference)
        loaded = sepress.load(tmp_path / f"net{suffix}")
        assert torch.equal(outputs(loaded.net, x), outputs(folded, x))
        assert {r.kind for r in loaded.layout.replaced} == {"identity"}


ALWAYS = "timm:mobilenetv3_small_050"  # the quickest: hard-sigmoid gates, depthwise layers


@pytest.mark.parametrize(
    "reference", [r if r == ALWAYS else pytest.param(r, marks=pytest.mark.zoo) for r in ZOO]
)
def test_a_folded_net_exports_and_prunes(reference: str, tmp_path: Path) -> None:
    x = images(16, 3, 64, 64)
    folded = fold(zoo_net(reference, x), calibration=x).net
    export_onnx(folded, tmp_path / "net.onnx", example=x[:1])
    assert check_onnx_parity(folded, tmp_path / "net.onnx", x[:8]).passed is True
    pruned = sepress.prune(folded, calibration=x, ratio=0.3, criterion="l2", compensate=False)
    assert pruned.report.checks["masked_equals_removed"].passed is True
    sepress.save(pruned.net, tmp_path / "pruned.pt", arch=reference)
    again = sepress.load(tmp_path / "pruned.pt").net
    assert torch.equal(outputs(again, x), outputs(pruned.net, x))


def test_a_pruned_net_folds_trains_saves_and_has_no_gate_left_to_fold(tmp_path: Path) -> None:
    reference, x = ALWAYS, images(16, 3, 64, 64)
    net = zoo_net(reference, x)
    pruned = sepress.prune(net, calibration=x, ratio=0.3, criterion="l2", compensate=False).net
    first = fold(pruned, calibration=x, gates=["blocks.0.*", "blocks.2.*"])
    second = fold(first.net, calibration=x)
    assert first.check.passed is True
    assert second.check.passed is True
    assert len(second.folded) == len(trace(net, x[:1]).gates) - len(first.folded)
    sepress.save(second.net, tmp_path / "net.pt", arch=reference)
    loaded = sepress.load(tmp_path / "net.pt").net
    assert torch.equal(outputs(loaded, x), outputs(second.net, x))
    loaded.train()
    F.cross_entropy(loaded(x), torch.arange(16) % 10).backward()
    assert all(p.grad is not None for p in loaded.parameters())
    with pytest.raises(InputError, match="no gate to fold"):
        fold(second.net, calibration=x)


def kept_scale() -> nn.Module:
    return Gated(F.hardswish, stream=True)


def kept_excitation() -> nn.Module:
    return Outside(then=F.softplus)


@pytest.mark.parametrize(
    ("factory", "module", "kind", "axis"),
    [(kept_scale, "se", "scale", 0), (kept_excitation, "gate", "excitation", 1)],
)
def test_a_constant_that_stayed_is_pruned_saved_exported_and_loaded(
    factory: Callable[[], nn.Module], module: str, kind: str, axis: int, tmp_path: Path
) -> None:
    folded = fold(lively(factory()), calibration=(x := images(12))).net
    pruned = sepress.prune(folded, calibration=x, ratio=0.4, min_width=2, round_to=2)
    assert pruned.report.checks["masked_equals_removed"].passed is True
    scale = pruned.net.get_parameter(f"{module}.scale")
    assert scale.shape[axis] == pruned.net.a[0].weight.shape[0] < 8
    sepress.save(pruned.net, tmp_path / "net.pt", arch=factory)
    loaded = sepress.load(tmp_path / "net.pt", arch=factory)
    assert torch.equal(outputs(loaded.net, x), outputs(pruned.net, x))
    (replaced,) = [r for r in loaded.layout.replaced if r.kind != "identity"]
    assert (replaced.module, replaced.kind, replaced.shape) == (module, kind, tuple(scale.shape))
    export_onnx(loaded.net, tmp_path / "net.onnx", example=x[:1])
    assert check_onnx_parity(loaded.net, tmp_path / "net.onnx", x).passed is True
    assert torch.equal(torch.fx.symbolic_trace(folded)(x), outputs(folded, x))


def test_an_excitation_in_place_keeps_what_does_not_learn(tmp_path: Path) -> None:
    x = images()
    folded = fold(lively(Outside()), calibration=x).net
    sepress.save(folded, tmp_path / "net.safetensors", arch=Outside)
    loaded = sepress.load(tmp_path / "net.safetensors", arch=Outside).net
    assert torch.equal(outputs(loaded, x), outputs(folded, x))
    assert not loaded.gate.scale.requires_grad


# ---- files that lie -------------------------------------------------------------------------------
@pytest.fixture
def folded_file(tmp_path: Path) -> Path:
    net = sepress.build("sepress:se_resnet8", in_chans=1)
    folded = fold(net, calibration=images(8, 1, 28, 28)).net
    sepress.save(folded, tmp_path / "net.pt", arch="sepress:se_resnet8", kwargs={"in_chans": 1})
    return tmp_path / "net.pt"


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a file's header, and sign it again."""
    content = torch.load(path, weights_only=True)
    header = json.loads(content["meta"])
    change(header["layout"])
    content["meta"] = json.dumps(header)
    content["digest"] = digest(content["meta"], content["tensors"])
    torch.save(content, path)


def first(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda layout: layout["replaced"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first(kind="pickle"), "layout.replaced.0.kind"),
        (first(module="stages.9.se"), "there is no such module"),
        (first(module=""), "there is no such module"),
        (first(module="stages.0.0"), "does not hold its tensors"),
        (first(kind="scale", shape=[16, 1, 1]), "does not hold its tensors"),
        (first(shape=[3]), "of shape"),
        (lambda layout: layout["replaced"].append(layout["replaced"][0] | {"module": "fc"}), "tensors: fc"),
        (lambda layout: layout["replaced"].append(layout["replaced"][0] | {"module": "act.x"}), "no such"),
        (lambda layout: layout.update(replaced=[]), "not a narrowed"),
    ],
)
def test_a_header_that_replaces_what_it_can_not_have_replaced_is_refused(
    folded_file: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    load_bundle(folded_file)
    forge(folded_file, change)
    with pytest.raises(InputError, match=message):
        load_bundle(folded_file)


def test_a_scale_of_a_shape_that_its_tensor_has_not_is_refused(tmp_path: Path) -> None:
    folded = fold(lively(kept_scale()), calibration=images()).net
    sepress.save(folded, tmp_path / "net.pt", arch=kept_scale)
    forge(tmp_path / "net.pt", first(shape=[10**9, 1, 1]))
    with pytest.raises(InputError, match="does not hold its tensors"):
        sepress.load(tmp_path / "net.pt", arch=kept_scale)


def test_a_file_from_before_gates_were_folded_still_loads(tmp_path: Path) -> None:
    net = sepress.build("sepress:se_resnet8")
    sepress.save(net, tmp_path / "net.pt", arch="sepress:se_resnet8")
    forge(tmp_path / "net.pt", lambda layout: layout.pop("replaced"))
    assert load_bundle(tmp_path / "net.pt").layout.replaced == ()


def test_a_bundle_knows_its_replaced_modules(tmp_path: Path, folded_file: Path) -> None:
    bundle = load_bundle(folded_file)
    assert [r.module for r in bundle.layout.replaced] == [f"stages.{i}.0.se" for i in range(3)]
    again = make_bundle(bundle.net, bundle.spec, lineage={})
    assert again.layout == bundle.layout
    save_bundle(again, tmp_path / "again.pt")
    assert load_bundle(tmp_path / "again.pt").layout == bundle.layout


# ---- the stage ------------------------------------------------------------------------------------
TRAIN = {"train": {"epochs": 1, "warmup_epochs": 0.2, "ema_decay": None}}
MODEL = {"source": "sepress:se_resnet8", "kwargs": {"in_chans": 1, "width": 8}}
PRUNE = {"prune": {"target_macs": 0.6, "round_to": 4, "min_width": 4, "calibration_images": 64}}
FINETUNE = {"finetune": {"epochs": 1, "warmup_epochs": 0.2, "ema_decay": None}}


def recipe(*stage_list: Any, **fields: Any) -> Recipe:
    return Recipe.model_validate({"name": "test", "device": "cpu", "stages": list(stage_list), **fields})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A net trained for one epoch on the embedded digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    stages.run_recipe(recipe(TRAIN, model=MODEL, data={"path": "digits"}), out=folder)
    return folder / "base.pt"


def test_a_recipe_folds_prunes_tunes_and_reports_nets_in_the_order_they_were_made(
    trained: Path, tmp_path: Path
) -> None:
    fold_all = {"fold": {"all": True, "calibration_images": 64}}
    what = recipe(fold_all, PRUNE, FINETUNE, "export", model={"source": str(trained)})
    outcome = stages.run_recipe(what, out=tmp_path / "run")
    report = outcome.report
    assert [row.label for row in report.measurements] == ["base", "folded", "pruned", "tuned"]
    base, folded, *_ = report.measurements
    blocks = [(8, 2), (16, 4), (32, 8)]  # channels and hidden units of the three SE blocks
    assert base.params - folded.params == sum(2 * c * r + c + r for c, r in blocks)
    assert report.checks["folded_equals_constant"].passed is True
    assert report.checks["masked_equals_removed"].passed is True
    assert any(note.startswith("3 of 3 gates folded") for note in report.notes)
    assert sum("its constant multiplies the layer before it" in note for note in report.notes) == 3
    bundle = load_bundle(tmp_path / "run" / "tuned.pt")
    assert bundle.lineage["base"]["path"] == str(trained.resolve())  # the teacher stays the base
    assert set(bundle.lineage["folded"]) == {f"stages.{i}.0.se" for i in range(3)}
    assert len(bundle.layout.replaced) == 3
    assert stages.run_recipe(what, out=tmp_path / "run").report == report  # nothing runs again


def test_fold_may_follow_a_finetune_and_its_net_is_the_newest(trained: Path, tmp_path: Path) -> None:
    what = recipe(FINETUNE, {"fold": {"gates": ["stages.0.*"]}}, model={"source": str(trained)})
    outcome = stages.run_recipe(what, out=tmp_path / "run")
    assert [row.label for row in outcome.report.measurements] == ["base", "tuned", "folded"]
    assert outcome.report.artifacts["model"].endswith("folded.pt")
    again = recipe({"fold": {"all": True}}, model={"source": outcome.report.artifacts["model"]})
    twice = stages.run_recipe(again, out=tmp_path / "again")
    assert [row.label for row in twice.report.measurements] == ["base", "folded"]
    assert len(load_bundle(tmp_path / "again" / "folded.pt").lineage["folded"]) == 3


def test_a_pruned_file_is_folded_beside_its_base(trained: Path, tmp_path: Path) -> None:
    stages.run_recipe(recipe(PRUNE, model={"source": str(trained)}), out=tmp_path / "pruned")
    what = recipe({"fold": {"all": True}}, model={"source": str(tmp_path / "pruned" / "pruned.pt")})
    report = stages.run_recipe(what, out=tmp_path / "run").report
    assert [row.label for row in report.measurements] == ["base", "pruned", "folded"]
    assert report.measurements[1].params > report.measurements[2].params
    bundle = load_bundle(tmp_path / "run" / "folded.pt")
    assert bundle.lineage["base"]["path"] == str(trained.resolve())
    assert len(bundle.lineage["plans"]) == 1


def test_gates_are_folded_within_a_constraint_on_validation(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy is made up: each gate that is gone costs 2 points."""

    def accuracy(job: Any, net: nn.Module, split: str) -> Any:
        gone = sum(type(module) is FoldedIdentity for module in net.modules())
        assert split == ("val" if "folded" not in job.labels else "test")
        return Accuracy(split, 1000, 0.9 - 0.02 * gone, 1.0, 0.1, None, None)

    monkeypatch.setattr(Job, "accuracy", accuracy)
    what = recipe({"fold": {"within": "top1_drop<=0.05"}}, model={"source": str(trained)})
    outcome = stages.run_recipe(what, out=tmp_path / "run")
    notes = outcome.report.notes
    assert any(note.startswith("2 of 3 gates folded") for note in notes)
    tried = next(note for note in notes if note.startswith("tried"))
    assert tried.startswith("tried: 3 gates, top1_drop<=0.05: not met at 0.06")
    assert "2 gates, top1_drop<=0.05: met at 0.04" in tried
    default = recipe("fold", model={"source": str(trained)})
    outcome = stages.run_recipe(default, out=tmp_path / "default")
    assert any(note.startswith("0 of 3 gates folded") for note in outcome.report.notes)


def test_unlabelled_images_fold_all_gates_or_those_named(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(40):
        pixels = generator.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    fields = {"model": {"source": str(trained)}, "data": {"path": str(folder)}}
    with pytest.raises(InputError, match=r"folding gates within top1_drop<=0.001 needs labels") as error:
        stages.run_recipe(recipe("fold", **fields), out=tmp_path / "run")
    assert "--all" in str(error.value)
    outcome = stages.run_recipe(recipe({"fold": {"all": True}}, **fields), out=tmp_path / "all")
    assert any("of divergence from the unfolded net" in note for note in outcome.report.notes)
    outcome = stages.run_recipe(recipe({"fold": {"gates": ["*2.0*"]}}, **fields), out=tmp_path / "one")
    assert load_bundle(tmp_path / "one" / "folded.pt").lineage["folded"] == ["stages.2.0.se"]


def test_where_a_fold_may_stand_in_a_recipe() -> None:
    source = {"source": "timm:seresnet50"}
    for order in (
        ("fold", "rank", PRUNE),
        ("rank", "fold", PRUNE, "finetune"),
        ("finetune", "fold", "export"),
    ):
        assert "fold" in [stage.kind for stage in recipe(*order, model=source).stages]
    for order in (("evaluate", "fold"), ("fold", "polarise"), ("fold", "fold"), ("finetune", "fold", PRUNE)):
        with pytest.raises(ValueError, match=r"can't follow|stands twice"):
            recipe(*order, model=source)


def test_naming_gates_leaves_the_default_constraint_out_and_reads_back_the_same() -> None:
    for written, constraint in [
        ({}, "top1_drop<=0.001"),
        ({"all": True}, None),
        ({"gates": ["a"]}, None),
        ({"gates": ["a"], "within": "top1>=0.7"}, "top1>=0.7"),
        ({"within": "loss_rise<=0.1"}, "loss_rise<=0.1"),
    ]:
        stage = FoldStage.model_validate(written)
        assert stage.constraint == constraint
        again = FoldStage.model_validate(stage.model_dump(mode="json", exclude={"kind"}))
        assert again.constraint == constraint
    for written in ({"all": True, "gates": ["a"]}, {"all": True, "within": "top1>=0.7"}):
        with pytest.raises(ValueError, match="takes no gates"):
            FoldStage.model_validate(written)
