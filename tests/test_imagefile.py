"""The file that takes bytes gives torch's probabilities, and so does the example beside it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from matplotlib.cbook import get_sample_data
from nets import images, lively
from onnx import helper
from PIL import Image
from torch import Tensor, nn

from sepress.data.digits import open_digits
from sepress.data.images import load_file
from sepress.data.transforms import build_prepare, normalise, to_levels
from sepress.device import seeded
from sepress.errors import InputError
from sepress.example import example_code
from sepress.export import Exporter, export_onnx
from sepress.imagefile import FromBytes, add_preprocessing, why_no_classifier, write_image_file
from sepress.parity import check_onnx_parity
from sepress.runtime import open_session
from sepress.types import ModelSpec, Preprocessing

RGB = Preprocessing((3, 24, 20), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875)
GREY = Preprocessing((1, 28, 28), (0.1307,), (0.3081,))
CLASSES = ("ape", "bär", "{cat}", 'd"o"g', "emu", "fox", "gnu")


class Classifier(nn.Module):
    """Every pixel's place counts, so that a crop beside the right one is told."""

    def __init__(self, input_size: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = input_size
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.fc = nn.Linear(8 * height * width, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().flatten(1)) / 4


def exported(
    folder: Path,
    preprocessing: Preprocessing,
    *,
    exporter: Exporter = "dynamo",
    batch: int | None = None,
    class_names: tuple[str, ...] | None = CLASSES,
) -> nn.Module:
    """Write model.onnx and model.image.onnx; returns the net."""
    net = lively(Classifier(preprocessing.input_size))
    spec = ModelSpec("user", "here:net", {}, preprocessing, class_names=class_names)
    example = images(1, *preprocessing.input_size)
    export_onnx(net, folder / "model.onnx", example=example, spec=spec, batch=batch, exporter=exporter)
    write_image_file(folder / "model.onnx", folder / "model.image.onnx", preprocessing)
    return net


def levels(count: int, preprocessing: Preprocessing) -> Tensor:
    """Images (N, H, W, C) uint8 that differ in brightness, too."""
    channels, height, width = preprocessing.input_size
    with seeded(3):
        top = torch.linspace(40, 255, count).view(-1, 1, 1, 1)
        return (torch.rand(count, height, width, channels) * top).to(torch.uint8)


def photograph(path: Path, *, grey: bool) -> Path:
    """A real image as PNG: a portrait of another shape than the input's, or a handwritten digit."""
    if grey:
        test = open_digits().splits["test"]
        test.read(test.keys[0], "L").save(path)
    else:
        with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as image:
            image.save(path)
    return path


# ---- the file -------------------------------------------------------------------------------------
@pytest.mark.parametrize("preprocessing", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_bytes_give_the_probabilities_that_torch_gives_for_the_loaders_tensors(
    exporter: Exporter, preprocessing: Preprocessing, tmp_path: Path
):
    net = exported(tmp_path, preprocessing, exporter=exporter)
    pixels = levels(5, preprocessing)
    session = open_session(tmp_path / "model.image.onnx", providers="cpu")
    ((given,), (answer,)) = session.get_inputs(), session.get_outputs()
    channels, height, width = preprocessing.input_size
    assert (given.name, given.type, given.shape) == (
        "image",
        "tensor(uint8)",
        ["batch", height, width, channels],
    )
    assert (answer.name, answer.type, answer.shape) == ("probabilities", "tensor(float)", ["batch", 7])
    found = session.run(None, {"image": pixels.numpy()})[0]
    loaded = normalise(pixels.permute(0, 3, 1, 2), mean=preprocessing.mean, std=preprocessing.std)
    expected = net(loaded).softmax(1).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert len(set(found.argmax(1))) > 1 or found.std(0).max() > 0.01  # the images are told apart
    check = check_onnx_parity(FromBytes(net, preprocessing), tmp_path / "model.image.onnx", pixels)
    assert check.passed


def test_parity_fails_where_the_bytes_are_read_with_another_mean(tmp_path: Path):
    net = exported(tmp_path, RGB)
    other = Preprocessing(RGB.input_size, (0.5, 0.5, 0.5), RGB.std)
    check = check_onnx_parity(FromBytes(net, other), tmp_path / "model.image.onnx", levels(5, RGB))
    assert check.passed is False


def test_a_fixed_batch_stays_fixed(tmp_path: Path):
    net = exported(tmp_path, RGB, batch=2)
    assert open_session(tmp_path / "model.image.onnx").get_inputs()[0].shape == [2, 24, 20, 3]
    pixels = levels(4, RGB)
    assert check_onnx_parity(FromBytes(net, RGB), tmp_path / "model.image.onnx", pixels).passed


def test_a_file_in_float16_is_fed_and_read_in_its_own_type(tmp_path: Path):
    net = lively(Classifier(RGB.input_size))
    export_onnx(net.half(), tmp_path / "half.onnx", example=images(1, 3, 24, 20).half())
    write_image_file(tmp_path / "half.onnx", tmp_path / "image.onnx", RGB)
    pixels = levels(3, RGB)
    found = open_session(tmp_path / "image.onnx").run(None, {"image": pixels.numpy()})[0]
    expected = FromBytes(net.float(), RGB)(pixels)["probabilities"].detach().numpy()
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_the_metadata_says_that_preprocessing_is_inside_and_keeps_the_rest(tmp_path: Path):
    exported(tmp_path, RGB)
    given, found = (
        {entry.key: entry.value for entry in onnx.load(tmp_path / name).metadata_props}
        for name in ("model.onnx", "model.image.onnx")
    )
    assert found.pop("sepress.preprocessing") == "inside"
    assert given.keys() - found.keys() == {"sepress.mean", "sepress.std"}
    assert found == {key: given[key] for key in found}
    assert json.loads(found["sepress.input_size"]) == [3, 24, 20]
    assert json.loads(found["sepress.class_names"]) == list(CLASSES)


def test_every_level_comes_back_from_its_normalised_value():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    for mean, std in (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5, 0, 1), (1e-3, 1, 7))):
        assert torch.equal(to_levels(normalise(every, mean=mean, std=std), mean=mean, std=std), every)


