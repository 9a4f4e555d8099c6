"""Our groups beside torch-pruning's, channel by channel, and what each difference does to the net when cut.

A difference is judged by pruning: our unit by our own check, theirs by its own pruner on a copy, whose
outputs must be those of the net with the removed channels zero where layers read them (hooks on modules,
nothing of sepress). All in float64.
"""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sepress.baselines import PeerGroup, SecondOpinion, Slot, coupled_channels
from sepress.coupling import Coupling, apply_removal, check_removal, trace
from sepress.types import CouplingGroup

TOLERANCE = 1e-4  # of the outputs' spread over images, as in the engine's own check
OUTPUT = "network output"
MOST_CUT = 8  # units of torch-pruning's that one difference is judged by

Unit = frozenset[Slot]


@dataclass(frozen=True)
class Difference:
    """Units that overlap and are not the same, told by the first of many alike."""

    times: int
    ours: tuple[Unit, ...]
    theirs: tuple[Unit, ...]
    we_say: str  # 'exact', 'frozen: why', 'none', or what failed
    they_say: str  # 'exact', 'none', or what failed
    verdict: str


@dataclass(frozen=True)
class Comparison:
    same: int  # units
    differences: tuple[Difference, ...]

    @property
    def ours_to_answer(self) -> tuple[Difference, ...]:
        """What torch-pruning has right and we have not, or nobody has shown wrong."""
        return tuple(d for d in self.differences if d.verdict.startswith("ours"))


def compare(net: nn.Module, images: Tensor) -> Comparison:
    """Compare the groups of a net in eval mode; raises what torch-pruning raises where it can't trace."""
    net, images = copy.deepcopy(net).double().eval(), images.double()
    coupling = trace(net, images[:1])
    kept = outputs_of(coupling)
    opinion = SecondOpinion(net, images[:1], kept=kept)
    theirs = {unit: (group, outputs) for group in opinion.groups() for outputs, unit in group.units.items()}
    ours = {
        unit: (group, number)
        for group in coupling.groups
        if group.frozen_because != OUTPUT
        for number, unit in enumerate(coupled_channels(net, group))
        if unit
    }
    alike = {unit for unit in ours.keys() & theirs.keys() if ours[unit][0].role != "frozen"}
    same = len(alike)
    judge = _Judge(net, images, coupling, kept)
    differences = []
    for mine, other, times in _alike(ours.keys() - alike, theirs.keys() - alike):
        asked = {opinion.goes_with(theirs[unit][0].root, theirs[unit][1]): theirs[unit] for unit in other}
        if (
            asked.keys() == set(mine) and ours[mine[0]][0].role != "frozen"
        ):  # the full group told only some of it
            same += times * len(mine)
            continue
        we_say = judge.ours(*ours[mine[0]]) if mine else "none"
        they_say = "exact" if asked else "none"
        for group, unit in itertools.islice(asked.values(), MOST_CUT):
            if they_say == "exact":
                they_say = judge.theirs(group, unit)
        verdict = _verdict(mine, tuple(asked), we_say, they_say)
        differences.append(Difference(times, mine, tuple(asked), we_say, they_say, verdict))
    return Comparison(same, tuple(differences))


def outputs_of(coupling: Coupling) -> tuple[str, ...]:
    """The layers that make the outputs."""
    return tuple(
        name
        for group in coupling.groups
        if OUTPUT in (group.frozen_because or "")
        for name in group.producers
    )


def _verdict(mine: Sequence[Unit], other: Sequence[Unit], we_say: str, they_say: str) -> str:
    if they_say not in ("exact", "none"):
        return f"torch-pruning: {re.split('[:0-9]', they_say)[0].strip()}"
    if we_say == "exact" and they_say == "none":
        return "torch-pruning: leaves out what can go"
    if we_say == "exact" and any(mine[0] < unit for unit in other):
        return "torch-pruning: takes more than must go"
    if we_say == "exact" and not any(unit < mine[0] for unit in other):
        return "both: another cut of the same channels"
    return "ours to answer"


