"""Moments: the covariance of what every kind of layer reads, by an unfolding of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepress.calibrate import ExcitationStats, calibrate, reader_key
from sepress.coupling import Coupling, trace
from sepress.gates import ReaderCall, Taps
from sepress.moments import (
    WIDEST,
    Form,
    arrange,
    choose_places,
    form_of,
    is_exact,
    places_of,
    put,
    rows_given,
    rows_read,
)
from sepress.types import CallSite, Reader
from tests import nets

CPU = torch.device("cpu")


class Between(nn.Module):
    """A convolution that makes 6 channels, and one layer that reads them."""

    def __init__(self, dims: int, layer: nn.Module, shape: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.a, self.layer, self.shape = conv(3, 6, 3, padding=1), layer, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.shape(self.a(x).relu()))


class Product(nn.Module):
    """x @ W."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Pointwise(nn.Module):
    """The weight of a 1x1 convolution, used as a linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1))


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (N, T, C)


def rows_of_places(x: Tensor) -> Tensor:
    """(N, C, ...) -> (N x places, C)."""
    return tokens(x).flatten(0, 1) if x.dim() > 2 else x


def unfolded(**geometry: int) -> Callable[[Tensor], Tensor]:
    def rows(x: Tensor) -> Tensor:
        return F.unfold(x, 3, **geometry).transpose(1, 2).flatten(0, 1)  # (N L, C x 9)

    return rows


def windows_1d(x: Tensor) -> Tensor:
    return F.pad(x, (2, 2)).unfold(2, 5, 2).transpose(1, 2).flatten(0, 1).flatten(1)  # (N L, C x 5)


def windows_3d(x: Tensor) -> Tensor:
    parts = x.unfold(2, 2, 1).unfold(3, 2, 1).unfold(4, 2, 1)  # (N, C, D, H, W, 2, 2, 2)
    return parts.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(0, 3).flatten(1)


# What reads 6 channels -> the rows that it multiplies with, (R, blocks x variables).
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "1x1": (lambda: Between(2, nn.Conv2d(6, 4, 1)), rows_of_places),
    "1x1 with a stride": (
        lambda: Between(2, nn.Conv2d(6, 4, 1, stride=2, bias=False)),
        lambda x: rows_of_places(x[:, :, ::2, ::2]),
    ),
    "3x3": (lambda: Between(2, nn.Conv2d(6, 4, 3)), unfolded()),
    "3x3 with a stride and padding": (
        lambda: Between(2, nn.Conv2d(6, 4, 3, stride=2, padding=1)),
        unfolded(stride=2, padding=1),
    ),
    "3x3, same padding, dilated": (
        lambda: Between(2, nn.Conv2d(6, 4, 3, padding="same", dilation=2)),
        unfolded(padding=2, dilation=2),
    ),
    "3x3, reflected": (
        lambda: Between(2, nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")),
        lambda x: unfolded()(F.pad(x, (1, 1, 1, 1), mode="reflect")),
    ),
    "3x3 in 2 blocks": (lambda: Between(2, nn.Conv2d(6, 4, 3, groups=2)), unfolded()),
    "conv1d": (lambda: Between(1, nn.Conv1d(6, 4, 5, stride=2, padding=2)), windows_1d),
    "conv3d": (lambda: Between(3, nn.Conv3d(6, 4, 2)), windows_3d),
    "linear on (N, C)": (
        lambda: Between(2, nn.Linear(6, 4), lambda x: x.mean((2, 3))),
        lambda x: x.mean((2, 3)),
    ),
    "linear on (N, T, C)": (lambda: Between(2, nn.Linear(6, 4), tokens), rows_of_places),
    "x @ W": (lambda: Between(2, Product(), tokens), rows_of_places),
    "a pointwise weight as a linear layer": (lambda: Between(2, Pointwise(), tokens), rows_of_places),
    "transposed": (lambda: Between(2, nn.ConvTranspose2d(6, 4, 2, stride=2)), rows_of_places),
    "flattened": (lambda: Between(2, nn.Linear(6 * 16, 4), lambda x: x.flatten(1)), lambda x: x.flatten(1)),
}
SHAPES = {"conv1d": (3, 15), "conv3d": (3, 3, 4, 3), "flattened": (3, 4, 4)}
EXACT = sorted(LAYERS.keys() - {"transposed"})


def build(name: str) -> tuple[nn.Module, Tensor, Coupling, Reader]:
    net = nets.lively(LAYERS[name][0]())
    x = torch.randn(5, *SHAPES.get(name, (3, 8, 7)), generator=torch.Generator().manual_seed(1))
    coupling = trace(net, x[:1])
    (reader,) = coupling.readers
    return net, x, coupling, reader


def measure(net: nn.Module, coupling: Coupling, *batches: Tensor, **ranks: int) -> ExcitationStats:
    return calibrate(net, coupling, batches, evidence=frozenset({"moments"}), device=CPU, **ranks)


def the_call(net: nn.Module, coupling: Coupling, x: Tensor) -> ReaderCall:
    calls: list[ReaderCall] = []
    with torch.no_grad(), Taps(net, coupling, on_call=lambda _, call: calls.append(call)):
        net(x)
    (call,) = calls
    return call


def weight_of(net: nn.Module, reader: Reader) -> Tensor:
    return dict(net.named_parameters())[reader.parameter].detach()


@pytest.fixture
def every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepress.moments.FEWEST_ROWS", 1 << 20)


@pytest.mark.usefixtures("every_place")
@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_the_covariance_of_the_unfolded_input(name: str) -> None:
    net, x, coupling, reader = build(name)
    stats = measure(net, coupling, x[:2], x[2:])
    moments = stats.moments(reader)
    assert moments is not None
    with torch.no_grad():
        rows = LAYERS[name][1](net.a(x).relu()).double().numpy()
    assert moments.plain
    assert moments.rows == len(rows)
    for block, (mean, covariance) in enumerate(zip(moments.mean, moments.covariance, strict=True)):
        width = len(mean)
        part = rows[:, block * width : (block + 1) * width]
        np.testing.assert_allclose(mean, part.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(covariance, np.cov(part.T, bias=True), rtol=1e-4, atol=1e-6)
    assert moments.mean.numel() == rows.shape[1]


@pytest.mark.parametrize("name", EXACT)
def test_a_row_times_the_arranged_weight_is_what_the_layer_gives_there(name: str) -> None:
    net, x, coupling, reader = build(name)
    weight, call = weight_of(net, reader), the_call(net, coupling, x)
    form = form_of(weight, reader)
    assert is_exact(reader, weight, form)
    places = places_of(reader, call, weight, form)
    chosen = torch.arange(0, places, 3)
    ((here, rows),) = rows_read(reader, call, weight, form, chosen)
    assert torch.equal(here, chosen)
    made = (rows @ arrange(weight, reader, form).mT).transpose(0, 1).flatten(1)  # (R, O)
    bias = getattr(net.layer, "bias", None)
    given = rows_given(reader, call, chosen) - (0 if bias is None else bias.detach())
    torch.testing.assert_close(made, given, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_put_is_the_inverse_of_arrange(name: str) -> None:
    net, _, _, reader = build(name)
    weight = weight_of(net, reader)
    form = form_of(weight, reader)
    blocks = arrange(weight, reader, form)
    assert blocks.shape[0] == form.blocks
    assert blocks.shape[2] == form.variables
    copied = torch.zeros_like(weight)
    put(copied, reader, form, blocks.double())
    assert torch.equal(copied, weight)


def reader_like(weight: Tensor, *, groups: int = 1, transposed: bool = False, axis: int = 1) -> Reader:
    positions = np.zeros(weight.shape[axis] * (1 if transposed else groups), dtype=int)
    kind = "conv_transpose2d" if transposed else "conv2d"
    site = CallSite(0, kind, 0, 1, "")
    return Reader("weight", axis, groups, transposed, False, site, positions, positions)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_where_taps_are_outputs_put_is_the_inverse_as_well(groups: int, transposed: bool) -> None:
    weight = torch.arange(4 * 6 * 9.0).view(4, 6, 3, 3)
    reader = reader_like(weight, groups=groups, transposed=transposed, axis=0 if transposed else 1)
    form = Form(groups, len(reader.unit) // groups, taps=1)
    blocks = arrange(weight, reader, form)
    copied = torch.zeros_like(weight)
    put(copied, reader, form, blocks)
    assert torch.equal(copied, weight)
    # One output of a block is one tap of one channel: here the first of the last block.
    first = weight[2 if groups == 2 else 0 :, 0, 0, 0] if transposed else weight[4 - 4 // groups, :, 0, 0]
    assert torch.equal(blocks[-1, 0], first)


def test_a_layer_too_wide_for_its_taps_counts_them_as_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepress.moments.WIDEST", 53)
    net, x, coupling, reader = build("3x3")
    weight = weight_of(net, reader)
    form = form_of(weight, reader)
    assert form == Form(blocks=1, positions=6, taps=1)
    assert arrange(weight, reader, form).shape == (1, 4 * 9, 6)
    assert not is_exact(reader, weight, form)
    monkeypatch.setattr("sepress.moments.FEWEST_ROWS", 1 << 20)
    moments = measure(net, coupling, x).moments(reader)
    assert moments is not None
    with torch.no_grad():
        rows = rows_of_places(net.a(x).relu()).double().numpy()
    np.testing.assert_allclose(moments.covariance[0], np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-6)


def test_a_3x3_convolution_over_512_channels_is_the_widest_with_all_its_taps() -> None:
    widest, wider = torch.empty(1, 512, 3, 3), torch.empty(1, 520, 3, 3)
    assert form_of(widest, reader_like(widest)).variables == WIDEST
    assert form_of(wider, reader_like(wider)).variables == 520


def test_all_places_count_where_they_are_few_and_the_same_ones_again_where_they_are_many() -> None:
    form = Form(blocks=1, positions=64, taps=9)  # 576 variables: 72 rows an image
    assert torch.equal(choose_places(3, 72, form, seed=0), torch.arange(3 * 72))
    chosen = choose_places(3, 100, form, seed=0)
    assert len(chosen) == 3 * 72
    assert torch.equal(chosen, chosen.unique())
    assert int(chosen[-1]) < 300
    assert torch.equal(chosen, choose_places(3, 100, form, seed=0))
    assert not torch.equal(chosen, choose_places(3, 100, form, seed=1))


@pytest.mark.parametrize("chunk", [1, 1 << 25])
def test_the_chosen_rows_are_those_of_all_places_whatever_the_part_that_is_held(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With parts of one image, and images without any chosen place."""
    net, x, coupling, reader = build("3x3")
    weight, call = weight_of(net, reader), the_call(net, coupling, x)
    form = form_of(weight, reader)
    places = places_of(reader, call, weight, form) // len(x)
    chosen = torch.tensor([3, 7, places + 1, 4 * places])  # none of images 2 and 3
    monkeypatch.setattr("sepress.moments._CHUNK", chunk)
    parts = list(rows_read(reader, call, weight, form, chosen))
    assert torch.equal(torch.cat([here for here, _ in parts]), chosen)
    assert all(len(here) for here, _ in parts)
    with torch.no_grad():
        every = unfolded()(net.a(x).relu())
    torch.testing.assert_close(torch.cat([rows[0] for _, rows in parts]), every[chosen])


