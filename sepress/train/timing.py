"""What an epoch of training would take, from a few steps: for whoever plans hours of them."""

from __future__ import annotations

import copy
import itertools
import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from sepress.device import seeded
from sepress.schedule import TrainConfig
from sepress.train.loop import Run, ready

if TYPE_CHECKING:
    from sepress.data import DataSource

STEPS = 3  # timed; they agree within a tenth on a quiet machine


def time_epoch(
    net: nn.Module,
    source: DataSource,
    *,
    config: TrainConfig,
    device: torch.device,
    teacher: nn.Module | None = None,
) -> float:
    """Return the seconds that one pass over the training images would take, validation left out.

    A few steps are taken on a copy of the net, which is left as it was; one before them, which warms caches
    and decoders up, does not count.
    """
    student = copy.deepcopy(net)
    with seeded(config.seed), ready(student, teacher, config=config, device=device):
        run = Run(student, source, config, device, teacher, penalty=None, rank=0, world_size=1)
        student.train()
        times = [time.perf_counter()]
        for inputs, targets in itertools.islice(run.loader, 1 + STEPS):
            run.take_step(inputs, targets, None).item()  # a number is had when an accelerator is done
            times.append(time.perf_counter())
    counted = times[1:] if len(times) > 2 else times  # a set of one batch has nothing after it
    return (counted[-1] - counted[0]) / (len(counted) - 1) * len(run.loader)
