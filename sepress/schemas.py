"""JSON Schemas (draft 2020-12) of what `--json` prints and what run folders hold, by name.

A reader may rely on every key that a schema requires, and must ignore keys that it doesn't know: they may be
added within a schema number. What changes or goes away raises the number. `sepress schema NAME` prints one.
"""

from __future__ import annotations

from collections.abc import Mapping

from sepress.errors import InputError
from sepress.types import JSON

DRAFT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, JSON]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
ANY_OBJECT: Schema = {"type": "object"}
ROLE: Schema = {"enum": ["gated", "ungated", "se_hidden", "frozen"]}
TARGET: Schema = {"enum": ["ratio", "target_macs", "target_params", "target_latency"]}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _object(*, optional: Mapping[str, Schema] | None = None, **required: Schema) -> Schema:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def _document(name: str, what: str, /, **required: Schema) -> Schema:
    named = {"schema": {"const": name}, **required}
    return {"$schema": DRAFT, "title": name, "description": what, **_object(**named)}


TIMES = {
    "median_ms": NUMBER,
    "p10_ms": NUMBER,
    "p90_ms": NUMBER,
    "ratio": NUMBER,  # median over rounds of this time by that of `ratio_to` in the same round
    "ratio_p10": NUMBER,
    "ratio_p90": NUMBER,
    "ratio_low": NUMBER,  # the 95 % interval of the ratio
    "ratio_high": NUMBER,
    "ratio_to": TEXT,
    "verdict": _maybe({"enum": ["faster", "same", "slower", "unclear"]}),
    "rounds": COUNT,
    "noisy": FLAG,
}
CONDITIONS = {
    "runtime": TEXT,
    "provider": _maybe(TEXT),
    "threads": _maybe(COUNT),
    "batch": COUNT,
    "input_shape": _list(COUNT),
    "cpu": _maybe(TEXT),
    "cores": _maybe(COUNT),
    "cpu_mhz": _maybe(_list(NUMBER)),  # before and after
    "governor": _maybe(TEXT),
    "load_average": _maybe(_list(NUMBER)),
    "gpu": _maybe(TEXT),
    "gpu_mhz": _maybe(_list(NUMBER)),
    "reasons": _map(TEXT),  # why a condition is null
}
LATENCY = _object(**TIMES, **CONDITIONS)
MEASUREMENT = _object(  # a null has its reason under its name in `reasons`
    optional={"per_class": _map(SHARE)},
    label=TEXT,
    split=_maybe(TEXT),
    n=_maybe(COUNT),
    top1=_maybe(SHARE),
    top5=_maybe(SHARE),
    loss=_maybe(NUMBER),
    macs=_maybe(COUNT),
    params=_maybe(COUNT),
    bytes=_maybe(COUNT),
    latency_ms=_maybe(NUMBER),
    latency=_maybe(LATENCY),
    reasons=_map(TEXT),
)
CHECK = _object(
    passed=_maybe(FLAG),  # null: vacuous, or not made, as `reason` says
    relative_error=_maybe(NUMBER),
    reason=_maybe(TEXT),
    argmax_agreement=_maybe(SHARE),
)
CONSTRAINT = _object(
    constraint=TEXT, actual=_maybe(NUMBER), passed=FLAG, reason=_maybe(TEXT), figures=_maybe(TEXT)
)
GROUP_ROW = _object(
    name=TEXT,
    role=ROLE,
    width_before=COUNT,
    width_after=COUNT,
    evidence=TEXT,
    mean_excitation=_maybe(NUMBER),
    excitation=_maybe(_list(NUMBER)),
    frozen_because=_maybe(TEXT),
)
VARIANT = _object(
    precision=TEXT,
    kept=FLAG,
    how=TEXT,
    reason=TEXT,
    agreement=_maybe(SHARE),
    validation=MEASUREMENT,
    final=_maybe(MEASUREMENT),
)
DIFFERENCE = _object(
    mean=NUMBER,
    se_seeds=_maybe(NUMBER),
    se_images=NUMBER,
    mcnemar=_map(SHARE),  # seed -> p
    se=NUMBER,
    beyond_two_se={"enum": [-1, 0, 1]},
)
PHASES = ("one_shot", "recalibrated", "tuned")
COMPARISON = _document(
    "sepress.compare/2",
    "Methods compared on one net: means over seeds, and every cell.",
    model=TEXT,
    trained=FLAG,
    settings=ANY_OBJECT,
    reference=TEXT,
    bases=_list(_object(seed=COUNT, weights=TEXT, top1=SHARE, n=COUNT, macs=COUNT, params=COUNT)),
    rows=_list(
        _object(
            method=TEXT,
            target=TARGET,
            value=NUMBER,
            seeds=_list(COUNT),
            macs_ratio=NUMBER,
            params_ratio=NUMBER,
            **{phase: _maybe(SHARE) for phase in PHASES},
            **{f"{phase}_std": _maybe(NUMBER) for phase in PHASES},
            drop=_maybe(NUMBER),
            against=_map(DIFFERENCE),
        )
    ),
    cells=_list(
        _object(
            method=TEXT,
            target=TARGET,
            value=NUMBER,
            seed=COUNT,
            macs_ratio=NUMBER,
            params_ratio=NUMBER,
            **{phase: _maybe(SHARE) for phase in PHASES},
            seconds=NUMBER,
            unchecked=_maybe(TEXT),
        )
    ),
    environment=ANY_OBJECT,
)

