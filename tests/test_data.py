"""Data: what is found, how it is split, matched, decoded, augmented and batched."""

import math
import os
import warnings
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sepress.data import DataSpec, make_loader, open_data
from sepress.data import loading as loading_module
from sepress.data.images import UnreadableImage, decode, decoding, load_file
from sepress.data.labels import match_classes
from sepress.data.registry import TORCHVISION
from sepress.data.splits import cut, hash_unit, stratified_order
from sepress.data.transforms import (
    RandomView,
    build_prepare,
    normalise,
    shift_and_mirror,
    shift_and_turn,
)
from sepress.errors import InputError
from sepress.types import Preprocessing

DIGITS = Preprocessing(input_size=(1, 28, 28), mean=(0.1307,), std=(0.3081,))
RGB8 = Preprocessing(input_size=(3, 8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def draw(path: Path, colour=(200, 100, 50), size=(8, 8), **options) -> Path:
    """Save an image of one colour; the format follows from the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "L" if isinstance(colour, int) else {3: "RGB", 4: "RGBA"}[len(colour)]
    Image.new(mode, size, colour).save(path, **options)
    return path


def draw_classes(root: Path, counts: dict[str, int]) -> Path:
    for folder, count in counts.items():
        for index in range(count):
            draw(root / folder / f"{index:03}.png", (index % 256, 0, 0))
    return root


def open_folder(root: Path, *, preprocessing=RGB8, class_names=None, num_classes=None, **options):
    spec = DataSpec(str(root), **options)
    return open_data(spec, preprocessing=preprocessing, class_names=class_names, num_classes=num_classes)


def levels(images: torch.Tensor) -> list:
    return (images * 255).round().int().tolist()


# ---- the embedded digits ------------------------------------------------------------------------
def test_digits_are_split_3500_500_1000_with_equal_classes():
    source = open_data(DataSpec("digits"), preprocessing=DIGITS, class_names=tuple("0123456789"))
    assert source.splits == {"train": 3500, "val": 500, "test": 1000}
    for split, each in (("train", 350), ("val", 50), ("test", 100)):
        assert torch.bincount(source.dataset(split).targets).tolist() == [each] * 10
    assert source.class_names == tuple("0123456789")
    assert source.labels_reason is None
    assert source.notes == ()


def test_the_digits_split_is_fixed_and_disjoint():
    source = open_data(DataSpec("digits"), preprocessing=DIGITS)
    names = {split: source.dataset(split).names for split in source.splits}
    assert len(set().union(*names.values())) == 5000
    # by hand: class 0 is rows 0..499; its validation images have ranks 350..399 by hash
    order = sorted(range(500), key=lambda i: sha256(f"digits/{i}".encode()).digest())
    assert names["val"][:50] == [f"digits/{i}" for i in sorted(order[350:400])]


def test_a_digit_is_normalised_by_the_mean_and_deviation_of_mnist():
    source = open_data(DataSpec("digits"), preprocessing=DIGITS)
    image, target = source.dataset("test")[0]
    assert image.shape == (1, 28, 28)
    assert image.dtype == torch.float32
    assert target == 0
    assert image.min().item() == pytest.approx(-0.1307 / 0.3081)
    assert image.max().item() <= (1 - 0.1307) / 0.3081 + 1e-6


def test_digits_feed_a_colour_net_of_another_size():
    source = open_data(DataSpec("digits"), preprocessing=RGB8)
    image, _ = source.dataset("val")[3]
    assert image.shape == (3, 8, 8)
    assert torch.equal(image[0], image[2])


# ---- folders ------------------------------------------------------------------------------------
def test_split_folders_are_taken_as_they_are(tmp_path):
    draw_classes(tmp_path, {"train/cat": 3, "train/dog": 2, "valid/cat": 1, "valid/dog": 1, "test/dog": 2})
    source = open_folder(tmp_path, class_names=("cat", "dog"))
    assert source.splits == {"train": 5, "val": 2, "test": 2}
    assert source.class_names == ("cat", "dog")
    assert source.dataset("train").names == [
        "train/cat/000.png",
        "train/cat/001.png",
        "train/cat/002.png",
        "train/dog/000.png",
        "train/dog/001.png",
    ]
    assert source.dataset("train").targets.tolist() == [0, 0, 0, 1, 1]
    assert source.dataset("test").targets.tolist() == [1, 1]
    assert source.notes == ()


def test_without_val_a_hash_of_the_path_below_train_cuts_it(tmp_path):
    draw_classes(tmp_path, {"train/a": 40, "train/b": 40, "test/a": 1, "test/b": 1})
    source = open_folder(tmp_path, val_fraction=0.25)
    names = [f"{c}/{i:03}.png" for c in "ab" for i in range(40)]
    first8 = {n: int(sha256(n.encode()).hexdigest()[:12], 16) / 16**12 for n in names}
    expected = [f"train/{n}" for n in names if first8[n] < 0.25]
    assert source.dataset("val").names == expected
    assert source.splits == {"train": 80 - len(expected), "val": len(expected), "test": 2}
    assert any("val cut from the images by a fixed hash" in note for note in source.notes)


def test_without_split_folders_all_three_are_cut_and_stay_when_images_come(tmp_path):
    draw_classes(tmp_path, {"a": 60, "b": 60})
    first = open_folder(tmp_path)
    before = {split: set(first.dataset(split).names) for split in ("train", "val", "test")}
    assert sum(map(len, before.values())) == 120
    units = {name: hash_unit(name) for part in before.values() for name in part}
    assert all(units[name] < 0.1 for name in before["test"])
    assert all(0.1 <= units[name] < 0.2 for name in before["val"])
    draw_classes(tmp_path, {"c": 30})
    after = open_folder(tmp_path)
    for split, names in before.items():
        assert names <= set(after.dataset(split).names)


def test_a_val_folder_without_test_is_the_test_split(tmp_path):
    draw_classes(tmp_path, {"train/a": 30, "train/b": 30, "val/a": 2, "val/b": 3})
    source = open_folder(tmp_path)
    assert source.splits["test"] == 5
    assert source.dataset("test").names[0] == "val/a/000.png"
    assert source.splits["train"] + source.splits["val"] == 60
    assert any("'val' is the test split" in note for note in source.notes)


def test_no_split_that_is_due_stays_empty_while_train_has_images_to_give():
    parts = cut(["x", "y", "z"], {"test": 1e-9, "val": 1e-9})
    assert {split: len(part) for split, part in parts.items()} == {"train": 1, "test": 1, "val": 1}
    order = sorted("xyz", key=hash_unit)
    assert ["xyz"[i] for i in parts["test"]] == order[:1]
    for name in "abcdefgh":  # whatever its hash
        assert {split: len(part) for split, part in cut([name], {"val": 0.5}).items()} == {"train": 1}


def test_one_image_is_a_train_split(tmp_path):
    draw(tmp_path / "a" / "only.png")
    source = open_folder(tmp_path)
    assert sum(source.splits.values()) == 1
    assert "train" in source.splits


def test_a_flat_folder_is_unlabelled_and_calibrates(tmp_path):
    for name in ("b.png", "a.jpg", "C.PNG", "notes.txt"):
        (tmp_path / name).write_text("x") if name.endswith("txt") else draw(tmp_path / name)
    source = open_folder(tmp_path, num_classes=10)
    assert source.splits == {"train": 3}
    assert "not sorted into class folders" in source.labels_reason
    assert source.dataset("train").names == ["C.PNG", "a.jpg", "b.png"]
    assert source.dataset("train").targets.tolist() == [-1, -1, -1]
    assert source.num_classes == 10
    assert len(source.calibration(2, seed=0)) == 2
    assert "1 files that are not images are left out (1 .txt)" in source.notes
    with pytest.raises(InputError, match="has no test split") as stopped:
        source.dataset("test")
    assert "train (3)" in stopped.value.remedy


def test_hidden_files_links_to_themselves_and_loops_are_left_out(tmp_path):
    draw_classes(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    draw(tmp_path / "train" / "a" / ".hidden.png")
    draw(tmp_path / "train" / ".cache" / "x.png")
    draw(tmp_path / "train" / "a" / "deep" / "er" / "z.png")
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train" / "a")
    (tmp_path / "train" / "a" / "self").symlink_to(tmp_path / "train" / "a" / "self")
    (tmp_path / "train" / "a" / "self.png").symlink_to(tmp_path / "train" / "a" / "self.png")
    (tmp_path / "train" / "b" / "linked.png").symlink_to(tmp_path / "train" / "a" / "000.png")
    source = open_folder(tmp_path, val_fraction=0.001)
    names = sorted(source.dataset("train").names + source.dataset("val").names)
    assert names == [
        "train/a/000.png",
        "train/a/001.png",
        "train/a/deep/er/z.png",
        "train/b/000.png",
        "train/b/001.png",
        "train/b/linked.png",
    ]


def test_names_may_hold_unicode_spaces_and_newlines(tmp_path):
    odd = ["Füße klein/ä b.png", "Füße klein/line\nbreak.png", "猫/1.png"]
    for name in odd:
        draw(tmp_path / "train" / name)
    draw_classes(tmp_path, {"test/猫": 1})
    source = open_folder(tmp_path)
    assert set(source.class_names) == {"Füße klein", "猫"}
    loader = make_loader(source.dataset("train"), batch_size=8)
    assert sum(len(targets) for _, targets in loader) + source.splits["val"] == 3


@pytest.mark.parametrize("place", [b"train/caf\xe9/1.png", b"train/a/caf\xe9.png", b"train/a/caf\xe9.txt"])
def test_a_name_that_is_not_utf_8_is_refused_in_escaped_form(tmp_path, place):
    draw_classes(tmp_path, {"train/a": 2, "test/a": 1})
    path = tmp_path / os.fsdecode(place)
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(InputError, match=r"train/.*caf\\udce9.* is not valid UTF-8") as stopped:
        open_folder(tmp_path)
    assert "Rename it" in stopped.value.remedy
    with pytest.raises(InputError, match=r"caf\\udce9' is not valid UTF-8"):
        open_folder(tmp_path / os.fsdecode(b"caf\xe9"))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "holds no image"),
        ({"a": 1, "b": 0}, "class folder 'b' holds no image"),
        ({"train/a": 1, "train/b": 1, "test/b": 0}, "class folder 'test/b' holds no image"),
        ({"train/a": 1, "val/a": 1, "valid/a": 1}, "several folders for one split"),
    ],
)
def test_folders_without_images_are_refused_by_name(tmp_path, layout, message):
    draw_classes(tmp_path, layout)
    for folder in layout:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match=message):
        open_folder(tmp_path)


def test_a_missing_folder_or_a_file_is_refused_with_the_remedy(tmp_path):
    for path, message in (
        (tmp_path / "none", "does not exist"),
        (draw(tmp_path / "x.png"), "is not a folder"),
    ):
        with pytest.raises(InputError, match=message) as stopped:
            open_folder(path)
        assert "folder of class folders" in stopped.value.remedy


def test_unlabelled_test_folders_and_loose_images_are_left_out_and_said(tmp_path):
    draw_classes(tmp_path, {"train/a": 20, "train/b": 20, "test": 3, "val/a": 1, "val/b": 1})
    draw(tmp_path / "train" / "loose.png")
    source = open_folder(tmp_path)
    assert source.splits["test"] == 2  # the val folder
    assert any("test folder has no class folders: its 3 images" in note for note in source.notes)
    assert any("1 images outside the class folders" in note for note in source.notes)


def test_the_fingerprint_follows_names_and_sizes(tmp_path):
    draw_classes(tmp_path, {"a": 3, "b": 3})
    first = open_folder(tmp_path).fingerprint
    assert first == open_folder(tmp_path).fingerprint
    assert len(first) == 64
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "00.png")
    second = open_folder(tmp_path).fingerprint
    draw(tmp_path / "a" / "00.png", size=(30, 30))
    assert len({first, second, open_folder(tmp_path).fingerprint}) == 3


# ---- classes and outputs ------------------------------------------------------------------------
def match(found, *, typed=None, class_names=None, num_classes=None):
    return match_classes(found, typed=typed, class_names=class_names, num_classes=num_classes)


def test_classes_match_the_models_by_name_exactly_then_ignoring_case():
    labels = match(("Cat", "dog"), class_names=("dog", "cow", "cat"))
    assert labels.outputs == (2, 0)
    assert labels.class_names == ("dog", "cow", "cat")
    assert labels.num_classes == 3
    assert labels.reason is None
    assert labels.note is None
    both = match(("Cat", "cat"), class_names=("cat", "Cat"))
    assert both.outputs == (1, 0)


def test_two_folders_never_share_an_output():
    labels = match(("CAT", "cat"), class_names=("cat", "dog", "cow"))
    assert labels.outputs == (-1, -1)
    assert "'CAT'" in labels.reason


def test_typed_classes_give_the_order_and_must_cover_the_data():
    assert match(("a", "b"), typed=("b", "x", "a"), num_classes=3).outputs == (2, 0)
    with pytest.raises(InputError, match="lacks: 'b'"):
        match(("a", "b"), typed=("a", "c"))
    with pytest.raises(InputError, match="2 names, the model 3 outputs"):
        match(("a", "b"), typed=("a", "b"), num_classes=3)


def test_sorted_order_counts_only_where_the_counts_agree_and_is_said():
    agreed = match(("a", "b"), num_classes=2)
    assert agreed.outputs == (0, 1)
    assert "order" in agreed.note
    unlike = match(("n01", "n02"), class_names=("tench", "goldfish"))
    assert unlike.outputs == (0, 1)
    assert "no class name" in unlike.note
    unknown = match(("a", "b"))
    assert (unknown.outputs, unknown.num_classes) == ((0, 1), 2)
    assert "neither classes nor their number" in unknown.note


def test_without_a_match_labels_are_withheld_with_the_reason(tmp_path):
    partly = match(("cat", "emu"), class_names=("cat", "dog"))
    assert partly.outputs == (-1, -1)
    assert "'emu'" in partly.reason
    draw_classes(tmp_path, {"a": 20, "b": 20})
    source = open_folder(tmp_path, num_classes=5)
    assert source.labels_reason == "the data has 2 classes, the model 5 outputs and no class names"
    assert set(source.dataset("train").targets.tolist()) == {-1}
    chosen = source.calibration(10, seed=1)  # still in proportion to the data's own classes
    assert {name[0] for name in chosen.names} == {"a", "b"}
    assert set(chosen.targets.tolist()) == {-1}


# ---- pixels -------------------------------------------------------------------------------------
def pixel(path: Path, mode="RGB"):
    with decoding():
        return np.asarray(decode(lambda key, m: load_file(key, m), path, mode))


def test_every_kind_of_image_becomes_8_bit_rgb_or_grey(tmp_path):
    assert pixel(draw(tmp_path / "grey.png", 77))[0, 0].tolist() == [77, 77, 77]
    assert pixel(draw(tmp_path / "red.png", (255, 0, 0)), "L")[0, 0] == 76  # 0.299 * 255
    assert pixel(draw(tmp_path / "alpha.png", (10, 20, 30, 0)))[0, 0].tolist() == [10, 20, 30]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    red, green, blue = pixel(tmp_path / "cmyk.jpg")[0, 0].tolist()
    assert red > 240
    assert max(green, blue) < 15
    Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    assert pixel(tmp_path / "deep.png")[0, 0].tolist() == [100, 100, 100]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128]))
    assert pixel(tmp_path / "palette.png")[0, 0].tolist() == [9, 8, 7]
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "moving.gif")[0, 0].tolist() == [255, 255, 255]


def test_exif_orientation_turns_the_image_upright(tmp_path):
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = pixel(tmp_path / "turned.png")
    assert upright.shape == (16, 8, 3)
    assert upright[0].min() == 255
    assert upright[-1].max() == 0


def test_an_image_of_the_inputs_size_is_not_resampled(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    prepare = build_prepare(Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3, crop_pct=0.5))
    assert np.array_equal(prepare(Image.fromarray(noise)).permute(1, 2, 0).numpy(), noise)


def test_the_shorter_side_becomes_size_over_crop_pct_and_the_centre_is_cropped():
    prepare = build_prepare(Preprocessing((1, 224, 224), (0.0,), (1.0,), crop_pct=0.875))
    wide = Image.new("L", (512, 256), 0)
    wide.paste(255, (144, 16, 368, 240))  # exactly the centre 224 x 224
    assert prepare(wide).float().mean().item() == 255
    tall = wide.transpose(Image.Transpose.ROTATE_90).resize((512, 1024), Image.Resampling.NEAREST)
    assert prepare(tall).float().mean().item() > 250  # halved first
    assert build_prepare(Preprocessing((3, 6, 12), (0.0,) * 3, (1.0,) * 3))(
        Image.new("RGB", (100, 90))
    ).shape == (3, 6, 12)


def test_a_very_long_strip_costs_no_memory():
    strip = Image.new("L", (2_000_000, 1), 9)
    prepare = build_prepare(Preprocessing((1, 224, 224), (0.0,), (1.0,)))
    assert prepare(strip).shape == (1, 224, 224)


def test_normalising_is_the_textbook_formula():
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).view(2, 3, 2, 2)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    result = normalise(images, mean=mean, std=std)
    by_hand = torch.stack([(images[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)], dim=1).float()
    torch.testing.assert_close(result, by_hand)
    torch.testing.assert_close(normalise(images.float(), mean=mean, std=std), by_hand)
    assert images.dtype == torch.uint8  # untouched


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (2, 8, 8)}, "can't feed an input of shape"),
        ({"input_size": (3, 8)}, "can't feed an input of shape"),
        ({"mean": (0.5,)}, "mean: 3 finite values"),
        ({"mean": (0.5, 0.5, math.nan)}, "mean: 3 finite values"),
        ({"std": (1.0, 0.0, 1.0)}, "above 0"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"interpolation": "cubist"}, "unknown interpolation 'cubist'"),
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused(changes, message):
    figures = {"input_size": (3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3} | changes
    with pytest.raises(InputError, match=message):
        open_data(DataSpec("digits"), preprocessing=Preprocessing(**figures))


# ---- damaged images -----------------------------------------------------------------------------
def spoil(path: Path) -> Path:
    """Cut a JPEG in the middle."""
    draw(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[:400])
    return path


def spoiled_folder(root: Path) -> Path:
    draw_classes(root, {"train/a": 9, "train/b": 9, "val/a": 1, "val/b": 1, "test/a": 1, "test/b": 1})
    spoil(root / "train" / "a" / "cut.jpg")
    (root / "train" / "b" / "empty.png").touch()
    return root


def test_a_damaged_image_stops_the_run_by_name(tmp_path):
    source = open_folder(spoiled_folder(tmp_path))
    with pytest.raises(InputError, match=r"1 of 20 train images can't be read: 'train/a/cut.jpg' \(\w"):
        list(make_loader(source.dataset("train"), batch_size=10))
    with pytest.raises(InputError, match=r"'train/b/empty.png'"):
        source.dataset("train")[19]


@pytest.mark.parametrize("kept", [True, False], ids=["kept in memory", "read each time"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_allowed_fraction_of_damaged_images_is_left_out_and_counted(tmp_path, monkeypatch, kept, workers):
    if not kept:
        monkeypatch.setattr(loading_module, "KEPT_BYTES", 0)
    source = open_folder(spoiled_folder(tmp_path), allow_corrupt=0.1)
    loader = make_loader(source.dataset("train"), batch_size=10, workers=workers)
    for _ in range(2):
        targets = [targets.tolist() for _, targets in loader]
        assert targets == [[0] * 9, [1] * 9]
    assert source.corrupt == ("train/a/cut.jpg", "train/b/empty.png")
    assert source.describe()["corrupt"] == {"count": 2, "names": list(source.corrupt)}


def test_one_more_damaged_image_than_allowed_stops_the_run(tmp_path):
    source = open_folder(spoiled_folder(tmp_path), allow_corrupt=0.09)
    with pytest.raises(InputError, match="2 of 20") as stopped:
        list(make_loader(source.dataset("train"), batch_size=4))
    assert "0.1" in stopped.value.remedy


def test_a_batch_without_any_readable_image_is_skipped(tmp_path):
    draw_classes(tmp_path, {"train/a": 1, "test/a": 1, "val/a": 1})
    for index in range(2):
        spoil(tmp_path / "train" / "a" / f"x{index}.jpg")
    source = open_folder(tmp_path, allow_corrupt=0.7)
    assert [len(targets) for _, targets in make_loader(source.dataset("train"), batch_size=1)] == [1]


def test_decompression_bombs_and_what_no_decoder_knows_are_unreadable(tmp_path, monkeypatch):
    draw(tmp_path / "bomb.png", 0, size=(40, 40))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "text.png").write_text("no image at all")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # an error above twice that, a warning below
    for path, reason in (
        (tmp_path / "bomb.png", "decompression bomb"),
        (tmp_path / "float.tif", "floating point"),
        (tmp_path / "text.png", "cannot identify"),
    ):
        with decoding(), pytest.raises(UnreadableImage, match=reason):
            decode(load_file, path, "RGB")


def test_remarks_on_damaged_metadata_dont_reach_the_user(tmp_path):
    draw(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert pixel(tmp_path / "x.jpg").shape == (8, 8, 3)
    assert seen == []


# ---- augmentation -------------------------------------------------------------------------------
def test_a_shifted_and_mirrored_image_is_a_crop_of_the_padded_one():
    images = torch.randint(1, 256, (64, 3, 16, 16), dtype=torch.uint8)
    result = shift_and_mirror(images, torch.Generator().manual_seed(5))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    mirrored = 0
    for image, shifted in zip(padded, result, strict=True):
        crops = [image[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
        plain = any(torch.equal(crop, shifted) for crop in crops)
        flipped = any(torch.equal(crop.flip(2), shifted) for crop in crops)
        assert plain or flipped
        mirrored += flipped
    assert 16 < mirrored < 48


def test_digits_move_a_little_and_are_never_mirrored():
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    image[..., 4:24, 6:10] = 255  # a bar on the left
    moved = shift_and_turn(image.expand(200, -1, -1, -1), torch.Generator().manual_seed(3))
    weight = moved.sum(dim=(1, 2))  # (200, 28) by column
    centre = (weight * torch.arange(28)).sum(1) / weight.sum(1)
    assert centre.max() < 13
    assert centre.std() > 0.5
    assert moved.max() <= 255.01


def test_training_augments_as_the_source_says(tmp_path):
    draw_classes(tmp_path, {"train/a": 4, "train/b": 4, "test/a": 1})
    kinds = {
        option: open_folder(tmp_path, augment=option).dataset("train", train=True)._augment
        for option in ("auto", "none", "digits", "natural")
    }
    assert kinds == {
        "auto": shift_and_mirror,
        "none": None,
        "digits": shift_and_turn,
        "natural": shift_and_mirror,
    }
    large = Preprocessing((3, 96, 96), (0.0,) * 3, (1.0,) * 3)
    assert isinstance(
        open_folder(tmp_path, preprocessing=large).dataset("train", train=True)._augment, RandomView
    )
    digits = open_data(DataSpec("digits"), preprocessing=DIGITS)
    assert digits.dataset("train", train=True)._augment is shift_and_turn
    assert digits.dataset("train")._augment is None


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_no_number_of_workers_changes_what_a_network_sees(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(12):
        path = tmp_path / "train" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(path)
    draw_classes(tmp_path, {"test/a": 1})
    large = Preprocessing((3, 66, 66), (0.0,) * 3, (1.0,) * 3)
    source = open_folder(tmp_path, preprocessing=large, val_fraction=0.001)
    dataset = source.dataset("train", train=True)
    state = torch.get_rng_state()

    def epochs(workers):
        loader = make_loader(dataset, batch_size=4, train=True, seed=7, workers=workers)
        batches = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            batches += list(loader)
        return batches

    alone, helped = epochs(0), epochs(2)
    assert len(alone) == len(helped) == 4  # 11 images: two full batches an epoch
    for (images, targets), (same_images, same_targets) in zip(alone, helped, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(targets, same_targets)
    assert not torch.equal(alone[0][0], alone[2][0])  # another epoch, other views
    assert torch.equal(state, torch.get_rng_state())


# ---- batches ------------------------------------------------------------------------------------
def digits_dataset(train=False):
    return open_data(DataSpec("digits"), preprocessing=DIGITS).dataset("val", train=train)


def test_training_order_follows_seed_and_epoch():
    def order(seed, epoch):
        loader = make_loader(digits_dataset(), batch_size=500, train=True, seed=seed)
        loader.set_epoch(epoch)
        ((images, _),) = loader
        return images

    assert torch.equal(order(1, 0), order(1, 0))
    assert not torch.equal(order(1, 0), order(1, 1))
    assert not torch.equal(order(1, 0), order(2, 0))


def test_evaluation_counts_each_image_once_over_all_processes():
    loaders = [make_loader(digits_dataset(), batch_size=64, rank=rank, world_size=3) for rank in range(3)]
    shares = [torch.cat([images for images, _ in loader]) for loader in loaders]
    assert [len(share) for share in shares] == [167, 167, 166]
    assert [len(loader) for loader in loaders] == [3, 3, 3]
    merged = torch.empty(500, 1, 28, 28)
    for rank, share in enumerate(shares):
        merged[rank::3] = share
    assert torch.equal(
        merged, torch.cat([images for images, _ in make_loader(digits_dataset(), batch_size=99)])
    )


def test_training_gives_every_process_the_same_number_of_full_batches():
    loaders = [
        make_loader(digits_dataset(), batch_size=50, train=True, seed=3, rank=rank, world_size=3)
        for rank in range(3)
    ]
    sizes = [[len(targets) for _, targets in loader] for loader in loaders]
    assert sizes == [[50, 50, 50]] * 3  # 166 each; the incomplete batch is dropped
    assert [len(loader) for loader in loaders] == [3, 3, 3]
    few = make_loader(digits_dataset(), batch_size=600, train=True)
    assert [len(targets) for _, targets in few] == [500]


def test_images_that_dont_fit_in_memory_give_the_same_batches(tmp_path, monkeypatch):
    draw_classes(tmp_path, {"train/a": 5, "train/b": 5, "test/a": 1})
    kept = open_folder(tmp_path).dataset("train", train=True)
    monkeypatch.setattr(loading_module, "KEPT_BYTES", 1)
    unkept = open_folder(tmp_path).dataset("train", train=True)
    assert (kept.in_memory, unkept.in_memory) == (True, False)
    pairs = zip(
        make_loader(kept, batch_size=3, train=True, seed=1),
        make_loader(unkept, batch_size=3, train=True, seed=1),
        strict=True,
    )
    for (images, targets), (same_images, same_targets) in pairs:
        assert torch.equal(images, same_images)
        assert torch.equal(targets, same_targets)


def test_images_kept_in_memory_are_decoded_once(tmp_path):
    draw_classes(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 1})
    source = open_folder(tmp_path, val_fraction=0.001)
    first = [levels(images) for images, _ in make_loader(source.dataset("train"), batch_size=4)]
    for path in (tmp_path / "train").rglob("*.png"):
        path.unlink()
    assert [levels(images) for images, _ in make_loader(source.dataset("train"), batch_size=4)] == first
    assert len(list(make_loader(source.calibration(5, seed=0), batch_size=5))) == 1


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 1, "rank": 1}, {"batch_size": 1, "workers": -1}]
)
def test_impossible_loaders_are_refused(options):
    with pytest.raises(InputError, match="can't make batches"):
        make_loader(digits_dataset(), **options)


def test_training_needs_an_image_for_every_process(tmp_path):
    draw_classes(tmp_path, {"train/a": 2, "test/a": 1})
    dataset = open_folder(tmp_path).dataset("train")
    with pytest.raises(InputError, match="can't feed 2 processes"):
        make_loader(dataset, batch_size=1, train=True, world_size=2)


# ---- calibration --------------------------------------------------------------------------------
def test_every_prefix_of_the_calibration_order_is_in_proportion():
    groups = np.array([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order([f"n{i}" for i in range(100)], groups, seed=0)
    assert sorted(order.tolist()) == list(range(100))
    for size in (10, 20, 50):
        assert np.bincount(groups[order[:size]], minlength=3) == pytest.approx(
            [0.6 * size, 0.3 * size, 0.1 * size], abs=1
        )


def test_calibration_is_from_train_fixed_by_its_seed_and_not_augmented():
    source = open_data(DataSpec("digits"), preprocessing=DIGITS)
    chosen = source.calibration(256, seed=4)
    assert set(chosen.names) <= set(source.dataset("train").names)
    assert set(torch.bincount(chosen.targets).tolist()) <= {25, 26}
    assert chosen.names == source.calibration(512, seed=4).names[:256]
    assert chosen.names != source.calibration(256, seed=5).names
    train = source.dataset("train")
    index = train.names.index(chosen.names[0])
    assert torch.equal(chosen[0][0], train[index][0])
    assert not any("calibration" in note for note in source.notes)


def test_calibration_keeps_no_image_unless_training_did(tmp_path):
    draw_classes(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 1})
    source = open_folder(tmp_path, val_fraction=0.001)
    passes = []
    for _ in range(2):
        loader = make_loader(source.calibration(5, seed=0), batch_size=2)
        passes.append([levels(images) for images, _ in loader])
        assert not loader.dataset.in_memory
        assert loader.dataset._store._kept.numel() == 0
    assert passes[0] == passes[1]
    for path in (tmp_path / "train").rglob("*.png"):
        draw(path, (0, 99, 0))
    assert levels(next(iter(make_loader(source.calibration(5, seed=0), batch_size=5)))[0])[0][1][0][0] == 99
    for _ in make_loader(source.dataset("train"), batch_size=4):
        pass
    assert source.calibration(5, seed=0).in_memory


def test_calibration_takes_all_there_are_and_says_so_once(tmp_path):
    draw_classes(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 1})
    source = open_folder(tmp_path, val_fraction=0.001)
    for _ in range(2):
        assert len(source.calibration(512, seed=0)) == source.splits["train"] == 5
    said = "calibration: 512 images were asked for, the train split has 5"
    assert source.notes[-1] == said
    assert source.notes.count(said) == 1
    with pytest.raises(InputError, match="at least 1 image"):
        source.calibration(0, seed=0)


# ---- torchvision --------------------------------------------------------------------------------
def write_idx(path: Path, values: np.ndarray) -> None:
    """MNIST's file format: magic number, sizes, bytes."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def mnist_root(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    for prefix, count in (("train", 50), ("t10k", 20)):
        images = np.arange(count)[:, None, None] * np.ones((1, 28, 28), int)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    return tmp_path


def test_a_torchvision_set_keeps_its_test_split_and_val_is_cut_from_train(mnist_root):
    spec = DataSpec("torchvision:MNIST", root=str(mnist_root), val_fraction=0.2)
    source = open_data(spec, preprocessing=DIGITS, num_classes=10)
    expected = [i for i in range(50) if hash_unit(f"train/{i}") < 0.2]
    assert source.dataset("val").targets.tolist() == [i % 10 for i in expected]
    assert source.splits == {"train": 50 - len(expected), "val": len(expected), "test": 20}
    ((images, targets),) = make_loader(source.dataset("test"), batch_size=20)
    level = (images[:, 0, 5, 5] * 0.3081 + 0.1307) * 255
    assert level.round().tolist() == list(range(20))
    assert targets.tolist() == [*range(10), *range(10)]
    assert source.class_names[3] == "3 - three"
    assert any("the model names no classes" in note for note in source.notes)
    named = open_data(spec, preprocessing=DIGITS, class_names=source.class_names)
    assert named.notes == source.notes[:1]
    assert source.dataset("train", train=True)._augment is shift_and_turn


def test_a_set_that_is_not_there_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=f"torchvision:CIFAR10 was not found in '{tmp_path}'") as stopped:
        open_data(DataSpec("torchvision:CIFAR10", root=str(tmp_path)), preprocessing=RGB8)
    assert "download" in stopped.value.remedy
    with pytest.raises(InputError, match="needs the folder in which it lies"):
        open_data(DataSpec("torchvision:CIFAR10"), preprocessing=RGB8)


def test_a_set_without_splits_or_label_lists_is_read_and_cut(monkeypatch):
    from torchvision import datasets

    few = partial(datasets.FakeData, size=40, image_size=(3, 8, 8), num_classes=4)
    monkeypatch.setattr(datasets, "FakeData", few)
    source = open_data(DataSpec("torchvision:FakeData"), preprocessing=RGB8)
    assert sum(source.splits.values()) == 40
    assert set(source.splits) == {"train", "val", "test"}
    assert source.num_classes == 4


def test_every_known_set_is_torchvisions_and_accepts_its_arguments():
    import inspect

    from torchvision import datasets

    for name, entry in TORCHVISION.items():
        constructor = getattr(datasets, name)
        for arguments in entry.splits.values():
            inspect.signature(constructor).bind("root", **arguments)
        assert entry.augment in ("digits", "natural")
        assert set(entry.splits) in ({"all"}, {"train", "test"}, {"train", "val", "test"})


# ---- the spec -----------------------------------------------------------------------------------
def test_a_spec_survives_json_without_its_permission_to_download():
    spec = DataSpec("torchvision:SVHN", root="data", classes=("a", "b"), allow_corrupt=0.25, download=True)
    record = spec.to_json()
    assert record == {
        "path": "torchvision:SVHN",
        "root": "data",
        "classes": ["a", "b"],
        "val_fraction": 0.1,
        "allow_corrupt": 0.25,
        "augment": "auto",
    }
    assert DataSpec.from_json(record) == DataSpec(
        "torchvision:SVHN", root="data", classes=("a", "b"), allow_corrupt=0.25
    )
    assert DataSpec.from_json({"path": "digits"}) == DataSpec("digits")


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        "digits",
        {},
        {"path": 3},
        {"path": ""},
        {"path": "a\0b"},
        {"path": "torchvision:ImageFolder"},
        {"path": "torchvision:os.system"},
        {"path": "digits", "download": True},
        {"path": "digits", "loader": "x"},
        {"path": "digits", "root": 1},
        {"path": "digits", "classes": "abc"},
        {"path": "digits", "classes": []},
        {"path": "digits", "classes": ["a", "a"]},
        {"path": "digits", "classes": ["a", 1]},
        {"path": "digits", "val_fraction": math.nan},
        {"path": "digits", "val_fraction": 0},
        {"path": "digits", "val_fraction": "0.1"},
        {"path": "digits", "allow_corrupt": 1.0},
        {"path": "digits", "allow_corrupt": -0.1},
        {"path": "digits", "allow_corrupt": True},
        {"path": "digits", "augment": "mixup"},
        {"path": "digits", "augment": ["none"]},
    ],
)
def test_a_data_record_that_isnt_one_is_refused(record):
    with pytest.raises(InputError):
        DataSpec.from_json(record)
