"""Model files: what is saved comes back bit for bit, and no file gets to do harm."""

from __future__ import annotations

import argparse
import doctest
import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sepress.bundle import load_bundle, load_model, make_bundle, new_folder, read_meta, save_bundle, save_net
from sepress.bundle.header import digest, named_tensors
from sepress.errors import InputError, SepressError
from sepress.models import build_net, build_spec
from sepress.types import AttributePatch, Bundle, Layout, ModelSpec

SUFFIXES = (".pt", ".safetensors")
TINY = {"in_chans": 1, "width": 8}


def tiny(seed: int = 0) -> Bundle:
    """A se_resnet8 with 8 channels, random weights, and norm statistics that are not the initial ones."""
    bundle = load_model("sepress:se_resnet8", kwargs=TINY, random_weights=True, seed=seed)
    with torch.no_grad():
        bundle.net.train()(torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(seed)))
    return replace(bundle, net=bundle.net.eval())


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def assert_bit_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def narrowed() -> Bundle:
    """A tiny net whose first block lost hidden channels 1 and 6 of 8, cut by hand, with its lineage."""
    bundle = tiny()
    block = bundle.net.get_submodule("stages.0.0")
    keep = torch.tensor([0, 2, 3, 4, 5, 7])
    for name, dim in (("conv1.weight", 0), ("bn1.weight", 0), ("bn1.bias", 0), ("conv2.weight", 1)):
        owner = block.get_submodule(name.split(".")[0])
        weight = getattr(owner, name.split(".")[1])
        setattr(owner, name.split(".")[1], nn.Parameter(weight.detach().index_select(dim, keep)))
    block.bn1.running_mean = block.bn1.running_mean[keep].clone()
    block.bn1.running_var = block.bn1.running_var[keep].clone()
    block.conv1.out_channels = block.conv2.in_channels = block.bn1.num_features = 6
    return make_bundle(bundle.net, bundle.spec, lineage={"parent": "tiny", "plans": [{"ratio": 0.25}]})