SCHEMAS: dict[str, Schema] = {
    "report": _document(
        "sepress.report/1",
        "What a run found: report.json, and `--json` of train, polarise, rank, prune, fold, finetune, "
        "evaluate, export, report and run.",
        name=TEXT,
        measurements=_list(MEASUREMENT),
        groups=_list(GROUP_ROW),
        checks=_map(CHECK),
        artifacts=_map(_maybe(TEXT)),
        environment=ANY_OBJECT,
        criterion=TEXT,
        constraints=_list(CONSTRAINT),
        variants=_list(VARIANT),
        trained=FLAG,
        selection=_map(ANY_OBJECT),
        notes=_list(TEXT),
        recipe=ANY_OBJECT,
        data=ANY_OBJECT,
        preprocessing=ANY_OBJECT,
    ),
    "plan": _document(
        "sepress.plan/2",
        "Which units go: plan.json, and `--json` of a dry run of prune. No other keys are read.",
        criterion=TEXT,
        policy=_object(
            **{name: _maybe(NUMBER) for name in ("ratio", "target_macs", "target_params", "target_latency")},
            scope={"enum": ["auto", "per-group", "global", "isomorphic", "knapsack"]},
            round_to=COUNT,
            min_width=COUNT,
            gated_only=FLAG,
            eca_neighbours=FLAG,
            frozen=_list(TEXT),
            overrides=_map(SHARE),
        ),
        macs_before=COUNT,
        macs_after=COUNT,
        params_before=COUNT,
        params_after=COUNT,
        latency_ratio=_maybe(NUMBER),
        groups=_list(
            _object(
                name=TEXT, width_before=COUNT, width_after=COUNT, removed=_list(COUNT), evidence=_maybe(TEXT)
            )
        ),
        notes=_list(TEXT),
    ),
    "dry-run": _document(
        "sepress.dry-run/1", "What `sepress run --dry-run` would do.", recipe=ANY_OBJECT, steps=_list(TEXT)
    ),
    "ranking": _document(
        "sepress.ranking/1",
        "A score a unit: ranking.json. A higher one stays.",
        trained=FLAG,
        criterion=TEXT,
        scores=_map(_list(NUMBER)),
        evidence=_map(TEXT),
        mean_excitation=_map(_list(NUMBER)),
        warnings=_list(TEXT),
        costs=_map(_list(NUMBER)),
    ),
    "inspection": _document(
        "sepress.inspection/2",
        "What is gated, coupled and frozen: `sepress inspect`. Made channels are output channels of layers.",
        model=TEXT,
        input_size=_list(COUNT),
        trained=FLAG,
        macs=COUNT,
        params=COUNT,
        channels=_object(
            gated=COUNT, ungated=COUNT, se_hidden=COUNT, frozen=COUNT, outputs=COUNT, free_share=SHARE
        ),
        gates=_list(
            _object(name=TEXT, kind=TEXT, channels=COUNT, activation=TEXT, producer=TEXT, group=TEXT)
        ),
        groups=_list(
            _object(
                name=TEXT,
                role=ROLE,
                width=COUNT,
                units=COUNT,
                made_channels=COUNT,
                touched_macs=COUNT,
                gates=_list(TEXT),
                producers=_list(TEXT),
                reasons=_list(_object(what=TEXT, module=TEXT, why=_maybe(TEXT))),
            )
        ),
        unfollowed=_list(_object(layer=TEXT, made_channels=COUNT, what=TEXT)),
    ),
    "convert": _document(
        "sepress.convert/1",
        "The file that `sepress convert` wrote, and what was chosen on the way.",
        path=TEXT,
        reference=TEXT,
        kwargs=ANY_OBJECT,
        input_size=_list(COUNT),
        preprocessing=TEXT,
        parameters=COUNT,
        notes=_list(TEXT),
    ),
    "bench": _document(
        "sepress.bench/1",
        "Models timed beside each other: `sepress bench --json`.",
        rows=_list(
            _object(
                **TIMES,
                **CONDITIONS,
                label=TEXT,
                images_per_s=NUMBER,
                peak_bytes=_maybe(COUNT),
            )
        ),
        notes=_list(TEXT),
    ),
    "compare": COMPARISON,
    "benchmark": _document(
        "sepress.benchmark/1", "The comparisons of a benchmark by name.", tables=_map(COMPARISON)
    ),
    "latency-table": _document(
        "sepress.latency-table/1",
        "What a net's layers take: `sepress profile`.",
        net=TEXT,
        overhead_ns=NUMBER,
        layers=_map({"type": "array"}),
        conditions=ANY_OBJECT,
        validation=ANY_OBJECT,
    ),
    "run": _document(
        "sepress.run/2",
        "What finished in a run folder, on what basis: run.json.",
        stages=_list(
            _object(stage=TEXT, artifacts=_map(TEXT), facts=ANY_OBJECT, digests=_map(TEXT), basis=ANY_OBJECT)
        ),
        begun=_maybe(_object(stage=TEXT, basis=ANY_OBJECT)),
    ),
}


def get_schema(name: str) -> Schema:
    """Return the JSON Schema of that name; InputError lists the known ones."""
    try:
        return SCHEMAS[name]
    except KeyError:
        raise InputError(f"no schema '{name}'", remedy=f"Known: {', '.join(SCHEMAS)}.") from None
