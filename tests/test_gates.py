"""Gates: what passes at a site is read exactly, and replaced exactly."""

import pytest
import torch
from torch import Tensor, nn

from sepress.coupling import trace
from sepress.errors import InputError, SepressError
from sepress.gates import ReaderCall, Taps, masking, mean_per_channel, spread


class Excite(nn.Module):
    """Squeeze and excitation of C channels."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = self.expand(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()  # (N, C, 1, 1)
        return x * s


class InvertedNet(nn.Module):
    """A stem, one inverted bottleneck with its gate on 8 hidden channels, a shortcut, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.widen = nn.Conv2d(6, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.se = Excite(8, 4)
        self.project = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)
        self.detour = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        h = self.depthwise(self.norm(self.widen(x)).relu()).relu()
        x = x + self.project(self.se(h))
        if self.detour:
            x = x.abs()
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net() -> InvertedNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return InvertedNet().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_an_expand_layer_of_zero_weight_and_logit_bias_excites_by_exactly_p(
    net: InvertedNet, images: Tensor
) -> None:
    p = torch.linspace(0.1, 0.8, 8)
    net.se.expand.weight.zero_()
    net.se.expand.bias.copy_(p.logit())
    seen = []
    with Taps(net, trace(net, images[:1]), on_gate=lambda gate, s: seen.append((gate, s))):
        net(images)
    ((gate, s),) = seen
    assert gate.channels == 8
    excitation = mean_per_channel(s, gate.site.axis, 4)
    torch.testing.assert_close(excitation, p.expand(4, 8), rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_gate_replaced_by_ones_is_a_net_without_it(net: InvertedNet, images: Tensor) -> None:
    coupling = trace(net, images[:1])
    with Taps(net, coupling, on_gate=lambda gate, s: torch.ones_like(s)):
        opened = net(images)
    net.se = nn.Identity()
    torch.testing.assert_close(opened, net(images), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_masked_channels_act_as_if_their_readers_had_no_weight_for_them(
    net: InvertedNet, images: Tensor
) -> None:
    coupling = trace(net, images[:1])
    with masking(net, coupling, {"widen": (1, 5), "stem": (0,)}):
        masked = net(images)
    net.project.weight[:, [1, 5]] = 0
    net.se.squeeze.weight[:, [1, 5]] = 0
    net.widen.weight[:, 0] = 0
    net.head.weight[:, 0] = 0
    torch.testing.assert_close(masked, net(images), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_readers_see_the_input_of_their_layer_and_every_forward_counts_anew(
    net: InvertedNet, images: Tensor
) -> None:
    seen: dict[str, list[Tensor]] = {}
    expected: dict[str, list[Tensor]] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module is not net.depthwise:
            module.register_forward_pre_hook(
                lambda m, args, name=name: expected.setdefault(f"{name}.weight", []).append(args[0])
            )
    coupling = trace(net, images[:1])
    expected.clear()
    with Taps(net, coupling, on_read=lambda r, x: seen.setdefault(r.parameter, []).append(x)):
        net(images[:2])
        torch.randn(2).sin()  # between forwards nothing is counted
        net(images[2:])
    expected.pop("stem.weight")  # it reads the image, which is no group's
    seen.pop("stem.weight", None)
    assert seen.keys() == expected.keys()
    for name, inputs in expected.items():
        assert len(inputs) == 2
        for a, b in zip(inputs, seen[name], strict=True):
            assert torch.equal(a, b), name


@torch.no_grad()
def test_a_forward_on_another_path_is_refused(net: InvertedNet, images: Tensor) -> None:
    coupling = trace(net, images[:1])
    net.detour = True
    with pytest.raises(SepressError, match="another path"), Taps(net, coupling):
        net(images)


def test_hooks_are_gone_after_the_context_even_after_an_error(net: InvertedNet, images: Tensor) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    coupling = trace(net, images[:1])
    with pytest.raises(ZeroDivisionError), Taps(net, coupling, on_gate=fail):
        net(images)
    assert not net._forward_pre_hooks
    assert not net._forward_hooks


@torch.no_grad()
def test_torch_calls_of_a_users_hook_do_not_shift_the_sites(net: InvertedNet, images: Tensor) -> None:
    net.register_forward_pre_hook(lambda module, args: (args[0].mul(1.0).add(0.0),))
    coupling = trace(net, images[:1])
    seen = []
    with Taps(net, coupling, on_gate=lambda gate, s: seen.append(s.shape)):
        net(images)
    assert seen == [(4, 8, 1, 1)]


def test_values_spread_along_the_channel_axis() -> None:
    x = torch.ones(2, 5, 3)
    assert torch.equal((x * spread(torch.arange(3.0), x, 2))[1, 4], torch.arange(3.0))
    per_image = torch.arange(6.0).view(2, 3)
    assert torch.equal((x * spread(per_image, x, 2))[:, 0], per_image)


def test_a_tensor_that_mixes_images_is_refused() -> None:
    with pytest.raises(InputError, match="does not keep 4 images apart"):
        mean_per_channel(torch.ones(6, 3, 1, 1), 1, 4)
    with pytest.raises(InputError, match="does not keep 4 images apart"):
        mean_per_channel(torch.ones(4, 3), 0, 4)


def test_windows_folded_into_the_first_axis_belong_to_their_image() -> None:
    windows = torch.arange(12.0).view(6, 1, 2)  # 2 images of 3 windows, 2 channels on the last axis
    assert mean_per_channel(windows, 2, 2).tolist() == [[2, 3], [8, 9]]


@torch.no_grad()
def test_on_call_sees_what_each_layer_read_and_gave_and_changes_nothing(
    net: InvertedNet, images: Tensor
) -> None:
    coupling = trace(net, images[:1])
    plain = net(images)
    seen: dict[str, ReaderCall] = {}
    with Taps(net, coupling, on_call=lambda reader, call: seen.update({reader.site.module: call})):
        assert torch.equal(net(images), plain)
    assert set(seen) == {"widen", "se.squeeze", "se.expand", "project", "head"}
    x = net.stem(images).relu()
    assert torch.equal(seen["widen"].x, x)
    assert torch.equal(seen["widen"].result, net.widen(x))
    assert torch.equal(seen["head"].result, plain)
    call = seen["project"]
    assert torch.equal(call.function(*call.args, **call.kwargs), call.result)


@torch.no_grad()
def test_on_call_sees_the_operand_that_on_read_put_in_place(net: InvertedNet, images: Tensor) -> None:
    coupling = trace(net, images[:1])
    seen: dict[str, Tensor] = {}
    with Taps(
        net,
        coupling,
        on_read=lambda reader, x: x * 0 if reader.site.module == "head" else None,
        on_call=lambda reader, call: seen.update({reader.site.module: call.x}),
    ):
        net(images)
    assert not seen["head"].any()
    assert seen["project"].any()


@torch.no_grad()
def test_on_call_stops_where_the_forward_is_not_the_traced_one(net: InvertedNet, images: Tensor) -> None:
    coupling = trace(net, images[:1])
    net.detour = True
    with pytest.raises(SepressError, match="another path"), Taps(net, coupling, on_call=lambda *_: None):
        net(images)
