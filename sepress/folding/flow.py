"""One forward -> which call read what which other call made, and what each module took and gave.

The trace (coupling/trace.py) knows channels and not calls; folding a gate asks the opposite: what else reads
the map before it, what reads the product, and what would run for nothing once the excitation is constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sepress.coupling import Coupling
from sepress.coupling.trace import function_name, undisturbed
from sepress.errors import SepressError
from sepress.outputs import tensors_in

Cut = tuple[int, int]  # a call and one of its operands: what was made for it counts as unread


@dataclass(frozen=True)
class Operand:
    """One tensor argument of a call: a value that a call made, a parameter or buffer, or something else."""

    value: int | None
    parameter: str | None  # state-dict name, where it is a parameter


@dataclass(frozen=True)
class FlowCall:
    """One outermost torch function call."""

    index: int
    name: str
    operands: tuple[Operand, ...]
    results: tuple[int, ...]  # the values that it made


@dataclass(frozen=True)
class Run:
    """One run of a module: the calls from `start` to before `stop` were made inside."""

    path: str
    start: int
    stop: int
    argument: int | None  # its input, where that is one tensor and nothing else
    result: int | None  # its output, where that is one tensor


@dataclass
class Flow:
    """What a forward did, call by call; a value is what one call made, or an input of the net."""

    calls: list[FlowCall] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)  # inner ones before those around them
    outputs: frozenset[int] = frozenset()  # the values that the net gave
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of the values; one image
    maker: dict[int, FlowCall] = field(default_factory=dict)
    readers: dict[int, list[FlowCall]] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)  # parameter -> calls that take it

    def alive(self, cuts: Iterable[Cut] = ()) -> frozenset[int]:
        """Return the calls that the net's outputs depend on, when nothing is read at the cuts."""
        unread = frozenset(cuts)
        found: set[int] = set()
        todo = list(self.outputs)
        while todo:
            call = self.maker.get(todo.pop())
            if call is None or call.index in found:
                continue
            found.add(call.index)
            todo += [
                operand.value
                for place, operand in enumerate(call.operands)
                if operand.value is not None and (call.index, place) not in unread
            ]
        return frozenset(found)

    def runs_of(self, path: str) -> list[Run]:
        return [run for run in self.runs if run.path == path]


def record_flow(net: nn.Module, coupling: Coupling, example: Tensor) -> Flow:
    """Run one input (1, ...) in eval mode and note its flow; SepressError where it is not as traced."""
    recorder = _Recorder(net)
    recorder.enter_input(example)
    with undisturbed(net), recorder.noting_runs(net), recorder:
        output = net(example)
    flow = recorder.flow
    flow.outputs = frozenset(recorder.value_of(x) for x in tensors_in(output))
    if tuple(call.name for call in flow.calls) != tuple(coupling.calls):
        raise SepressError("the forward took another path than the traced one")
    return flow


class _Recorder(TorchFunctionMode):
    """Numbers what calls make; every tensor is kept until the end, so that identity tells them apart."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.flow = Flow()
        self._parameters = {id(p): name for name, p in net.named_parameters()}
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def enter_input(self, x: Tensor) -> None:
        self._number(x)

    def value_of(self, x: Tensor) -> int:
        """The number of what a tensor holds now; a tensor that no call made gets one of its own."""
        return self._numbers[id(x)] if id(x) in self._numbers else self._number(x)

    def _number(self, x: Tensor) -> int:
        number = len(self._kept)
        self._kept.append(x)
        self._numbers[id(x)] = number
        self.flow.shapes[number] = tuple(x.shape)
        return number

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        flow, name = self.flow, function_name(func)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        operands = tuple(Operand(self._numbers.get(id(x)), self._parameters.get(id(x))) for x in tensors)
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name == "__setitem__":  # writes, and gives nothing
            made = tensors[:1]
        call = FlowCall(len(flow.calls), name, operands, tuple(self._number(x) for x in made))
        flow.calls.append(call)
        for value in call.results:
            flow.maker[value] = call
        for operand in operands:
            if operand.value is not None:
                flow.readers.setdefault(operand.value, []).append(call)
            if operand.parameter is not None and made:  # reading its shape is no use of it
                flow.uses[operand.parameter] = flow.uses.get(operand.parameter, 0) + 1
        return result

    @contextmanager
    def noting_runs(self, net: nn.Module) -> Iterator[None]:
        """Note what each module takes and gives."""
        running: list[tuple[int, int | None]] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            running.append((len(self.flow.calls), self.value_of(args[0]) if alone else None))

        with ExitStack() as hooks, torch.no_grad():
            for path, module in net.named_modules():

                def leave(_module: nn.Module, _args: Any, output: Any, path: str = path) -> None:
                    start, argument = running.pop()
                    result = self.value_of(output) if isinstance(output, Tensor) else None
                    self.flow.runs.append(Run(path, start, len(self.flow.calls), argument, result))

                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
            yield