# ---- ours ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "reference", ["timm:mobilenetv3_small_050", "torchvision:mobilenet_v3_small", "sepress:se_mobile"]
)
def test_a_saved_net_comes_back_bit_equal(reference: str, suffix: str, tmp_path: Path) -> None:
    bundle = load_model(reference, random_weights=True, num_classes=7, seed=3)
    save_bundle(bundle, tmp_path / f"net{suffix}")
    again = load_bundle(tmp_path / f"net{suffix}")
    assert again.spec == bundle.spec
    assert again.spec.trained is False
    assert again.layout == bundle.layout
    assert again.lineage == {"origin": {"reference": reference, "weights": "random, seed 3"}}
    assert_bit_equal(state_of(again.net), state_of(bundle.net))
    assert not again.net.training
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.net(x), bundle.net(x))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_narrowed_net_comes_back_trains_on_and_is_saved_again(suffix: str, tmp_path: Path) -> None:
    bundle = narrowed()
    save_bundle(bundle, tmp_path / f"net{suffix}")
    again = load_bundle(tmp_path / f"net{suffix}")
    assert again.lineage == bundle.lineage
    assert_bit_equal(state_of(again.net), state_of(bundle.net))
    block = again.net.get_submodule("stages.0.0")
    assert (block.conv1.out_channels, block.conv2.in_channels, block.bn1.num_features) == (6, 6, 6)
    again.net.train()
    optimizer = torch.optim.SGD(again.net.parameters(), lr=0.1)
    again.net(torch.randn(4, 1, 12, 12)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(block.conv1.weight, bundle.net.get_submodule("stages.0.0").conv1.weight)
    save_bundle(again, tmp_path / f"again{suffix}")
    assert_bit_equal(state_of(load_bundle(tmp_path / f"again{suffix}").net), state_of(again.net))


def test_both_formats_hold_the_same_header_and_digest(tmp_path: Path) -> None:
    bundle = tiny()
    save_bundle(bundle, tmp_path / "a.pt")
    save_bundle(bundle, tmp_path / "a.safetensors")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["format"] == "sepress.bundle/1"
    from safetensors import safe_open

    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {k: content[k] for k in ("format", "meta", "digest")}
    assert_bit_equal(load_file(tmp_path / "a.safetensors"), content["tensors"])
    assert json.loads(content["meta"])["spec"]["arch"] == "se_resnet8"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_peek_tells_spec_and_lineage(suffix: str, tmp_path: Path) -> None:
    save_bundle(replace(tiny(), lineage={"data": "digits"}), tmp_path / f"a{suffix}")
    header = read_meta(tmp_path / f"a{suffix}")
    assert header.spec == tiny().spec
    assert header.lineage == {"data": "digits"}
    torch.save({"a": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match="sepress did not write"):
        read_meta(tmp_path / "foreign.pt")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_requires_grad_and_half_precision_are_kept(suffix: str, tmp_path: Path) -> None:
    bundle = tiny()
    bundle.net.half().get_parameter("conv1.weight").requires_grad_(False)
    save_bundle(bundle, tmp_path / f"a{suffix}")
    net = load_bundle(tmp_path / f"a{suffix}").net
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert net.get_parameter("fc.weight").dtype == torch.float16


class Tied(nn.Module):
    """Two linear layers with one weight, a buffer outside the state dict and a plain tensor attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.arange(4.0), persistent=False)
        self.offset = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.scale) + self.offset


def user_spec(arch: str) -> ModelSpec:
    return build_spec(arch)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tied_weights_stay_tied_and_no_tensor_is_left_on_meta(suffix: str, tmp_path: Path) -> None:
    net = Tied()
    save_bundle(make_bundle(net, user_spec("mine:Tied"), lineage={}), tmp_path / f"a{suffix}")
    again = load_bundle(tmp_path / f"a{suffix}", arch=Tied).net
    assert isinstance(again, Tied)
    assert again.second.weight is again.first.weight
    assert torch.equal(again.scale, torch.arange(4.0))
    x = torch.randn(3, 4)
    assert torch.equal(again(x), net(x))


def test_ties_made_after_building_are_restored(tmp_path: Path) -> None:
    bundle = tiny()
    bundle.net.get_submodule("stages.0.0.bn2").weight = bundle.net.get_submodule("stages.0.0.bn1").weight
    save_bundle(make_bundle(bundle.net, bundle.spec, lineage={}), tmp_path / "a.safetensors")
    block = load_bundle(tmp_path / "a.safetensors").net.get_submodule("stages.0.0")
    assert block.bn1.weight is block.bn2.weight


def test_a_users_factory_is_named_again_and_never_run_from_the_file(tmp_path: Path) -> None:
    save_bundle(make_bundle(Tied(), user_spec("evil.module:Tied"), lineage={}), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"evil\.module:Tied.*may not run"):
        load_bundle(tmp_path / "a.pt")
    assert load_bundle(tmp_path / "a.pt", arch=f"{__name__}:Tied").spec.arch == f"{__name__}:Tied"
    assert load_bundle(tmp_path / "a.pt", arch=lambda: Tied()).spec.source == "user"


def test_a_net_without_a_factory_can_not_be_bundled() -> None:
    with pytest.raises(InputError, match="without a factory") as error:
        make_bundle(nn.Linear(2, 2), None, lineage={})
    assert "ONNX" in str(error.value)


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        save_bundle(tiny(), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_text() == "precious"
    save_bundle(tiny(), tmp_path / "a.pt", overwrite=True)
    assert load_bundle(tmp_path / "a.pt").spec.arch == "se_resnet8"
    with pytest.raises(InputError, match=r"\.pt or \.safetensors"):
        save_bundle(tiny(), tmp_path / "a.pkl")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]  # no temporary file stays


def test_a_net_that_its_spec_does_not_build_is_not_bundled(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a narrowed sepress:se_resnet8"):
        make_bundle(Tied(), tiny().spec, lineage={})
    stale = tiny()
    stale.net.fc = nn.Linear(32, 4)
    with pytest.raises(InputError, match="spec says 10 classes"):
        make_bundle(stale.net, stale.spec, lineage={})
    with pytest.raises(SepressError, match="changed its shape"):
        save_bundle(stale, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_pruned_net_is_saved_by_its_architecture_alone_and_pruned_again(
    suffix: str, tmp_path: Path
) -> None:
    from sepress.coupling import apply_removal, trace

    x = torch.randn(2, 3, 64, 64)
    net = build_net(build_spec("timm:mobilenetv3_small_050", num_classes=7))
    path = tmp_path / f"once{suffix}"
    for name in ("once", "twice"):
        coupling = trace(net, x[:1])
        apply_removal(net, coupling, {g.name: (0, 2) for g in coupling.prunable()})
        path = tmp_path / f"{name}{suffix}"
        save_net(net, path, arch="timm:mobilenetv3_small_050")
        again = load_bundle(path)
        assert again.spec.kwargs == {"num_classes": 7}
        assert_bit_equal(state_of(again.net), state_of(net))
        assert torch.equal(again.net(x), net(x))
        depthwise = [m for m in again.net.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        assert depthwise
        assert all(m.groups == m.in_channels == m.out_channels == len(m.weight) for m in depthwise)
        net = again.net


def test_a_loaded_bundle_is_saved_as_it_is(tmp_path: Path) -> None:
    save_bundle(narrowed(), tmp_path / "a.pt")
    save_net(load_bundle(tmp_path / "a.pt"), tmp_path / "b.safetensors")
    assert read_meta(tmp_path / "b.safetensors") == read_meta(tmp_path / "a.pt")
    with pytest.raises(InputError, match="knows its architecture"):
        save_net(tiny(), tmp_path / "c.pt", arch="sepress:se_resnet8")
    with pytest.raises(InputError, match="without a factory"):
        save_net(tiny().net, tmp_path / "c.pt")
    with pytest.raises(InputError, match="have 10 classes, but num_classes is 5"):
        save_net(tiny().net, tmp_path / "c.pt", arch="sepress:se_resnet8", kwargs=TINY, num_classes=5)


def test_loading_and_saving_leave_the_random_state_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    save_bundle(make_bundle(Tied(), user_spec("mine:Tied"), lineage={}, factory=Tied), tmp_path / "a.pt")
    torch.random.set_rng_state(state)
    load_bundle(tmp_path / "a.pt", arch=Tied)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_examples_in_the_documentation_run() -> None:
    import sepress.bundle
    import sepress.models

    for module in (sepress.bundle, sepress.models):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


class Splitting(nn.Module):
    """Keeps numbers that shapes do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, groups=8)
        self.sizes = (4, 4)
        self.steps = 1
        self.flag = True


def test_patched_attributes_are_restored_and_the_last_patch_counts(tmp_path: Path) -> None:
    old = [AttributePatch("", "sizes", 0, 3), AttributePatch("conv", "groups", None, 4)]
    bundle = make_bundle(
        Splitting(),
        user_spec("mine:Splitting"),
        lineage={},
        attributes=[*old, AttributePatch("", "sizes", 0, 2), AttributePatch("", "sizes", 1, 3)],
    )
    save_bundle(bundle, tmp_path / "a.pt")
    again = load_bundle(tmp_path / "a.pt", arch=Splitting)
    assert again.net.sizes == (2, 3)
    assert again.net.conv.groups == 4
    assert len(again.layout.attributes) == 3


def test_rewritten_numbers_are_found_by_comparing_with_the_architecture() -> None:
    net = Splitting()
    net.sizes = (4, 2)
    net.steps = 12  # grew: a counter, not a width
    net.flag = False
    bundle = make_bundle(net, user_spec("mine:Splitting"), lineage={}, factory=Splitting)
    assert bundle.layout.attributes == (AttributePatch("", "sizes", 1, 2),)


@pytest.mark.parametrize(
    "patch",
    [
        AttributePatch("", "sizes", 0, 5),  # grows
        AttributePatch("", "sizes", 2, 1),  # no such position
        AttributePatch("", "flag", None, 1),  # a bool
        AttributePatch("", "absent", None, 1),
        AttributePatch("nowhere", "groups", None, 1),
        AttributePatch("conv", "groups", None, 0),
        AttributePatch("conv", "forward", None, 1),
    ],
)
def test_an_attribute_that_is_not_a_shrunk_number_is_refused(patch: AttributePatch, tmp_path: Path) -> None:
    bundle = make_bundle(Splitting(), user_spec("mine:Splitting"), lineage={}, attributes=[patch])
    save_bundle(bundle, tmp_path / "a.pt")
    with pytest.raises(InputError, match="its header sets"):
        load_bundle(tmp_path / "a.pt", arch=Splitting)


# ---- hostile and broken files -------------------------------------------------------------------
def forge(path: Path, change: object, tensors: dict[str, Tensor] | None = None) -> None:
    """Write a tiny bundle whose header was changed by `change(header)`, with a digest that fits."""
    bundle = tiny()
    save_bundle(bundle, path, overwrite=True)
    content = torch.load(path, weights_only=True)
    header = json.loads(content["meta"])
    change(header)  # type: ignore[operator]
    content["meta"] = json.dumps(header)
    content["tensors"] |= tensors or {}
    content["digest"] = digest(content["meta"], content["tensors"])
    torch.save(content, path)


def set_at(*keys: str, value: object) -> object:
    def change(header: dict) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("spec", "arch", value="se_resnet_9000"), "no architecture"),
        (set_at("spec", "arch", value="os:system"), "no architecture"),
        (set_at("spec", "source", value="pickle"), "spec.source"),
        (set_at("spec", "kwargs", "checkpoint_path", value="/etc/passwd"), "checkpoint_path"),
        (set_at("spec", "kwargs", "pretrained", value=True), "pretrained"),
        (set_at("spec", "kwargs", "width", value=10**9), "width"),
        (set_at("spec", "kwargs", "width", value=True), "width"),
        (set_at("spec", "kwargs", "num_classes", value=999_999), "no tensor has so many"),
        (set_at("spec", "preprocessing", "std", value=[0.0]), "std"),
        (set_at("spec", "preprocessing", "input_size", value=[1, 10**9, 10**9]), "input size"),
        (set_at("layout", "shapes", "conv1.weight", value=[10**9, 1, 3, 3]), "its header says"),
        (set_at("layout", "shapes", "conv1.weight", value=[True, 1, 3, 3]), "valid"),
        (set_at("layout", "shapes", "extra", value=[1]), "disagree about 'extra'"),
        (set_at("aliases", value={"a": "nowhere"}), "ties a -> nowhere"),
        (set_at("aliases", value={"stray": "conv1.weight"}), "not a narrowed"),
        (set_at("lineage", value=[1]), "lineage"),
        (set_at("lineage", value={"loss": float("nan")}), "NaN"),
    ],
)
def test_a_forged_header_is_refused_with_its_field(change: object, message: str, tmp_path: Path) -> None:
    forge(tmp_path / "a.pt", change)
    with pytest.raises(InputError, match=message):
        load_bundle(tmp_path / "a.pt")


