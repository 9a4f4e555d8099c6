"""Files changed at random: readers give what is valid or an InputError, nothing else, in little memory.

Every mutation has a seed of its own, its number, so that one that fails can be made again.
"""

from __future__ import annotations

import json
import re
import resource
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sepress.bundle import load_bundle, read_meta, save_net
from sepress.costs import coarse_table, read_table
from sepress.coupling import trace
from sepress.criteria import rank
from sepress.errors import InputError
from sepress.files import read_json
from sepress.models import build_net, build_spec
from sepress.plan import plan_from_json, plan_pruning, plan_to_json
from sepress.recipe import load_recipe
from sepress.report import report_from_json, report_to_json
from sepress.runfolder import RunFolder, StageRecord
from sepress.types import Check, GroupRow, Measurement, Policy, Report

FAST, SLOW = 60, 1500  # mutations of each kind of file
MEMORY = 256 << 20  # bytes that reading a file of a few kB may take beyond what is in use
NET = "sepress:se_resnet8"


# ---- valid files ----------------------------------------------------------------------------------
def write_model(path: Path) -> None:
    spec = build_spec(NET, num_classes=3, kwargs={"width": 8, "in_chans": 1})
    save_net(build_net(spec), path, arch=NET, kwargs={"width": 8}, lineage={"data": {"path": "digits"}})


def traced() -> Any:
    spec = build_spec(NET, num_classes=3, kwargs={"width": 8, "in_chans": 1})
    net = build_net(spec).eval()
    return net, trace(net, torch.zeros(1, 1, 8, 8))


def write_plan(path: Path) -> None:
    net, coupling = traced()
    ranking = rank(coupling, None, criterion="l2", net=net)
    policy = Policy(ratio=0.5, round_to=1, min_width=1, frozen=("fc",), overrides={"conv1": 0.25})
    path.write_text(json.dumps(plan_to_json(plan_pruning(ranking, coupling, policy=policy))))


def write_table(path: Path) -> None:
    path.write_text(json.dumps(coarse_table(traced()[1]).to_json()))


def write_report(path: Path) -> None:
    base = Measurement(
        "base", "test", 100, 0.98, 1.0, 0.1, 1000, 100, 4000, 1.5, {"median_ms": 1.5}, reasons={}
    )
    report = Report(
        name="model",
        measurements=(base, replace(base, label="pruned", top1=None, reasons={"top1": "no labels"})),
        groups=(GroupRow("conv1", "gated", 4, 4, evidence="l2", mean_excitation=0.25),),
        checks={"masked_equals_removed": Check(True, 1e-7), "onnx_parity": Check(None, None, "not exported")},
        artifacts={"model": "pruned.pt", "onnx": None},
        environment={"torch": "2"},
        criterion="l2",
        recipe={"name": "x", "stages": [{"prune": {"ratio": 0.5}}]},
        constraints=({"text": "top1_drop<=0.01", "met": True, "value": 0.0},),
        notes=("calibrated",),
        data={"path": "photos", "splits": {"train": 3}, "corrupt": {"count": 0, "names": []}, "notes": []},
        preprocessing={"input_size": [3, 8, 8], "mean": [0.5], "std": [0.5], "crop_pct": 1.0},
    )
    path.write_text(json.dumps(report_to_json(report)))


def write_run(path: Path) -> None:
    folder = RunFolder(path.parent, recipe_text="name: x\n")
    (path.parent / "base.pt").write_bytes(b"weights")
    basis = {"settings": {"lr": 0.1}, "seed": 0, "made": {}}
    folder.finish(StageRecord("train", {"base": "base.pt"}, {"notes": ["a"]}, basis=basis))
    folder.begin("evaluate", basis)
    folder.close()


def write_recipe(path: Path) -> None:
    path.write_text(
        """name: tiny
device: cpu
data: {path: photos, batch_size: 16, augment: none}
model: {source: "sepress:se_resnet8", kwargs: {width: 8}, input_size: 8}
stages:
  - train: {epochs: 2, ema_decay: 0.9, amp: off}
  - prune: {target_macs: 0.6, criterion: l2, round_to: 4}
  - evaluate
require: [top1_drop<=1%]
"""
    )


# ---- readers: path -> what was read, in a form that can be compared ---------------------------------
def read_model(path: Path) -> Any:
    header = read_meta(path)
    bundle = load_bundle(path)
    tensors = {name: tensor.numpy().tobytes() for name, tensor in bundle.net.state_dict().items()}
    return header.spec, bundle.layout.shapes, tensors


def read_foreign(path: Path) -> Any:
    """The same bytes as a foreign file is read: any weights that fit are valid."""
    net = load_bundle(path, arch=NET, kwargs={"width": 8}).net
    return sorted((name, tuple(tensor.shape)) for name, tensor in net.state_dict().items())


def read_plan(path: Path) -> Any:
    plan = plan_from_json(read_json(path, what="plan"))
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    return plan


def read_report(path: Path) -> Any:
    from sepress.report import render_report, report_to_annotations, report_to_junit, report_to_markdown

    report = report_from_json(read_json(path, what="report"))
    for render in (render_report, report_to_annotations, report_to_junit, report_to_markdown):
        render(report)  # what is read can be shown
    return report


