"""A pruned net -> its layers fitted again to what the base's layers give, in closed form and without labels.

Every layer of the pruned net reads something else than it did: what came before it was cut as well. So each
is fitted to give what the base's layer gives, from what it now reads (the asymmetric reconstruction of He et
al. 2017, Channel Pruning, sec. 3.2). All layers take half of their least-squares step at once, and batch norm
is estimated again; a few such passes come to what fitting layer after layer gives, at two forwards a pass
instead of two a layer (measured on an SE-ResNet-20).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sepress import console
from sepress.calibrate import split_batch
from sepress.coupling import Coupling, trace
from sepress.gates import ReaderCall, Taps
from sepress.modes import evaluating
from sepress.moments import (
    Form,
    arrange,
    choose_places,
    form_of,
    is_exact,
    places_of,
    put,
    rows_given,
    rows_read,
    uses_itself,
)
from sepress.reconstruct import biases, factorise, readers_by_parameter
from sepress.types import Reader, Removed

STEP = 0.5  # of the way to the least-squares fit: whole steps of all layers at once overshoot


def recover(
    pruned: nn.Module,
    base: nn.Module,
    coupling: Coupling,
    removed: Removed,
    batches: Iterable[object],
    *,
    passes: int,
    recalibrate: Callable[[nn.Module], object],
    device: torch.device,
) -> None:
    """Fit the layers of `pruned` to the base's in so many passes, in place.

    Norms are estimated by `recalibrate` before, between and after.
    `coupling` is the base's, `removed` what was cut from it; `batches` can be read more than once. Layers
    that the fit is not exact for (transposed, very wide, or with a computed weight), those that share a
    weight and not its bias, depthwise ones and those that read no channel of a group stay as they are.
    """
    recalibrate(pruned)
    if not passes:
        return
    inputs, _ = split_batch(next(iter(batches)))
    own = trace(pruned, tree_map(lambda x: x[:1].to(device), inputs))
    layers = _layers(pruned, own, coupling, removed)
    for _ in console.track(range(passes), "refitting", total=passes):
        with evaluating(base), evaluating(pruned):
            for number, batch in enumerate(batches):
                inputs, _ = split_batch(batch)
                arguments = inputs if isinstance(inputs, tuple) else (inputs,)
                arguments = tuple(x.to(device) for x in arguments)
                _collect(layers, pruned, base, own, coupling, arguments, seed=number)
        for layer in layers:
            layer.move()
        recalibrate(pruned)


class _Layer:
    """One weight of the pruned net: the calls that use it, here and in the base, and sums over their rows."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        reader: Reader,
        surviving: np.ndarray,
        factors: np.ndarray | None,
    ) -> None:
        self.weight, self.bias, self.reader = weight, bias, reader
        self.form: Form = form_of(weight, reader)
        self.surviving = torch.as_tensor(surviving)  # of the base's outputs, (O,) bool
        self.factors = None if factors is None else torch.as_tensor(factors[surviving])  # of what survives
        self.plain = is_exact(reader, weight, self.form)  # until a call shows another
        self.chosen: dict[int, Tensor] = {}  # call -> the places that count, in the batch under way
        self.places: dict[int, int] = {}  # call -> how many there are in the base
        self.given: dict[int, Tensor] = {}  # call -> (B, R, O) of the base there
        self._clear()

    def _clear(self) -> None:
        blocks, variables = self.form.blocks, self.form.variables
        outputs = int(self.surviving.sum()) // blocks
        self._rows = 0
        self._read = torch.zeros(blocks, variables, dtype=torch.float64)
        self._given = torch.zeros(blocks, outputs, dtype=torch.float64)
        self._square = torch.zeros(blocks, variables, variables, dtype=torch.float64)
        self._cross = torch.zeros(blocks, outputs, variables, dtype=torch.float64)

    def see_base(self, number: int, call: ReaderCall, images: int, seed: int) -> None:
        """Keep what the base's layer gives at the places that count."""
        if not self.plain:
            return
        places = places_of(self.reader, call, self.weight, self.form)
        self.places[number] = places
        self.chosen[number] = choose_places(images, places // images, self.form, seed=seed)
        rows = rows_given(self.reader, call, self.chosen[number])  # (R, O)
        rows = rows[:, self.surviving.to(rows.device)]
        if self.factors is not None:  # what surgery multiplied is to give so much more
            rows = rows * self.factors.to(rows)
        self.given[number] = rows.reshape(len(rows), self.form.blocks, -1).transpose(0, 1)

    def see_own(self, number: int, call: ReaderCall) -> None:
        """Add the rows of one call of the pruned net, against what the base gave there."""
        self.plain = self.plain and uses_itself(call, self.weight) and number in self.given
        if self.plain:  # channels can be places to a layer: where some went, rows are others
            places = places_of(self.reader, call, self.weight, self.form)
            self.plain = places == self.places[number]
        if not self.plain:
            return
        given = self.given.pop(number)
        done = 0
        for _, rows in rows_read(self.reader, call, self.weight, self.form, self.chosen.pop(number)):
            target = given[:, done : done + rows.shape[1]]
            done += rows.shape[1]
            x_mean, y_mean = rows.mean(1, keepdim=True), target.mean(1, keepdim=True)
            x, y = rows - x_mean, target - y_mean  # about the part's own means: no cancellation in float32
            x_exact, y_exact = x_mean.cpu().double(), y_mean.cpu().double()
            self._rows += rows.shape[1]
            self._read += rows.shape[1] * x_exact[:, 0]
            self._given += rows.shape[1] * y_exact[:, 0]
            self._square += (x.mT @ x).cpu().double() + rows.shape[1] * x_exact.mT * x_exact
            self._cross += (y.mT @ x).cpu().double() + rows.shape[1] * y_exact.mT * x_exact

    def move(self) -> None:
        """Take a step towards the least-squares fit; a bias then keeps the means of the outputs."""
        if not self.plain or not self._rows:
            return
        read, given = self._read / self._rows, self._given / self._rows
        covariance = self._square / self._rows - read[:, :, None] * read[:, None, :]
        cross = self._cross / self._rows - given[:, :, None] * read[:, None, :]
        old = arrange(self.weight.detach().cpu().double(), self.reader, self.form)  # (B, O, D)
        steps = [
            torch.cholesky_solve((d - w @ c).T, factorise(c)[0]).T
            for w, c, d in zip(old, covariance, cross, strict=True)
        ]
        new = old + STEP * torch.stack(steps)
        put(self.weight, self.reader, self.form, new)
        if self.bias is not None:
            mean = (given - (new @ read[:, :, None])[:, :, 0]).flatten()
            with torch.no_grad():
                self.bias.copy_(mean.to(self.bias.dtype))
        self._clear()


def _layers(net: nn.Module, own: Coupling, coupling: Coupling, removed: Removed) -> list[_Layer]:
    modules = dict(net.named_modules())
    before, factors = readers_by_parameter(coupling), coupling.factors(removed)
    layers = []
    for parameter, readers in readers_by_parameter(own).items():
        owner, _, name = parameter.rpartition(".")
        weight = getattr(modules[owner], name)
        ways = {reader.dim for reader in readers} | {reader.dim for reader in before[parameter]}
        added = list(biases(modules, parameter, readers))
        if (
            any(reader.mixed for reader in readers)
            or len(ways) > 1
            or len(readers) != len(before[parameter])
            or len(added) > 1
        ):
            continue
        bias = added[0] if added else None
        outputs = 1 - readers[0].dim if weight.dim() == 2 else 0
        surviving = _surviving(coupling, removed, parameter, outputs)
        layers.append(_Layer(weight, bias, readers[0], surviving, factors.get((parameter, outputs))))
    return layers


def _surviving(coupling: Coupling, removed: Removed, parameter: str, dim: int) -> np.ndarray:
    """Which indices of one axis of a parameter are left of the base's, (n,) bool."""
    left = np.ones(coupling.shapes[parameter][dim], dtype=bool)
    for group in coupling.groups:
        for member in group.members:
            if (member.parameter, member.dim) == (parameter, dim) and removed.get(group.name):
                left[member.index[np.isin(member.unit, removed[group.name])]] = False
    return left


def _collect(
    layers: list[_Layer],
    pruned: nn.Module,
    base: nn.Module,
    own: Coupling,
    coupling: Coupling,
    arguments: tuple[Tensor, ...],
    *,
    seed: int,
) -> None:
    """Run one batch through both nets."""
    by_weight = {layer.reader.parameter: layer for layer in layers}
    images = len(arguments[0])

    def numbered(readers: tuple[Reader, ...]) -> Mapping[int, int]:
        """The ordinal of each reader among those of its weight."""
        seen: dict[str, int] = {}
        numbers = {}
        for reader in readers:
            numbers[id(reader)] = seen[reader.parameter] = seen.get(reader.parameter, -1) + 1
        return numbers

    first, second = numbered(coupling.readers), numbered(own.readers)

    def on_base(reader: Reader, call: ReaderCall) -> None:
        if reader.parameter in by_weight:
            by_weight[reader.parameter].see_base(first[id(reader)], call, images, seed)

    def on_own(reader: Reader, call: ReaderCall) -> None:
        if reader.parameter in by_weight:
            by_weight[reader.parameter].see_own(second[id(reader)], call)

    with Taps(base, coupling, on_call=on_base):
        base(*arguments)
    with Taps(pruned, own, on_call=on_own):
        pruned(*arguments)
