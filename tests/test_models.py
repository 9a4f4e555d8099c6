"""References, specs and our own architectures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sepress.errors import InputError
from sepress.models import build_net, build_spec, check_kwargs, factory_reference, parse_reference
from sepress.models.registry import ARCHITECTURES
from sepress.models.se_resnet import SEBasicBlock
from sepress.models.squeeze_excitation import SqueezeExcitation
from sepress.types import ModelSpec


# ---- references ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("timm:seresnet50.ra2_in1k", ("timm", "seresnet50.ra2_in1k")),
        ("torchvision:mobilenet_v3_small", ("torchvision", "mobilenet_v3_small")),
        ("sepress:se_resnet8", ("sepress", "se_resnet8")),
        ("my_pkg.nets:make.it", ("user", "my_pkg.nets:make.it")),
    ],
)
def test_a_reference_splits_into_source_and_architecture(text: str, expected: tuple[str, str]) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "text", ["", "timm:", "timm:hf-hub:a/b", "timm:../x", "a b:c", "pkg:", "http://x.y/z", "timm:a\n"]
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_reference(text)


def test_a_bare_name_is_answered_with_what_it_may_have_meant() -> None:
    with pytest.raises(InputError) as error:
        parse_reference("seresnet50")
    assert "timm:seresnet50, torchvision:seresnet50, sepress:seresnet50" in str(error.value)


def test_reading_a_reference_imports_neither_torch_nor_a_registry() -> None:
    code = (
        "import sys; from sepress.models import parse_reference; parse_reference('timm:x');"
        "print([m for m in ('torch', 'timm', 'torchvision', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("reference", "close"),
    [
        ("timm:mobilenetv3_smal_050", "timm:mobilenetv3_small_050"),
        ("torchvision:mobilenet_v3_tiny", "torchvision:mobilenet_v3_small"),
        ("sepress:se_resnet9", "sepress:se_resnet8"),
        ("timm:mobilenetv3_small_050.nope", "timm:mobilenetv3_small_050.lamb_in1k"),
    ],
)
def test_an_unknown_architecture_is_answered_with_close_ones(reference: str, close: str) -> None:
    with pytest.raises(InputError) as error:
        build_spec(reference)
    assert close in str(error.value)


# ---- arguments ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kwargs",
    [
        {"pretrained": True},
        {"weights": "DEFAULT"},
        {"checkpoint_path": "x.pt"},
        {"num_classes": 0},
        {"num_classes": True},
        {"num_classes": 10.0},
        {"width": 10**9},
        {"width_mult": float("nan")},
        {"global_pool": "../avg"},
        {"depth": "3"},
    ],
)
def test_arguments_that_are_not_plain_and_structural_are_refused(kwargs: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(kwargs))):
        check_kwargs(kwargs)


def test_plain_structural_arguments_pass() -> None:
    kwargs = {"num_classes": 10, "width_mult": 1, "drop_rate": 0.2, "global_pool": "avg", "aux_logits": False}
    assert check_kwargs(kwargs) == kwargs


# ---- specs --------------------------------------------------------------------------------------
def test_timms_preprocessing_is_read_from_its_configuration() -> None:
    spec = build_spec("timm:mobilenetv3_small_050")
    assert spec.kwargs == {"num_classes": 1000}
    assert spec.preprocessing.input_size == (3, 224, 224)
    assert spec.preprocessing.mean == (0.485, 0.456, 0.406)
    assert spec.preprocessing.interpolation == "bicubic"
    assert spec.preprocessing.crop_pct == 0.875
    assert spec.preprocessing.origin == "timm: mobilenetv3_small_050.lamb_in1k"


def test_torchvisions_preprocessing_and_class_names_are_read_from_its_weights() -> None:
    spec = build_spec("torchvision:efficientnet_b1")
    assert spec.preprocessing.input_size == (3, 240, 240)
    assert spec.preprocessing.crop_pct == 240 / 255
    assert spec.preprocessing.interpolation == "bilinear"
    assert "EfficientNet_B1_Weights.IMAGENET1K_V2" in spec.preprocessing.origin
    assert spec.class_names is not None
    assert (len(spec.class_names), spec.class_names[0]) == (1000, "tench")
    assert build_spec("torchvision:efficientnet_b1", num_classes=10).class_names is None
    assert build_spec("torchvision:efficientnet_b1", trained=False).class_names is None


def test_our_own_nets_are_prepared_for_the_channels_they_take() -> None:
    assert build_spec("sepress:se_mobile").preprocessing.input_size == (3, 32, 32)
    digits = build_spec("sepress:se_resnet8", kwargs={"in_chans": 1}).preprocessing
    assert (digits.input_size, digits.mean, digits.std) == ((1, 28, 28), (0.1307,), (0.3081,))
    four = build_spec("timm:mobilenetv3_small_050", kwargs={"in_chans": 4}).preprocessing
    assert four.input_size == (4, 224, 224)
    assert four.mean == pytest.approx((0.449,) * 4)


@pytest.mark.parametrize(
    ("typed", "size"), [(96, (3, 96, 96)), ((64, 48), (3, 64, 48)), ((1, 20, 24), (1, 20, 24))]
)
def test_a_typed_input_size_may_be_a_square_height_and_width_or_whole(
    typed: object, size: tuple[int, ...]
) -> None:
    overrides = {"input_size": typed, "mean": 0.5, "std": (0.25,), "interpolation": None}
    preprocessing = build_spec("sepress:se_mobile", overrides=overrides).preprocessing
    assert preprocessing.input_size == size
    assert preprocessing.mean == (0.5,) * size[0]
    assert preprocessing.std == (0.25,) * size[0]
    assert preprocessing.origin.startswith("typed: input_size, mean, std; the rest from sepress")


@pytest.mark.parametrize(
    "overrides",
    [
        {"input_size": 0},
        {"input_size": "224"},
        {"input_size": (3, -1, 5)},
        {"mean": (0.5, 0.5)},
        {"mean": float("nan")},
        {"std": 0},
        {"interpolation": "magic"},
        {"crop_pct": 0},
        {"gamma": 2},
    ],
)
def test_impossible_preprocessing_is_refused(overrides: dict[str, object]) -> None:
    with pytest.raises(InputError):
        build_spec("sepress:se_mobile", overrides=overrides)


def test_class_names_are_counted() -> None:
    assert build_spec("sepress:se_mobile", num_classes=2, class_names=["a", "b"]).class_names == ("a", "b")
    with pytest.raises(InputError, match="3 class names for 2 classes"):
        build_spec("sepress:se_mobile", num_classes=2, class_names=["a", "b", "c"])
    with pytest.raises(InputError, match="given twice"):
        build_spec("sepress:se_mobile", num_classes=2, kwargs={"num_classes": 3})


# ---- building -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "reference",
    [
        "timm:mobilenetv3_small_050",
        "torchvision:mobilenet_v3_small",
        *(f"sepress:{a}" for a in ARCHITECTURES),
    ],
)
def test_the_meta_device_gets_the_same_shapes_as_the_cpu(reference: str) -> None:
    spec = build_spec(reference, num_classes=7)
    meta, cpu = build_net(spec, device="meta"), build_net(spec)
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}
    assert {k: v.shape for k, v in meta.state_dict().items()} == {
        k: v.shape for k, v in cpu.state_dict().items()
    }
    assert not cpu.training
    assert cpu(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current folder, and its name."""
    (tmp_path / "users_nets_for_a_test.py").write_text(
        "from torch import nn\n"
        "import torch\n"
        "def good(num_classes=3): return nn.Linear(2, num_classes)\n"
        "def reads(num_classes=3): return nn.Linear(2, int(torch.tensor(num_classes)))\n"
        "def fails(): raise ZeroDivisionError('their fault')\n"
        "def wrong(): return 7\n"
        "number = 7\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users_nets_for_a_test", raising=False)
    return "users_nets_for_a_test"