@pytest.mark.parametrize("name", ["3x3", "3x3 in 2 blocks", "linear on (N, T, C)"])
def test_the_parts_of_processes_add_up_to_the_whole(name: str) -> None:
    net, x, coupling, reader = build(name)
    batches = x[:2], x[2:3], x[3:]
    whole = measure(net, coupling, *batches)
    parts = [measure(net, coupling, *batches, rank=rank, world_size=2) for rank in range(2)]
    added = parts[0] + parts[1]
    assert added.images == whole.images == 5
    assert added.sums.keys() == whole.sums.keys()
    for key, value in whole.sums.items():
        torch.testing.assert_close(added.sums[key], value, rtol=1e-12, atol=1e-9)
    repeated = measure(net, coupling, *batches)
    assert all(torch.equal(value, repeated.sums[key]) for key, value in whole.sums.items())
    assert whole.moments(reader) is not None


@pytest.mark.usefixtures("every_place")
def test_a_mean_a_thousand_times_the_spread_costs_no_digits() -> None:
    net, x, coupling, reader = build("1x1")
    with torch.no_grad():
        net.a.bias += 1e3  # type: ignore[operator]
        rows = rows_of_places(net.a(x)).double().numpy()
    moments = measure(net, coupling, x).moments(reader)
    assert moments is not None
    np.testing.assert_allclose(moments.covariance[0], np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-4)


