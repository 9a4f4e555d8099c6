"""Files as training programs write them: the right weights and class count, and a note on the choice."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sepress.bundle import load_bundle, read_meta, save_bundle
from sepress.errors import InputError
from sepress.types import Bundle

TIMM = "mobilenetv3_small_050"
TORCHVISION = "mobilenet_v3_small"
CLASSES = 7


def timm_net(seed: int = 0, name: str = TIMM, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return jittered(timm.create_model(name, **{"num_classes": CLASSES, **kwargs}))


def torchvision_net(seed: int = 0, name: str = TORCHVISION) -> nn.Module:
    torch.manual_seed(seed)
    return jittered(torchvision.models.get_model(name, num_classes=CLASSES))


def jittered(net: nn.Module) -> nn.Module:
    """Norm statistics that are not the initial ones."""
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer)
    return net.eval()


def averaged(net: nn.Module, seed: int = 1) -> nn.Module:
    """Another net of that kind, in the part of the averaged one."""
    other = copy.deepcopy(net)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return other


def holds(bundle: Bundle, net: nn.Module) -> bool:
    """Whether the bundle has the net's tensors, bit for bit, in float32 and under the same names."""
    mine, theirs = bundle.net.state_dict(), net.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def notes_of(bundle: Bundle) -> str:
    return "; ".join(bundle.lineage["origin"]["notes"])


def timm_arguments(**more: Any) -> argparse.Namespace:
    """Of timm's train.py, those that shape the net or prepare images, and a few others."""
    values = {
        "model": TIMM, "pretrained": False, "num_classes": CLASSES, "gp": None, "img_size": 160,
        "input_size": None, "crop_pct": None, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25],
        "interpolation": "", "train_interpolation": "random", "bn_eps": None, "model_kwargs": {}, "aa": None,
        "lr": 0.1, "data_dir": Path("photos"), "device": "cuda", "amp": True, "class_map": "",
    }  # fmt: skip
    values["interpolation"] = "bicubic"
    return argparse.Namespace(**{**values, **more})