def test_a_users_factory_is_imported_from_the_current_folder(user_module: str) -> None:
    before = list(sys.path)
    spec = build_spec(f"{user_module}:good", num_classes=5)
    assert spec.preprocessing.origin.startswith("assumed")
    net = build_net(spec)
    assert isinstance(net, nn.Linear)
    assert net.out_features == 5
    assert sys.path == before


def test_a_constructor_that_reads_values_is_moved_to_meta_afterwards(user_module: str) -> None:
    net = build_net(build_spec(f"{user_module}:reads"), device="meta")
    assert net.get_parameter("weight").device.type == "meta"
    assert net.get_parameter("weight").shape == (3, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":fails", "ZeroDivisionError: their fault"),
        (":wrong", "returned a int"),
        (":number", "not a function"),
        (":absent", "has no 'absent'"),
        ("_typo:good", "importing users_nets_for_a_test_typo failed"),
    ],
)
def test_a_factory_that_fails_is_an_input_error_with_its_cause(
    name: str, message: str, user_module: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_net(build_spec(f"{user_module}{name}"))


def test_an_argument_the_constructor_does_not_take_is_an_input_error() -> None:
    with pytest.raises(InputError, match="takes no 'in_chans'"):
        build_net(build_spec("torchvision:mobilenet_v3_small", kwargs={"in_chans": 1}))
    with pytest.raises(InputError, match=r"sepress:se_resnet8\(width_mult=2, num_classes=10\) failed"):
        build_net(build_spec("sepress:se_resnet8", kwargs={"width_mult": 2}))


def test_a_spec_from_elsewhere_can_only_name_registered_architectures() -> None:
    preprocessing = build_spec("sepress:se_mobile").preprocessing
    with pytest.raises(InputError, match="no architecture 'hf-hub"):
        build_net(ModelSpec("timm", "hf-hub:someone/net", {}, preprocessing))
    with pytest.raises(InputError, match="checkpoint_path"):
        build_net(ModelSpec("timm", "seresnet50", {"checkpoint_path": "x"}, preprocessing))


@pytest.mark.parametrize("reference", ["timm:mobilenetv3_small_050", "torchvision:mobilenet_v3_small"])
def test_pretrained_weights_that_can_not_be_had_name_the_ways_out(
    reference: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*args: object, **kwargs: object) -> object:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", unreachable)
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match="no route to host") as error:
        build_net(build_spec(reference), pretrained=True)
    assert "--random-weights" in str(error.value)
    assert f"--arch {reference}" in str(error.value)


