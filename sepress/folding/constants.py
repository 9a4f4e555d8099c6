"""Calibration images -> the constant of every gate, and what the net loses with one gate alone constant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepress import console
from sepress.calibrate import split_batch
from sepress.coupling import Coupling
from sepress.errors import InputError
from sepress.gates import Taps, mean_per_channel
from sepress.modes import evaluating
from sepress.outputs import tensors_in
from sepress.types import Gate

Constants = Mapping[str, Tensor]  # gate -> (C,), float64 on the CPU


@dataclass(frozen=True)
class Loss:
    """What one gate's constant costs on calibration images, in nats an image."""

    cross_entropy: float | None  # its rise; None without labels
    divergence: float  # KL from the unfolded net's outputs

    @property
    def figure(self) -> float:
        """What gates are ordered by."""
        return self.divergence if self.cross_entropy is None else self.cross_entropy

    def __str__(self) -> str:
        what = "of divergence from the unfolded net" if self.cross_entropy is None else "of loss"
        return f"{round(self.figure, 4) + 0:.4f} {what}"  # + 0: no -0.0000


def constant_gates(net: nn.Module, coupling: Coupling, constants: Constants) -> Taps:
    """A context in which the gates named give their constant, whatever the image."""

    def replaced(gate: Gate, s: Tensor) -> Tensor | None:
        if gate.name not in constants:
            return None
        shape = [1] * s.dim()
        shape[gate.site.axis] = gate.channels
        return constants[gate.name].to(s).view(shape).expand_as(s)

    return Taps(net, coupling, on_gate=replaced)


def measure_constants(
    net: nn.Module,
    coupling: Coupling,
    batches: Iterable[Any],
    *,
    device: torch.device,
) -> dict[str, Tensor]:
    """For every gate, find what stands in for its excitation with the least error.

    Least squares on the recalibrated map: c = E[s x^2] / E[x^2] for each channel, over images and positions,
    so that an image that hardly has a channel hardly counts for its constant; the mean of s where x is 0
    throughout. All gates run meanwhile: measuring each with the ones before it constant gave no better net.
    InputError for no images.
    """
    sums: dict[str, Tensor] = {}
    images = 0

    def add(count: int, gate: Gate, s: Tensor, x: Tensor) -> None:
        axis = gate.site.axis
        excitation = mean_per_channel(s.float(), axis, count)  # (N, C)
        energy = mean_per_channel(x.float().square(), axis - s.dim() + x.dim(), count)
        parts = torch.stack([excitation * energy, energy, excitation]).cpu().double().sum(1)  # (3, C)
        sums[gate.name] = sums[gate.name] + parts if gate.name in sums else parts

    with evaluating(net):
        for batch in console.track(batches, "measuring the gates' constants"):
            inputs = split_batch(batch)[0].to(device)
            images += len(inputs)
            with Taps(net, coupling, on_product=partial(add, len(inputs))):
                net(inputs)
    if not images:
        raise InputError("no calibration image was given", remedy="Pass at least one batch of images.")
    return {
        name: torch.where(energy > 0, weighted / energy.clamp(min=1e-300), mean / images)
        for name, (weighted, energy, mean) in sums.items()
    }


def measure_losses(
    net: nn.Module,
    coupling: Coupling,
    batches: Iterable[Any],
    constants: Constants,
    *,
    device: torch.device,
) -> dict[str, Loss]:
    """For every gate that has a constant, run the net with that gate alone constant."""
    entropy = dict.fromkeys(constants, 0.0)
    divergence = dict.fromkeys(constants, 0.0)
    images, labelled = 0, True
    with evaluating(net):
        for batch in console.track(batches, "measuring what each gate's constant costs"):
            inputs, targets = split_batch(batch)
            inputs = inputs.to(device)
            images += len(inputs)
            base = _log_probabilities(net(inputs))
            usable = targets is not None and bool((targets >= 0).all()) and base.dim() == 2
            labelled &= usable
            for name in constants:
                with constant_gates(net, coupling, {name: constants[name]}):
                    found = _log_probabilities(net(inputs))
                divergence[name] += float(F.kl_div(found, base, reduction="sum", log_target=True))
                if usable:
                    assert targets is not None
                    at = targets.to(base.device).long()
                    entropy[name] += float(F.nll_loss(found, at, reduction="sum"))
                    entropy[name] -= float(F.nll_loss(base, at, reduction="sum"))
    return {
        name: Loss(entropy[name] / images if labelled else None, divergence[name] / images)
        for name in constants
    }


def _log_probabilities(output: Any) -> Tensor:
    """The first output (N, K, ...) as log probabilities, float64 where the device has it."""
    logits = next(tensors_in(output), None)
    if logits is None or logits.dim() < 2:
        raise InputError(
            "what a gate's constant costs is told by logits (N, K), and the net gives none",
            remedy="Fold named gates, or all of them (--gates, --all).",
        )
    return F.log_softmax(logits.float(), dim=1)