def timm_checkpoint(folder: Path, net: nn.Module, ema: nn.Module | None = None, **arguments: Any) -> Path:
    """What timm's train.py leaves, by timm's own CheckpointSaver."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    saver = CheckpointSaver(
        net,
        optimizer,
        args=timm_arguments(**arguments),
        model_ema=ema,
        amp_scaler=None,
        checkpoint_dir=str(folder),
    )
    saver.save_checkpoint(3, metric=71.5)
    return folder / "model_best.pth.tar"


# ---- timm ---------------------------------------------------------------------------------------
def test_a_checkpoint_of_timms_train_script_needs_nothing_said(tmp_path: Path) -> None:
    net = timm_net()
    bundle = load_bundle(timm_checkpoint(tmp_path, net))
    assert holds(bundle, net)
    assert bundle.spec.reference == f"timm:{TIMM}"
    assert bundle.spec.kwargs == {"num_classes": CLASSES}
    figures = bundle.spec.preprocessing
    assert (figures.input_size, figures.mean, figures.interpolation) == ((3, 160, 160), (0.5,) * 3, "bicubic")
    assert figures.origin.startswith("its 'args': input_size, interpolation, mean, std; the rest from timm: ")
    assert notes_of(bundle) == (
        f"took the weights under 'state_dict'; its 'args' names the architecture: timm:{TIMM}"
    )


@pytest.mark.parametrize("average", [ModelEmaV2, ModelEmaV3])
def test_timms_averaged_weights_are_taken(average: Any, tmp_path: Path) -> None:
    net = timm_net()
    ema = average(averaged(net))
    bundle = load_bundle(timm_checkpoint(tmp_path, net, ema))
    assert holds(bundle, ema.module)
    assert "took the averaged (EMA) weights under 'state_dict_ema', not those under 'state_dict'" in notes_of(
        bundle
    )


def test_what_was_typed_goes_before_what_the_script_noted(tmp_path: Path) -> None:
    path = timm_checkpoint(tmp_path, timm_net())
    overrides: dict[str, Any] = {"input_size": 96, "mean": [0.1]}
    figures = load_bundle(path, arch=f"timm:{TIMM}", overrides=overrides).spec.preprocessing
    assert (figures.input_size, figures.mean, figures.std) == ((3, 96, 96), (0.1,) * 3, (0.25,) * 3)


def test_other_architectures_do_not_get_the_scripts_arguments(tmp_path: Path) -> None:
    path = timm_checkpoint(tmp_path, timm_net())
    bundle = load_bundle(path, arch=lambda num_classes=3: timm_net(num_classes=num_classes))
    assert bundle.spec.preprocessing.origin.startswith("assumed")
    assert bundle.spec.kwargs == {"num_classes": CLASSES}


def test_arguments_that_shape_the_net_are_passed_on_or_refused(tmp_path: Path) -> None:
    net = timm_net(global_pool="max", drop_rate=0.2)
    path = timm_checkpoint(tmp_path, net, gp="max", model_kwargs={"drop_rate": 0.2})
    bundle = load_bundle(path)
    assert bundle.spec.kwargs == {"num_classes": CLASSES, "global_pool": "max", "drop_rate": 0.2}
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(bundle.net(image), net(image))
    path = timm_checkpoint(tmp_path, timm_net(), bn_eps=1e-2, model_kwargs={"act_layer": "relu"})
    with pytest.raises(InputError, match="built with bn_eps, act_layer"):
        load_bundle(path)


def test_input_channels_are_read_from_the_weights(tmp_path: Path) -> None:
    net = timm_net(in_chans=1)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    bundle = load_bundle(tmp_path / "a.pth", arch=f"timm:{TIMM}")
    assert holds(bundle, net)
    assert bundle.spec.kwargs == {"num_classes": CLASSES, "in_chans": 1}
    assert bundle.spec.preprocessing.input_size == (1, 224, 224)
    assert len(bundle.spec.preprocessing.mean) == 1
    with pytest.raises(InputError, match="have 1 input channels, but in_chans is 3"):
        load_bundle(tmp_path / "a.pth", arch=f"timm:{TIMM}", kwargs={"in_chans": 3})


def test_a_download_from_the_hub_is_told_by_the_config_beside_it(tmp_path: Path) -> None:
    net = timm_net(in_chans=1)
    names = [f"class {number}" for number in range(CLASSES)]
    config: dict[str, Any] = {"label_names": names}
    save_for_hf(net, str(tmp_path), model_config=config, safe_serialization="both")
    for name in ("model.safetensors", "pytorch_model.bin"):
        bundle = load_bundle(tmp_path / name)
        assert holds(bundle, net)
        assert bundle.spec.reference == f"timm:{TIMM}"
        assert bundle.spec.class_names == tuple(names)
        assert bundle.spec.preprocessing.input_size[0] == 1
        assert "the config.json beside it names the architecture" in notes_of(bundle)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"architecture": 3}', '{"architecture": "../x"}', "[" * 50_000]
)
def test_another_config_beside_the_file_says_nothing(text: str, tmp_path: Path) -> None:
    torch.save(timm_net().state_dict(), tmp_path / "a.pth")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="does not say which architecture"):
        load_bundle(tmp_path / "a.pth")


# ---- torchvision --------------------------------------------------------------------------------
def torchvision_checkpoint(path: Path, net: nn.Module, ema: nn.Module | None = None) -> Path:
    """What torchvision's references/classification/train.py gives utils.save_on_master."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    arguments = argparse.Namespace(
        model=TORCHVISION, data_path="photos", weights=None, val_resize_size=256, val_crop_size=192,
        train_crop_size=176, interpolation="bicubic", model_ema=ema is not None, distributed=False,
    )  # fmt: skip
    checkpoint = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 4,
        "args": arguments,
    }
    if ema is not None:
        checkpoint["model_ema"] = ema.state_dict()
    torch.save(checkpoint, path)
    return path


