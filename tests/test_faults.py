"""The fault table: what a user does -> the exit code and words of the one message, and nothing lost.

Every row runs the real command line in a folder of its own. Of all rows it is held that no traceback is
shown, that the files there before are the same, byte for byte, and that nothing half-written is left; of a
row that does not end with 0, that nothing new is left, unless a run was under way (`keeps`).

Held elsewhere, one layer down: payloads in every kind of pickle and headers that lie (test_formats.py,
test_bundle.py), every kind of YAML fault (test_recipe.py), names that are not UTF-8 and shares of damaged
images (test_data.py), full disks, kills and second runs (test_runfolder.py, killed.py), checks that fail
(test_stages.py), random damage (test_fuzz.py).
"""

from __future__ import annotations

import importlib.metadata
import json
import pickle
import shlex
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import make_photos
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import sepress
from sepress import cli
from sepress.bundle.header import digest
from sepress.models import build_net, registry

NET = "sepress:se_resnet8"
RECIPE = """
name: tiny
device: cpu
data: {path: photos}
model: {source: model.pt}
stages: [evaluate]
"""
# 8 x 8 images and widths from 8: a cut of one channel at a time
PRUNE = "prune model.pt --data photos --criterion l2 --round-to 1 --min-width 1 --no-compensate --dry-run"
EVALUATE = "evaluate model.pt --data photos --out run"
UNGATED = "prune w.pth --arch test_faults:Plain --input-size 3,8,8 --data photos --ratio 0.5 --out run"
FINETUNE = "finetune model.pt --data photos --epochs 1 --out run"


class Plain(nn.Module):
    """A net without gates, for --arch test_faults:Plain."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.b(self.a(x).relu()).relu().mean((2, 3)))
        return logits


class Payload:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (Path("it-ran"),)


# ---- how the folder is prepared; the current folder is it -----------------------------------------
def tiny(**kwargs: Any) -> nn.Module:
    with sepress.device.seeded(0):
        return build_net(sepress.models.build_spec(NET, num_classes=3, kwargs={"width": 8, **kwargs})).eval()


def save_tiny(path: str, net: nn.Module | None = None) -> None:
    sepress.save(
        net or tiny(),
        path,
        arch=NET,
        kwargs={"width": 8},
        overrides={"input_size": 8},
        class_names=["c0", "c1", "c2"],
        overwrite=True,
    )


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ with train, val and test; model.pt and model.safetensors of the same net; tiny.yaml."""
    folder = tmp_path_factory.mktemp("given")
    make_photos(folder / "photos", train=4, val=2, test=2)
    save_tiny(str(folder / "model.pt"))
    save_tiny(str(folder / "model.safetensors"))
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


def malicious(name: str) -> None:
    """The model file with a payload beside its tensors; .pt2 as torch.export packs one."""
    if name.endswith(".pt2"):
        with zipfile.ZipFile(name, "w") as archive:
            archive.writestr("net/archive_format", "pt2")
            archive.writestr("net/data/sample_inputs/model.pt", pickle.dumps(Payload()))
        return
    content = torch.load("model.pt", weights_only=True)
    torch.save(content | {"x": Payload()}, name)


def cut(name: str, share: float) -> None:
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: int(len(data) * share)])


def flip(name: str, share: float) -> None:
    data = bytearray(Path(name).read_bytes())
    data[int(len(data) * share)] ^= 0x20
    Path(name).write_bytes(data)


def forge(**spec: Any) -> None:
    """model.pt with another spec in its header, and a digest that fits."""
    content = torch.load("model.pt", weights_only=True)
    header = json.loads(content["meta"])
    header["spec"] |= spec
    content["meta"] = json.dumps(header)
    content["digest"] = digest(content["meta"], content["tensors"])
    torch.save(content, "model.pt")


