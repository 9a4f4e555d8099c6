"""Calibration: the sums are what a plain loop over the images gives, whatever the batches."""

import gc
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sepress.calibrate import NEEDS_LABELS, ExcitationStats, calibrate, split_batch
from sepress.coupling import Coupling, trace
from sepress.errors import InputError
from sepress.gates import Taps
from tests import nets

ALL = frozenset(
    {"excitation", "class-excitation", "contribution", "fisher", "gate-taylor", "taylor", "hessian"}
)


class Net(nn.Module):
    """6 channels, widened to 8 gated ones, projected back onto a shortcut that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.widen = nn.Conv2d(6, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Linear(8, 4)
        self.expand = nn.Linear(4, 8)
        self.project = nn.Conv2d(8, 6, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        h = self.norm(self.widen(x)).relu()
        s = torch.sigmoid(4 * self.expand(self.squeeze(h.mean((2, 3))).relu()))  # (N, C)
        self.last_gate = s
        x = x + self.project(h * s[:, :, None, None])
        return self.head(self.drop(x.mean((2, 3))))


@pytest.fixture
def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().eval()
        nn.init.normal_(net.expand.weight)
        nn.init.normal_(net.squeeze.weight)
        return net


@pytest.fixture
def images() -> Tensor:
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets() -> Tensor:
    return torch.arange(12) % 5


@pytest.fixture
def coupling(net: Net, images: Tensor) -> Coupling:
    return trace(net, images[:1])


def measure(net: Net, coupling: Coupling, batches: object, **options: object) -> ExcitationStats:
    options = {"evidence": ALL, "device": "cpu"} | options
    return calibrate(net, coupling, batches, **options)


def test_excitation_moments_are_those_of_the_gate(
    net: Net, coupling: Coupling, images: Tensor, targets: Tensor
) -> None:
    stats = measure(net, coupling, [(images[:5], targets[:5]), (images[5:], targets[5:])])
    with torch.no_grad():
        net(images)
    s = net.last_gate.double()
    (gate,) = coupling.gates
    torch.testing.assert_close(stats.mean_excitation(gate), s.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.excitation_variance(gate), s.var(0, correction=0), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(stats.saturation(gate), ((s < 0.05) | (s > 0.95)).double().mean(0))
    by_class = torch.stack([s[targets == k].mean(0) for k in range(5)])
    torch.testing.assert_close(stats.class_mean_excitation(gate), by_class, rtol=1e-6, atol=0)
    assert stats.images == 12


@torch.no_grad()
def test_mean_square_and_variance_are_those_of_what_a_layer_reads(
    net: Net, coupling: Coupling, images: Tensor
) -> None:
    read = {}
    for name in ("widen", "project", "head"):
        getattr(net, name).register_forward_pre_hook(
            lambda m, args, name=name: read.__setitem__(f"{name}.weight", args[0].double())
        )
    coupling = trace(net, images[:1])
    stats = measure(net, coupling, images.split(5), evidence=frozenset({"contribution"}))
    net(images)
    readers = {r.parameter: r for r in coupling.readers}
    for name, x in read.items():
        columns = x.movedim(1, 0).flatten(1)  # (P, images and places)
        torch.testing.assert_close(
            stats.mean_square(readers[name]), columns.square().mean(1), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            stats.variance(readers[name]), columns.var(1, correction=0), rtol=1e-5, atol=1e-9
        )


def test_fisher_is_the_square_of_each_images_gradient_summed_over_readers(
    net: Net, coupling: Coupling, images: Tensor, targets: Tensor
) -> None:
    stats = measure(net, coupling, [(images, targets)], evidence=frozenset({"fisher"}))
    expected = torch.zeros(6)
    for i in range(12):
        u = torch.ones(6, requires_grad=True)  # on the shortcut, read by widen and, after the sum, by head
        x = net.stem(images[i : i + 1]).relu()
        h = net.norm(net.widen(x * u[:, None, None])).relu()
        s = torch.sigmoid(4 * net.expand(net.squeeze(h.mean((2, 3))).relu()))
        x = x + net.project(h * s[:, :, None, None])
        logits = F.linear(x.mean((2, 3)) * u, net.head.weight, net.head.bias)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, targets[i : i + 1]), u)
        expected += gradient.square() / 12
    torch.testing.assert_close(stats.fisher("stem", 6).float(), expected, rtol=1e-4, atol=1e-9)


def test_fisher_of_gated_channels_is_that_of_the_gate_itself(
    net: Net, coupling: Coupling, images: Tensor, targets: Tensor
) -> None:
    stats = measure(net, coupling, [(images, targets)], evidence=frozenset({"fisher"}))
    gates = []

    def probe(_: object, s: Tensor) -> Tensor:
        s = s.detach().requires_grad_()
        gates.append(s)
        return s

    with Taps(net, coupling, on_gate=probe):
        loss = F.cross_entropy(net(images), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, gates)
    by_gate = (gates[0] * gradient).flatten(1).square().mean(0).double()
    torch.testing.assert_close(stats.fisher("widen", 8), by_gate, rtol=1e-4, atol=1e-12)


def test_parameter_gradients_are_those_of_the_mean_loss(
    net: Net, coupling: Coupling, images: Tensor, targets: Tensor
) -> None:
    stats = measure(
        net, coupling, [(images[:7], targets[:7]), (images[7:], targets[7:])], evidence=frozenset({"taylor"})
    )
    F.cross_entropy(net(images), targets).backward()
    gradients = stats.gradients()
    assert {"widen.weight", "project.weight", "norm.bias", "squeeze.weight"} <= gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient.float(), net.get_parameter(name).grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: n + m
        )


def test_gate_taylor_is_the_mean_over_images_of_the_absolute_gradient(
    net: Net, coupling: Coupling, images: Tensor, targets: Tensor
) -> None:
    one_by_one = [(images[i : i + 1], targets[i : i + 1]) for i in range(12)]
    # Of a single image, Fisher is the square of the one gradient there is.
    singles = [measure(net, coupling, [one], evidence=frozenset({"fisher"})) for one in one_by_one]
    by_hand = torch.stack([single.fisher("stem", 6).sqrt() for single in singles]).mean(0)
    stats = measure(net, coupling, [(images, targets)], evidence=frozenset({"gate-taylor"}))
    torch.testing.assert_close(stats.gate_taylor("stem", 6), by_hand, rtol=1e-4, atol=1e-9)
    assert not any(name.endswith("/fisher") for name in stats.sums)


def test_squared_gradients_are_those_of_each_image_alone(
    net: Net, coupling: Coupling, images: Tensor, targets: Tensor
) -> None:
    stats = measure(net, coupling, [(images, targets)], evidence=frozenset({"hessian"}))
    by_hand = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for i in range(12):
        net.zero_grad()
        F.cross_entropy(net(images[i : i + 1]), targets[i : i + 1]).backward()
        for name, p in net.named_parameters():
            by_hand[name] += p.grad.square() / 12
    squares = stats.squared_gradients()
    assert {"widen.weight", "project.weight", "norm.bias", "squeeze.weight"} <= squares.keys()
    for name, square in squares.items():
        torch.testing.assert_close(
            square.float(), by_hand[name], rtol=1e-4, atol=1e-9, msg=lambda m, n=name: n + m
        )
    assert not stats.gradients()


def test_a_class_without_images_has_no_mean(
    net: Net, coupling: Coupling, images: Tensor, targets: Tensor
) -> None:
    few = targets < 4
    stats = measure(net, coupling, [(images[few], targets[few])], evidence=frozenset({"class-excitation"}))
    by_class = stats.class_mean_excitation(coupling.gates[0])  # the classes are the logits
    assert by_class.isnan().all(1).tolist() == [False] * 4 + [True]


def test_statistics_of_two_halves_add_up_to_those_of_the_whole(
    net: Net, coupling: Coupling, images: Tensor, targets: Tensor
) -> None:
    batches = [(images[i : i + 3], targets[i : i + 3]) for i in range(0, 12, 3)]
    whole = measure(net, coupling, [(images, targets)], data_id="d")
    halves = [measure(net, coupling, batches, rank=rank, world_size=2, data_id="d") for rank in (0, 1)]
    assert [h.images for h in halves] == [6, 6]
    total = halves[0] + halves[1]
    assert (total.images, total.data_id) == (12, "d")
    for name, value in whole.sums.items():
        torch.testing.assert_close(total.sums[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m)


def test_statistics_of_different_evidence_do_not_add(net: Net, coupling: Coupling, images: Tensor) -> None:
    a = measure(net, coupling, [images], evidence=frozenset({"excitation"}))
    b = measure(net, coupling, [images], evidence=frozenset({"contribution"}))
    with pytest.raises(InputError, match="can't be added"):
        a + b


def test_memory_does_not_grow_with_the_number_of_images(net: Net, coupling: Coupling) -> None:
    alive = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            yield torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)
            gc.collect()
            alive.append(sum(x.numel() for x in gc.get_objects() if type(x) is Tensor))

    gc.freeze()  # what lives already is not looked at
    try:
        measure(net, coupling, batches())
    finally:
        gc.unfreeze()
    assert len(alive) == 5
    assert max(alive[1:]) == alive[1]


def test_the_net_is_left_as_it_was(net: Net, coupling: Coupling, images: Tensor, targets: Tensor) -> None:
    net.train()
    net.norm.eval()
    net.head.bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    modes = {name: m.training for name, m in net.named_modules()}
    values = {name: v.clone() for name, v in net.state_dict().items()}
    state = torch.get_rng_state()
    measure(net, coupling, [(images, targets)])
    with pytest.raises(IndexError):
        measure(net, coupling, iter([(images, targets), ()]))
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert {name: m.training for name, m in net.named_modules()} == modes
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, values[name]) for name, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


def test_files_bring_the_statistics_back(
    net: Net, coupling: Coupling, images: Tensor, targets: Tensor, tmp_path
) -> None:
    stats = measure(net, coupling, [(images, targets)], data_id="digits")
    tensors, metadata = stats.to_tensors()
    save_file(tensors, tmp_path / "stats.safetensors", metadata=metadata)
    with safe_open(tmp_path / "stats.safetensors", framework="pt") as file:
        again = ExcitationStats.from_tensors({k: file.get_tensor(k) for k in file.keys()}, file.metadata())  # noqa: SIM118
    assert (again.images, again.evidence, again.data_id) == (12, ALL, "digits")
    assert again.sums.keys() == stats.sums.keys()
    assert all(torch.equal(again.sums[name], value) for name, value in stats.sums.items())


@pytest.mark.parametrize("evidence", sorted(NEEDS_LABELS))
def test_what_needs_labels_says_so(net: Net, coupling: Coupling, images: Tensor, evidence: str) -> None:
    for batch in (images, (images, torch.tensor([0, -1] * 6))):
        with pytest.raises(InputError, match=r"needs a label.*\nPass \(inputs, targets\)"):
            measure(net, coupling, [batch], evidence=frozenset({evidence}))
    with pytest.raises(InputError, match="do not fit"):
        measure(net, coupling, [(images, torch.full((12,), 5))], evidence=frozenset({evidence}))


def test_no_image_unknown_evidence_and_nan_are_refused(net: Net, coupling: Coupling, images: Tensor) -> None:
    with pytest.raises(InputError, match="no calibration image"):
        measure(net, coupling, [])
    with pytest.raises(InputError, match="unknown evidence"):
        measure(net, coupling, [images], evidence=frozenset({"luck"}))
    images[3, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        measure(net, coupling, [images], evidence=frozenset({"excitation"}))


def test_a_batch_is_inputs_or_inputs_and_targets() -> None:
    x, y = torch.ones(2, 3), torch.tensor([0, 1])
    assert split_batch(x) == (x, None)
    assert split_batch([x]) == (x, None)
    assert split_batch((x, y)) == (x, y)
    assert split_batch([x, None]) == (x, None)
    assert split_batch([x, x]) == ((x, x), None)  # two inputs


class InPlace(nn.Module):
    """An input that is written into, and in-place activations directly behind convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, groups=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        x = F.relu(self.a(x), inplace=True)
        x = F.relu(self.b(x), inplace=True)
        return self.head(x.mean((2, 3)))