def read_run(path: Path) -> Any:
    outside = path.parent.parent / "outside.pt"
    outside.write_bytes(b"not the run's")
    folder = RunFolder(path.parent, recipe_text="name: x\n")
    try:
        record = folder.finished("train", {"settings": {"lr": 0.2}})  # sets aside what the record names
        folder.keep_only(())
    finally:
        folder.close()
    assert outside.read_bytes() == b"not the run's"
    return record


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name, how a valid one is written, and how it is read."""

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    sealed: bool = False  # whether a digest in it makes every change of its meaning an error


KINDS = {
    "model .pt": Kind("a.pt", write_model, read_model, sealed=True),
    "model .safetensors": Kind("a.safetensors", write_model, read_model, sealed=True),
    "foreign .pt": Kind("a.pt", lambda path: torch.save(weights(), path), read_foreign),
    "foreign .safetensors": Kind("a.safetensors", lambda path: save_file(weights(), path), read_foreign),
    "plan": Kind("plan.json", write_plan, read_plan),
    "recipe": Kind("recipe.yaml", write_recipe, load_recipe),
    "report": Kind("report.json", write_report, read_report),
    "run": Kind("run.json", write_run, read_run),
    "latency table": Kind("latency.json", write_table, lambda path: read_table(path).to_json()),
}


def weights() -> dict[str, torch.Tensor]:
    spec = build_spec(NET, num_classes=3, kwargs={"width": 8, "in_chans": 1})
    return build_net(spec).state_dict()


# ---- mutations --------------------------------------------------------------------------------------
WORDS = [
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b'""', b"[]", b"{}", b"[[[[[[",
    b'{"a":' * 3000, b"[" * 20000, b"9" * 5000, b"\xff\xfe", b"\x00", b"../outside.pt", b"/etc/passwd",
    b"!!python/object/apply:os.system", b"&a [*a]", b"\n- ", b": ", b"\xf0\x9f\x92\xa9", b'"\\ud800"',
]  # fmt: skip


TOKEN = re.compile(rb'"[^"]{0,80}"|-?\d[\d.eE+-]*|\w+')


def mutated(valid: bytes, random: np.random.Generator) -> bytes:
    """One to four changes: a bit, a byte, a cut, a copy, a removal, a token for another, a nasty word."""
    data = bytearray(valid)
    for _ in range(random.integers(1, 5)):
        if not data:
            break
        # Half of all changes fall near the start, where headers are.
        end = len(data) if random.random() < 0.5 else min(len(data), 512)
        at = int(random.integers(end))
        match int(random.integers(7)):
            case 0:
                data[at] ^= 1 << int(random.integers(8))
            case 1:
                data[at] = int(random.integers(256))
            case 2:
                del data[at:]
            case 3:
                del data[at : at + int(random.integers(1, 40))]
            case 4:
                data[at:at] = data[at : at + int(random.integers(1, 200))]
            case 5:
                data[at:at] = WORDS[int(random.integers(len(WORDS)))]
            case 6:
                tokens = list(TOKEN.finditer(bytes(data[:65536])))
                if tokens:
                    target = tokens[int(random.integers(len(tokens)))]
                    other = tokens[int(random.integers(len(tokens)))].group()
                    word = other if random.random() < 0.5 else WORDS[int(random.integers(len(WORDS)))]
                    data[target.start() : target.end()] = word
    return bytes(data)


@contextmanager
def little_memory() -> Iterator[None]:
    """Let an allocation of MEMORY or more fail, which is then no InputError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(kind: str, count: int, folder: Path) -> tuple[int, int]:
    """Read so many mutations; returns how many were refused, and how many were read."""
    how = KINDS[kind]
    place = folder / "work" / how.name
    place.parent.mkdir()
    how.write(place)
    others = {path: path.read_bytes() for path in place.parent.iterdir() if path != place}
    valid = place.read_bytes()
    expected = how.read(place)
    refused = taken = 0
    for number in range(count):
        random = np.random.default_rng([number, zlib.crc32(kind.encode())])
        for path in list(place.parent.rglob("*")):
            if path.is_file():
                path.unlink()
        for path, content in others.items():
            path.write_bytes(content)
        place.write_bytes(mutated(valid, random))
        try:
            with little_memory():
                found = how.read(place)
        except InputError:
            refused += 1
            continue
        except Exception as error:
            raise AssertionError(f"{kind}, mutation {number}: {type(error).__name__}: {error}") from error
        taken += 1
        assert not how.sealed or found == expected, f"{kind}, mutation {number}: read as another"
    return refused, taken


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_changed_at_random_is_refused_or_valid(kind: str, tmp_path: Path) -> None:
    refused, _ = fuzz(kind, FAST, tmp_path)
    assert refused > FAST // 10  # or the mutations change nothing


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_files_changed_at_random_are_refused_or_valid(kind: str, tmp_path: Path) -> None:
    refused, taken = fuzz(kind, SLOW, tmp_path)
    print(f"{kind}: {refused} refused, {taken} read")
