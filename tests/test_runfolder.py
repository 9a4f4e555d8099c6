"""Runs that are killed go on, a change re-runs what depends on it, and no two runs share a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from photos import make_photos

from sepress import stages
from sepress.basis import differences, stage_basis
from sepress.errors import InputError
from sepress.files import replacing, sweep_partial, write_text
from sepress.lock import FolderLock
from sepress.recipe import Recipe, load_recipe
from sepress.runfolder import RunFolder, StageRecord

RECIPE = """
name: tiny
device: cpu
threads: 1
data: {path: photos, batch_size: 16, augment: none}
model: {source: "sepress:se_resnet8", kwargs: {width: 8}, input_size: 8}
stages:
  - train: {epochs: 2, warmup_epochs: 0, ema_decay: 0.9, amp: off}
  - prune: {target_macs: 0.6, criterion: l2, round_to: 4, min_width: 4, calibration_images: 24,
            recalibration_images: 24}
  - finetune: {epochs: 2, warmup_epochs: 0, lr: 0.01, ema_decay: null, amp: off}
  - evaluate: {split: val}
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe and its images."""
    folder = tmp_path_factory.mktemp("photos")
    make_photos(folder / "photos", train=16, val=8)
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def tiny(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(photos, tmp_path / "work"))
    return tmp_path / "work"


def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the stages that run from now on."""
    calls: list[str] = []
    for kind, stage in list(stages.STAGES.items()):
        monkeypatch.setitem(
            stages.STAGES, kind, lambda job, s, kind=kind, stage=stage: calls.append(kind) or stage(job, s)
        )
    return calls


# ---- what depends on a change -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("require=[top1_drop<=1%]", []),
        ("name=other", []),
        ("data.workers=1", []),
        ("stages.evaluate.split=train", ["evaluate"]),
        ("stages.finetune.lr=0.02", ["finetune", "evaluate"]),
        ("stages.prune.target_macs=0.7", ["prune", "finetune", "evaluate"]),
        ("stages.train.lr=0.04", ["train", "prune", "finetune", "evaluate"]),
        ("seed=1", ["train", "prune", "finetune", "evaluate"]),
        ("data.augment=natural", ["train", "prune", "finetune", "evaluate"]),
    ],
)
def test_a_changed_recipe_runs_what_depends_on_the_change(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, change: str, again: list[str]
) -> None:
    stages.run_recipe(load_recipe("tiny.yaml"), out=Path("run"))
    calls = ran(monkeypatch)
    stages.run_recipe(load_recipe("tiny.yaml", [change]), out=Path("run"))
    assert calls == again