def test_a_wider_tensor_than_the_architecture_has_is_refused(tmp_path: Path) -> None:
    wide = torch.zeros(16, 1, 3, 3)
    forge(
        tmp_path / "a.pt",
        set_at("layout", "shapes", "conv1.weight", value=[16, 1, 3, 3]),
        {"conv1.weight": wide},
    )
    with pytest.raises(InputError, match=r"can't come from pruning \(8, 1, 3, 3\)"):
        load_bundle(tmp_path / "a.pt")


def test_a_tensor_that_repeats_one_number_a_billion_times_is_refused(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(10**9)
    torch.save(
        {"format": "sepress.bundle/1", "meta": "{}", "digest": "", "tensors": {"a": huge}}, tmp_path / "a.pt"
    )
    with pytest.raises(InputError):
        load_bundle(tmp_path / "a.pt")
    torch.save({"a": huge}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="more than the file holds"):
        load_bundle(tmp_path / "b.pt", arch="sepress:se_resnet8")


@pytest.mark.parametrize("nesting", ["[" * 100_000, '{"a":' * 100_000])
def test_a_deeply_nested_header_is_refused(nesting: str, tmp_path: Path) -> None:
    torch.save(
        {"format": "sepress.bundle/1", "meta": nesting, "digest": "", "tensors": {}}, tmp_path / "a.pt"
    )
    with pytest.raises(InputError, match="not valid"):
        load_bundle(tmp_path / "a.pt")


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"format": "sepress.bundle/2"}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"sepress\.bundle/2"):
        load_bundle(tmp_path / "a.pt")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.target,)  # type: ignore[return-value]


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("name", ["a.pt", "a.pt2", "a.pth", "a.safetensors", "legacy.pt"])
def test_the_payload_of_a_malicious_pickle_does_not_run(
    name: str, forced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = tmp_path / "it-ran"
    content = {"format": "sepress.bundle/1", "meta": "{}", "digest": "", "tensors": {}, "x": Payload(mark)}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not name.startswith("legacy"))
    with pytest.raises(InputError):
        load_bundle(tmp_path / name)
    with pytest.raises(InputError):
        load_bundle(tmp_path / name, arch="sepress:se_resnet8")
    with pytest.raises(InputError):
        read_meta(tmp_path / name)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))  # noqa: S301 - the control: it would have run
    assert mark.exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_and_bit_flipped_files_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    save_bundle(tiny(), path)
    whole = path.read_bytes()
    for length in (1, 7, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            load_bundle(path)
    reference = state_of(tiny().net)
    for step in range(40):
        position = (step * 7919 + 3) * len(whole) // (40 * 7919 + 3)
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            bundle = load_bundle(path)
        except InputError:
            continue
        assert suffix == ".pt"  # a zip file has bytes that mean nothing: paddings, times
        assert_bit_equal(state_of(bundle.net), reference)


def test_what_is_not_a_model_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("hello, I am not a model")
    (tmp_path / "graph.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/code/__torch__.py", "")
        archive.writestr("script/data.pkl", "")
    with zipfile.ZipFile(tmp_path / "program.pt2", "w") as archive:
        archive.writestr("program/archive_format", "pt2")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("../../etc/passwd", "")
    for name, message in {
        "absent.pt": "no such file",
        ".": "not a file",
        "empty.pt": "empty",
        "text.pt": "not a model file",
        "graph.onnx": "ONNX",
        "script.pt": "TorchScript",
        "program.pt2": "exported program",
        "other.zip": "zip archive",
    }.items():
        with pytest.raises(InputError, match=message):
            load_bundle(tmp_path / name)


# ---- foreign files ------------------------------------------------------------------------------
def saved(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "foreign.pth")
    return tmp_path / "foreign.pth"


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


@pytest.mark.parametrize("shape", [
    "bare", "state_dict", "model", "model_state_dict", "ddp", "compiled", "ddp-compiled", "lightning", "args",
])  # fmt: skip
def test_common_checkpoints_load_with_arch(shape: str, tmp_path: Path) -> None:
    state = state_of(tiny().net)
    content: dict[str, object] = {
        "bare": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "optimizer": {"state": {}, "param_groups": []}},
        "model_state_dict": {"model_state_dict": state},
        "ddp": prefixed("module.", state),
        "compiled": prefixed("_orig_mod.", state),
        "ddp-compiled": {"model": prefixed("module._orig_mod.", state)},
        "lightning": {
            "state_dict": {**prefixed("net.", state), "loss.weight": torch.ones(2)},
            "pytorch-lightning_version": "2.4",
        },
        "args": {"model": state, "args": argparse.Namespace(lr=0.1, data="photos")},
    }[shape]  # type: ignore[assignment]
    bundle = load_bundle(saved(tmp_path, content), arch="sepress:se_resnet8", kwargs=TINY)
    assert_bit_equal(state_of(bundle.net), state)
    assert bundle.spec.trained is True
    assert bundle.lineage["origin"]["file"] == "foreign.pth"
    notes = bundle.lineage["origin"]["notes"]
    key = next((key for key in ("state_dict", "model", "model_state_dict") if key in content), None)
    assert notes[0] == (f"took the weights under '{key}'" if key else "took the state dict that the file is")
    assert notes[1:] == (["left out 1 tensors outside 'net.' (loss.weight)"] if shape == "lightning" else [])


