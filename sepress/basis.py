"""What a stage's results depend on, as plain values by name; two of them -> what changed, in words.

A stage whose basis is as it was, and whose files are intact, is not run again. The nets that it starts from
count by their files' digests, so what follows a stage that is run again is run again as well, and what does
not read its net is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sepress.recipe import Recipe
from sepress.types import JSON

Basis = Mapping[str, JSON]
_DIGEST = re.compile(r"[0-9a-f]{64}")
_OF_TRAINING = ("augment",)  # settings of the data that only training reads
_NEVER = ("workers", "download")  # how images are fetched changes none of them


def stage_basis(
    recipe: Recipe,
    kind: str,
    settings: Any,
    *,
    device: str,
    inputs: Mapping[str, str],
    made: Mapping[str, str],
) -> dict[str, JSON]:
    """Return all that a stage's results depend on.

    `device` is the kind that runs; `inputs` digests of the given files and the data by what they are; `made`
    digests of the files that earlier stages left and this one reads, by their roles.
    """
    data = {} if recipe.data is None else recipe.data.model_dump(mode="json")
    left_out = _NEVER if _trains(kind, settings) else (*_NEVER, *_OF_TRAINING)
    facts: dict[str, JSON] = {
        "settings": {} if settings is None else settings.model_dump(mode="json", exclude={"kind"}),
        "seed": recipe.seed,
        "device": device,
        "threads": recipe.threads,
        "model": recipe.model.model_dump(mode="json", exclude={"trust_pickle"}),
        "data": {key: value for key, value in data.items() if key not in left_out},
        "images": inputs["data"],
        "model file": inputs.get("model file"),
        "made": dict(made),
    }
    stages = {stage.kind: stage for stage in recipe.stages}
    if kind == "prune":
        facts |= {name: inputs.get(name) for name in ("plan", "latency table")}
        if "rank" in stages:  # the two write a ranking to the same file
            facts["rank"] = stages["rank"].model_dump(mode="json")
        if settings.within is not None and "finetune" in stages:
            facts["finetune"] = stages["finetune"].model_dump(mode="json")
    if kind == "precision" and "evaluate" in stages:  # what is kept is also told of the split evaluated on
        facts["evaluate"] = stages["evaluate"].model_dump(mode="json")
    return facts


def _trains(kind: str, settings: Any) -> bool:
    shapes = kind == "prune" and (settings.within is not None or settings.step_epochs)
    return bool(shapes) or kind in ("train", "polarise", "finetune")


def differences(old: Basis, new: Basis) -> list[str]:
    """Say what is no longer as it was: `settings.opset (17, now 18)`, `made.base`."""
    before, after = _flat(old), _flat(new)
    found = []
    for key in dict.fromkeys((*before, *after)):
        a, b = before.get(key), after.get(key)
        if a != b:
            told = not any(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (a, b))
            found.append(f"{key} ({a}, now {b})" if told else key)
    return found


def _flat(value: JSON, path: str = "") -> dict[str, JSON]:
    if not isinstance(value, Mapping):
        return {path: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in _flat(part, f"{path}.{name}" if path else str(name)).items()
    }
