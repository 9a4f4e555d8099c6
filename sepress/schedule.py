"""What a training run is asked to do, and the learning rate that follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sepress.defaults import BATCH_SIZE
from sepress.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """The choices of one training run; a value out of range raises InputError."""

    epochs: int = 30  # enough for a small net on small images; ImageNet takes 90 and more
    lr: float = 0.1  # the peak; SGD at batch 128 (He et al. 2016). A tenth of it fine-tunes; AdamW: 0.001
    batch_size: int = BATCH_SIZE  # of one process
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9  # of SGD, Nesterov's
    weight_decay: float = (
        5e-4  # SGD, small images (Zagoruyko & Komodakis 2016); AdamW: 0.05. Not on norms, biases
    )
    warmup_epochs: float = (
        0.5  # from 0 to lr in a line, then a cosine to 0; short, since short runs are usual
    )
    label_smoothing: float = 0.1  # as the SENet paper trains (Szegedy et al. 2016)
    ema_decay: float | None = 0.999  # of the weights' moving average, which is what is selected; None: off
    clip_norm: float | None = (
        5.0  # of all gradients together: above a healthy step's, so it stops spikes only
    )
    # auto: bfloat16 (or float16, scaled) on cuda, off elsewhere. bfloat16: everywhere; on CPUs that have it,
    # 1.6 times as fast for plain convolutions and half as fast for depthwise ones (measured on AMD EPYC).
    amp: Literal["auto", "bfloat16", "off"] = "auto"
    channels_last: Literal["auto", "off"] = "auto"  # auto: cuda and cpu (a fifth faster on a small SE-ResNet)
    seed: int = 0  # of order, augmentation and dropout; the first weights are the caller's
    distill_weight: float = 0.5  # share of the teacher in the loss, where there is a teacher
    temperature: float = 2.0  # of distillation; low, since a pruned net's teacher is close to it already
    workers: int = 0  # that decode images; they change no result

    def __post_init__(self) -> None:
        for name, holds, expected in _RANGES:
            value = getattr(self, name)
            if not holds(value):
                raise InputError(f"train.{name} is {value!r}", remedy=f"Expected: {expected}.")
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"train.warmup_epochs is {self.warmup_epochs!r} of {self.epochs} epochs",
                remedy="Expected: fewer warm-up epochs than epochs.",
            )


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _not_negative(value: float) -> bool:
    return 0 <= value < math.inf


_RANGES: tuple[tuple[str, Callable[..., bool], str], ...] = (
    ("epochs", lambda v: v >= 1, "at least 1"),
    ("lr", _positive, "a finite number above 0"),
    ("batch_size", lambda v: v >= 2, "at least 2 (batch norm has no variance over one image)"),
    ("optimizer", lambda v: v in ("sgd", "adamw"), "sgd or adamw"),
    ("momentum", lambda v: 0 < v < 1, "a fraction between 0 and 1"),
    ("weight_decay", _not_negative, "a finite number, at least 0"),
    ("warmup_epochs", _not_negative, "a finite number, at least 0"),
    ("label_smoothing", lambda v: 0 <= v < 1, "a fraction from 0 to below 1"),
    ("ema_decay", lambda v: v is None or 0 < v < 1, "null, or a fraction between 0 and 1"),
    ("clip_norm", lambda v: v is None or _positive(v), "null, or a finite number above 0"),
    ("amp", lambda v: v in ("auto", "bfloat16", "off"), "auto, bfloat16 or off"),
    ("channels_last", lambda v: v in ("auto", "off"), "auto or off"),
    ("seed", lambda v: v >= 0, "an integer, at least 0"),
    ("distill_weight", lambda v: 0 <= v <= 1, "a fraction from 0 to 1"),
    ("temperature", _positive, "a finite number above 0"),
    ("workers", lambda v: v >= 0, "at least 0"),
)


def learning_rate(step: int, config: TrainConfig, *, steps_per_epoch: int) -> float:
    """The rate of one step (from 0): linear up to `lr`, then half a cosine to 0 (Loshchilov & Hutter 2017).

    The last warm-up step and the first step of the cosine have `lr`; a step past the end would have 0.
    """
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