def test_a_checkpoint_of_torchvisions_references_needs_nothing_said(tmp_path: Path) -> None:
    net = torchvision_net()
    bundle = load_bundle(torchvision_checkpoint(tmp_path / "checkpoint.pth", net))
    assert holds(bundle, net)
    assert bundle.spec.reference == f"torchvision:{TORCHVISION}"
    assert bundle.spec.kwargs == {"num_classes": CLASSES}
    figures = bundle.spec.preprocessing
    assert (figures.input_size, figures.crop_pct, figures.interpolation) == ((3, 192, 192), 0.75, "bicubic")
    assert "took the weights under 'model'" in notes_of(bundle)


def test_torchvisions_average_is_taken_without_its_counter(tmp_path: Path) -> None:
    net = torchvision_net()
    ema = AveragedModel(averaged(net), multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    bundle = load_bundle(torchvision_checkpoint(tmp_path / "checkpoint.pth", net, ema))
    assert holds(bundle, ema.module)
    assert "took the averaged (EMA) weights under 'model_ema', not those under 'model'" in notes_of(bundle)
    assert "left out 1 tensors outside 'module.' (n_averaged)" in notes_of(bundle)


def test_a_name_of_both_registries_is_the_one_of_the_program_that_wrote_it(tmp_path: Path) -> None:
    both = {"arch": "resnet18", "state_dict": torchvision.models.resnet18(num_classes=3).state_dict()}
    torch.save({**both, "args": argparse.Namespace(model="resnet18", val_crop_size=224)}, tmp_path / "a.pth")
    assert load_bundle(tmp_path / "a.pth").spec.reference == "torchvision:resnet18"
    torch.save(both, tmp_path / "a.pth")
    assert load_bundle(tmp_path / "a.pth").spec.reference == "timm:resnet18"


# ---- Lightning ----------------------------------------------------------------------------------
def lightning_checkpoint(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    """The layout that Lightning's Trainer.save_checkpoint writes."""
    loop = {"state_dict": {}, "batch_progress": {"total": {"ready": 8}, "is_last_batch": True}}
    monitor = {
        "monitor": "val_acc",
        "best_model_score": torch.tensor(0.9),
        "dirpath": "runs/1",
        "best_k_models": {},
    }
    checkpoint = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": loop, "validate_loop": loop},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_acc'}": monitor},
        "optimizer_states": [
            {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
        ],
        "lr_schedulers": [{"T_max": 5, "last_epoch": 3}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"model_name": TIMM, "lr": 0.1, "root": Path("photos"), "betas": (0.9, 0.99)},
        **more,
    }
    torch.save(checkpoint, path)
    return path


def under(prefix: str, net: nn.Module) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in net.state_dict().items()}


@pytest.mark.parametrize("prefix", ["model.", "net._orig_mod.", "backbone.module."])
def test_a_checkpoint_of_lightning_is_told_by_its_hyper_parameters(prefix: str, tmp_path: Path) -> None:
    net = timm_net()
    state = {**under(prefix, net), "loss.weight": torch.ones(CLASSES), "val_acc.tp": torch.zeros(CLASSES)}
    bundle = load_bundle(lightning_checkpoint(tmp_path / "last.ckpt", state))
    assert holds(bundle, net)
    assert bundle.spec.kwargs["num_classes"] == CLASSES
    assert f"its 'hyper_parameters' names the architecture: timm:{TIMM}" in notes_of(bundle)
    assert "left out 2 tensors outside" in notes_of(bundle)


def test_an_average_inside_a_lightning_module_is_taken_and_said(tmp_path: Path) -> None:
    net = timm_net()
    other = averaged(net)
    state = {**under("model.", net), **under("model_ema.module.", other)}
    bundle = load_bundle(lightning_checkpoint(tmp_path / "last.ckpt", state))
    assert holds(bundle, other)
    assert "took the averaged (EMA) weights under 'model_ema.module.'" in notes_of(bundle)


