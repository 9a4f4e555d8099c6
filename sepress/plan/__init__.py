"""Turn a ranking into a plan: which units of which group go, and what that predicts. Pure functions.

Every group has a **ladder**, the widths it may take: its full width, then multiples of its rounding
step down to its floor. A **schedule** is one order over all steps of all ladders, and a plan is a
prefix of it, so that a larger ratio removes whatever a smaller one does:

- per-group scope: a step comes at the ratio at which rounding to the nearest width takes it; steps
  that come together are taken in ranking order (cheapest first);
- global scope: a step comes by its cost, the mean score of the units that go over the mean
  score of their group (scores of different layers are not comparable raw);
- isomorphic scope (Fang et al., Isomorphic Pruning, ECCV 2024, arXiv 2407.04616): groups of the same
  structure compete as under the global scope, and every class of them loses the same share;
- knapsack scope (Aflalo et al., Knapsack Pruning, arXiv 2002.08258): a step comes by the loss predicted for
  what it saves, for rankings whose costs can be compared over groups: for a target in MACs or parameters, its
  share of these and of the predicted latency together, so that of plans that meet the target a fast one is
  taken; for a target in latency its share of that; for a ratio channels.

Scopes over groups take at most 85 % of any one.

A ratio takes the prefix that rounds every group to its nearest width, moved along the schedule
until the total is within one step of the largest group; where a step of wide units jumps over that, smaller
steps are given back, or taken in its place. A target in MACs, parameters or latency takes the first prefix
at or below it, then gives back what fits, at most one step a group: at or below the target, as near as the
steps allow. Of two units with equal scores the lower index goes first.
"""

from __future__ import annotations

from sepress.plan.files import SCHEMA, plan_from_json, plan_to_json
from sepress.plan.planning import PlanRow, check_plan, format_plan, plan_pruning, smallest_macs
from sepress.plan.policy import GLOBAL_LIMIT, SCOPES, Count, Countable, check_policy

__all__ = [
    "GLOBAL_LIMIT",
    "SCHEMA",
    "SCOPES",
    "Count",
    "Countable",
    "PlanRow",
    "check_plan",
    "check_policy",
    "format_plan",
    "plan_from_json",
    "plan_pruning",
    "plan_to_json",
    "smallest_macs",
]
