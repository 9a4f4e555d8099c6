"""Reconstruction: the order is the greedy one, and what others can stand in for costs nothing to remove."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepress.calibrate import ExcitationStats, calibrate, reader_key
from sepress.coupling import Coupling, apply_removal, trace
from sepress.criteria import rank
from sepress.errors import SepressError
from sepress.gates import Taps, masking
from sepress.pruning import prune_channels
from sepress.reconstruct import (
    RIDGE,
    Consumer,
    compensate,
    factorise,
    order_groups,
    refit,
    regularised,
    removal_order,
    together,
)
from sepress.types import CouplingGroup, Policy, PruningPlan, Removed
from tests import nets

CPU = torch.device("cpu")
MOMENTS = frozenset({"moments"})


@pytest.fixture
def every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepress.moments.FEWEST_ROWS", 1 << 20)


def build(name: str, images: int = 128) -> tuple[nn.Module, Tensor, Coupling]:
    net, x = nets.build(name)
    x = torch.randn(images, *x.shape[1:], generator=torch.Generator().manual_seed(2))
    return net, x, trace(net, x[:1])


def measure(net: nn.Module, coupling: Coupling, x: Tensor) -> ExcitationStats:
    return calibrate(net, coupling, x.split(64), evidence=MOMENTS, device=CPU)


def pruned(
    net: nn.Module, coupling: Coupling, stats: ExcitationStats, removed: Removed, x: Tensor
) -> nn.Module:
    """What prune_channels gives for a plan that removes these, without any recalibration."""
    widths = {group.name: group.width for group in coupling.groups}
    gone = {name: coupling.group(name).unit_width * len(units) for name, units in removed.items()}
    plan = PruningPlan(
        Policy(ratio=0.5), "reconstruction", removed, widths,
        {name: width - gone.get(name, 0) for name, width in widths.items()}, {}, 1, 1, 1, 1,
    )  # fmt: skip
    ranking = rank(coupling, stats, criterion="reconstruction", net=net)
    surgery = prune_channels(net, coupling, ranking, plan, images=x[:8], moments=stats)
    assert surgery.check.passed
    return surgery.net


@torch.no_grad()
def error(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """The largest difference over the spread of the outputs over images."""
    a, b = one(x), other(x)
    return float((a - b).abs().max() / (a - a.mean(0)).abs().max())


def slots(
    group: CouplingGroup, coupling: Coupling, unit: int, *, made: bool
) -> list[tuple[str, int, np.ndarray]]:
    """Where a unit lies on the parameters that make the channel, or on those that read it."""
    reading = {(reader.parameter, reader.dim) for reader in coupling.readers}
    return [
        (member.parameter, member.dim, member.index[member.unit == unit])
        for member in group.members
        if ((member.parameter, member.dim) not in reading) == made
    ]


@torch.no_grad()
def duplicate(net: nn.Module, coupling: Coupling, group: CouplingGroup, unit: int, twin: int) -> None:
    """Make one unit's channel the other's, wherever it is read."""
    state = net.state_dict()
    pairs = zip(slots(group, coupling, unit, made=True), slots(group, coupling, twin, made=True), strict=True)
    for (name, dim, to), (_, _, at) in pairs:
        tensor = state[name].movedim(dim, 0)
        tensor[to] = tensor[at]


@torch.no_grad()
def silence(net: nn.Module, coupling: Coupling, group: CouplingGroup, unit: int) -> None:
    """Make a unit's channel zero."""
    state = net.state_dict()
    for name, dim, at in slots(group, coupling, unit, made=True):
        if not name.endswith(("running_var", "running_mean")):
            state[name].movedim(dim, 0)[at] = 0


# ---- the order, by brute force ------------------------------------------------------------------
Problem = list[tuple[Tensor, Tensor, Tensor]]  # consumers: weight (O, D), covariance (D, D), variables (U, M)