def _alike(
    mine: Iterable[Unit], other: Iterable[Unit]
) -> Iterator[tuple[tuple[Unit, ...], tuple[Unit, ...], int]]:
    """Units that overlap, if through others: of the sets on the same layers the first, and how many."""
    members: dict[Slot, list[tuple[bool, Unit]]] = {}
    for theirs, units in ((False, mine), (True, other)):
        for unit in units:
            for slot in unit:
                members.setdefault(slot, []).append((theirs, unit))
    seen: set[tuple[bool, Unit]] = set()
    found: dict[object, list[tuple[tuple[Unit, ...], tuple[Unit, ...]]]] = {}
    for slot in sorted(members):
        stack = [node for node in members[slot] if node not in seen]
        cluster = []
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            cluster.append(node)
            stack.extend(near for part in node[1] for near in members[part] if near not in seen)
        if cluster:
            sides = tuple(
                tuple(sorted((unit for theirs, unit in cluster if theirs is side), key=sorted))
                for side in (False, True)
            )
            found.setdefault(tuple(frozenset(_layers(units)) for units in sides), []).append(sides)
    for sets in found.values():
        yield *sets[0], len(sets)


def _layers(units: Iterable[Unit]) -> set[tuple[str, str]]:
    return {(name, side) for unit in units for name, side, _ in unit}


class _Judge:
    """Prunes one unit at a time, by either side, and says what came of it."""

    def __init__(self, net: nn.Module, images: Tensor, coupling: Coupling, kept: Sequence[str]) -> None:
        self.net, self.images, self.coupling, self.kept = net, images, coupling, kept

    def ours(self, group: CouplingGroup, unit: int) -> str:
        if group.role == "frozen":
            return f"frozen: {group.frozen_because}"
        if group.units < 2:
            return "the last unit"
        removed = {group.name: (unit,)}
        pruned = copy.deepcopy(self.net)
        apply_removal(pruned, self.coupling, removed)
        check, _ = check_removal(self.net, pruned, self.coupling, removed, self.images)
        return "exact" if check.passed else f"check failed: {check.reason or check.relative_error}"

    def theirs(self, group: PeerGroup, outputs: Sequence[int]) -> str:
        opinion = SecondOpinion(self.net, self.images[:1], kept=self.kept)
        try:
            gone = opinion.cut(group.root, outputs)
        except Exception as error:  # noqa: BLE001  (what it raises is its answer)
            return f"its pruner fails: {brief(error)}"
        return judge(self.net, opinion.net, gone, self.images)


def judge(net: nn.Module, pruned: nn.Module, gone: Iterable[Slot], images: Tensor) -> str:
    """'exact', or how the pruned net fails, or by how much it differs from the masked one."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            removed = outputs(pruned(images))
        except Exception as error:  # noqa: BLE001  (what it raises is the answer)
            return f"the forward fails: {brief(error)}"
        with masked(net, gone):
            wanted = outputs(net(images))
    if [x.shape for x in wanted] != [x.shape for x in removed]:
        return "the outputs' shape changed"
    error = max(
        float((a - b).abs().max() / (a - a.mean(0)).abs().max()) for a, b in zip(wanted, removed, strict=True)
    )
    return "exact" if error <= TOLERANCE else f"differs from the masked net by {error:.1g} of its spread"


def outputs(result: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]


def masked(net: nn.Module, gone: Iterable[Slot]) -> ExitStack:
    """A net whose convolutions and linear layers read zeros where channels are gone."""
    inputs: dict[str, list[int]] = {}
    for name, side, index in gone:
        if side == "in":
            inputs.setdefault(name, []).append(index)
    hooks = ExitStack()
    for name, channels in inputs.items():
        module = net.get_submodule(name)
        axis = -1 if isinstance(module, nn.Linear) else 1

        def zero(
            _module: nn.Module, args: tuple[Any, ...], axis: int = axis, channels: list[int] = channels
        ) -> Any:
            return (args[0].index_fill(axis, torch.tensor(channels), 0), *args[1:])

        hooks.callback(module.register_forward_pre_hook(zero).remove)
    return hooks


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:120]


def summary(comparison: Comparison) -> Counter[str]:
    """How many units, by verdict."""
    counts: Counter[str] = Counter({"same": comparison.same})
    for difference in comparison.differences:
        counts[difference.verdict] += difference.times
    return counts