def declare(shape: list[int]) -> None:
    """model.safetensors whose header says that a tensor is of another shape, and where that would end."""
    data = Path("model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["conv1.weight"]["shape"] = shape
    text = json.dumps(header).encode()
    Path("model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def state(name: str, net: nn.Module) -> None:
    torch.save(net.state_dict(), name)


def poisoned(value: float) -> None:
    """model.pt whose last layer gives that value."""
    net = tiny()
    with torch.no_grad():
        net.fc.bias.fill_(value)
    save_tiny("model.pt", net)


def exploding() -> None:
    """model.pt whose first layer gives what float32 can't hold."""
    net = tiny()
    with torch.no_grad():
        net.conv1.weight.fill_(1e38)
    save_tiny("model.pt", net)


def only_folders(*names: str) -> None:
    """photos/ with these class folders, and no image."""
    shutil.rmtree("photos")
    for name in names:
        Path("photos", name).mkdir(parents=True)


def images_of_every_kind() -> None:
    """In place of a class's training images: CMYK, 16 bit, alpha, grey, turned by EXIF, animated, palette."""
    folder = Path("photos/train/c0")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(108, dtype=np.uint16).reshape(9, 12) * 600).save(folder / "sixteen.png")
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("LA").save(folder / "grey-alpha.png")
    image.convert("P").save(folder / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)] * 3)


def other_classes() -> None:
    """photos/ with a class that the model does not know in place of one that it does."""
    for split in ("train", "val", "test"):
        Path("photos", split, "c2").rename(Path("photos", split, "c9"))
    shutil.copytree("photos/train/c9", "photos/train/c10")


def huge_image() -> None:
    """A PNG of a few hundred bytes whose header declares 2^31 - 1 pixels a side."""
    path = Path("photos/train/c0/0.png")
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    path.write_bytes(data)


def moved(folder: str) -> None:
    """Model and images below a folder of that name."""
    Path(folder).mkdir()
    for name in ("photos", "model.pt"):
        shutil.move(name, Path(folder, name))


def looped() -> None:
    Path("photos/train/c0/loop").symlink_to(Path("photos").resolve())
    Path("photos/train/c0/self.png").symlink_to("self.png")


def few_images(count: int) -> None:
    shutil.rmtree("photos")
    Path("photos").mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), (number * 40, 90, 10)).save(f"photos/{number}.png")


def run_naming(outside: str) -> None:
    """A run folder, as if unpacked from an archive, whose state names a file outside it."""
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(RECIPE)
    record = {"stage": "load", "artifacts": {"base": outside}, "facts": {}, "digests": {outside: "0" * 64}}
    Path("run/run.json").write_text(
        json.dumps({"schema": "sepress.run/2", "stages": [record | {"basis": {}}], "begun": None})
    )


def archive_with(member: str) -> None:
    with zipfile.ZipFile("model.pt", "w") as archive:
        archive.writestr(member, "a file of another folder")
        archive.writestr("model/data.pkl", pickle.dumps({}))


def extends(target: str) -> None:
    Path("tiny.yaml").write_text(f"extends: {target}\n{RECIPE}")


# ---- what the machine does --------------------------------------------------------------------------
Patch = pytest.MonkeyPatch


def changed_architecture(patch: Patch) -> None:
    """As after another version of the library that defines it: its layers are wider now."""
    narrow = registry.ARCHITECTURES["se_resnet8"]
    wider = lambda **kwargs: narrow(**kwargs | {"width": 6, "reduction": 2})  # noqa: E731
    patch.setitem(registry.ARCHITECTURES, "se_resnet8", wider)


def renamed_layers(patch: Patch) -> None:
    narrow = registry.ARCHITECTURES["se_resnet8"]

    def renamed(**kwargs: Any) -> nn.Module:
        net = narrow(**kwargs)
        net.classifier = net.fc
        del net.fc
        return net

    patch.setitem(registry.ARCHITECTURES, "se_resnet8", renamed)


def two_runtimes(patch: Patch) -> None:
    version = importlib.metadata.version
    patch.setattr(importlib.metadata, "version", lambda name: "1" if "onnxruntime" in name else version(name))


def no_architecture(patch: Patch) -> None:
    patch.delitem(registry.ARCHITECTURES, "se_resnet8")