def test_the_stages_of_a_recipe_come_and_go(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages.run_recipe(load_recipe("tiny.yaml"), out=Path("run"))
    calls = ran(monkeypatch)
    short = re.sub(r"  - finetune.*\n", "", RECIPE)
    Path("short.yaml").write_text(short)
    outcome = stages.run_recipe(load_recipe("short.yaml"), out=Path("run"))
    assert calls == ["evaluate"]  # of base and pruned only
    assert outcome.report is not None
    assert [m.label for m in outcome.report.measurements] == ["base", "pruned"]
    assert not Path("run/tuned.pt").exists()
    assert Path("run/earlier/1/tuned.pt").is_file()


def test_what_a_change_replaces_is_kept_and_said(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages.run_recipe(load_recipe("tiny.yaml"), out=Path("run"))
    kept = {name: Path("run", name).read_bytes() for name in ("tuned.pt", "report.json", "recipe.yaml")}
    from sepress import console

    console.enable()
    stages.run_recipe(load_recipe("tiny.yaml", ["stages.finetune.lr=0.02"]), out=Path("run"))
    said = " ".join(capsys.readouterr().err.split())
    assert "[finetune] again, since it depends on what has changed: settings.lr (0.01, now 0.02)" in said
    assert "[evaluate] again, since it depends on what has changed: made.tuned" in said
    assert "[prune] finished before" in said
    for name, content in kept.items():
        assert Path("run/earlier/1", name).read_bytes() == content
    assert Path("run/tuned.pt").read_bytes() != kept["tuned.pt"]


def test_other_images_are_other_data(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages.run_recipe(load_recipe("tiny.yaml"), out=Path("run"))
    calls = ran(monkeypatch)
    Path("photos/val/c0/0.png").unlink()
    stages.run_recipe(load_recipe("tiny.yaml"), out=Path("run"))
    assert calls == ["train", "prune", "finetune", "evaluate"]


def basis_of(kind: str, *changes: str, **made: str) -> dict[str, Any]:
    recipe: Recipe = load_recipe("tiny.yaml", changes)
    settings = next(stage for stage in recipe.stages if stage.kind == kind)
    inputs = {"data": "d" * 64}
    return stage_basis(recipe, kind, settings, device="cpu", inputs=inputs, made=made)


def test_a_basis_holds_what_results_depend_on_only(tiny: Path) -> None:
    assert differences(basis_of("prune"), basis_of("prune")) == []
    assert differences(basis_of("prune"), basis_of("prune", "data.augment=natural")) == []
    assert differences(basis_of("finetune"), basis_of("finetune", "data.augment=natural")) == [
        "data.augment (none, now natural)"
    ]
    within = "stages.prune={within: top1_drop<=0.1}"
    assert differences(basis_of("prune", within), basis_of("prune", within, "stages.finetune.lr=1")) == [
        "finetune.lr (0.01, now 1.0)"
    ]
    assert differences(basis_of("prune", base="a" * 64), basis_of("prune", base="b" * 64)) == ["made.base"]


# ---- runs that are killed ------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_a_run_killed_at_any_change_of_its_folder_ends_with_the_same_plan_and_weights(tiny: Path) -> None:
    """At every change would be better, and takes minutes: `python tests/killed.py` takes a number."""
    driver = Path(__file__).with_name("killed.py")
    command = [sys.executable, "-W", "ignore", str(driver), "tiny.yaml", "runs", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, *again = [json.loads(line) for line in done.stdout.splitlines()]
    assert whole["made"].keys() == {"base.pt", "pruned.pt", "tuned.pt", "plan.json"}
    assert len(again) == 12
    for one in again:
        assert one["status"] == 0, done.stderr
        assert one["made"] == whole["made"]
        assert one["left over"] == []
        assert not one["earlier"]
    assert again[-1]["reused"] >= 3


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", recipe_text="")
    folder.begin("train", {"settings": {"lr": 1}})
    folder.file("base.checkpoint").write_text("half a training")
    folder.close()
    folder = RunFolder(tmp_path / "run", recipe_text="")
    folder.begin("train", {"settings": {"lr": 1}})
    assert folder.file("base.checkpoint").exists()
    folder.begin("train", {"settings": {"lr": 2}})
    assert not folder.file("base.checkpoint").exists()
    folder.close()


def test_what_a_killed_process_left_half_written_is_swept_and_nothing_else(tmp_path: Path) -> None:
    files = replacing(tmp_path / "net.safetensors")
    partial = files.__enter__()
    others = [".hidden", ".net.partial-", "net.partial-abcdefgh", ".x.abcdefgh"]
    for name in others:
        (tmp_path / name).write_text("mine")
    assert partial.exists()
    sweep_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


# ---- one run at a time -----------------------------------------------------------------------------
def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(tiny: Path) -> None:
    folder = RunFolder(Path("run"), recipe_text="first")
    with pytest.raises(InputError, match="another run is at work"):
        stages.run_recipe(load_recipe("tiny.yaml"), out=Path("run"))
    assert Path("run/recipe.yaml").read_text() == "first"
    folder.close()
    stages.run_recipe(load_recipe("tiny.yaml"), out=Path("run"))


HOLDER = """
import os, sys, time
from pathlib import Path
from sepress.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
if os.fork() == 0:  # as a loader worker does
    time.sleep(60)
print("held", os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_a_lock_holds_against_other_processes_and_dies_with_its_main_process(tmp_path: Path) -> None:
    main = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert main.stdout is not None
    pid = main.stdout.readline().split()[1]
    try:
        with pytest.raises(InputError, match=f"another run is at work.*process {pid} on"):
            FolderLock(tmp_path)
        main.kill()
        main.wait()
        children = subprocess.run(["pgrep", "-g", str(main.pid)], capture_output=True, check=False).stdout
        assert children  # the worker lives on
        FolderLock(tmp_path).release()
    finally:
        os.killpg(main.pid, 9)
        main.stdout.close()
        main.wait()


def test_a_lock_is_given_back_by_a_run_that_fails(tiny: Path) -> None:
    stages.run_recipe(load_recipe("tiny.yaml"), out=Path("run"))
    Path("run/run.json").write_text("{")
    with pytest.raises(InputError, match="can't be read"):
        stages.run_recipe(load_recipe("tiny.yaml"), out=Path("run"))
    FolderLock(Path("run")).release()


# ---- disks ---------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A function: kilobytes -> a folder on a disk of its own of that size; skips where none can be made."""
    mounted: list[Path] = []

    def make(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip("a disk of a fixed size takes the right to mount one")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_at_any_file_loses_nothing_and_the_run_goes_on_when_there_is_room(
    tiny: Path, small_disk: Any
) -> None:
    whole = stages.run_recipe(load_recipe("tiny.yaml"), out=Path("whole"))
    sizes = [0, 40, 90, 160, 260]  # kilobytes: from nothing to one file short of all
    used = sum(path.stat().st_size for path in Path("whole").rglob("*")) // 1024
    assert used > sizes[-1]
    failures = []
    for size in sizes:
        disk = small_disk(max(8, size))
        try:
            stages.run_recipe(load_recipe("tiny.yaml"), out=disk / "run")
        except InputError as error:
            failures.append(str(error))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        for path in (disk / "run").glob("*"):
            assert ".partial-" not in path.name
        again = stages.run_recipe(load_recipe("tiny.yaml"), out=disk / "run")
        assert again.report is not None
        assert whole.report is not None
        assert [m.top1 for m in again.report.measurements] == [m.top1 for m in whole.report.measurements]
        assert (disk / "run/plan.json").read_bytes() == Path("whole/plan.json").read_bytes()
    assert len(failures) == len(sizes)
    assert all("no space is left" in failure for failure in failures)


def test_an_error_of_ours_in_the_middle_of_a_file_is_not_told_as_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_records_survive_as_they_were_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", recipe_text="")
    write_text(folder.file("plan.json"), "{}")
    made = folder.finish(StageRecord("prune", {"plan": "plan.json"}, {"a": 1}, basis={"seed": 0}))
    folder.close()
    folder = RunFolder(tmp_path / "run", recipe_text="")
    assert folder.finished("prune", {"seed": 0}) == made
    folder.close()
    assert time.time() - (tmp_path / "run/run.json").stat().st_mtime < 60