def test_averaged_weights_are_taken_and_said(tmp_path: Path) -> None:
    plain, averaged = state_of(tiny(0).net), state_of(tiny(1).net)
    content = {"state_dict": plain, "state_dict_ema": averaged, "epoch": 1}
    bundle = load_bundle(saved(tmp_path, content), arch="sepress:se_resnet8", kwargs=TINY)
    assert_bit_equal(state_of(bundle.net), averaged)
    assert bundle.lineage["origin"]["notes"] == [
        "took the averaged (EMA) weights under 'state_dict_ema', not those under 'state_dict'"
    ]


def test_torchvisions_averaged_model_loads_without_its_counter(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(tiny(1).net).state_dict()
    bundle = load_bundle(saved(tmp_path, {"model_ema": averaged}), arch="sepress:se_resnet8", kwargs=TINY)
    assert_bit_equal(state_of(bundle.net), state_of(tiny(1).net))
    assert "n_averaged" in bundle.lineage["origin"]["notes"][1]


def test_a_foreign_safetensors_file_loads_with_arch(tmp_path: Path) -> None:
    save_file(state_of(tiny().net), tmp_path / "a.safetensors", metadata={"format": "pt"})
    bundle = load_bundle(tmp_path / "a.safetensors", arch="sepress:se_resnet8", kwargs=TINY)
    assert_bit_equal(state_of(bundle.net), state_of(tiny().net))


@pytest.mark.parametrize(
    "reference", ["timm:mobilenetv3_small_050", "torchvision:mobilenet_v3_small", "sepress:se_resnet8"]
)
def test_the_class_count_is_read_from_the_weights(reference: str, tmp_path: Path) -> None:
    net = build_net(build_spec(reference, num_classes=7))
    bundle = load_bundle(saved(tmp_path, net.state_dict()), arch=reference)
    assert bundle.spec.kwargs["num_classes"] == 7
    assert bundle.spec.class_names is None
    assert bundle.net(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    with pytest.raises(InputError, match="have 7 classes, but num_classes is 5"):
        load_bundle(tmp_path / "foreign.pth", arch=reference, num_classes=5)


def head_of(num_classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, num_classes))


def test_a_factorys_class_count_is_read_from_the_weights_where_it_takes_one(tmp_path: Path) -> None:
    path = saved(tmp_path, head_of(5).state_dict())
    bundle = load_bundle(path, arch=head_of)
    assert bundle.spec.kwargs == {"num_classes": 5}
    assert bundle.spec.arch == f"{__name__}:head_of"
    save_bundle(bundle, tmp_path / "a.pt")
    assert load_bundle(tmp_path / "a.pt", arch=head_of).net(torch.zeros(1, 4)).shape == (1, 5)


def test_weights_of_another_net_are_refused_with_counts_and_first_keys(tmp_path: Path) -> None:
    state = state_of(tiny().net)
    state["conv1.weight"] = torch.zeros(8, 1, 5, 5)
    del state["fc.bias"]
    state["stray"] = torch.zeros(1)
    with pytest.raises(InputError) as error:
        load_bundle(saved(tmp_path, state), arch="sepress:se_resnet8", kwargs=TINY)
    text = str(error.value)
    assert "missing 1: fc.bias" in text
    assert "unexpected 1: stray" in text
    assert "other shapes 1: conv1.weight is (8, 1, 5, 5), expected (8, 1, 3, 3)" in text


def test_the_architecture_is_inferred_from_a_training_script_s_note(tmp_path: Path) -> None:
    net = build_net(build_spec("timm:mobilenetv3_small_050", num_classes=4))
    content = {"arch": "mobilenetv3_small_050", "state_dict": prefixed("module.", net.state_dict())}
    bundle = load_bundle(saved(tmp_path, content))
    assert bundle.spec.reference == "timm:mobilenetv3_small_050"
    assert bundle.spec.kwargs["num_classes"] == 4
    theirs = build_net(build_spec("torchvision:mobilenet_v3_small"))
    content = {"arch": "mobilenet_v3_small", "state_dict": theirs.state_dict()}
    assert load_bundle(saved(tmp_path, content)).spec.reference == "torchvision:mobilenet_v3_small"
    with pytest.raises(InputError, match="--arch timm:NAME"):
        load_bundle(saved(tmp_path, {"arch": "os:system", "state_dict": net.state_dict()}))


def test_a_pickled_net_is_refused_and_trusted_only_when_told(tmp_path: Path) -> None:
    net = tiny().net
    path = saved(tmp_path, net)
    with pytest.raises(InputError, match=r"runs code .*SEResNet") as error:
        load_bundle(path, arch="sepress:se_resnet8", kwargs=TINY)
    assert "--trust-pickle" in str(error.value)
    bundle = load_bundle(path, arch="sepress:se_resnet8", kwargs=TINY, trust_pickle=True)
    assert_bit_equal(state_of(bundle.net), state_of(net))


def test_a_file_without_weights_is_told_by_its_keys(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its keys are epoch, loss"):
        load_bundle(saved(tmp_path, {"epoch": 1, "loss": 0.5}), arch="sepress:se_resnet8")
    with pytest.raises(InputError, match="it holds a list"):
        load_bundle(saved(tmp_path, [1, 2]), arch="sepress:se_resnet8")


# ---- what a user calls a model ------------------------------------------------------------------
def test_random_weights_are_typed_reproducible_and_recorded() -> None:
    state = torch.random.get_rng_state()
    a, b = (load_model("sepress:se_resnet8", random_weights=True, seed=5) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_bit_equal(state_of(a.net), state_of(b.net))
    assert not a.spec.trained
    with pytest.raises(InputError, match="--random-weights"):
        load_model("sepress:se_resnet8")


def test_inspecting_a_name_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sepress.models.sources.construct_pretrained", None)
    assert load_model("timm:mobilenetv3_small_050", weights="none").spec.trained is False


def test_a_file_and_a_name_are_told_apart(tmp_path: Path) -> None:
    save_bundle(tiny(), tmp_path / "a.pt")
    assert load_model(str(tmp_path / "a.pt")).spec.arch == "se_resnet8"
    with pytest.raises(InputError, match="no such file"):
        load_model("absent.pt")
    with pytest.raises(InputError, match="timm:seresnet50"):
        load_model("seresnet50")
    with pytest.raises(InputError, match="goes with a name"):
        load_model(str(tmp_path / "a.pt"), random_weights=True)
    with pytest.raises(InputError, match="goes with a file"):
        load_model("sepress:se_resnet8", arch="sepress:se_resnet8", random_weights=True)


def test_typed_preprocessing_overrides_a_files_own(tmp_path: Path) -> None:
    save_bundle(tiny(), tmp_path / "a.pt")
    preprocessing = load_bundle(tmp_path / "a.pt", overrides={"input_size": 20}).spec.preprocessing
    assert preprocessing.input_size == (1, 20, 20)
    assert preprocessing.origin.startswith("typed: input_size; the rest from sepress: MNIST")


def test_a_new_folder_never_takes_one_that_is_there(tmp_path: Path) -> None:
    made = [new_folder(tmp_path / "run") for _ in range(3)]
    assert [folder.name for folder in made] == ["run", "run-2", "run-3"]
    assert all(folder.is_dir() for folder in made)


def test_every_buffer_is_in_the_layout() -> None:
    tensors, aliases = named_tensors(Tied())
    assert set(tensors) == {"first.weight", "first.bias", "scale"}
    assert aliases == {"second.weight": "first.weight"}
    assert make_bundle(Tied(), user_spec("mine:Tied"), lineage={}).layout == Layout(
        {"first.weight": (4, 4), "first.bias": (4,), "scale": (4,)}
    )
