"""Recipes run in a folder: artifacts, reuse, refusals, and what a failed check leaves behind."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from sepress import cutting, job, pruning, stages
from sepress.bundle import load_bundle
from sepress.costs import coarse_table
from sepress.coupling import trace
from sepress.errors import CheckError, InputError
from sepress.recipe import Recipe
from sepress.report import render_report, report_to_json
from sepress.types import Check

TRAIN = {"train": {"epochs": 1, "lr": 0.1, "warmup_epochs": 0.2, "ema_decay": None}}
DIGITS = {"data": {"path": "digits"}, "device": "cpu"}
WIDTH = {"source": "sepress:se_resnet8", "kwargs": {"in_chans": 1, "width": 8}}


def recipe(*stage_list: Any, **fields: Any) -> Recipe:
    return Recipe.model_validate({"name": "test", "stages": list(stage_list), **fields})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a net trained for one epoch on the embedded digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    stages.run_recipe(recipe(TRAIN, model=WIDTH, **DIGITS), out=folder)
    return folder


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(trained / "base.pt", tmp_path / "model.pt"))


PRUNE = {"prune": {"target_macs": 0.5, "round_to": 4, "min_width": 4, "calibration_images": 64}}


def prune_recipe(model: Path, *more: Any, **fields: Any) -> Recipe:
    return recipe(PRUNE, *more, model={"source": str(model)}, device="cpu", **fields)


def test_a_file_that_sepress_trained_is_pruned_exported_and_reported_without_naming_its_data(
    model: Path,
) -> None:
    outcome = stages.run_recipe(prune_recipe(model, "export"))
    assert outcome.folder.parent == model.parent
    assert outcome.folder != model.parent
    names = {path.name for path in outcome.folder.iterdir()}
    assert {"pruned.pt", "model.onnx", "plan.json", "ranking.json", "report.json", "report.md"} <= names
    with safe_open(outcome.folder / "excitation.safetensors", "pt") as file:
        assert any(key.startswith("gate/") for key in file.keys())  # noqa: SIM118 (not a dict)
    report = json.loads((outcome.folder / "report.json").read_text())
    base, pruned = report["measurements"]
    assert (base["label"], pruned["label"]) == ("base", "pruned")
    assert pruned["macs"] <= 0.5 * base["macs"]
    assert (base["split"], base["n"]) == ("test", 1000)
    assert pruned["bytes"] == (outcome.folder / "model.onnx").stat().st_size < base["bytes"]
    assert report["checks"]["masked_equals_removed"]["passed"] is True
    assert report["checks"]["onnx_parity"]["passed"] is True
    assert report["artifacts"]["model"] == "pruned.pt"
    gated = [row for row in report["groups"] if row["role"] == "gated"]
    assert gated
    assert all(0 < row["mean_excitation"] < 1 for row in gated)
    again = stages.run_recipe(prune_recipe(model))
    assert again.folder != outcome.folder


def test_the_saved_pruned_net_is_the_one_that_was_measured(model: Path) -> None:
    outcome = stages.run_recipe(prune_recipe(model))
    bundle = load_bundle(outcome.folder / "pruned.pt")
    assert outcome.report is not None
    assert sum(p.numel() for p in bundle.net.parameters()) == outcome.report.measurements[-1].params
    assert bundle.lineage["plans"][0]["criterion"] == "reconstruction"
    assert bundle.lineage["base"]["path"] == str(model.resolve())


def test_finished_stages_are_reused_and_a_damaged_file_is_made_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for kind, stage in list(stages.STAGES.items()):
        monkeypatch.setitem(
            stages.STAGES, kind, lambda job, s, kind=kind, stage=stage: calls.append(kind) or stage(job, s)
        )
    what, out = prune_recipe(model), tmp_path / "run"
    first = stages.run_recipe(what, out=out)
    assert calls == ["load", "prune", "evaluate"]
    calls.clear()
    second = stages.run_recipe(what, out=out)
    assert calls == []
    assert second.report == first.report
    (out / "pruned.pt").write_bytes(b"damaged")
    third = stages.run_recipe(what, out=out)
    assert calls == ["prune", "evaluate"]
    assert third.report.measurements == first.report.measurements


def test_a_ranking_is_reused_although_pruning_wrote_one_of_its_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = {"rank": {"criterion": "l2", "calibration_images": 64}}
    what = recipe(rank, PRUNE, model={"source": str(model)}, device="cpu")
    first = stages.run_recipe(what, out=tmp_path / "run")
    monkeypatch.setattr(stages, "STAGES", {})  # nothing can run
    assert stages.run_recipe(what, out=tmp_path / "run").report == first.report


def test_a_folder_of_other_files_is_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        stages.run_recipe(prune_recipe(model), out=other)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_another_model_file_under_the_same_name_is_not_taken_for_the_one_that_was_pruned(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = stages.run_recipe(prune_recipe(model), out=out)
    shutil.copy(first.folder / "pruned.pt", model)
    again = stages.run_recipe(prune_recipe(model), out=out)
    assert again.report is not None
    assert first.report is not None
    assert again.report.measurements[-1].macs < first.report.measurements[-1].macs
    assert (out / "earlier/1/pruned.pt").is_file()


def test_a_run_does_not_work_in_the_folder_of_its_own_model(model: Path) -> None:
    out = model.with_name("run")
    stages.run_recipe(prune_recipe(model), out=out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match=r"pruned\.pt lies in the run folder"):
        stages.run_recipe(recipe({"finetune": {}}, model={"source": str(out / "pruned.pt")}), out=out)
    prune = {"prune": {"plan": str(out / "plan.json")}}
    with pytest.raises(InputError, match=r"plan\.json lies in the run folder"):
        stages.run_recipe(recipe(prune, model={"source": str(model)}), out=out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_dry_run_writes_a_plan_and_no_model_and_the_plan_can_be_applied(
    model: Path, tmp_path: Path
) -> None:
    dry = stages.run_recipe(prune_recipe(model), out=tmp_path / "dry", dry_run=True)
    assert dry.plan is not None
    assert not list(dry.folder.glob("*.pt"))
    applied = recipe(
        {"prune": {"plan": str(dry.folder / "plan.json"), "calibration_images": 64}},
        model={"source": str(model)},
        device="cpu",
    )
    outcome = stages.run_recipe(applied, out=tmp_path / "applied")
    assert outcome.report.measurements[-1].macs == dry.plan.macs_after


def test_a_failed_check_leaves_no_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = (Check(False, 0.5, reason="made to fail"), {})
    monkeypatch.setattr(pruning, "check_removal", lambda *_: failed)
    with pytest.raises(CheckError) as error:
        stages.run_recipe(prune_recipe(model), out=tmp_path / "run")
    assert error.value.exit_code == 4
    assert not list((tmp_path / "run").glob("*.pt"))


def test_an_export_of_a_fixed_batch_with_preprocessing_is_checked_timed_and_listed(model: Path) -> None:
    export = {"export": {"batch": 2, "with_preprocessing": True, "exporter": "torchscript"}}
    outcome = stages.run_recipe(recipe(export, model={"source": str(model)}, device="cpu"))
    assert outcome.report is not None
    names = {role: Path(path).name for role, path in outcome.report.artifacts.items() if path}
    found = {role: names[role] for role in ("onnx", "image_onnx", "example")}
    assert found == {"onnx": "model.onnx", "image_onnx": "model.image.onnx", "example": "example.py"}
    assert all((outcome.folder / name).is_file() for name in found.values())
    assert "model.image.onnx" in (outcome.folder / "example.py").read_text()
    check = outcome.report.checks["image_parity"]
    assert check.passed is True
    assert check.argmax_agreement == 1.0
    row = outcome.report.measurements[-1].latency
    assert row is not None
    assert row["batch"] == 2


def test_preprocessing_in_the_file_of_no_classifier_is_refused_and_nothing_is_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sepress.imagefile.why_no_classifier", lambda _: "it is none")
    export = recipe({"export": {"with_preprocessing": True}}, model={"source": str(model)}, device="cpu")
    with pytest.raises(InputError, match="it is none"):
        stages.run_recipe(export, out=tmp_path / "run")
    assert not [p for p in (tmp_path / "run").glob("*") if p.suffix in (".onnx", ".py")]


def test_a_failed_parity_leaves_neither_onnx_nor_a_model_under_its_final_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "check_onnx_parity", lambda *_: Check(False, 0.5))
    with pytest.raises(CheckError):
        stages.run_recipe(prune_recipe(model, "export"), out=tmp_path / "run")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not [name for name in left if name.endswith((".onnx", ".pt"))]
    assert "pruned.pt.rejected" in left


def test_constraints_stand_in_the_report_with_their_figures(model: Path) -> None:
    outcome = stages.run_recipe(prune_recipe(model, require=["macs_ratio<=0.5", "macs_ratio<=0.1"]))
    met, missed = outcome.report.constraints
    assert met["passed"] is True
    assert missed["passed"] is False
    assert 0.1 < missed["actual"] <= 0.5


def test_what_misses_a_constraint_is_kept_as_rejected_until_it_is_held_to_another(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, what = tmp_path / "run", prune_recipe(model, "export", require=("macs_ratio<=0.1",))
    report = stages.run_recipe(what, out=out).report
    assert report is not None
    rejected = {"pruned.pt.rejected", "model.onnx.rejected"}
    names = {path.name for path in out.iterdir()}
    assert rejected <= names
    assert not {"pruned.pt", "model.onnx"} & names
    assert {"plan.json", "base.onnx"} <= names
    kept = json.loads((out / "report.json").read_text())["artifacts"]
    assert (kept["model"], kept["onnx"]) == ("pruned.pt.rejected", "model.onnx.rejected")
    monkeypatch.setattr(stages, "STAGES", {})  # nothing runs again
    again = stages.run_recipe(what.model_copy(update={"require": ("macs_ratio<=0.9",)}), out=out).report
    assert again is not None
    assert again.artifacts["model"] == str((out / "pruned.pt").resolve())
    assert not rejected & {path.name for path in out.iterdir()}
    load_bundle(out / "pruned.pt")


def test_without_calibration_images_the_error_says_what_to_pass(tmp_path: Path) -> None:
    foreign = recipe(
        PRUNE,
        model={"source": "timm:lcnet_050", "random_weights": True},
        device="cpu",
        out=str(tmp_path / "run"),
    )
    with pytest.raises(InputError, match="--data"):
        stages.run_recipe(foreign)


def test_fine_tuning_is_taught_by_the_base_and_selected_on_validation(model: Path, tmp_path: Path) -> None:
    tune = {"finetune": {"epochs": 1, "lr": 0.02, "warmup_epochs": 0.1}}
    outcome = stages.run_recipe(prune_recipe(model, tune), out=tmp_path / "run")
    assert [m.label for m in outcome.report.measurements] == ["base", "pruned", "tuned"]
    assert 0 <= outcome.report.selection["tuned"]["val_top1"] <= 1
    tuned = load_bundle(outcome.folder / "tuned.pt")
    pruned = load_bundle(outcome.folder / "pruned.pt")
    assert tuned.layout.shapes == pruned.layout.shapes
    assert any(
        not torch.equal(a, b) for a, b in zip(tuned.net.parameters(), pruned.net.parameters(), strict=True)
    )
    alone = recipe(tune, model={"source": str(outcome.folder / "pruned.pt")}, device="cpu")
    verb = stages.run_recipe(alone, out=tmp_path / "verb")
    assert [m.label for m in verb.report.measurements] == [
        "base",
        "pruned",
        "tuned",
    ]  # its file knows its base


def test_the_printed_report_has_absolute_paths_and_the_file_relative_ones(model: Path) -> None:
    outcome = stages.run_recipe(prune_recipe(model))
    printed = report_to_json(outcome.report)
    assert Path(printed["artifacts"]["model"]).is_absolute()
    written = json.loads((outcome.folder / "report.json").read_text())
    assert written["artifacts"]["model"] == "pruned.pt"
    assert printed["artifacts"]["onnx"] is None


def test_an_unlabelled_folder_calibrates_and_its_accuracy_is_null_with_the_reason(
    model: Path, tmp_path: Path
) -> None:
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(20):
        pixels = (255 * torch.rand(28, 28, generator=generator)).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    what = prune_recipe(model, data={"path": str(folder)})
    report = stages.run_recipe(what, out=tmp_path / "run").report
    assert report.measurements[0].top1 is None
    assert report.measurements[0].reasons["top1"]
    tune = {"finetune": {"epochs": 1}}
    with pytest.raises(InputError, match="labels"):
        stages.run_recipe(prune_recipe(model, tune, data={"path": str(folder)}), out=tmp_path / "tuned")


def class_folders(root: Path, *, classes: int = 3, each: int = 14) -> Path:
    """Drawn 28 px images: a class is where the bright bar stands."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(each):
            pixels = (100 * torch.rand(28, 28, generator=generator)).to(torch.uint8)
            pixels[:, 8 * label : 8 * label + 6] += 150
            Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return root