def test_lightnings_weight_averaging_is_said(tmp_path: Path) -> None:
    net = timm_net()
    other = averaged(net)
    more = {"current_model_state": under("model.", net), "averaging_state": {"n_averaged": torch.tensor(3)}}
    bundle = load_bundle(lightning_checkpoint(tmp_path / "last.ckpt", under("model.", other), **more))
    assert holds(bundle, other)
    assert "which are the averaged (EMA) ones, not those under 'current_model_state'" in notes_of(bundle)


def test_a_student_and_its_teacher_are_not_guessed_between(tmp_path: Path) -> None:
    net = timm_net()
    state = {**under("student.", net), **under("teacher.", averaged(net))}
    with pytest.raises(InputError, match=r"several networks .* under 'student\.' and 'teacher\.'"):
        load_bundle(lightning_checkpoint(tmp_path / "last.ckpt", state), arch=f"timm:{TIMM}")
    same = {**under("model.", net), **under("loss.model.", net)}  # one network registered twice
    assert holds(load_bundle(lightning_checkpoint(tmp_path / "last.ckpt", same)), net)


# ---- wrappers, averages, shards -------------------------------------------------------------------
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "_forward_module."]
)
def test_prefixes_of_wrappers_are_dropped(prefix: str, tmp_path: Path) -> None:
    net = timm_net()
    torch.save({"state_dict": under(prefix, net)}, tmp_path / "a.pth")
    assert holds(load_bundle(tmp_path / "a.pth", arch=f"timm:{TIMM}"), net)


def test_names_that_wrappers_put_inside_are_dropped(tmp_path: Path) -> None:
    net = timm_net()
    state = {k.replace("blocks.", "blocks._fsdp_wrapped_module.", 1): v for k, v in net.state_dict().items()}
    state = {k.replace(".se.", "._checkpoint_wrapped_module.se."): v for k, v in state.items()}
    torch.save(
        under("_fsdp_wrapped_module.", net) | {"_fsdp_wrapped_module." + k: v for k, v in state.items()},
        tmp_path / "a.pth",
    )
    assert holds(load_bundle(tmp_path / "a.pth", arch=f"timm:{TIMM}"), net)


def test_an_average_without_names_is_left_and_said(tmp_path: Path) -> None:
    net = timm_net()
    shadow = {"decay": 0.99, "num_updates": 3, "shadow_params": [p.detach() for p in net.parameters()]}
    torch.save({"model": net.state_dict(), "ema": shadow}, tmp_path / "a.pth")
    bundle = load_bundle(tmp_path / "a.pth", arch=f"timm:{TIMM}")
    assert holds(bundle, net)
    assert "took the weights under 'model'; 'ema' holds no named weights and was left" in notes_of(bundle)


def test_a_bare_average_and_an_online_model_beside_it(tmp_path: Path) -> None:
    net = timm_net()
    other = averaged(net)
    torch.save(AveragedModel(other).state_dict(), tmp_path / "a.pth")
    assert holds(load_bundle(tmp_path / "a.pth", arch=f"timm:{TIMM}"), other)
    state = {**under("online_model.", net), **under("ema_model.", other), "step": torch.tensor(3)}
    torch.save(state, tmp_path / "a.pth")  # lucidrains' ema-pytorch
    assert holds(load_bundle(tmp_path / "a.pth", arch=f"timm:{TIMM}"), other)


def test_half_weights_are_held_in_float32_and_quantized_ones_refused(tmp_path: Path) -> None:
    net = timm_net()
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()},
        tmp_path / "a.safetensors",
    )
    bundle = load_bundle(tmp_path / "a.safetensors", arch=f"timm:{TIMM}")
    assert torch.equal(bundle.net.conv_stem.weight, net.conv_stem.weight.half().float())  # type: ignore[union-attr, operator]
    assert "its weights are torch.float16 and are held as float32" in notes_of(bundle)
    state = {**net.state_dict(), "conv_stem.weight": torch.ones(16, 3, 3, 3, dtype=torch.int8)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"'conv_stem\.weight' holds torch\.int8, expected torch\.float32"):
        load_bundle(tmp_path / "a.pth", arch=f"timm:{TIMM}")