def problem(units: int, taps: int, consumers: int, *, positions: int = 1, seed: int = 0) -> Problem:
    """Correlated inputs; each consumer reads variables of no unit as well, and the second lacks unit 1."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(consumers):
        width = units * positions * taps + 3
        x = torch.randn(4 * width, width, dtype=torch.float64, generator=generator)
        x = x @ torch.randn(width, width, dtype=torch.float64, generator=generator)
        variables = torch.randperm(width, generator=generator)[:-3].view(units, -1)
        if number:
            variables[1] = -1
            variables[2, -1] = -1
        weight = torch.randn(3, width, dtype=torch.float64, generator=generator)
        made.append((weight, x.T @ x / len(x), variables))
    return made


def direct_loss(weight: Tensor, covariance: Tensor, gone: Tensor) -> float:
    """Of the best weights that are zero at `gone`, by the normal equations of the whole refit."""
    matrix = regularised(covariance)
    keep = torch.ones(len(matrix), dtype=torch.bool)
    keep[gone] = False
    new = torch.zeros_like(weight)
    new[:, keep] = torch.linalg.lstsq(matrix[keep][:, keep], matrix[keep] @ weight.T).solution.T
    return float((((weight - new) @ matrix) * (weight - new)).sum())


def loss_without(problem: Problem, units: list[int]) -> float:
    total = 0.0
    for weight, covariance, variables in problem:
        gone = variables[units].flatten()
        total += direct_loss(weight, covariance, gone[gone >= 0])
    return total


@pytest.mark.parametrize(("taps", "positions"), [(1, 1), (9, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("consumers", [1, 2])
def test_the_order_is_the_greedy_one_and_its_costs_those_of_the_full_refits(
    taps: int, positions: int, consumers: int
) -> None:
    given = problem(5, taps, consumers, positions=positions)
    order, costs = removal_order(
        [Consumer(w, torch.linalg.inv(regularised(c)), v) for w, c, v in given], units=5
    )
    gone: list[int] = []
    for unit, cost in zip(order, costs, strict=True):
        before = loss_without(given, gone)
        left = [u for u in range(5) if u not in gone]
        losses = {u: loss_without(given, [*gone, u]) - before for u in left}
        assert unit == min(losses, key=losses.__getitem__)
        assert cost == pytest.approx(losses[unit], rel=1e-6)
        gone.append(unit)
    assert sum(costs) == pytest.approx(loss_without(given, order), rel=1e-6)


def test_an_order_leaves_the_weights_and_covariances_given_as_they_were() -> None:
    ((weight, covariance, variables),) = problem(4, 2, 1)
    inverse = torch.linalg.inv(regularised(covariance))
    kept = weight.clone(), inverse.clone()
    removal_order([Consumer(weight, inverse, variables)], units=4)
    assert torch.equal(weight, kept[0])
    assert torch.equal(inverse, kept[1])


def test_a_dead_a_duplicated_and_a_dependent_variable_go_before_all_others_and_cost_nothing() -> None:
    x = torch.randn(400, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    x[:, 4] = x[:, 1]
    x[:, 6] = 0.5 * x[:, 0] - 2 * x[:, 3]
    covariance = x.T @ x / len(x)
    weight = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inverse = torch.cholesky_inverse(factorise(covariance)[0])
    energy = float(((weight @ covariance) * weight).sum())
    order, costs = removal_order([Consumer(weight, inverse, torch.arange(8)[:, None])], units=8)
    assert order[0] == 2
    assert len({1, 4} & set(order[:3])) == 1
    assert len({0, 3, 6} & set(order[:3])) == 1
    assert costs[0] <= 1e-8 * energy
    assert max(costs[1:3]) <= 2 * RIDGE * energy
    assert costs[3] > 10 * RIDGE * energy


# ---- the refit ----------------------------------------------------------------------------------
def test_a_refit_takes_what_others_replace_over_to_rounding_and_leaves_what_nothing_replaces() -> None:
    x = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 4] = x[:, 1]
    x[:, 5] = 0
    weight = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([True, True, True, True, False, False])
    x[:, :4] = torch.linalg.qr(x[:, :4]).Q  # nothing but the twin is like another
    x[:, 4] = x[:, 1]
    new, _ = refit(weight, x.T @ x / len(x), kept)
    torch.testing.assert_close(new[:, 1], weight[:, 1] + weight[:, 4], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new[:, [0, 2, 3]], weight[:, [0, 2, 3]], rtol=1e-9, atol=1e-9)
    assert not new[:, 4:].any()


@pytest.mark.parametrize("rows", [10, 40, 4000])  # fewer than variables, too
def test_a_refit_is_never_worse_than_plain_removal_and_near_to_the_least_squares_fit(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 20, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(20, 20, dtype=torch.float64, generator=generator)
    x = x - x.mean(0)
    weight = torch.randn(5, 20, dtype=torch.float64, generator=generator)
    kept = torch.rand(20, generator=generator) > 0.4
    new, _ = refit(weight, x.T @ x / rows, kept)
    lost = float((x @ (weight - new).T).square().sum())
    plain = float((x @ (weight * ~kept).T).square().sum())
    best = torch.linalg.lstsq(x[:, kept], x @ weight.T, driver="gelsd").solution
    least = float((x @ weight.T - x[:, kept] @ best).square().sum())
    assert least <= lost + 1e-9 * plain
    assert lost <= plain
    assert lost - least <= 0.02 * plain


def test_the_condition_is_one_for_unlike_variables_and_grows_to_the_ridge_for_twins() -> None:
    apart = torch.eye(3, dtype=torch.float64) * torch.tensor([1.0, 1e6, 1e-6])
    assert factorise(apart)[1] == pytest.approx(1, rel=1e-3)
    twins = torch.ones(2, 2, dtype=torch.float64)
    assert factorise(twins)[1] == pytest.approx(0.5 / RIDGE, rel=0.01)  # 1 + r over (1 + r) - 1 / (1 + r)


def test_the_ridge_grows_where_rounding_made_a_covariance_indefinite() -> None:
    indefinite = torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)
    factor, _ = factorise(indefinite)
    torch.testing.assert_close(factor @ factor.T, regularised(indefinite, 0.1))
    with pytest.raises(SepressError, match="far from definite"):
        factorise(torch.tensor([[1.0, 5.0], [5.0, 1.0]], dtype=torch.float64))


def test_all_dead_variables_can_be_solved_for() -> None:
    new, condition = refit(
        torch.ones(1, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64), torch.arange(3) > 0
    )
    assert new.tolist() == [[0, 1, 1]]
    assert condition == 1


@pytest.mark.usefixtures("every_place")
def test_moments_of_two_calls_together_are_those_of_all_their_rows() -> None:
    net, x, coupling = build("plain", images=6)
    (reader,) = (r for r in coupling.readers if r.parameter == "b.0.weight")
    parts = [measure(net, coupling, part).moments(reader) for part in (x[:2], x[2:])]
    whole = measure(net, coupling, x).moments(reader)
    assert whole is not None
    added = together([part for part in parts if part is not None])
    assert added.rows == whole.rows
    torch.testing.assert_close(added.mean, whole.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(added.covariance, whole.covariance, rtol=1e-5, atol=1e-5)


# ---- nets ---------------------------------------------------------------------------------------
EXACT = [
    "plain", "residual", "se residual", "inverted bottleneck", "dense", "depthwise", "grouped", "transposed",
    "flattened", "se 1d", "se 3d", "inline se", "gated identity", "scale and shift", "tied", "layer scale",
    "shuffle", "stored split", "two outputs", "padded shortcut",
]  # fmt: skip


def read_groups(coupling: Coupling, net: nn.Module, x: Tensor) -> list[str]:
    return list(order_groups(net, coupling, measure(net, coupling, x)))


@pytest.mark.usefixtures("every_place")
@pytest.mark.parametrize("name", EXACT)
def test_a_duplicated_channel_goes_first_and_removing_it_changes_no_output(name: str) -> None:
    """Whatever reads it: SE's squeeze, its expand, residual streams, blocks, the head."""
    start, x, coupling = build(name)
    if name == "two outputs":
        start = First(start)
        coupling = trace(start, x[:1])
    names = read_groups(coupling, start, x[:4])
    assert names
    for group in (group for group in coupling.groups if group.name in names):
        net = copy.deepcopy(start)
        duplicate(net, coupling, group, unit=2, twin=0)
        stats = measure(net, coupling, x)
        order, costs, _ = order_groups(net, coupling, stats)[group.name]
        first = min(order.index(0), order.index(2))
        assert costs[first] < 2 * RIDGE, group.name  # and so do all before it, which happen to be dead
        whole = pruned(net, coupling, stats, {group.name: (order[first],)}, x)
        assert error(net, whole, x) < 5e-5, group.name


