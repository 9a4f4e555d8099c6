"""Where the traced part of a forward ends: at its outputs, or at the last layer before post-processing.

Detection nets choose by value after their heads (top-k, thresholds, non-maximum suppression): how many boxes
come out, and in which order, hangs on rounding. What such post-processing reads is the net's output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sepress.coupling.shadows import StorageMap
from sepress.errors import InputError
from sepress.outputs import tensors_in
from sepress.types import Reason

if TYPE_CHECKING:
    from sepress.coupling.rules import Op
    from sepress.coupling.trace import Tracer

NETWORK_OUTPUT = "network output"  # the reason that freezes what the net returns
Place = tuple[int, int]  # (number of an operation, position among the tensors that it made)


@dataclass(frozen=True)
class Ending:
    """The last layer's place in a forward whose post-processing chooses by value."""

    operations: int  # so many come before the post-processing
    calls: int  # so many of torch's functions are called before it
    heads: tuple[Place, ...]  # what it reads of theirs


@dataclass
class EndFinder:
    """Follows a trace from layer to layer: what was read and decided since the last one."""

    decision: InputError | None = None  # activations became a Python value; an error if a layer follows
    _chose: bool = False
    _operations: int = 0  # up to and with the last layer
    _calls: int = 0
    _frozen: int = 0  # facts frozen up to there
    _heads: set[Place] = field(default_factory=set)
    _made: StorageMap[tuple[Place, ...]] = field(default_factory=StorageMap)

    def sweep(self) -> None:
        self._made.sweep()

    def decide(self, error: InputError) -> None:
        """Activations became a Python value: of all such since the last layer, the first is told."""
        self._chose = True
        self.decision = self.decision or error

    def follow(self, t: Tracer, op: Op, *, layer: bool, number: int | None) -> None:
        """Note what an operation with activations read and made; `number` is None where it isn't recorded.

        Raises the InputError of a decision where a layer follows it.
        """
        for x in op.inputs:
            self._read(x)
        if number is None:  # it lays memory out
            places = self._made.get(op.inputs[0]) if op.inputs else None
            for output in op.outputs if places else ():
                if output not in self._made:
                    self._made.put(output, places or ())
        else:
            for position, output in enumerate(op.outputs):
                before = self._made.get(output) or ()
                if not before or op.func._schema.is_mutable:
                    self._made.put(output, (*before, (number, position)))
        self._chose = self._chose or op.chooses
        if layer:
            if self.decision is not None:
                raise self.decision
            self._chose, self._operations, self._calls = False, len(t.operations), len(t.calls)
            self._frozen = len(t.facts.frozen)
            self._heads.clear()

    def _read(self, x: torch.Tensor) -> None:
        self._heads.update(place for place in self._made.get(x) or () if place[0] < self._operations)

    def finish(self, t: Tracer, outputs: Any) -> Ending | None:
        """Freeze what leaves the net, and say where its traced part ends if that isn't at its outputs."""
        for output in tensors_in(outputs):
            self._read(output)
            if output in t.shadows:
                t.facts.freeze(t.distinct_ids(output), Reason(NETWORK_OUTPUT))
        for channels in t.no_region.values():
            t.facts.freeze(channels, Reason("pooled over no region of the image that was traced"))
        if not (self._chose and self._heads):
            return None
        t.gates.found = [gate for gate in t.gates.found if gate.site.index < self._calls]
        since = t.facts.frozen[self._frozen :]
        t.facts.frozen[self._frozen :] = [(ids, Reason(NETWORK_OUTPUT)) for ids, _ in since]
        for number, position in self._heads:
            for ids in t.operations[number].outputs[position] or ():
                t.facts.freeze(ids, Reason(NETWORK_OUTPUT))
        return Ending(self._operations, self._calls, tuple(sorted(self._heads)))
