"""The defaults that several modules share, each once and with its reason."""

from __future__ import annotations

from typing import Final

CRITERION: Final = "auto"
AUTO: Final = "reconstruction"  # what 'auto' stands for: the measured default, which needs no labels
METHOD: Final = f"{AUTO}+refit@knapsack"  # the defaults of pruning, as a comparison writes them
CALIBRATION_IMAGES = 512  # scores settle with these
REFIT_PASSES = 4  # after which more change nothing (SE-ResNet-20 at 0.5x and 0.3x MACs)
RECALIBRATION_IMAGES = 256  # 18 % -> 65 % top-1 at half the MACs; more changes nothing
BATCH_SIZE = 128  # He et al. 2016 on CIFAR-10; the learning rates fit it
# torch has two. Simplified, their files are alike and as fast; this one proves what it says of other inputs.
EXPORTER: Final = "dynamo"
OPSET = 18  # what torch's exporter writes natively, other versions are converted; what older runtimes read
LATENCY_ROUNDS = 30  # the medians of 30 rounds agree within about 2 % on a quiet machine
LATENCY_WARMUP = 5  # rounds that are not counted: allocators and caches settle
