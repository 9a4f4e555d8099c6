"""One traced forward -> gates and coupling groups; surgery; the check that masked = removed."""

from sepress.coupling.check import check_removal
from sepress.coupling.endings import NETWORK_OUTPUT
from sepress.coupling.groups import Coupling, find_gates, find_groups, trace
from sepress.coupling.surgery import (
    apply_patch,
    apply_removal,
    attribute_patches,
    sync_attributes,
    take_out,
)

__all__ = [
    "NETWORK_OUTPUT",
    "Coupling",
    "apply_patch",
    "apply_removal",
    "attribute_patches",
    "check_removal",
    "find_gates",
    "find_groups",
    "sync_attributes",
    "take_out",
    "trace",
]
