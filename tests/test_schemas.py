"""What `--json` prints and what a run folder holds are as the published schemas say, and no key more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from jsonschema import Draft202012Validator
from photos import make_photos
from typer.testing import CliRunner

from sepress import cli
from sepress.errors import InputError
from sepress.schemas import SCHEMAS, get_schema

RECIPE = """
name: tiny
device: cpu
threads: 1
data: {path: photos, batch_size: 16, augment: none}
model: {source: "sepress:se_resnet8", kwargs: {width: 8}, input_size: 8}
stages:
  - train: {epochs: 1, warmup_epochs: 0, ema_decay: null}
  - rank: {criterion: l2, calibration_images: 24}
  - prune: {target_macs: 0.6, round_to: 4, min_width: 4, calibration_images: 24, recalibration_images: 24}
  - evaluate
  - export: {latency_rounds: 10}
  - precision: {fp16: true, int8: false, within: top1_drop<=1%, latency_rounds: 10}
require: [macs_ratio<=0.9, top1_drop<=0.5]
"""


def closed(schema: Any) -> Any:
    """The schema, every object of which has the keys that it names only."""
    if isinstance(schema, dict):
        found = {key: closed(value) for key, value in schema.items()}
        return found | ({"additionalProperties": False} if "properties" in schema else {})
    return [closed(value) for value in schema] if isinstance(schema, list) else schema


def check(name: str, value: Any) -> None:
    assert value["schema"] == SCHEMAS[name]["title"]
    faults = Draft202012Validator(closed(get_schema(name))).iter_errors(value)
    assert [f"{fault.json_path}: {fault.message[:200]}" for fault in faults] == []


def call(*arguments: str) -> Any:
    done = CliRunner().invoke(cli.app, arguments, prog_name="sepress")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe and images."""
    folder = tmp_path_factory.mktemp("schemas")
    make_photos(folder / "photos", train=16, val=8, test=4)
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def here(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    return work


def test_every_schema_is_one_and_names_itself() -> None:
    for name, schema in SCHEMAS.items():
        Draft202012Validator.check_schema(schema)
        assert schema["properties"]["schema"]["const"] == schema["title"]  # type: ignore[index, call-overload]
        assert call("schema", name) == schema
    with pytest.raises(InputError, match="no schema 'gone'"):
        get_schema("gone")


def test_a_schema_refuses_what_it_does_not_describe() -> None:
    plan = {"schema": "sepress.plan/2", "criterion": 3}
    faults = {fault.message for fault in Draft202012Validator(SCHEMAS["plan"]).iter_errors(plan)}
    assert "3 is not of type 'string'" in faults
    assert "'policy' is a required property" in faults


def test_a_run_prints_and_leaves_what_the_schemas_say(here: Path) -> None:
    check("dry-run", call("run", "tiny.yaml", "--dry-run", "--json"))
    report = call("run", "tiny.yaml", "--out", "made", "--json")
    check("report", report)
    assert report["variants"]
    assert report["constraints"]
    assert report["measurements"][1]["latency"]
    for name, file in (("report", "report"), ("plan", "plan"), ("ranking", "ranking"), ("run", "run")):
        check(name, json.loads(Path(f"made/{file}.json").read_text()))
    check("report", call("report", "made", "--json"))


def test_a_dry_run_of_prune_prints_a_plan(here: Path) -> None:
    model = "sepress:se_resnet8"
    arguments = ["--random-weights", "--data", "photos", "--input-size", "3,8,8", "--ratio", "0.3"]
    check("plan", call("prune", model, *arguments, "--dry-run", "--out", "planned", "--json"))


def test_inspect_and_convert_print_what_their_schemas_say(here: Path) -> None:
    check("inspection", call("inspect", "timm:test_efficientnet", "--json"))
    torch.save(timm.create_model("test_efficientnet").state_dict(), "weights.pth")
    options = ["--arch", "timm:test_efficientnet", "--out", "converted.safetensors", "--json"]
    check("convert", call("convert", "weights.pth", *options))


def test_bench_prints_what_its_schema_says(here: Path) -> None:
    size = ["--input-size", "3,8,8"]
    check(
        "bench", call("bench", "sepress:se_resnet8", "sepress:se_mobile", *size, "--rounds", "10", "--json")
    )


def test_comparisons_print_what_the_schemas_say(here: Path) -> None:
    benchmark = {
        "data": {"path": "photos", "batch_size": 16, "augment": "none"},
        "seeds": [0, 1],
        "nets": [
            {
                "name": "plain",
                "model": {"source": "sepress:se_resnet8", "kwargs": {"width": 8}, "input_size": 8},
                "train": {"epochs": 1, "warmup_epochs": 0, "ema_decay": None},
            }
        ],
        "split": "val",
        "calibration_images": 32,
        "recalibration_images": 32,
        "round_to": 4,
        "min_width": 4,
        "against": "l2",
        "compare": [{"methods": ["l2", "random"], "target_macs": [0.6]}],
    }
    Path("bench.yaml").write_text(json.dumps(benchmark))
    printed = call("benchmark", "bench.yaml", "--out", "compared", "--json")
    check("benchmark", printed)
    check("compare", printed["tables"]["plain"])
    check("compare", json.loads(Path("compared/plain/compare.json").read_text()))
