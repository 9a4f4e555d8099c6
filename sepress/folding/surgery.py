"""A net and constants for its gates -> the net without their blocks, each fold held to what it stands for.

A fold stands when the folded net gives what the unfolded one gives with its gates held constant by taps
(gates.py), which knows nothing of weights or modules. One that does not falls back to the next placement.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sepress import console
from sepress.coupling import Coupling
from sepress.errors import CheckError
from sepress.folding.constants import Constants, constant_gates
from sepress.folding.flow import Cut, Flow, record_flow
from sepress.folding.places import Block, Placement, Where, find_block, idle_modules, placements
from sepress.models.folded import build_replacement, put_module
from sepress.modes import evaluating
from sepress.outputs import named_outputs
from sepress.parity import compare_outputs
from sepress.types import Check, Gate

FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


@dataclass(frozen=True)
class Folded:
    """One gate that is gone."""

    gate: str
    where: Where
    parameters: tuple[str, ...]  # that hold its constant now
    replaced: tuple[str, ...]  # modules that gave way


@dataclass(frozen=True)
class Folding:
    """A net without the blocks of some gates, and the check that it is what it should be."""

    net: nn.Module
    folded: tuple[Folded, ...]
    refused: Mapping[str, str]  # gate -> why its fold could not stand
    check: Check  # of the net as a whole


@dataclass(frozen=True)
class Structure:
    """What folding needs to know of a net, read off one forward of it."""

    net: nn.Module  # stays as it is
    coupling: Coupling
    flow: Flow
    blocks: Mapping[str, Block]  # of the gates that can be folded
    unfoldable: Mapping[str, str]  # the other gates -> why

    def gate(self, name: str) -> Gate:
        return next(gate for gate in self.coupling.gates if gate.name == name)

    def cut(self, name: str) -> Cut:
        """Where the gate's excitation is read."""
        site = self.gate(name).site
        return site.index, site.operand


def find_structure(net: nn.Module, coupling: Coupling, example: Tensor) -> Structure:
    """Find the blocks of a traced net's gates; `example` is one input (1, ...)."""
    flow = record_flow(net, coupling, example)
    found = {gate.name: find_block(net, flow, gate) for gate in coupling.gates}
    return Structure(
        net=net,
        coupling=coupling,
        flow=flow,
        blocks={name: block for name, block in found.items() if isinstance(block, Block)},
        unfoldable={name: why for name, why in found.items() if isinstance(why, str)},
    )


def fold_constants(
    structure: Structure, constants: Constants, images: Tensor, *, allow_vacuous: bool = False
) -> Folding:
    """Fold the gates named on a copy of the net, in order; a fold that no check confirms is left out.

    `images` (n, ...) are real inputs on the net's device. Raises CheckError where they tell nothing.
    """
    net = copy.deepcopy(structure.net)
    done: dict[str, Tensor] = {}
    folded: list[Folded] = []
    refused: dict[str, str] = {}
    check = Check(None, None, reason="no gate was folded")
    for name, constant in console.track(constants.items(), "folding gates"):
        outcome = _fold_one(structure, net, name, {**done, name: constant}, images, allow_vacuous)
        if isinstance(outcome, str):
            refused[name] = outcome
        else:
            step, check = outcome
            folded.append(step)
            done[name] = constant
    return Folding(net, tuple(folded), refused, check)


def _fold_one(
    structure: Structure, net: nn.Module, name: str, constants: Constants, images: Tensor, allow_vacuous: bool
) -> tuple[Folded, Check] | str:
    """Try a gate's placements on `net`, in place, until one passes; the last of `constants` is the gate's."""
    gate, block = structure.gate(name), structure.blocks[name]
    cuts = [structure.cut(other) for other in constants]
    like = next(net.parameters())
    idle = [
        path for path in idle_modules(structure.net, structure.flow, cuts, block.path) if _is_there(net, path)
    ]
    why = ""
    for placement in placements(structure.net, structure.flow, gate, block, constants[name].to(like), cuts):
        undo = _apply(net, block, placement, idle)
        try:
            check = check_fold(structure, net, constants, images)
        except FAILURES as error:  # the forward can't do without what was taken out
            check = Check(False, None, reason=f"the forward fails: {str(error).splitlines()[0]}")
        if check.passed or (check.passed is None and allow_vacuous):
            return Folded(name, placement.where, tuple(placement.factors), (block.path, *idle)), check
        _undo(net, undo)
        if check.passed is None:
            raise CheckError(
                f"whether a folded gate is its constant can't be told: {check.reason}",
                remedy="Use real, different images and a trained net, or pass --allow-vacuous.",
            )
        why = check.reason or f"relative error {check.relative_error}"
    return f"the folded net differs from the one whose gate is constant: {why}"


def _is_there(net: nn.Module, path: str) -> bool:
    """Whether a module is still as it was: not replaced, and not inside one that was."""
    try:
        return next(net.get_submodule(path).parameters(), None) is not None
    except AttributeError:
        return False


@dataclass
class _Undo:
    modules: list[tuple[str, nn.Module]]
    parameters: dict[str, Tensor]


def _apply(net: nn.Module, block: Block, placement: Placement, idle: list[str]) -> _Undo:
    """Place a gate's constant, and return what takes it back."""
    like = next(net.parameters())
    parameters = dict(net.named_parameters())
    undo = _Undo([], {name: parameters[name].detach().clone() for name in placement.factors})
    with torch.no_grad():
        for name, factor in placement.factors.items():
            parameters[name].mul_(factor.to(parameters[name]))
    scale = placement.scale
    module = build_replacement(placement.kind, () if scale is None else tuple(scale.shape)).to(like)
    if scale is not None:
        held = module.get_parameter("scale")
        held.data.copy_(scale)
        held.requires_grad_(placement.where == "kept")  # a 1 that stands for nothing does not learn
    undo.modules.append((block.path, put_module(net, block.path, module)))
    for path in idle:
        undo.modules.append((path, put_module(net, path, build_replacement("identity", ()))))
    return undo


def _undo(net: nn.Module, undo: _Undo) -> None:
    for path, module in reversed(undo.modules):
        put_module(net, path, module)
    parameters = dict(net.named_parameters())
    for name, value in undo.parameters.items():
        parameters[name].data.copy_(value)


def check_fold(structure: Structure, folded: nn.Module, constants: Constants, images: Tensor) -> Check:
    """Compare a folded net with the unfolded one, its gates constant by taps; float64 decides on rounding."""
    net = structure.net
    check = _compare(structure.coupling, net, folded, constants, images)
    if check.passed is not False:
        return check
    try:
        exact, other = (copy.deepcopy(each).cpu().double() for each in (net, folded))
        return _compare(structure.coupling, exact, other, constants, images.cpu().double())
    except (RuntimeError, TypeError):  # a forward that fixes its own dtype
        return check


def _compare(
    coupling: Coupling, net: nn.Module, folded: nn.Module, constants: Constants, images: Tensor
) -> Check:
    with constant_gates(net, coupling, constants):
        expected = _outputs(net, images)
    return compare_outputs(expected, _outputs(folded, images))


def _outputs(net: nn.Module, images: Tensor) -> dict[str, np.ndarray]:
    with evaluating(net):
        return {name: x.cpu().numpy() for name, x in named_outputs(net(images)).items()}