def test_deepspeeds_whole_weights_load_and_its_shards_are_refused(tmp_path: Path) -> None:
    net = timm_net()
    content = {"module": net.state_dict(), "ds_version": "0.15", "ds_config": {}, "dp_world_size": 1}
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    assert holds(load_bundle(tmp_path / "mp_rank_00_model_states.pt", arch=f"timm:{TIMM}"), net)
    empty = {name: torch.empty(0) for name in net.state_dict()}
    for shard in (
        {**content, "module": empty},
        {"optimizer_state_dict": {}, "ds_config": {}, "ds_version": "0.15"},
    ):
        torch.save(shard, tmp_path / "shard.pt")
        with pytest.raises(InputError, match=r"zero_to_fp32\.py"):
            load_bundle(tmp_path / "shard.pt", arch=f"timm:{TIMM}")


def test_weights_that_fsdp_flattened_are_refused(tmp_path: Path) -> None:
    torch.save({"_fsdp_wrapped_module._flat_param": torch.zeros(10)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="a shard of a distributed checkpoint"):
        load_bundle(tmp_path / "a.pt", arch=f"timm:{TIMM}")


# ---- heads --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("reference", "head"),
    [
        ("timm:seresnet18", "fc"),
        ("timm:mobilenetv3_small_050", "classifier"),
        ("timm:regnety_002", "head.fc"),
        ("torchvision:mobilenet_v3_small", "classifier.3"),
        ("torchvision:regnet_y_400mf", "fc"),
        ("timm:legacy_seresnet18", "last_linear"),
        ("timm:efficientvim_m1", "heads.3"),
        ("timm:repvit_m0_9", "head.head.l"),
        ("timm:levit_128s", "head.linear"),
    ],
)  # fmt: skip
def test_the_class_count_is_read_from_every_head(reference: str, head: str, tmp_path: Path) -> None:
    source, _, name = reference.partition(":")
    net = timm_net(name=name) if source == "timm" else torchvision_net(name=name)
    weight = net.state_dict()[f"{head}.weight"]
    assert weight.shape[0] == CLASSES
    torch.save(net.state_dict(), tmp_path / "a.pth")
    bundle = load_bundle(tmp_path / "a.pth", arch=reference)
    assert holds(bundle, net)
    assert bundle.spec.kwargs == {"num_classes": CLASSES}


@pytest.mark.parametrize(
    ("name", "heads"), [("levit_128s", 2), ("repvit_m0_9", 2), ("efficientvim_m1_dist", 8)]
)
def test_a_net_with_several_heads_has_one_class_count(name: str, heads: int, tmp_path: Path) -> None:
    net = timm_net(name=name)
    grown = [k for k, v in net.state_dict().items() if k.endswith("weight") and v.shape[0] == CLASSES]
    assert len(grown) == heads
    torch.save(net.state_dict(), tmp_path / "a.pth")
    bundle = load_bundle(tmp_path / "a.pth", arch=f"timm:{name}")
    assert holds(bundle, net)
    assert bundle.spec.kwargs == {"num_classes": CLASSES}