# ---- what has no probabilities --------------------------------------------------------------------
def shaped(
    inputs: dict[str, list[int]], outputs: dict[str, list[int]], operator: str = "Relu"
) -> onnx.ModelProto:
    values = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes) for name, axes in ends.items()]
        for ends in (inputs, outputs)
    ]
    node = helper.make_node(operator, list(inputs)[:1], list(outputs)[:1])
    return helper.make_model(helper.make_graph([node], "net", *values))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (shaped({"a": [1, 3, 24, 20], "b": [1]}, {"y": [1, 7]}), "2 inputs"),
        (shaped({"a": [1, 3, 24, 20]}, {"y": [1, 7], "z": [1]}), "2 outputs"),
        (shaped({"a": [1, 3, 24]}, {"y": [1, 7]}), "no batch of grey or RGB images"),
        (shaped({"a": [1, 4, 24, 20]}, {"y": [1, 7]}), "no batch of grey or RGB images"),
        (shaped({"a": [1, 3, 24, 20]}, {"y": [1, 7, 6, 6]}), "4 axes"),
        (shaped({"a": [1, 3, 24, 20]}, {"y": [1, 1]}), "one number an image"),
        (shaped({"a": [1, 3, 24, 20]}, {"y": [1, 7]}, "Softmax"), "a softmax already"),
    ],
)
def test_what_is_no_classifier_of_images_is_refused_with_the_reason(model: onnx.ModelProto, reason: str):
    assert reason in str(why_no_classifier(model))
    with pytest.raises(InputError, match=reason):
        add_preprocessing(model, RGB)


def test_preprocessing_for_another_input_size_is_refused():
    model = shaped({"a": [1, 3, 32, 32]}, {"y": [1, 7]})
    with pytest.raises(InputError, match=r"\(3, 32, 32\).*\(3, 24, 20\)"):
        add_preprocessing(model, RGB)


# ---- the example ----------------------------------------------------------------------------------
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "timm", "sepress")))  # importing one now fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def classify(example: Path, image: Path) -> list[tuple[str, float]]:
    """Run the example; (class, probability) of its lines."""
    command = [sys.executable, "-W", "error", "-c", WITHOUT, str(example), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [re.fullmatch(r"([\d.]+)% (.+)", line) for line in done.stdout.splitlines()]
    return [(line[2], float(line[1]) / 100) for line in lines if line]


@pytest.mark.parametrize("inside", [False, True], ids=["model", "image-model"])
@pytest.mark.parametrize(
    ("preprocessing", "batch", "class_names"),
    [(RGB, None, CLASSES), (RGB, 3, None), (GREY, None, CLASSES)],
    ids=["rgb", "fixed-batch", "grey-of-the-inputs-size"],
)
def test_the_example_gives_torchs_classes_and_probabilities_without_torch(
    preprocessing: Preprocessing,
    batch: int | None,
    class_names: tuple[str, ...] | None,
    inside: bool,
    tmp_path: Path,
):
    net = exported(tmp_path, preprocessing, batch=batch, class_names=class_names)
    example = tmp_path / "example.py"
    example.write_text(example_code(inside=inside, batch=batch), encoding="utf-8")
    image = photograph(tmp_path / "image.png", grey=preprocessing is GREY)
    found = classify(example, image)
    prepare = build_prepare(preprocessing)
    pixels = prepare(load_file(image, prepare.mode))[None]
    loaded = normalise(pixels, mean=preprocessing.mean, std=preprocessing.std)
    expected, order = net(loaded).softmax(1)[0].sort(descending=True)
    assert [name for name, _ in found] == [str((class_names or range(7))[i]) for i in order[:5].tolist()]
    assert [p for _, p in found] == pytest.approx(expected[:5].tolist(), abs=1e-4)
    assert 0.2 < found[0][1] < 0.9999  # neither blind nor saturated, or the figures say nothing


def test_the_example_is_fifteen_lines_beside_its_imports_and_names_no_value_of_the_model():
    for inside in (False, True):
        lines = example_code(inside=inside, batch=None).splitlines()
        code = [line for line in lines if line and not line.startswith(('"""', "import ", "from "))]
        assert len(code) <= 15
        packages = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
        assert packages == {"json", "sys", "pathlib", "numpy", "onnxruntime", "PIL"}