def read_only(patch: Patch) -> None:
    """Folders can't be made; the tests may run as root, who may write anywhere."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    patch.setattr(Path, "mkdir", refuse)


def unpickles_by_default(patch: Patch) -> None:
    patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


def nothing() -> None:
    pass


def unpatched(_: Patch) -> None:
    pass


@dataclass(frozen=True)
class Row:
    """One fault: its name, the command, its exit code, words of the message, and what comes first."""

    name: str
    command: str
    code: int
    words: tuple[str, ...] = ()
    given: Callable[[], object] = nothing
    machine: Callable[[Patch], None] = unpatched
    keeps: bool = False  # what finished before stays in the run folder


def rows(*tables: list[Row]) -> list[Any]:
    return [pytest.param(row, id=row.name) for table in tables for row in table]


MODEL_FILES = [
    Row(
        "a payload in a .pt",
        EVALUATE,
        2,
        ("runs code when it is read", "pathlib", "--trust-pickle"),
        lambda: malicious("model.pt"),
    ),
    Row(
        "a payload in a .pt, where torch unpickles by default",
        EVALUATE,
        2,
        ("runs code",),
        lambda: malicious("model.pt"),
        unpickles_by_default,
    ),
    Row(
        "a payload in a .pt2",
        "inspect a.pt2",
        2,
        ("exported program", "state_dict"),
        lambda: malicious("a.pt2"),
    ),
    Row(
        "a payload in a .pt2, where torch unpickles by default",
        "inspect a.pt2",
        2,
        ("exported program",),
        lambda: malicious("a.pt2"),
        unpickles_by_default,
    ),
    *(
        Row(f"{name} cut at {share:.0%}", f"inspect {name}", 2, (name,), lambda n=name, s=share: cut(n, s))
        for name in ("model.pt", "model.safetensors")
        for share in (0, 0.01, 0.5, 0.99)
    ),
    *(
        Row(
            f"{name}, a bit flipped at {share:.0%}",
            f"inspect {name}",
            2,
            ("damaged", "Copy or download it again"),
            lambda n=name, s=share: flip(n, s),
        )
        for name in ("model.pt", "model.safetensors")
        for share in (0.3, 0.5, 0.7)
    ),
    Row(
        "a tensor declared huge",
        "inspect model.safetensors",
        2,
        ("model.safetensors", "damaged"),
        lambda: declare([10**9, 10**9, 3, 3]),
    ),
    Row(
        "a spec of a huge net",
        "inspect model.pt",
        2,
        ("width",),
        lambda: forge(kwargs={"num_classes": 3, "width": 10**9}),
    ),
    Row(
        "a spec that names code",
        "inspect model.pt",
        2,
        ("os:system",),
        lambda: forge(source="user", arch="os:system"),
    ),
    Row(
        "a spec that names code of a registry",
        "inspect model.pt",
        2,
        ("names no architecture",),
        lambda: forge(arch="os:system"),
    ),
    Row(
        "a spec that names a URL",
        "inspect model.pt",
        2,
        ("http",),
        lambda: forge(source="timm", arch="http://a.example/net"),
    ),
    Row(
        "a spec that names weights",
        "inspect model.pt",
        2,
        ("checkpoint_path",),
        lambda: forge(kwargs={"checkpoint_path": "/etc/passwd"}),
    ),
    Row(
        "a spec that asks for weights",
        "inspect model.pt",
        2,
        ("pretrained",),
        lambda: forge(kwargs={"pretrained": True}),
    ),
    Row(
        "a spec of an unknown architecture",
        "inspect model.pt",
        2,
        ("no architecture", "se_resnet99"),
        lambda: forge(arch="se_resnet99"),
    ),
    Row(
        "another net's state dict",
        f"inspect w.pth --arch {NET}",
        2,
        ("w.pth", "don't fit", "missing 57: conv1.weight", "--arch"),
        lambda: state("w.pth", Plain()),
    ),
    Row("no architecture named", "inspect w.pth", 2, ("w.pth", "--arch"), lambda: state("w.pth", Plain())),
    Row(
        "an architecture that now has other widths",
        EVALUATE,
        2,
        ("model.pt", "version"),
        machine=changed_architecture,
    ),
    Row(
        "an architecture that now has other layers",
        EVALUATE,
        2,
        ("model.pt", "classifier", "version"),
        machine=renamed_layers,
    ),
    Row(
        "an architecture that is gone",
        EVALUATE,
        2,
        ("no architecture", "se_resnet8"),
        machine=no_architecture,
    ),
    Row(
        "an archive that climbs out of its folder",
        "inspect model.pt",
        2,
        ("model.pt",),
        lambda: archive_with("../../it-ran"),
    ),
]
DATA = [
    Row("data of another class count", FINETUNE, 2, ("labels", "--classes"), other_classes),
    Row(
        "empty class folders",
        EVALUATE,
        2,
        ("class folder 'a' holds no image", "Fill it"),
        lambda: only_folders("a", "b"),
    ),
    Row("no image at all", EVALUATE, 2, ("photos", "no image"), lambda: only_folders(".")),
    Row(
        "one image to train on",
        f"train {NET} --data photos --out run --input-size 3,8,8",
        2,
        ("labels",),
        lambda: few_images(1),
    ),
    Row("one image to prune on", f"{PRUNE} --ratio 0.5 --out run", 0, (), lambda: few_images(1)),
    Row(
        "a corrupt image",
        PRUNE + " --ratio 0.5",
        2,
        ("'train/c0/0.png'", "Repair", "allow_corrupt"),
        lambda: Path("photos/train/c0/0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken"),
    ),
    Row(
        "a huge image", PRUNE + " --ratio 0.5", 2, ("'train/c0/0.png'", "Repair", "allow_corrupt"), huge_image
    ),
    Row("CMYK, 16 bit, alpha, turned, animated", EVALUATE + " --split train", 0, (), images_of_every_kind),
    Row("links in circles", EVALUATE + " --split train", 0, (), looped),
    *(
        Row(
            f"a path with {what}",
            f"evaluate '{name}/model.pt' --data '{name}/photos' --out '{name}/run'",
            0,
            (),
            lambda n=name: moved(n),
        )
        for what, name in {"a space": "my data", "unicode": "größe 模型", "a newline": "two\nlines"}.items()
    ),
]
OUTPUT = [
    Row(
        "a read-only folder",
        EVALUATE,
        2,
        ("can't be used", "Read-only file system", "--out"),
        machine=read_only,
    ),
    Row("an output folder that is a file", EVALUATE.replace("run", "tiny.yaml"), 2, ("tiny.yaml", "--out")),
    Row(
        "an output folder of other files",
        EVALUATE.replace("run", "photos"),
        2,
        ("photos", "holds other files"),
    ),
    Row(
        "a folder below a file",
        "convert model.pt --out tiny.yaml/x.pt",
        2,
        ("tiny.yaml/x.pt", "can't be written"),
    ),
    Row(
        "a run folder that names files outside it",
        EVALUATE,
        2,
        ("../model.pt", "not the name of a file"),
        lambda: run_naming("../model.pt"),
        keeps=True,
    ),
    Row(
        "a run folder that names an absolute path",
        EVALUATE,
        2,
        ("/etc/passwd",),
        lambda: run_naming("/etc/passwd"),
        keeps=True,
    ),
]
NUMBERS = [
    Row(
        "a learning rate that diverges",
        FINETUNE + " --lr 1e38",
        2,
        ("finite", "lower the learning rate"),
        keeps=True,
    ),
    Row(
        "a loss of NaN",
        FINETUNE,
        2,
        ("loss is nan", "lower the learning rate"),
        lambda: poisoned(float("nan")),
        keeps=True,
    ),
    Row(
        "activations that explode",
        "prune model.pt --data photos --ratio 0.5 --round-to 1 --min-width 1 --out run",
        2,
        ("finite",),
        exploding,
    ),
    Row(
        "a criterion of gates for a net without any",
        f"{UNGATED} --criterion mean-excitation",
        2,
        ("gate", "contribution"),
        lambda: state("w.pth", Plain()),
    ),
    Row(
        "only gated groups of a net without any",
        f"{UNGATED} --criterion l2 --gated-only",
        2,
        ("gate",),
        lambda: state("w.pth", Plain()),
    ),
    Row(
        "everything frozen",
        PRUNE + " --ratio 0.5 --freeze '*'",
        2,
        ("freezes every prunable group", "Freeze fewer"),
    ),
    *(
        Row(f"--{option} {value}", f"{PRUNE} --{option}={value}", 2, (f"--{option}",))
        for option in ("ratio", "target-macs", "target-params", "target-latency")
        for value in ("0", "1", "-1", "nan", "inf")
    ),
    Row(
        "a target that can't be reached",
        PRUNE + " --target-macs 0.0001",
        2,
        ("0.0001", "smallest reachable is 0.017"),
    ),
    Row(
        "a net that prunes to nothing", PRUNE + " --ratio 0.999 --out run", 2, ("at most 0.928", "min_width")
    ),
    Row(
        "a ratio that removes nothing",
        PRUNE.replace("--min-width 1", "--min-width 512") + " --ratio 0.5",
        2,
        ("at most 0.0", "min_width"),
    ),
]
RECIPES = [
    Row(
        "a bomb of aliases",
        "run tiny.yaml",
        2,
        ("tiny.yaml:1", "aliases"),
        lambda: Path("tiny.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
    ),
    Row(
        "a tag that runs code",
        "run tiny.yaml",
        2,
        ("tiny.yaml:1", "tags"),
        lambda: Path("tiny.yaml").write_text("name: !!python/object/apply:pathlib.Path.touch [it-ran]\n"),
    ),
    Row(
        "nesting without end",
        "run tiny.yaml",
        2,
        ("tiny.yaml", "nested"),
        lambda: Path("tiny.yaml").write_text("a: " + "[" * 9000),
    ),
    Row(
        "a recipe that extends one outside its folder",
        "run tiny.yaml",
        2,
        ("../../../etc/passwd",),
        lambda: extends("../../../etc/passwd"),
    ),
    Row(
        "a recipe that extends an absolute path",
        "run tiny.yaml",
        2,
        ("/etc/passwd",),
        lambda: extends("/etc/passwd"),
    ),
    Row(
        "half a character",
        "run tiny.yaml",
        2,
        ("tiny.yaml", "surrogates"),
        lambda: Path("tiny.yaml").write_text('name: "\\ud800"\n'),
    ),
    Row(
        "a report nested without end",
        "report r.json",
        2,
        ("r.json", "run folder"),
        lambda: Path("r.json").write_text("[" * 100_000),
    ),
    Row(
        "a plan nested without end",
        "prune model.pt --data photos --plan p.json --out run",
        2,
        ("p.json", "plan"),
        lambda: Path("p.json").write_text('{"a":' * 100_000),
    ),
    Row(
        "a report of half characters",
        "report r.json",
        2,
        ("r.json", "surrogates"),
        lambda: Path("r.json").write_text('"\\ud800"'),
    ),
    Row(
        "two packages of ONNX Runtime",
        "export model.pt --data photos --out run",
        2,
        ("onnxruntime and onnxruntime-gpu are both installed", "pip uninstall"),
        machine=two_runtimes,
        keeps=True,
    ),
]


def content(folder: Path) -> dict[str, bytes | str]:
    """Every file's bytes and every link's target, by name."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("row", rows(MODEL_FILES, DATA, OUTPUT, NUMBERS, RECIPES))
def test_a_fault_has_its_exit_code_and_its_words_and_nothing_is_lost(
    row: Row, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(given, tmp_path / "work")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SEPRESS_DEBUG", "")
    row.given()
    before = content(folder)
    folders = {path for path in folder.rglob("*") if path.is_dir()}
    row.machine(monkeypatch)
    result = CliRunner().invoke(cli.app, shlex.split(row.command))
    monkeypatch.undo()
    said = " ".join(result.output.split())
    assert result.exit_code == row.code, said
    assert "Traceback" not in said
    assert [word for word in row.words if word not in said] == [], said
    after = content(folder)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if ".partial-" in name or name.endswith("it-ran")]
    assert not (tmp_path / "it-ran").exists()
    if row.code and not row.keeps:
        assert after.keys() == before.keys()
        assert {path for path in folder.rglob("*") if path.is_dir()} == folders