def test_sensitivity_is_the_sum_of_outer_products_of_each_places_output_gradient(images: Tensor) -> None:
    """By blocks of a grouped convolution, before its in-place activation; images stay as they were."""
    net = nets.lively(InPlace())
    targets = torch.arange(12) % 5
    coupling = trace(net, images[:1].clone())
    given = images.clone()
    batches = [(given[:7], targets[:7]), (given[7:], targets[7:])]
    with torch.no_grad():  # gradients are taken whatever the caller has switched off
        stats = calibrate(net, coupling, batches, evidence=frozenset({"sensitivity"}), device="cpu")
    assert not given.requires_grad
    assert torch.equal(given, images)
    x = net.a(2 * images).relu()
    y = net.b(x)  # (N, 4, H, W)
    logits = net.head(y.relu().mean((2, 3)))
    loss = F.cross_entropy(logits, targets, reduction="sum")
    at_y, at_logits = torch.autograd.grad(loss, [y, logits])
    expected = torch.zeros(2, 2, 2, dtype=torch.float64)
    for image in at_y.double():
        for place in image.flatten(1).T:
            for block, g in enumerate(place.split(2)):
                expected[block] += torch.outer(g, g)
    found = {reader.site.module: stats.sensitivity(reader) for reader in coupling.readers}
    torch.testing.assert_close(found["b"], expected / 12, rtol=1e-4, atol=1e-9)
    g = at_logits.double()
    torch.testing.assert_close(found["head"], (g.T @ g / 12)[None], rtol=1e-4, atol=1e-9)


def test_sensitivity_and_moments_do_not_change_the_other_evidence(net: Net, images: Tensor) -> None:
    coupling = trace(net, images[:1])
    batch = images, torch.arange(12) % 5
    alone = calibrate(net, coupling, [batch], evidence=ALL, device="cpu")
    more = calibrate(net, coupling, [batch], evidence=ALL | {"moments", "sensitivity"}, device="cpu")
    for name, value in alone.sums.items():
        torch.testing.assert_close(more.sums[name], value, rtol=1e-5, atol=1e-8)