def test_published_weights_load_but_for_a_classifier_of_another_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torchvision

    published = torchvision.models.mobilenet_v3_small()
    get_model = torchvision.models.get_model
    monkeypatch.setattr(
        "torchvision.models.get_model",
        lambda arch, weights=None, **kw: published if weights else get_model(arch, weights=None, **{
            k: v for k, v in kw.items() if k != "progress"
        }),
    )  # fmt: skip
    net = build_net(build_spec("torchvision:mobilenet_v3_small", num_classes=5), pretrained=True)
    theirs, ours = published.state_dict(), net.state_dict()
    differing = [k for k in theirs if theirs[k].shape != ours[k].shape or not torch.equal(theirs[k], ours[k])]
    assert differing == ["classifier.3.weight", "classifier.3.bias"]
    with pytest.raises(InputError, match="don't fit"):
        build_net(build_spec("torchvision:mobilenet_v3_small", kwargs={"width_mult": 0.5}), pretrained=True)


def test_factories_are_recorded_by_an_importable_looking_name() -> None:
    assert factory_reference(SEBasicBlock) == "sepress.models.se_resnet:SEBasicBlock"
    assert parse_reference(factory_reference(lambda: nn.Identity()))[0] == "user"


# ---- our networks -------------------------------------------------------------------------------
def test_squeeze_and_excitation_equals_the_papers_equations() -> None:
    se = SqueezeExcitation(3, 2).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    w1, b1 = se.reduce.weight[:, :, 0, 0], se.reduce.bias
    w2, b2 = se.expand.weight[:, :, 0, 0], se.expand.bias
    for image in range(2):
        z = x[image].sum(dim=(1, 2)) / 20  # equation 2
        s = 1 / (1 + torch.exp(-(w2 @ (w1 @ z + b1).clamp(min=0) + b2)))  # equation 3
        torch.testing.assert_close(se(x)[image], x[image] * s[:, None, None])  # equation 4


