"""Criteria: scores equal those made by hand, and every group is judged by something that is named."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepress.calibrate import EVIDENCE, ExcitationStats, calibrate
from sepress.coupling import Coupling, trace
from sepress.criteria import CRITERIA, get_criterion, rank
from sepress.criteria.contribution import weight_energy
from sepress.errors import InputError
from sepress.reconstruct import order_groups
from sepress.types import CallSite, Reader


class Excite(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.sigmoid(self.expand(self.squeeze(x.mean((2, 3), keepdim=True)).relu()))
        return x * self.last


class Block(nn.Module):
    """A residual block with 6 ungated inner channels and its gate on the shortcut's 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.se = Excite(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        self.last = self.norm1(h).relu()
        return (x + self.se(self.norm2(self.conv2(self.last)))).relu()


class Net(nn.Module):
    """Two residual blocks; the classifier reads the shortcut flattened, 2 x 2 positions a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block1, self.block2 = Block(), Block()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        self.read1 = x
        x = self.block1(x)
        self.read2 = x
        x = self.block2(x)
        self.read3 = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(self.read3)


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().eval()
        for block in (net.block1, net.block2):
            nn.init.normal_(block.se.squeeze.weight, std=3)
            nn.init.constant_(block.se.squeeze.bias, 1)
            nn.init.normal_(block.se.expand.weight)
            nn.init.normal_(block.se.expand.bias)
        return net


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 5


@pytest.fixture
def coupling(net: Net, batch: tuple[Tensor, Tensor]) -> Coupling:
    return trace(net, batch[0][:1])


def measure(net: nn.Module, coupling: Coupling, batch: tuple[Tensor, Tensor]) -> ExcitationStats:
    return calibrate(net, coupling, [batch], evidence=frozenset(EVIDENCE), device="cpu")


def test_mean_excitation_is_the_mean_over_images_and_over_the_gates_of_a_shortcut(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    ranking = rank(coupling, measure(net, coupling, batch), criterion="mean-excitation", net=net)
    with torch.no_grad():
        net(batch[0])
    by_hand = (net.block1.se.last.mean((0, 2, 3)) + net.block2.se.last.mean((0, 2, 3))) / 2
    np.testing.assert_allclose(ranking.scores["stem"], by_hand.numpy(), rtol=1e-6)
    assert ranking.evidence["stem"] == "mean of 2 gates"
    assert ranking.mean_excitation == {"stem": ranking.scores["stem"]}


def test_mean_excitation_judges_what_has_no_gate_by_l2_and_says_so(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    stats = measure(net, coupling, batch)
    ranking = rank(coupling, stats, criterion="mean-excitation", net=net)
    by_l2 = rank(coupling, stats, criterion="l2", net=net)
    for name in ("block1.conv1", "block1.se.squeeze"):
        assert ranking.scores[name] == by_l2.scores[name]
        assert ranking.evidence[name] == "L2 of weights (no gate)"


@torch.no_grad()
def gates_of(net: Net, images: Tensor) -> list[Tensor]:
    net(images)
    return [block.se.last.flatten(1) for block in (net.block1, net.block2)]  # (N, C) each


def test_class_excitation_is_the_mean_over_gates_of_each_ones_largest_class_mean(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    ranking = rank(coupling, measure(net, coupling, batch), criterion="class-excitation", net=net)
    images, targets = batch
    largest = [
        torch.stack([s[targets == k].mean(0) for k in range(5)]).amax(0) for s in gates_of(net, images)
    ]
    np.testing.assert_allclose(ranking.scores["stem"], (sum(largest) / 2).numpy(), rtol=1e-6)
    assert ranking.evidence["stem"] == "largest class mean of 2 gates"
    assert ranking.evidence["block1.conv1"] == "L2 of weights (no gate)"


def test_class_excitation_passes_over_a_class_without_images(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    images, targets = batch[0], torch.tensor([0, 3] * 5)
    ranking = rank(coupling, measure(net, coupling, (images, targets)), criterion="class-excitation", net=net)
    largest = [torch.maximum(s[::2].mean(0), s[1::2].mean(0)) for s in gates_of(net, images)]
    np.testing.assert_allclose(ranking.scores["stem"], (sum(largest) / 2).numpy(), rtol=1e-6)


def test_excitation_spread_is_the_mean_over_gates_of_their_deviation(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    ranking = rank(coupling, measure(net, coupling, batch), criterion="excitation-spread", net=net)
    a, b = (s.std(0, correction=0) for s in gates_of(net, batch[0]))
    np.testing.assert_allclose(ranking.scores["stem"], ((a + b) / 2).numpy(), rtol=1e-4)
    assert ranking.evidence["stem"] == "spread of 2 gates"


@torch.no_grad()
def test_a_gate_that_never_varies_has_no_spread_however_open(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    for block in (net.block1, net.block2):
        block.se.expand.weight[2] = 0
        block.se.expand.bias[2] = 8
    stats = measure(net, coupling, batch)
    by_spread = rank(coupling, stats, criterion="excitation-spread", net=net).scores["stem"]
    by_mean = rank(coupling, stats, criterion="mean-excitation", net=net).scores["stem"]
    assert np.argmin(by_spread) == np.argmax(by_mean) == 2
    assert by_spread[2] < 1e-6


@pytest.mark.parametrize("criterion", ["fisher", "gate-taylor"])
def test_a_unit_gate_on_inner_channels_reacts_as_the_activation_times_its_gradient(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor], criterion: str
) -> None:
    images, targets = batch
    ranking = rank(coupling, measure(net, coupling, batch), criterion=criterion, net=net)
    loss = F.cross_entropy(net(images), targets, reduction="sum")
    x = net.block1.last  # what conv2 alone reads
    (gradient,) = torch.autograd.grad(loss, x)
    reaction = (x.detach() * gradient).sum((2, 3))  # (N, C)
    by_hand = reaction.square().mean(0) if criterion == "fisher" else reaction.abs().mean(0)
    np.testing.assert_allclose(ranking.scores["block1.conv1"], by_hand.numpy(), rtol=1e-4)
    words = {"fisher": "Fisher at 1 reader", "gate-taylor": "Taylor of a unit gate at 1 reader"}
    assert ranking.evidence["block1.conv1"] == words[criterion]


@pytest.mark.parametrize("criterion", ["fisher", "gate-taylor"])
def test_costs_of_unit_gates_are_the_sums_of_the_lowest_scores(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor], criterion: str
) -> None:
    ranking = rank(coupling, measure(net, coupling, batch), criterion=criterion, net=net)
    assert ranking.costs.keys() == ranking.scores.keys()
    for name, scores in ranking.scores.items():
        by_hand = [sum(sorted(scores)[:gone]) for gone in range(len(scores) + 1)]
        assert ranking.costs[name] == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_that_predict_have_costs_and_no_others(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor], criterion: str
) -> None:
    ranking = rank(coupling, measure(net, coupling, batch), criterion=criterion, net=net)
    assert bool(ranking.costs) == CRITERIA[criterion].predicts


def inner_weights(net: Net) -> tuple[Tensor, Tensor, Tensor]:
    """What block1's inner channels are made by, scaled by and read by, each (6, ...)."""
    block = net.block1
    return (
        block.conv1.weight.detach().flatten(1),
        block.norm1.weight.detach(),
        block.conv2.weight.detach().transpose(0, 1).flatten(1),
    )


