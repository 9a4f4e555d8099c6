"""What the finished stages of a run found -> its Report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sepress.constraints import evaluate, parse_constraint
from sepress.job import SAVED_CHECK, Job
from sepress.measure import count_macs, count_params, environment
from sepress.types import JSON, Check, GroupRow, Measurement, Report, Variant


def build_report(job: Job) -> Report:
    """Put together what the finished stages found; every figure that is missing says why."""
    labels = job.labels
    example = job.example()
    source = Path(job.recipe.model.source)
    artifacts = {
        "model": job.artifact(labels[-1]) or (source if source.is_file() else None),
        "onnx": job.artifact("onnx"),
        "onnx_fp16": job.artifact("onnx_fp16"),
        "onnx_int8": job.artifact("onnx_int8"),
        "plan": job.artifact("plan"),
        "latency_table": job.artifact("latency_table"),
        "ranking": job.artifact("ranking"),
        "base_onnx": job.artifact("base_onnx"),
        "image_onnx": job.artifact("image_onnx"),
        "example": job.artifact("example"),
        "report": job.folder.file("report.json"),
        "report_md": job.folder.file("report.md"),
        "recipe": job.folder.file("recipe.yaml"),
    }
    inside = job.fact("image_parity")
    report = Report(
        name=job.recipe.name,
        measurements=tuple(_measurement(job, label, example) for label in labels),
        groups=tuple(_group_row(fact) for fact in job.fact("groups") or ()),
        checks={
            "masked_equals_removed": _check(
                job.fact("masked_equals_removed"), "nothing was pruned in this run"
            ),
            "onnx_parity": _check(job.fact("onnx_parity"), "nothing was exported in this run"),
            **({} if inside is None else {"image_parity": Check(**inside)}),
            "folded_equals_constant": _check(
                job.fact("folded_equals_constant"), "no gate was folded in this run"
            ),
            SAVED_CHECK: _check(job.fact(SAVED_CHECK), "no model was saved in this run"),
        },
        artifacts={role: None if path is None else str(path.resolve()) for role, path in artifacts.items()},
        environment=environment() | {"device": str(job.device), "seed": job.recipe.seed},
        criterion=job.fact("criterion") or "",  # where nothing was ranked
        recipe=job.recipe.model_dump(mode="json", exclude={"out"}),
        variants=tuple(_variant(fact) for fact in job.fact("variants") or ()),
        notes=job.notes,
        trained=bool(job.fact("trained")),
        selection=job.newest.lineage.get("selection", {}),
        data=_data(job),
        preprocessing=dataclasses.asdict(job.spec.preprocessing),
    )
    results = [evaluate(parse_constraint(text), report) for text in job.recipe.require]
    return dataclasses.replace(report, constraints=tuple(result.to_json() for result in results))


def _measurement(job: Job, label: str, example: Tensor) -> Measurement:
    net = job.bundle(label).net
    accuracy = (job.fact("accuracy") or {}).get(label)
    size = (job.fact("bytes") or {}).get(label)
    latency = (job.fact("latency") or {}).get(label)
    reasons: dict[str, str] = {}
    if accuracy is None:
        reasons |= dict.fromkeys(("split", "n", "top1", "top5", "loss"), "not evaluated in this run")
        accuracy = {}
    else:
        missing = [name for name in ("split", "n", "top1", "top5", "loss") if accuracy[name] is None]
        reasons |= dict.fromkeys(missing, accuracy["reason"])
    if size is None:
        reasons |= dict.fromkeys(("bytes", "latency_ms", "latency"), "not exported in this run")
    return Measurement(
        label=label,
        split=accuracy.get("split"),
        n=accuracy.get("n"),
        top1=accuracy.get("top1"),
        top5=accuracy.get("top5"),
        loss=accuracy.get("loss"),
        macs=count_macs(net, example),
        params=count_params(net),
        bytes=size,
        latency_ms=None if latency is None else latency["median_ms"],
        latency=latency,
        per_class=accuracy.get("per_class"),
        reasons=reasons,
    )


def _data(job: Job) -> dict[str, JSON]:
    """What is known of the images; one that was unreadable in any stage is counted, and named."""
    seen = [record.facts["data"] for record in job.records if "data" in record.facts]
    names = dict.fromkeys(name for data in seen for name in data["corrupt"]["names"])
    count = max((data["corrupt"]["count"] for data in seen), default=0)
    latest = seen[-1] if seen else job.source.describe()
    return {**latest, "corrupt": {"count": max(count, len(names)), "names": list(names)}}


def _check(fact: Mapping[str, JSON] | None, otherwise: str) -> Check:
    return Check(None, None, reason=otherwise) if fact is None else Check(**fact)


def _variant(fact: Mapping[str, JSON]) -> Variant:
    final = fact["final"]
    measured = {"validation": Measurement(**fact["validation"]), "final": final and Measurement(**final)}
    return Variant(**{**fact, **measured})


def _group_row(fact: Mapping[str, JSON]) -> GroupRow:
    excitation = fact["excitation"]
    return GroupRow(**{**fact, "excitation": None if excitation is None else tuple(excitation)})
