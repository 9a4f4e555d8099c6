"""Gates that hardly matter -> constants in the weights around them, their SE blocks gone: the Python API.

An excitation that depends little on the image can be one constant per channel, and a constant can be
multiplied into the layer before the gate or into those that read it. Which gates those are is measured
(search.py); where the constant goes is found in the net's flow (flow.py, places.py) and proved on real
inputs (surgery.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from sepress.coupling import trace
from sepress.device import home_of, resolve_device, seeded
from sepress.folding.constants import Loss
from sepress.folding.search import FoldResult, GateOutcome, fold_gates
from sepress.pruning import CHECK_IMAGES, Batch, as_batches, first_images

__all__ = ["FoldResult", "GateOutcome", "Loss", "fold", "fold_gates"]


def fold(
    net: nn.Module,
    *,
    calibration: Tensor | Iterable[Batch],
    gates: Sequence[str] = ("*",),
    accept: Callable[[nn.Module], bool] | None = None,
    batch_size: int = 64,
    device: str = "auto",
    seed: int = 0,
    allow_vacuous: bool = False,
) -> FoldResult:
    """Replace SE gates by constants in the weights around them; the net given is left as it was.

    `calibration` is what `sepress.prune` takes: inputs (N, C, H, W), or an iterable of such batches that can
    be read more than once, with labels where there are any: they say better which gates cost little. `gates`
    are patterns of gate names. Without `accept` all of them are folded; with it, the most, the cheapest
    first, for which it says True of the folded net (measure accuracy on images kept apart there). Raises
    InputError for what can't be used and CheckError where the folded net can't be told to be right.

    >>> import sepress, torch
    >>> net = sepress.build("sepress:se_resnet8", in_chans=1)
    >>> result = sepress.fold(net, calibration=torch.randn(32, 1, 28, 28))
    >>> len(result.folded), result.check.passed, result.params_after < result.params_before
    (3, True, True)
    """
    batches = as_batches(calibration, batch_size)
    home = home_of(net)
    place = resolve_device(device)
    with seeded(seed):
        base = copy.deepcopy(net).to(place).eval()
        images = first_images(batches, CHECK_IMAGES).to(place)

        def judged(folded: nn.Module) -> tuple[bool, str]:
            assert accept is not None
            accepted = bool(accept(folded))
            return accepted, "accepted" if accepted else "not accepted"

        result = fold_gates(
            base,
            trace(base, images[:1]),
            batches,
            images,
            patterns=gates,
            accept=None if accept is None else judged,
            device=place,
            allow_vacuous=allow_vacuous,
        )
    result.net.to(home)
    given = {name: module.training for name, module in net.named_modules()}
    for name, module in result.net.named_modules():
        module.training = given.get(name, net.training)  # a norm that was frozen stays so
    return result