class Figures:
    """MACs and parameters summed layer by layer, from the papers' tables and not from the modules."""

    def __init__(self) -> None:
        self.macs = self.params = 0

    def conv(self, i: int, o: int, k: int, side: int, *, groups: int = 1) -> None:
        """A square convolution without bias, and its batch norm."""
        self.macs += i // groups * o * k * k * side * side
        self.params += i // groups * o * k * k + 2 * o

    def linear(self, i: int, o: int) -> None:
        self.macs += i * o
        self.params += i * o + o

    def se(self, channels: int, hidden: int) -> None:
        self.linear(channels, hidden)
        self.linear(hidden, channels)


def resnet_figures(blocks: int) -> Figures:
    total = Figures()
    total.conv(3, 16, 3, 32)
    for inputs, channels, side in ((16, 16, 32), (16, 32, 16), (32, 64, 8)):
        for i in (inputs, *[channels] * (blocks - 1)):
            total.conv(i, channels, 3, side)
            total.conv(channels, channels, 3, side)
            total.se(channels, channels // 4)
            if i != channels:
                total.conv(i, channels, 1, side)
    total.linear(64, 10)
    return total


def mobile_figures() -> Figures:
    total = Figures()
    total.conv(3, 16, 3, 32)
    for inputs, hidden, channels, side_in, side in (
        (16, 32, 16, 32, 32),
        (16, 48, 24, 32, 16), (24, 72, 24, 16, 16),
        (24, 96, 40, 16, 8), (40, 160, 40, 8, 8),
        (40, 160, 80, 8, 4), (80, 320, 80, 4, 4),
    ):  # fmt: skip
        total.conv(inputs, hidden, 1, side_in)
        total.conv(hidden, hidden, 3, side, groups=hidden)
        total.se(hidden, hidden // 4)
        total.conv(hidden, channels, 1, side)
    total.conv(80, 240, 1, 4)
    total.linear(240, 10)
    return total


@pytest.mark.parametrize(
    ("arch", "gates", "expected"),
    [
        ("se_resnet8", 3, resnet_figures(1)),
        ("se_resnet20", 9, resnet_figures(3)),
        ("se_resnet56", 27, resnet_figures(9)),
        ("se_mobile", 7, mobile_figures()),
    ],
)
def test_our_architectures_have_the_size_of_their_tables(arch: str, gates: int, expected: Figures) -> None:
    net = ARCHITECTURES[arch]().eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() // 2 == expected.macs
    assert sum(p.numel() for p in net.parameters()) == expected.params
    assert sum(isinstance(m, SqueezeExcitation) for m in net.modules()) == gates


def test_se_scales_the_residual_branch_and_not_the_shortcut() -> None:
    block = SEBasicBlock(4, 4, stride=1, reduction=4).eval()
    nn.init.zeros_(block.se.expand.weight)
    nn.init.constant_(block.se.expand.bias, -100.0)  # a closed gate
    x = torch.rand(1, 4, 6, 6)
    torch.testing.assert_close(block(x), x)


def test_width_and_reduction_change_the_hidden_sizes() -> None:
    net = ARCHITECTURES["se_resnet8"](width=8, reduction=2, in_chans=1)
    hidden = [m.reduce.out_channels for m in net.modules() if isinstance(m, SqueezeExcitation)]
    assert hidden == [4, 8, 16]
    assert ARCHITECTURES["se_mobile"](width_mult=0.5).get_parameter("conv1.weight").shape == (8, 3, 3, 3)