def test_a_model_knows_its_data_from_any_folder_and_changed_data_are_not_taken_for_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = class_folders(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    training = recipe(TRAIN, model=WIDTH, data={"path": "photos", "batch_size": 8}, device="cpu")
    base = stages.run_recipe(training, out=tmp_path / "trained").folder / "base.pt"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = tmp_path / "run"
    report = stages.run_recipe(prune_recipe(base), out=out).report
    assert report.data["path"] == str(photos)
    assert report.measurements[0].split == "test"
    next((photos / "class0").glob("*.png")).unlink()
    plan = out / "plan.json"
    plan.unlink()
    again = stages.run_recipe(prune_recipe(base), out=out).report
    assert plan.is_file()
    assert again.data["fingerprint"] != report.data["fingerprint"]


def test_what_is_refused_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    for wrong in (
        recipe(PRUNE, model={"source": str(tmp_path / "missing.pt")}),
        prune_recipe(model, data={"path": str(tmp_path / "nowhere")}),
        recipe({"prune": {"plan": str(tmp_path / "no-plan.json")}}, model={"source": str(model)}),
        recipe({"fold": {"gates": ["nothing"]}}, model={"source": str(model)}),  # known once it is loaded
    ):
        with pytest.raises(InputError):
            stages.run_recipe(wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_run_folder_that_is_a_file_is_an_input_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="can't be used"):
        stages.run_recipe(prune_recipe(model), out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_plan_keeps_the_evidence_that_it_was_made_by(model: Path, tmp_path: Path) -> None:
    by_l2 = {"prune": {**PRUNE["prune"], "criterion": "l2"}}
    dry = recipe(by_l2, model={"source": str(model)}, device="cpu")
    folder = stages.run_recipe(dry, out=tmp_path / "dry", dry_run=True).folder
    applied = recipe(
        {"prune": {"plan": str(folder / "plan.json")}}, model={"source": str(model)}, device="cpu"
    )
    report = stages.run_recipe(applied, out=tmp_path / "run").report
    assert report.criterion == "l2"
    assert all(row.evidence.startswith("L2") for row in report.groups if row.role != "frozen")
    assert any(row.mean_excitation is not None for row in report.groups)


def test_a_pruned_foreign_net_is_fine_tuned_with_its_base_as_teacher(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(load_bundle(model).net.state_dict(), weights)
    foreign = {"source": str(weights), "arch": "sepress:se_resnet8", "kwargs": WIDTH["kwargs"]}
    pruned = stages.run_recipe(recipe(PRUNE, model=foreign, **DIGITS), out=tmp_path / "pruned")
    teachers: list[Any] = []
    plain = stages.train
    monkeypatch.setattr(
        stages, "train", lambda *args, **named: teachers.append(named["teacher"]) or plain(*args, **named)
    )
    tune = recipe(
        {"finetune": {"epochs": 1, "lr": 0.02}},
        model={"source": str(pruned.folder / "pruned.pt")},
        device="cpu",
        require=["macs_ratio<=0.5"],
    )
    report = stages.run_recipe(tune, out=tmp_path / "tuned").report
    (teacher,) = teachers
    assert sum(p.numel() for p in teacher.parameters()) == report.measurements[0].params
    assert report.constraints[0]["passed"] is True


def test_a_net_whose_output_never_varies_is_not_exported_without_the_flag(
    model: Path, tmp_path: Path
) -> None:
    from sepress.bundle import save_bundle

    bundle = load_bundle(model)
    with torch.no_grad():
        bundle.net.fc.weight.zero_()
    save_bundle(bundle, tmp_path / "constant.pt")
    constant = {"source": str(tmp_path / "constant.pt")}
    with pytest.raises(CheckError, match="can't be told"):
        stages.run_recipe(recipe("export", model=constant, device="cpu"), out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.onnx"))
    allowed = recipe({"export": {"allow_vacuous": True}}, model=constant, device="cpu")
    report = stages.run_recipe(allowed, out=tmp_path / "allowed").report
    assert report.checks["onnx_parity"].passed is None
    assert report.artifacts["onnx"] is not None


def test_a_factory_of_the_users_own_is_pruned_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mynets.py").write_text(
        "from sepress.models.se_resnet import se_resnet8\n"
        "def three():\n    return se_resnet8(num_classes=3, in_chans=1, width=8)\n"
    )
    monkeypatch.chdir(tmp_path)
    what = recipe(
        PRUNE,
        model={
            "source": "mynets:three",
            "random_weights": True,
            "input_size": [1, 28, 28],
            "mean": [0.5],
            "std": [0.5],
        },
        data={"path": str(class_folders(tmp_path / "photos"))},
        device="cpu",
    )
    first = stages.run_recipe(what, out=tmp_path / "run")
    assert first.report.trained is False
    assert stages.run_recipe(what, out=tmp_path / "run").report == first.report


def test_unreadable_images_within_the_allowed_share_are_counted_and_named_in_the_report(
    model: Path, tmp_path: Path
) -> None:
    photos = class_folders(tmp_path / "photos", classes=10, each=12)
    broken = photos / "class3" / "5.png"
    broken.write_bytes(broken.read_bytes()[:60])
    data = {"path": str(photos), "allow_corrupt": 0.2, "classes": [f"class{n}" for n in range(10)]}
    what = recipe(
        {"prune": {**PRUNE["prune"], "calibration_images": 500}},
        model={"source": str(model)},
        data=data,
        device="cpu",
    )
    report = stages.run_recipe(what, out=tmp_path / "run").report
    assert report.data["corrupt"] == {"count": 1, "names": ["class3/5.png"]}


def test_the_whole_job_runs_by_mean_excitation_and_says_what_judged_the_rest(
    model: Path, tmp_path: Path
) -> None:
    by_gates = {"prune": {**PRUNE["prune"], "criterion": "mean-excitation"}}
    what = recipe(by_gates, "export", model={"source": str(model)}, device="cpu")
    report = stages.run_recipe(what, out=tmp_path / "run").report
    evidence = {row.role: row.evidence for row in report.groups}
    assert evidence["gated"].startswith("mean of ")
    assert evidence["ungated"].startswith("L2")
    assert report.criterion == "mean-excitation"
    folding = report.checks["folded_equals_constant"]
    assert (folding.passed, folding.reason) == (None, "no gate was folded in this run")
    assert all(check.passed for check in report.checks.values() if check is not folding)


def test_a_latency_table_is_planned_by_kept_and_refused_of_another_net_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = load_bundle(model).net
    table = coarse_table(trace(net, torch.zeros(1, 1, 28, 28)))
    table = replace(table, block=np.ones(len(table.block), int), fixed=np.zeros(len(table.block)))
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table.to_json()))

    def by_table(folder: str) -> Any:
        options = {"target_latency": 0.9, "round_to": 4, "min_width": 4, "calibration_images": 64}
        what = recipe(
            {"prune": {**options, "latency_table": str(path)}}, model={"source": str(model)}, device="cpu"
        )
        return stages.run_recipe(what, out=tmp_path / folder)

    outcome = by_table("run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["latency_ratio"] <= 0.9
    assert json.loads((tmp_path / "run" / "latency.json").read_text()) == table.to_json()
    assert any("by a given table" in note for note in outcome.report.notes)
    path.write_text(json.dumps({**table.to_json(), "overhead_ns": 1.0}))
    by_table("run")
    assert json.loads((tmp_path / "run/latency.json").read_text())["overhead_ns"] == 1.0
    assert json.loads((tmp_path / "run/earlier/1/latency.json").read_text()) == table.to_json()
    path.write_text(json.dumps({**table.to_json(), "net": "0" * 64}))
    monkeypatch.setattr(stages, "judge", None)  # nothing is measured
    with pytest.raises(InputError, match="of another net"):
        by_table("other")


POLARISE = {"polarise": {"epochs": 1, "lr": 0.02, "warmup_epochs": 0.1, "strength": 3.0}}


def test_a_polarised_net_is_what_is_pruned_and_its_base_teaches_and_is_compared_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = stages.run_recipe(
        recipe(POLARISE, model={"source": str(model)}, device="cpu"), out=tmp_path / "polarised"
    )
    base, polarised = outcome.report.measurements
    assert (base.label, polarised.label, base.macs) == ("base", "polarised", polarised.macs)
    cost, gates = (note for note in outcome.report.notes if "polarised" in note or "excitation" in note)
    assert "top-1 on validation" in cost
    assert gates.count("->") == 3  # its gates
    found = json.loads((outcome.folder / "run.json").read_text())["stages"][1]["facts"]["polarisation"]
    decided = {when: sum(d["closed"].values()) + sum(d["open"].values()) for when, d in found.items()}
    assert decided["before"] < decided["after"]
    assert "polarised" not in outcome.report.selection

    teachers: list[Any] = []
    plain = stages.train
    monkeypatch.setattr(
        stages, "train", lambda *args, **named: teachers.append(named["teacher"]) or plain(*args, **named)
    )
    tune = {"finetune": {"epochs": 1, "lr": 0.02, "warmup_epochs": 0.1}}
    what = recipe(PRUNE, tune, model={"source": str(outcome.folder / "polarised.pt")}, device="cpu")
    report = stages.run_recipe(what, out=tmp_path / "pruned").report
    assert [m.label for m in report.measurements] == ["base", "polarised", "pruned", "tuned"]
    assert report.measurements[0].top1 == base.top1
    weights = load_bundle(model).net.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in teachers[0].state_dict().items())
    tuned = load_bundle(tmp_path / "pruned" / "tuned.pt")
    assert tuned.lineage["base"]["path"] == str(model.resolve())
    model.unlink()  # without its base, the polarised net is one
    report = stages.run_recipe(prune_recipe(outcome.folder / "polarised.pt"), out=tmp_path / "alone").report
    assert [m.label for m in report.measurements] == ["base", "pruned"]


NO_GATE = "no excitation was found, since the net has no gate: channels are judged without it"
GATELESS = {"source": "timm:resnet10t", "random_weights": True, "input_size": 28, "num_classes": 10}


def test_a_net_without_gates_is_pruned_and_every_report_notes_that_no_excitation_was_found(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    plain = {"calibration_images": 64, "recalibration_images": 64, "compensate": False}
    by_contribution = {"prune": {"ratio": 0.3, "criterion": "contribution", **plain}}
    report = stages.run_recipe(recipe(by_contribution, model=GATELESS, **DIGITS), out=out).report
    assert NO_GATE in report.notes
    assert report.checks["masked_equals_removed"].passed is True
    assert NO_GATE in json.loads((out / "report.json").read_text())["notes"]
    assert NO_GATE in (out / "report.md").read_text()
    shown = io.StringIO()
    Console(file=shown, width=200).print(render_report(report))
    assert "No excitation was found, since the net has no gate" in shown.getvalue()
    again = recipe({"prune": {"plan": str(out / "plan.json"), **plain}}, model=GATELESS, **DIGITS)
    assert NO_GATE in stages.run_recipe(again, out=tmp_path / "again").report.notes


@pytest.mark.parametrize("kind", ["rank", "prune"])
def test_a_criterion_of_gates_needs_a_net_with_gates(kind: str, tmp_path: Path) -> None:
    settings = {"criterion": "mean-excitation", "calibration_images": 64}
    what = recipe({kind: settings | ({"ratio": 0.3} if kind == "prune" else {})}, model=GATELESS, **DIGITS)
    with pytest.raises(
        InputError, match="'mean-excitation' judges channels by their gates, and this net has"
    ):
        stages.run_recipe(what, out=tmp_path / "run")


def test_polarising_needs_labels_and_gates(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no gate"):
        stages.run_recipe(recipe(POLARISE, model=GATELESS, **DIGITS), out=tmp_path / "run")
    folder = tmp_path / "flat"
    folder.mkdir()
    from PIL import Image

    Image.new("L", (28, 28)).save(folder / "a.png")
    unlabelled = recipe(POLARISE, model={"source": str(model)}, data={"path": str(folder)}, device="cpu")
    with pytest.raises(InputError, match="polarising needs labels"):
        stages.run_recipe(unlabelled, out=tmp_path / "labels")


SMALL_STEPS = {"round_to": 4, "min_width": 4, "calibration_images": 64}


def test_a_search_within_a_constraint_prunes_to_what_holds_after_the_recipes_fine_tune(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = []
    plain = cutting.rank_channels
    monkeypatch.setattr(cutting, "rank_channels", lambda *a, **n: ranked.append(1) or plain(*a, **n))
    within = {"prune": {"within": "top1_drop<=0.05", **SMALL_STEPS}}
    tune = {"finetune": {"epochs": 1, "lr": 0.02, "warmup_epochs": 0.1}}
    what = recipe(within, tune, {"evaluate": {"split": "val"}}, model={"source": str(model)}, device="cpu")
    outcome = stages.run_recipe(what, out=tmp_path / "run")
    base, pruned, tuned = outcome.report.measurements
    assert len(ranked) == 1
    assert tuned.top1 >= base.top1 - 0.05
    assert pruned.macs < base.macs
    plan = json.loads((outcome.folder / "plan.json").read_text())
    assert plan["notes"][0] in outcome.report.notes
    held = f"keeps {pruned.macs / base.macs:.1%} of the MACs; shares tried, each fine-tuned for 1 epoch: "
    assert held in plan["notes"][0]


def test_a_constraint_that_no_smaller_net_holds_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    within = {"prune": {"within": "top1>=0.999", **SMALL_STEPS}}
    with pytest.raises(InputError, match=r"no smaller net was found that holds top1>=0\.999.* reached top1 "):
        stages.run_recipe(recipe(within, model={"source": str(model)}, device="cpu"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_constraint_that_can_not_be_told_is_refused_before_a_net_is_made(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = job.evaluate
    untold = {"top5": None, "reason": "top-5 says nothing here"}
    monkeypatch.setattr(job, "evaluate", lambda *a, **n: replace(plain(*a, **n), **untold))
    monkeypatch.setattr(cutting, "prune_channels", None)
    within = {"prune": {"within": "top5_drop<=0.01", **SMALL_STEPS}}
    with pytest.raises(InputError, match=r"can't be told on validation: .* top-5 says nothing here"):
        stages.run_recipe(recipe(within, model={"source": str(model)}, device="cpu"), out=tmp_path / "run")


def test_pruning_in_steps_ranks_anew_and_its_plan_is_of_the_net_that_was_given(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[Any] = []
    plain = cutting.train
    monkeypatch.setattr(
        cutting, "train", lambda *args, **named: teachers.append(named["teacher"]) or plain(*args, **named)
    )
    in_steps = {"prune": {"target_macs": 0.4, "steps": 2, "step_epochs": 1, **SMALL_STEPS}}
    outcome = stages.run_recipe(
        recipe(in_steps, model={"source": str(model)}, device="cpu"), out=tmp_path / "run"
    )
    (teacher,) = teachers  # between the two
    weights = load_bundle(model).net.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())
    base, pruned = outcome.report.measurements
    plan = json.loads((outcome.folder / "plan.json").read_text())
    assert pruned.macs == plan["macs_after"] <= 0.4 * base.macs
    assert "pruned in 2 steps" in plan["notes"][0]
    assert outcome.report.checks["masked_equals_removed"].passed is True
    again = recipe(
        {"prune": {"plan": str(outcome.folder / "plan.json")}}, model={"source": str(model)}, device="cpu"
    )
    applied = stages.run_recipe(again, out=tmp_path / "again")
    shapes = load_bundle(applied.folder / "pruned.pt").layout.shapes
    assert shapes == load_bundle(outcome.folder / "pruned.pt").layout.shapes


@pytest.mark.parametrize("key", ["steps", "criterion", "compensate"])
def test_a_comparison_takes_no_schedule_and_what_methods_say_is_not_said_twice(model: Path, key: str) -> None:
    values = {"steps": 2, "criterion": "l2", "compensate": False}
    prune = {"target_macs": 0.5, key: values[key]}
    what = recipe({"prune": prune}, model={"source": str(model)}, device="cpu")
    with pytest.raises(InputError, match=rf"it takes no {key}\n"):
        stages.compare_model(what, methods=["l2"], seeds=[0])


@pytest.mark.parametrize("schedule", [{"within": "top1_drop<=0.01"}, {"target_macs": 0.4, "steps": 2}])
def test_a_dry_run_is_refused_where_a_plan_depends_on_nets_that_are_made(
    model: Path, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    what = recipe({"prune": schedule}, model={"source": str(model)}, device="cpu")
    with pytest.raises(InputError, match="a dry run makes no net"):
        stages.run_recipe(what, out=tmp_path / "run", dry_run=True)
    assert not (tmp_path / "run").exists()
