"""What layers read -> its second moments, streamed in flat memory: the evidence of reconstruction.

A layer is linear in its unfolded input (a row: positions x taps of its kernel), so the covariance of that
input says what any change of its weight does to its output. Only sums are kept, and those of two sets of
images add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sepress.gates import ReaderCall
from sepress.types import Reader

WIDEST = 4608  # variables of one covariance: a 3x3 convolution over 512 channels, 170 MB in float64
ROWS_PER_VARIABLE = 8  # an image gives a row for every eight variables, so that 512 images give 64 a variable
FEWEST_ROWS = 16  # of an image
CONSTANT = 1e-10  # of its mean square: a variance that is none
_CHUNK = 1 << 25  # unfolded values that are held at a time


@dataclass(frozen=True)
class Form:
    """How a layer's weight and input are laid out for its moments: block by block of its groups.

    `taps` is the size of the kernel where every tap of every position is a variable. It is 1 for linear
    and transposed layers, and where that would be too wide: the taps then count as further outputs, which
    neglects what neighbouring pixels have in common.
    """

    blocks: int
    positions: int  # that one block reads
    taps: int

    @property
    def variables(self) -> int:
        return self.positions * self.taps


def form_of(weight: Tensor, reader: Reader) -> Form:
    """The form for a layer of that weight."""
    positions = len(reader.unit) // reader.groups
    taps = weight.shape[2:].numel() if weight.dim() > 2 and not reader.transposed else 1
    return Form(reader.groups, positions, taps if positions * taps <= WIDEST else 1)


def as_read(weight: Tensor, reader: Reader) -> Tensor:
    """A layer's weight; a bank's experts as so many further outputs, those of one output side by side."""
    return weight.reshape(reader.mixed).transpose(0, 1).flatten(0, 1) if reader.mixed else weight


def arrange(weight: Tensor, reader: Reader, form: Form) -> Tensor:
    """A weight as (blocks, outputs, variables): what a row of one block is multiplied with, by output."""
    if reader.transposed:  # (I, O / g, ...)
        blocks = weight.reshape(form.blocks, form.positions, -1).transpose(1, 2)
    elif weight.dim() <= 2:
        blocks = weight.movedim(reader.dim, -1).reshape(1, -1, form.positions)
    else:  # (O, I / g, ...)
        blocks = weight.reshape(form.blocks, -1, form.positions, weight.shape[2:].numel())
        blocks = blocks.transpose(2, 3).flatten(1, 2) if form.taps == 1 else blocks.flatten(2)
    return blocks


@torch.no_grad()
def put(weight: Tensor, reader: Reader, form: Form, blocks: Tensor) -> None:
    """Write (blocks, outputs, variables) into a weight, in place: the inverse of `arrange`."""
    where = arrange(torch.arange(weight.numel()).view(weight.shape), reader, form)
    values = torch.empty(weight.numel(), dtype=weight.dtype)  # on the CPU: not every device has float64
    values[where.flatten()] = blocks.flatten().to(weight.dtype)
    weight.copy_(values.view(weight.shape))


@dataclass(frozen=True)
class Moments:
    """Of the rows that one layer reads: how many, their mean (B, D) and covariance (B, D, D), float64.

    `plain`: the layer multiplied with the parameter itself, not with something computed from it.
    """

    rows: int
    mean: Tensor
    covariance: Tensor
    plain: bool


def from_sums(sums: Mapping[str, Tensor], key: str) -> Moments | None:
    """The moments of the reader of that key; None where none were collected."""
    if f"moments/{key}/rows" not in sums:
        return None
    rows, calls, plain = (float(value) for value in sums[f"moments/{key}/rows"])
    mean = sums[f"moments/{key}/sum"] / rows
    square = sums[f"moments/{key}/square"] / rows
    covariance = square - mean[:, :, None] * mean[:, None, :]
    # What varies by less is constant but for float32's rounding, and its variance but for float64's.
    varies = covariance.diagonal(dim1=1, dim2=2) > CONSTANT * square.diagonal(dim1=1, dim2=2)
    covariance *= varies[:, :, None] & varies[:, None, :]
    return Moments(int(rows), mean, (covariance + covariance.mT) / 2, plain == calls)


def choose_places(images: int, places: int, form: Form, *, seed: int) -> Tensor:
    """Numbers of the output places, over all images of a batch, that count: sorted, by the seed.

    A random choice, since neighbours say the same; all of them where there are few.
    """
    total = images * places
    wanted = images * max(FEWEST_ROWS, form.variables // ROWS_PER_VARIABLE)
    if wanted >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values


def moment_sums(
    reader: Reader, call: ReaderCall, weight: Tensor, *, images: int, seed: int
) -> dict[str, Tensor]:
    """The sums of one call, by the last part of their name, float64 on the CPU.

    rows (3,): rows, calls, and calls that used `weight` itself; sum (B, D); square (B, D, D).
    """
    form = form_of(weight, reader)
    places = places_of(reader, call, weight, form)
    count = 0
    total = torch.zeros(form.blocks, form.variables, dtype=torch.float64)
    square = torch.zeros(form.blocks, form.variables, form.variables, dtype=torch.float64)
    chosen = choose_places(images, places // images, form, seed=seed)
    for _, rows in rows_read(reader, call, weight, form, chosen):  # (B, R, D), float32
        mean = rows.mean(1, keepdim=True)
        centred = rows - mean  # about the part's own mean: no cancellation in float32
        exact = mean.cpu().double()
        total += rows.shape[1] * exact[:, 0]
        square += (centred.mT @ centred).cpu().double() + rows.shape[1] * exact.mT * exact
        count += rows.shape[1]
    own = uses_itself(call, weight)
    return {"rows": torch.tensor([count, 1, int(own)], dtype=torch.float64), "sum": total, "square": square}


def output_square(gradient: Tensor, reader: Reader) -> Tensor:
    """The sum over all places of g g^T, g the gradient at a layer's outputs, by block: (B, O, O), float64."""
    g = gradient.detach().float()
    g = g.movedim(1, -1) if _convolves(reader) else g
    rows = g.reshape(-1, reader.groups, g.shape[-1] // reader.groups).transpose(0, 1)  # (B, R, O)
    return (rows.mT @ rows).cpu().double()


def uses_itself(call: ReaderCall, weight: Tensor) -> bool:
    """Whether a call multiplied with the parameter, and not with something computed from it."""
    operands = (*call.args, *call.kwargs.values())
    return any(isinstance(x, Tensor) and x.data_ptr() == weight.data_ptr() for x in operands)


def places_of(reader: Reader, call: ReaderCall, weight: Tensor, form: Form) -> int:
    """How many rows the call offers, over all images."""
    if _is_unfolded(reader, weight, form):
        return len(call.x) * call.result.shape[2:].numel()
    return call.x.numel() // call.x.shape[reader.site.axis]


def rows_read(
    reader: Reader, call: ReaderCall, weight: Tensor, form: Form, chosen: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the layer reads at the chosen places, in parts: (their numbers (R,), rows (B, R, D))."""
    x = call.x.detach().float()
    if not _is_unfolded(reader, weight, form):
        flat = x.movedim(reader.site.axis, -1).reshape(-1, len(reader.unit))
        yield chosen, _blocks(flat[chosen.to(x.device)], form)
        return
    places = call.result.shape[2:].numel()
    most = max(1, _CHUNK // (places * form.blocks * form.variables))
    for first in range(0, len(x), most):
        part = x[first : first + most]
        here = chosen[(chosen >= first * places) & (chosen < (first + len(part)) * places)]
        at = (here - first * places).to(x.device)
        if len(here):
            yield here, _blocks(_unfold(part, call)[at // places, at % places], form)


def is_exact(reader: Reader, weight: Tensor, form: Form) -> bool:
    """Whether a row times the arranged weight is what the layer gives at one place, without its bias."""
    return _is_unfolded(reader, weight, form) or not _convolves(reader)


def rows_given(reader: Reader, call: ReaderCall, chosen: Tensor) -> Tensor:
    """What a layer of an exact form gives at the chosen places, (R, O)."""
    y = call.result.detach().float()
    y = y.movedim(1, -1) if _convolves(reader) else y
    return y.reshape(-1, y.shape[-1])[chosen.to(y.device)]


def _is_unfolded(reader: Reader, weight: Tensor, form: Form) -> bool:
    """Whether rows are what a kernel sees, and not single places of the input."""
    if not _convolves(reader) or reader.transposed:
        return False
    return form.taps > 1 or weight.shape[2:].numel() == 1


def _convolves(reader: Reader) -> bool:
    """Whether channels lie behind the images, and places behind the channels."""
    return reader.site.function.startswith("conv")


def _unfold(x: Tensor, call: ReaderCall) -> Tensor:
    """What the kernel sees at every place, (N, L, C x taps), by the layer's own kind of convolution.

    A kernel that is 1 at one tap picks that tap, with the stride, padding and dilation of the call.
    """
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    kernel = given["weight"].shape[2:]
    taps = kernel.numel()
    geometry = {name: given[name] for name in ("stride", "padding", "dilation") if name in given}
    pick = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(taps, 1, *kernel)
    seen = call.function(x.reshape(-1, 1, *x.shape[2:]), pick, **geometry)  # (N C, taps, ...)
    unfolded: Tensor = seen.reshape(len(x), x.shape[1] * taps, -1).mT
    return unfolded


def _blocks(rows: Tensor, form: Form) -> Tensor:
    return rows.reshape(len(rows), form.blocks, form.variables).transpose(0, 1)
