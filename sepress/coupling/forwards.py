"""Trace a net in eval mode, and once more in training mode where layers run only there.

What the trace in eval mode says of gates, sites, costs and operations stands. Auxiliary heads (GoogLeNet,
PSPNet, deep supervision) read the trunk in training only: what they read must shrink with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sepress.coupling.banks import BankFinder
from sepress.coupling.slots import owner_of
from sepress.coupling.trace import Inputs, Tracer, one_image, run_forward, undisturbed
from sepress.errors import InputError
from sepress.types import Reason


@dataclass(frozen=True)
class Idle:
    """Modules whose parameters no operation of the forward in eval mode takes."""

    training: tuple[str, ...] = ()  # they run in training mode
    unused: tuple[str, ...] = ()  # they run in neither, or that can't be told

    def notes(self) -> tuple[str, ...]:
        """What a plan says of them."""
        notes = []
        if self.training:
            notes.append(
                f"Runs in training only, and was cut with what it reads: {', '.join(self.training)}."
            )
        if self.unused:
            names = ", ".join(name or "the net itself" for name in self.unused)
            notes.append(f"No forward uses these parameters, so they stay as they are: {names}.")
        return tuple(notes)


def run_tracer(net: nn.Module, inputs: Inputs, *, eca_neighbours: bool = False) -> tuple[Tracer, Idle]:
    """Trace the forwards of one image; InputError where that in eval mode fails or decides on data."""
    tracer = Tracer(net, BankFinder(), eca_neighbours=eca_neighbours)
    with undisturbed(net):
        outputs = run_forward(tracer, net, one_image(inputs))
        while tracer.banks.found:
            banks = BankFinder({**tracer.banks.known, **tracer.banks.found})
            tracer = Tracer(net, banks, eca_neighbours=eca_neighbours)
            outputs = run_forward(tracer, net, one_image(inputs))
    tracer.ending = tracer.ends.finish(tracer, outputs)
    silent = _silent(tracer)
    idle = _find_idle(tracer, net, inputs, silent) if silent else Idle()
    tracer.claims.settle()
    tracer.rescalings = tracer.scales.settle(tracer)
    return tracer, idle


def _find_idle(tracer: Tracer, net: nn.Module, inputs: Inputs, silent: frozenset[str]) -> Idle:
    """Trace training mode for the parameters that took no part, and see which then still don't."""
    failure = _trace_training(tracer, net, inputs)
    unused = _silent(tracer)
    if unused and tracer.ends.decision is not None:  # the path not taken may hold the layers that didn't run
        raise tracer.ends.decision
    if unused and failure is not None:
        _freeze_what_they_may_read(tracer, net, unused, failure)
    return Idle(_modules(net, silent - unused), _modules(net, unused))


def _silent(tracer: Tracer) -> frozenset[str]:
    """Return the names of the parameters that no operation took."""
    slots = tracer.slots
    return frozenset(slots.parameters - {slots.names[number] for number in tracer.touched})


def _modules(net: nn.Module, parameters: frozenset[str]) -> tuple[str, ...]:
    """Return the outermost modules that hold nothing but these parameters."""
    found: list[str] = []
    for path, module in net.named_modules():
        held = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
        inside = any(path == outer or path.startswith(f"{outer}.") for outer in found)
        if held and not inside and parameters.issuperset(held):
            found.append(path)
    alone = {owner_of(name) for name in parameters if not any(name.startswith(f"{m}.") for m in found)}
    return (*found, *sorted(alone))


def _trace_training(tracer: Tracer, net: nn.Module, inputs: Inputs) -> InputError | None:
    """Add the facts of a forward in training mode, of two images, since batch norm needs more than one value.

    Where it fails (it may need targets), the facts up to there are added and the error is returned; what the
    layers met on the way make stays then, since it may be an output.
    """
    images = tuple(torch.cat([x, x]) for x in one_image(inputs))
    count = len(tracer.producers)
    with undisturbed(net), _only_facts(tracer):
        net.train()
        try:
            tracer.ends.finish(tracer, run_forward(tracer, net, images))
            return None
        except InputError as error:
            failure = error
    for producer in tracer.producers[count:]:
        why = f"made in training, where the forward fails ({_cause(failure)})"
        tracer.facts.freeze(producer.slots, Reason(why))
    return failure


@contextmanager
def _only_facts(tracer: Tracer) -> Iterator[None]:
    """Keep of what is traced inside: facts, sizes to patch, and the producers that weren't any before."""
    kept = ("operations", "products", "readers", "calls", "gates", "ends", "group_counts")
    before = {name: getattr(tracer, name) for name in kept}
    known = {int(tracer.slots.axis_of[made.slots[0]]) for made in tracer.producers}
    count = len(tracer.producers)
    for name in kept:
        setattr(tracer, name, type(before[name])())
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(tracer, name, value)
        added = tracer.producers[count:]
        tracer.producers[count:] = [m for m in added if int(tracer.slots.axis_of[m.slots[0]]) not in known]


def _freeze_what_they_may_read(
    tracer: Tracer, net: nn.Module, names: frozenset[str], failure: InputError
) -> None:
    """Layers ran in neither forward, and training mode's failed: channels as many as they read stay.

    Where no layer makes a width that one of them reads (inputs joined, or flattened), nothing can go.
    """
    slots = tracer.slots
    shapes = {name: shape for name, shape in zip(slots.names, slots.shapes, strict=True) if name in names}
    own = {shape[0] for shape in shapes.values() if len(shape) > 1}
    made = [producer.slots for producer in tracer.producers]
    for name, shape in shapes.items():
        if not shape:
            continue
        groups = getattr(net.get_submodule(owner_of(name)), "groups", 1)  # a convolution's
        width = shape[1] * groups if len(shape) > 1 else shape[0]
        alike = [channels for channels in made if len(channels) == width]
        read = alike if alike or width in own else made
        if read:
            why = f"'{owner_of(name)}' may read it in training, where the forward can't be traced"
            tracer.facts.freeze(np.concatenate(read), Reason(f"{why} ({_cause(failure)})"))


def _cause(error: InputError) -> str:
    return str(error.__cause__ or error).split("\n")[0][:120]