def test_what_varies_by_float_rounding_alone_has_no_covariance() -> None:
    net, x, coupling, reader = build("1x1")
    with torch.no_grad():
        net.a.weight[2] *= 1e-7  # type: ignore[index, operator]
        net.a.bias[2] = 3.0  # type: ignore[index]
    moments = measure(net, coupling, x).moments(reader)
    assert moments is not None
    assert not moments.covariance[0, 2].any()
    assert not moments.covariance[0, :, 2].any()
    assert float(moments.mean[0, 2]) == pytest.approx(3.0)


def test_a_computed_weight_is_told_from_the_parameter() -> None:
    net, x = nets.build("weight norm")
    coupling = trace(net, x[:1])
    stats = measure(net, coupling, x)
    plain = {r.site.module: moments.plain for r in coupling.readers if (moments := stats.moments(r))}
    assert plain == {"b": False, "head.fc": True}


def test_a_weight_called_twice_has_moments_for_either_call() -> None:
    net, x = nets.build("tied")
    coupling = trace(net, x[:1])
    stats = measure(net, coupling, x)
    shared = [reader for reader in coupling.readers if reader.parameter == "one.weight"]
    assert len({reader_key(reader) for reader in shared}) == 2
    first, second = (stats.moments(reader) for reader in shared)
    assert first is not None
    assert second is not None
    assert first.plain
    assert second.plain
    assert not torch.equal(first.mean, second.mean)


def test_a_net_in_half_precision_has_moments_in_double() -> None:
    net, x, coupling, reader = build("linear on (N, C)")
    moments = measure(net.bfloat16(), coupling, x.bfloat16()).moments(reader)
    assert moments is not None
    assert moments.covariance.dtype == torch.float64


def test_moments_are_as_large_as_the_layer_is_wide_whatever_the_number_of_images() -> None:
    net, x, coupling, _ = build("3x3")
    small, large = measure(net, coupling, x[:1]), measure(net, coupling, *[x] * 4)
    assert {k: v.shape for k, v in small.sums.items()} == {k: v.shape for k, v in large.sums.items()}
    assert sum(value.numel() for value in large.sums.values()) == 3 + 54 + 54 * 54


def test_moments_stay_out_of_the_statistics_file() -> None:
    net, x, coupling, _ = build("1x1")
    tensors, metadata = measure(net, coupling, x).to_tensors()
    assert not tensors
    assert not metadata["evidence"]