@pytest.mark.usefixtures("every_place")
@pytest.mark.parametrize("name", EXACT)
def test_a_dead_channel_goes_first_at_no_cost_and_removing_it_changes_no_output(name: str) -> None:
    start, x, coupling = build(name)
    if name == "two outputs":
        start = First(start)
        coupling = trace(start, x[:1])
    for group in (group for group in coupling.groups if group.name in read_groups(coupling, start, x[:4])):
        net = copy.deepcopy(start)
        silence(net, coupling, group, unit=2)
        stats = measure(net, coupling, x)
        order, costs, _ = order_groups(net, coupling, stats)[group.name]
        assert not any(costs[: order.index(2) + 1]), group.name  # others may happen to be dead as well
        whole = pruned(net, coupling, stats, {group.name: (2,)}, x)
        assert error(net, whole, x) < 5e-5, group.name


class First(nn.Module):
    """The first output of a net of several."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)["logits"] + self.net.map.weight.sum() * 0


class Linear(nn.Module):
    """Channels that are read without an activation between, by a convolution with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nets.Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)).relu())


@pytest.mark.usefixtures("every_place")
@torch.no_grad()
def test_a_channel_that_is_a_sum_of_others_and_a_constant_costs_nothing() -> None:
    net = nets.lively(Linear())
    x = torch.randn(128, 3, 10, 10, generator=torch.Generator().manual_seed(2))
    net.a.weight[5] = 0.5 * net.a.weight[1] - 2 * net.a.weight[3]
    net.a.bias[5] = 0.7
    coupling = trace(net, x[:1])
    stats = measure(net, coupling, x)
    order, costs, readers = order_groups(net, coupling, stats)["a"]
    assert order[0] in (1, 3, 5)
    assert costs[0] < 2 * RIDGE
    assert costs[1] > 5 * RIDGE
    assert readers == 1
    for unit in (1, 3, 5):  # any of the three is given by the other two
        assert error(net, pruned(net, coupling, stats, {"a": (unit,)}, x), x) < 1e-3
    assert error(net, pruned(net, coupling, stats, {"a": (5,)}, x), x) < 5e-5