def test_a_head_of_other_layers_is_refused_with_the_way_to_build_it(tmp_path: Path) -> None:
    net = timm_net(name="seresnet18")
    net.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(512, 3))
    torch.save(net.state_dict(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"missing 2: fc\.weight.*\n.*fc\.1\.weight") as error:
        load_bundle(tmp_path / "a.pth", arch="timm:seresnet18")
    assert "--arch pkg.module:factory" in str(error.value)


# ---- pickled networks -----------------------------------------------------------------------------
class Wrapped(nn.Module):
    """A user's own class around a timm net, with a layer of its own."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.backbone = timm_net()
        self.neck = nn.Linear(CLASSES, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.neck(self.backbone(x).sigmoid())
        return out


class Other(nn.Module):
    """Has the tensors of a `Wrapped`, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm_net()
        self.neck = nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.neck(self.backbone(x))
        return out


def pickled(tmp_path: Path, content: Any) -> Path:
    torch.save(content, tmp_path / "whole.pt")
    return tmp_path / "whole.pt"


@pytest.mark.parametrize("wrap", [None, nn.DataParallel, AveragedModel, ModelEmaV2], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"in_chans": 1}, {"num_classes": 3}], ids=str)
def test_a_pickled_net_of_timm_knows_its_architecture(kwargs: Any, wrap: Any, tmp_path: Path) -> None:
    net = timm_net(**kwargs)
    path = pickled(tmp_path, net if wrap is None else wrap(net))
    with pytest.raises(InputError, match="--trust-pickle"):
        load_bundle(path)
    bundle = load_bundle(path, trust_pickle=True)
    assert holds(bundle, net)
    assert bundle.spec.reference == f"timm:{TIMM}"
    assert bundle.spec.kwargs == {"num_classes": CLASSES, **kwargs}
    assert "the rebuilt network computes what the pickled one does" in notes_of(bundle)
    save_bundle(bundle, tmp_path / "native.safetensors")  # which nothing need be trusted for
    assert holds(load_bundle(tmp_path / "native.safetensors"), net)


def test_a_pickled_net_of_torchvision_is_found_among_those_of_its_class(tmp_path: Path) -> None:
    for name in ("mobilenet_v3_small", "regnet_y_400mf"):
        net = torchvision_net(name=name)
        bundle = load_bundle(pickled(tmp_path, {"epoch": 1, "model": net}), trust_pickle=True)
        assert holds(bundle, net)
        assert bundle.spec.reference == f"torchvision:{name}"


def test_a_pickled_class_of_the_users_own_is_rebuilt_by_its_factory(tmp_path: Path) -> None:
    net = Wrapped(num_classes=4).eval()
    path = pickled(tmp_path, net)
    with pytest.raises(InputError) as error:
        load_bundle(path, trust_pickle=True)
    assert error.value.message == f"{path}: it holds a pickled Wrapped, and no registry builds that"
    assert f"--arch {__name__}:Wrapped" in str(error.value.remedy)
    bundle = load_bundle(path, trust_pickle=True, arch=f"{__name__}:Wrapped")
    assert holds(bundle, net)
    assert bundle.spec.kwargs == {"num_classes": 4}
    part = load_bundle(path, trust_pickle=True, arch=f"timm:{TIMM}")  # the part alone, because it was said
    assert holds(part, net.backbone)
    assert "left out 2 tensors outside 'backbone.' (neck.weight, neck.bias)" in notes_of(part)


def test_a_pickled_net_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compute different outputs"):
        load_bundle(pickled(tmp_path, Other().eval()), trust_pickle=True, arch=f"{__name__}:Wrapped")
    net = timm_net()
    net.conv_stem.stride = (1, 1)  # type: ignore[union-attr, assignment]
    with pytest.raises(InputError, match=r"compute different outputs[^$]*--arch pkg\.module:factory"):
        load_bundle(pickled(tmp_path, net), trust_pickle=True)


def test_a_pickled_net_that_can_not_run_here_is_loaded_by_its_tensors_alone(tmp_path: Path) -> None:
    net = timm_net()
    del net.act2  # as a module of another version lacks what this one asks for
    net.norm_head = None
    net.conv_head = copy.deepcopy(net.conv_head)
    net.flatten = None  # type: ignore[assignment]
    bundle = load_bundle(pickled(tmp_path, net), trust_pickle=True)
    assert "could not be run to compare" in notes_of(bundle)


def test_a_native_file_of_a_pickle_says_where_it_came_from(tmp_path: Path) -> None:
    bundle = load_bundle(pickled(tmp_path, timm_net()), trust_pickle=True)
    save_bundle(bundle, tmp_path / "native.pt")
    origin = read_meta(tmp_path / "native.pt").lineage["origin"]
    assert origin["file"] == "whole.pt"
    assert json.dumps(origin["notes"]).count("MobileNetV3") >= 1