@torch.no_grad()
def test_scores_by_torch_pruning_are_those_of_the_weights(net: Net, coupling: Coupling) -> None:
    nn.init.uniform_(net.block1.norm1.weight, -1, 1)
    out, scale, into = inner_weights(net)
    l2 = out.square().sum(1) + scale.square() + into.square().sum(1)
    rising = l2.sort().values
    lamp = {v.item(): v / rising[i:].sum() for i, v in enumerate(rising)}

    def distances(w: Tensor) -> Tensor:
        return (w.square()[:, None] - w.square()[None]).square().sum(2).sqrt().sum(1)

    by_hand = {
        "l1": out.abs().sum(1) + scale.abs() + into.abs().sum(1),
        "l2": l2,
        "lamp": torch.stack([lamp[v.item()] for v in l2]),
        "bn-scale": scale.abs(),
        "fpgm": distances(out) + distances(into),
    }
    for criterion, expected in by_hand.items():
        scores = rank(coupling, None, criterion=criterion, net=net).scores["block1.conv1"]
        np.testing.assert_allclose(scores, (expected / expected.mean()).numpy(), rtol=1e-4, err_msg=criterion)


def test_hessian_is_weights_times_gradients_of_each_image_squared(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    nn.init.uniform_(net.block1.norm1.weight, -1, 1)
    ranking = rank(coupling, measure(net, coupling, batch), criterion="hessian", net=net)
    block, total = net.block1, torch.zeros(6)
    for i in range(10):
        net.zero_grad()
        F.cross_entropy(net(batch[0][i : i + 1]), batch[1][i : i + 1]).backward()
        total += (block.conv1.weight * block.conv1.weight.grad).detach().square().sum((1, 2, 3))
        total += (block.norm1.weight * block.norm1.weight.grad).detach().square()
        total += (block.conv2.weight * block.conv2.weight.grad).detach().square().sum((0, 2, 3))
    np.testing.assert_allclose(ranking.scores["block1.conv1"], (total / total.mean()).numpy(), rtol=1e-4)
    assert ranking.evidence["block1.conv1"] == "Hessian of weights"


def test_a_group_without_batch_norm_is_judged_by_l2_and_says_so(net: Net, coupling: Coupling) -> None:
    by_scale = rank(coupling, None, criterion="bn-scale", net=net)
    by_l2 = rank(coupling, None, criterion="l2", net=net)
    assert by_scale.evidence["block1.se.squeeze"] == "L2 of weights (no batch norm covers it)"
    assert by_scale.scores["block1.se.squeeze"] == by_l2.scores["block1.se.squeeze"]
    assert by_scale.evidence["block1.conv1"] == "scale of batch norm"


def test_a_twin_is_what_fpgm_removes(net: Net, coupling: Coupling) -> None:
    with torch.no_grad():
        net.block1.conv1.weight[1] = net.block1.conv1.weight[4]
        net.block1.conv2.weight[:, 1] = net.block1.conv2.weight[:, 4]
    scores = rank(coupling, None, criterion="fpgm", net=net).scores["block1.conv1"]
    assert scores[1] == pytest.approx(scores[4], rel=1e-5)
    assert set(np.argsort(scores)[:2]) == {1, 4}


def test_lamp_orders_a_group_as_l2_does(net: Net, coupling: Coupling) -> None:
    lamp, l2 = (rank(coupling, None, criterion=name, net=net).scores for name in ("lamp", "l2"))
    assert all(np.array_equal(np.argsort(lamp[name]), np.argsort(l2[name])) for name in l2)


def with_gate_units(coupling: Coupling, *units: list[int]) -> Coupling:
    gates = tuple(
        dataclasses.replace(g, units=np.array(u)) for g, u in zip(coupling.gates, units, strict=True)
    )
    return dataclasses.replace(coupling, gates=gates)


def test_a_unit_of_several_gate_channels_has_their_mean(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    stats = measure(net, coupling, batch)
    shared = with_gate_units(coupling, [0, 1, 2, 3], [3, -1, 3, 3])
    a, b = (stats.mean_excitation(gate).numpy() for gate in shared.gates)
    ranking = rank(shared, stats, criterion="mean-excitation", net=net)
    last = (a[3] + (b[0] + b[2] + b[3]) / 3) / 2
    np.testing.assert_allclose(ranking.scores["stem"], [a[0], a[1], a[2], last], rtol=1e-6)


def test_gates_that_cover_a_part_of_a_group_do_not_judge_it(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    partial = with_gate_units(coupling, [0, 1, -1, -1], [0, 1, -1, -1])
    ranking = rank(partial, measure(net, coupling, batch), criterion="mean-excitation", net=net)
    assert ranking.evidence["stem"] == "L2 of weights (its gates cover a part only)"
    assert ranking.mean_excitation == {}


def test_contribution_of_inner_channels_is_their_deviation_times_the_weights_that_read_them(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    ranking = rank(coupling, measure(net, coupling, batch), criterion="contribution", net=net)
    with torch.no_grad():
        net(batch[0])
    deviation = net.block1.last.transpose(0, 1).flatten(1).std(1, correction=0)
    norm = net.block1.conv2.weight.detach().square().sum((0, 2, 3)).sqrt()
    by_hand = deviation * norm
    np.testing.assert_allclose(
        ranking.scores["block1.conv1"], (by_hand / by_hand.square().sum().sqrt()).numpy(), rtol=1e-5
    )
    assert ranking.evidence["block1.conv1"] == "contribution at 1 reader"


def test_a_constant_channel_contributes_nothing_however_large(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    norm = net.block1.norm1
    with torch.no_grad():
        norm.weight[2], norm.bias[2] = 0.0, 100.0
    ranking = rank(coupling, measure(net, coupling, batch), criterion="contribution", net=net)
    scores = ranking.scores["block1.conv1"]
    assert min(scores) == scores[2] < 1e-3 * max(scores)


def test_contribution_on_a_shortcut_adds_the_shares_of_all_its_readers_and_positions(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    ranking = rank(coupling, measure(net, coupling, batch), criterion="contribution", net=net)
    with torch.no_grad():
        net(batch[0])
    shares = torch.zeros(4)
    for x, conv in ((net.read1, net.block1.conv1), (net.read2, net.block2.conv1)):
        energy = x.transpose(0, 1).flatten(1).var(1, correction=0) * conv.weight.detach().square().sum(
            (0, 2, 3)
        )
        shares += energy / energy.sum()
    energy = net.read3.var(0, correction=0) * net.head.weight.detach().square().sum(0)  # (16,)
    shares += (energy / energy.sum()).view(4, 4).sum(1)
    np.testing.assert_allclose(ranking.scores["stem"], shares.sqrt().numpy(), rtol=1e-5)
    assert ranking.evidence["stem"] == "contribution at 3 readers"


def test_hidden_channels_of_an_se_block_are_judged_where_its_expand_layer_reads_them(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    ranking = rank(coupling, measure(net, coupling, batch), criterion="contribution", net=net)
    assert ranking.evidence["block1.se.squeeze"] == "contribution at 1 reader"


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_every_prunable_group(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor], criterion: str
) -> None:
    ranking = rank(coupling, measure(net, coupling, batch), criterion=criterion, net=net)
    assert {name: len(s) for name, s in ranking.scores.items()} == {
        g.name: g.units for g in coupling.prunable()
    }
    assert ranking.evidence.keys() == ranking.scores.keys()
    assert all(np.isfinite(s).all() for s in ranking.scores.values())
    assert ranking.mean_excitation.keys() == {"stem"}


def test_random_scores_follow_the_seed(net: Net, coupling: Coupling) -> None:
    def scores(seed: int) -> object:
        return rank(coupling, None, criterion="random", net=net, seed=seed).scores

    assert scores(1) == scores(1)
    assert scores(1) != scores(2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_weight_energy_is_the_energy_that_a_unit_impulse_leaves(groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(4, 6, 3, padding=1, groups=groups, bias=False)
    dim = 0 if transposed else 1
    site = CallSite(index=0, function="conv2d", operand=0, axis=1, module="conv")
    nobody = np.full(4, -1)
    reader = Reader("weight", dim, groups, transposed, pooled=False, site=site, group=nobody, unit=nobody)
    impulse = torch.zeros(4, 4, 5, 5)  # image i: 1 in the middle of channel i
    impulse[range(4), range(4), 2, 2] = 1
    by_hand = conv(impulse).square().sum((1, 2, 3))
    np.testing.assert_allclose(weight_energy(conv.weight, reader), by_hand.numpy(), rtol=1e-5)


def test_an_unknown_criterion_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown criterion 'magic'") as caught:
        get_criterion("magic")
    assert all(name in str(caught.value) for name in CRITERIA)


def test_statistics_that_lack_the_evidence_are_refused(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    excitation = calibrate(net, coupling, [batch], evidence=frozenset({"excitation"}), device="cpu")
    with pytest.raises(InputError, match="needs statistics that were not collected: fisher"):
        rank(coupling, excitation, criterion="fisher", net=net)
    with pytest.raises(InputError, match=r"class-excitation\nCalibrate for this criterion"):
        rank(coupling, excitation, criterion="class-excitation", net=net)
    with pytest.raises(InputError, match="contribution"):
        rank(coupling, None, criterion="contribution", net=net)


def test_statistics_of_another_net_are_refused(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    stats = measure(net, coupling, batch)
    shorter = dataclasses.replace(stats, sums={k: v[..., 1:] for k, v in stats.sums.items()})
    with pytest.raises(InputError, match="of another net"):
        rank(coupling, shorter, criterion="mean-excitation", net=net)


def test_a_weight_that_is_not_finite_is_named(net: Net, coupling: Coupling) -> None:
    net.block1.conv2.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"scores of 'block1.conv1' .* not finite|scores of 'stem'"):
        rank(coupling, None, criterion="l2", net=net)


@torch.no_grad()
def test_gates_that_look_untrained_or_constant_are_warned_of(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    assert not rank(coupling, measure(net, coupling, batch), net=net).warnings
    net.block1.se.expand.weight.zero_()
    net.block1.se.expand.bias.fill_(0.1)
    warnings = rank(coupling, measure(net, coupling, batch), net=net).warnings
    assert warnings == (
        "1 of 2 gates look untrained, all channel means within 0.05 of 0.5: block1.se",
        "1 of 2 gates do not vary over images: block1.se",
    )


@torch.no_grad()
def test_channels_that_are_always_zero_are_warned_of_and_score_zero(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor]
) -> None:
    net.block2.norm1.weight[[1, 4]] = 0
    net.block2.norm1.bias[[1, 4]] = -1
    ranking = rank(coupling, measure(net, coupling, batch), criterion="contribution", net=net)
    assert ranking.warnings == ("2 channels are zero on every calibration image: 2 of block2.conv1",)
    assert [ranking.scores["block2.conv1"][i] for i in (1, 4)] == [0, 0]


def test_a_net_without_gates_is_told_so() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    coupling = trace(net, torch.randn(1, 3, 8, 8))
    ranking = rank(coupling, None, criterion="l2", net=net)
    assert ranking.warnings == (
        "no excitation was found, since the net has no gate: channels are judged without it",
    )


@pytest.mark.parametrize("criterion", ["reconstruction", "fisher-reconstruction"])
def test_scores_of_a_reconstruction_are_the_losses_predicted_in_its_order(
    net: Net, coupling: Coupling, batch: tuple[Tensor, Tensor], criterion: str
) -> None:
    stats = measure(net, coupling, batch)
    ranking = rank(coupling, stats, criterion=criterion, net=net)
    orders = order_groups(net, coupling, stats, felt=criterion != "reconstruction")
    assert ranking.costs.keys() == orders.keys() == {group.name for group in coupling.prunable()}
    for name, (order, steps, readers) in orders.items():
        scores, costs = ranking.scores[name], ranking.costs[name]
        assert sorted(range(len(scores)), key=lambda unit: (scores[unit], order.index(unit))) == order
        assert costs == pytest.approx([0.0, *itertools.accumulate(steps)])
        assert [scores[unit] for unit in order] == pytest.approx(costs[1:])
        assert ranking.evidence[name].endswith(f"at {readers} reader{'s' * (readers > 1)}")