def test_what_the_squeeze_read_of_a_channel_moves_to_its_twin() -> None:
    net, x, coupling = build("inverted bottleneck")
    duplicate(net, coupling, coupling.group("expand.0"), unit=2, twin=0)
    old = net.se.squeeze.weight.detach().flatten(1).clone()
    compensate(net, coupling, measure(net, coupling, x), {"expand.0": (2,)})
    new = net.se.squeeze.weight.detach().flatten(1)
    torch.testing.assert_close(new[:, 0], old[:, 0] + old[:, 2], rtol=1e-4, atol=1e-5)
    assert not new[:, 2].any()
    rest = [c for c in range(12) if c not in (0, 2)]
    torch.testing.assert_close(new[:, rest], old[:, rest], rtol=1e-4, atol=1e-5)


def test_all_units_together_cost_the_whole_variance_of_every_reader() -> None:
    """Shares of variance: 1 a reader that reads nothing else, up to the ridge."""
    net, x, coupling = build("se residual")
    for _, costs, readers in order_groups(net, coupling, measure(net, coupling, x)).values():
        assert sum(costs) == pytest.approx(readers, rel=0.02)
        assert min(costs) >= 0


def test_compensation_halves_the_error_of_plain_removal_and_a_bias_takes_up_the_mean() -> None:
    net, x, coupling = build("plain")
    with torch.no_grad():
        net.b[0].weight[2] = net.b[0].weight[0] + 0.1 * net.b[0].weight[2]
        net.b[1].weight[2], net.b[1].bias[2] = net.b[1].weight[0], net.b[1].bias[0]
        base = net(x)
        removed = {"b.0": (2, 4)}
        fitted = copy.deepcopy(net)
        compensate(fitted, coupling, measure(net, coupling, x), removed)
        with masking(net, coupling, removed):
            plain = net(x)
        with masking(fitted, coupling, removed):
            made = fitted(x)
    assert (made - base).square().mean() < (plain - base).square().mean() / 2
    torch.testing.assert_close(made.mean(0), base.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("every_place")
def test_each_bias_beside_a_shared_weight_makes_up_for_its_own_calls() -> None:
    net, x, coupling = build("tied")
    read: dict[str, Tensor] = {}
    with torch.no_grad(), Taps(net, coupling, on_read=lambda r, x: read.update({r.site.module: x})):
        net(x)
    fitted = copy.deepcopy(net)
    done = compensate(fitted, coupling, measure(net, coupling, x), {"a.0": (1, 3)})
    assert "one.weight" in done.refitted
    with torch.no_grad():
        for name in ("one", "two"):
            old, new = net.get_submodule(name), fitted.get_submodule(name)
            a = F.conv2d(read[name], old.weight, old.bias, padding=1).mean((0, 2, 3))
            b = F.conv2d(read[name], new.weight, new.bias, padding=1).mean((0, 2, 3))
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
            assert not torch.equal(old.bias, new.bias)
    assert fitted.one.weight is fitted.two.weight


def test_a_transposed_layers_bias_takes_up_the_mean() -> None:
    net, x, coupling = build("transposed")
    fitted = copy.deepcopy(net)
    compensate(fitted, coupling, measure(net, coupling, x), {"a.0": (1, 4)})
    with torch.no_grad():
        read = net.a(x).relu()
        torch.testing.assert_close(
            fitted.up(read).mean((0, 2, 3)), net.up(read).mean((0, 2, 3)), rtol=0.02, atol=0.02
        )


class BothWays(nn.Module):
    """One weight that is read along either axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.weight = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = (self.a(x).relu().mean((2, 3)) @ self.weight).relu()
        return self.head((x @ self.weight.t()).relu())


def test_weights_that_no_refit_fits_are_left_and_named() -> None:
    net, x, coupling = build("weight norm")
    done = compensate(net, coupling, measure(net, coupling, x), {"a": (1,)})
    assert not done.refitted
    (parameter,) = done.left
    assert parameter.startswith("b.parametrizations.weight")
    assert done.notes() == (
        "Compensation refitted no layer that reads what goes.",
        f"Left as they are, as what they multiply with is computed from the parameter: {parameter}.",
    )
    net = nets.lively(BothWays())
    coupling = trace(net, x[:1])
    kept = net.weight.detach().clone()
    group = next(group for group in coupling.groups if group.role != "frozen")
    done = compensate(net, coupling, measure(net, coupling, x), {group.name: (1,)})
    assert done.left == {"weight": "they are read along both axes"}
    assert torch.equal(net.weight, kept)


def test_a_covariance_that_can_not_be_solved_leaves_its_layer() -> None:
    net, x, coupling = build("plain")
    stats = measure(net, coupling, x)
    (reader,) = (r for r in coupling.readers if r.parameter == "head.fc.weight")
    name = f"moments/{reader_key(reader)}/square"
    square = torch.eye(6, dtype=torch.float64) + 5
    square.fill_diagonal_(1)
    mean = stats.sums[f"moments/{reader_key(reader)}/sum"] * 0
    broken = replace(
        stats, sums={**stats.sums, name: square[None], f"moments/{reader_key(reader)}/sum": mean}
    )
    kept = net.head.fc.weight.detach().clone()
    done = compensate(net, coupling, broken, {"b.0": (1,)})
    assert done.left == {"head.fc.weight": "what they read has no covariance that can be solved"}
    assert torch.equal(net.head.fc.weight, kept)


def test_the_plan_says_what_was_refitted_and_how_well_conditioned_it_was() -> None:
    net, x, coupling = build("se residual")
    stats = measure(net, coupling, x)
    ranking = rank(coupling, stats, criterion="reconstruction", net=net)
    policy = Policy(ratio=0.3, round_to=1, min_width=1)
    surgery = prune_channels(net, coupling, ranking, policy, images=x[:8], moments=stats)
    (note,) = (note for note in surgery.plan.notes if note.startswith("Compensation"))
    done = compensate(copy.deepcopy(net), coupling, stats, surgery.plan.removed)
    assert 1 <= done.condition <= 8 * 9 / RIDGE
    assert note == done.notes()[0]
    assert f"refitted {len(done.refitted)} layers" in note


def test_no_removed_unit_is_no_refit() -> None:
    net, x, coupling = build("plain")
    before = copy.deepcopy(net.state_dict())
    done = compensate(net, coupling, measure(net, coupling, x), {})
    assert (done.refitted, done.left, done.notes()) == ((), {}, ())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Unheard(nn.Module):
    """Two branches read one tensor; the logits do not hear the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(8, 4, 1),
            nets.Head(4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.head(self.b(x).relu() + 0 * self.c(x))


@torch.no_grad()
def test_what_the_loss_does_not_feel_costs_nothing_where_gradients_weigh() -> None:
    net = nets.lively(Unheard())
    net.b.weight[:, 5] = 0  # only the branch that no one hears reads channel 5
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    coupling = trace(net, x[:1])
    batch = x, torch.arange(64) % 5
    stats = calibrate(net, coupling, [batch], evidence=frozenset({"moments", "sensitivity"}), device=CPU)
    felt_order, felt, _ = order_groups(net, coupling, stats, felt=True)["a"]
    order, costs, _ = order_groups(net, coupling, stats)["a"]
    assert felt_order[0] == 5
    assert felt[0] < 1e-9
    assert costs[order.index(5)] > 0.01


def test_orders_of_the_sums_of_two_processes_are_those_of_the_whole() -> None:
    net, x, coupling = build("inverted bottleneck")
    batches = x.split(32)
    parts = [
        calibrate(net, coupling, batches, evidence=MOMENTS, device=CPU, rank=rank, world_size=2)
        for rank in range(2)
    ]
    whole = order_groups(net, coupling, calibrate(net, coupling, batches, evidence=MOMENTS, device=CPU))
    added = order_groups(net, coupling, parts[0] + parts[1])
    assert {name: order for name, (order, _, _) in added.items()} == {
        name: order for name, (order, _, _) in whole.items()
    }


def test_the_masked_net_with_refitted_weights_is_the_pruned_net() -> None:
    net, x, coupling = build("dense")
    removed = {"a.0": (0, 3), "b.0": (1,)}
    compensate(net, coupling, measure(net, coupling, x), removed)
    small = copy.deepcopy(net)
    apply_removal(small, coupling, removed)
    with torch.no_grad(), masking(net, coupling, removed):
        torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-5)
