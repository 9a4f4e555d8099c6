"""Runs of a recipe that die by SIGKILL at the n-th change they make to their folder, and what comes of them.

`python tests/killed.py RECIPE FOLDER POINTS` counts the changes of an undisturbed run (files opened for
writing, renamed, removed), then kills a run at each of POINTS changes spread evenly over them, starts it
again, and prints a JSON line a run: where it died, what was reused, and digests of its plan and weights.
`python tests/killed.py RECIPE FOLDER POINTS --at random` kills at random moments of the run's time instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from sepress import console
from sepress.digests import tensor_digest
from sepress.recipe import load_recipe
from sepress.stages import run_recipe

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def changes_in(folder: Path, event: str, args: tuple[Any, ...]) -> bool:
    """Whether an audit event is a change to a file of the folder."""
    if event == "open":
        path, _, flags = args
        changes = isinstance(path, str) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    else:
        path, changes = args[0] if args else None, event in CHANGES
    return changes and isinstance(path, str | os.PathLike) and str(path).startswith(str(folder))


def in_child(work: Any) -> tuple[int, dict[str, Any]]:
    """Run `work` in a forked child; returns its wait status and the JSON object that it gave."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.write(writing, json.dumps(work()).encode())
        except BaseException:  # noqa: BLE001 - a forked child must not go on as its parent
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    return os.waitpid(child, 0)[1], json.loads(text or b"{}")


def run(recipe: str, folder: Path, *, die_at: int | None = None) -> dict[str, Any]:
    """Run the recipe in the folder; dies at that change to it, else tells what was made."""
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if changes_in(folder, event, args):
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    lines: list[str] = []
    console.log = lines.append  # type: ignore[assignment]
    start = time.perf_counter()
    run_recipe(load_recipe(recipe), out=folder)
    made = {}
    for path in sorted(folder.glob("*.pt")):
        content = torch.load(path, weights_only=True)
        tensors = next(v for v in content.values() if isinstance(v, dict) and _are_tensors(v))
        made[path.name] = tensor_digest(tensors)
    made["plan.json"] = hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
    return {
        "changes": count,
        "seconds": time.perf_counter() - start,
        "made": made,
        "reused": sum("reused" in line for line in lines),
        "left over": sorted(path.name for path in folder.iterdir() if ".partial-" in path.name),
        "earlier": (folder / "earlier").exists(),
    }


def _are_tensors(value: dict[Any, Any]) -> bool:
    return bool(value) and all(isinstance(item, torch.Tensor) for item in value.values())


def killed_after(recipe: str, folder: Path, seconds: float) -> None:
    """Run in a child that is killed from outside after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            run(recipe, folder)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("points", type=int)
    parser.add_argument("--at", choices=("changes", "random"), default="changes")
    typed = parser.parse_args()
    torch.set_num_threads(1)
    folder = typed.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)  # so that every run makes the same changes
    _, whole = in_child(lambda: run(typed.recipe, folder / "whole"))
    print(json.dumps(whole), flush=True)
    draw = random.Random(0)
    for number in range(typed.points):
        out = folder / str(number)
        if typed.at == "random":
            at: float = draw.uniform(0, whole["seconds"])
            killed_after(typed.recipe, out, at)
        else:
            at = 1 + number * (whole["changes"] - 1) // max(1, typed.points - 1)
            status, _ = in_child(lambda out=out, at=at: run(typed.recipe, out, die_at=at))
            assert os.WIFSIGNALED(status), f"change {at} of {whole['changes']} was never made"
        status, again = in_child(lambda out=out: run(typed.recipe, out))
        print(json.dumps({"at": at, "status": status, **again}), flush=True)


if __name__ == "__main__":
    main()
