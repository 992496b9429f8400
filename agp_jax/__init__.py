"""Automated Gradual Pruning for JAX: neural networks become smaller while they train.

Prune: wrap any optax optimizer, and train as before (arXiv:1710.01878).

    curve = agp.polynomial_schedule(0.8, begin_step=0, end_step=40_000, frequency=400)
    rules = [agp.dense("stem/.*"), agp.Rule(".*/kernel", agp.element(), curve)]
    tx = agp.prune(optax.adam(1e-3), rules)

Thin: with `agp.filters()` or `agp.heads(8)` in a rule, and `couplings=` in `prune`,

    couplings = agp.find_couplings(predict, params, x)
    cut = agp.plan_cut(agp.get_masks(opt_state), couplings)
    smaller = agp.thin(params, cut)
    predict_smaller = agp.thin_function(predict, params, cut)

Measure: `print(agp.measure_cost(predict_smaller, smaller, x).table())`.

Schedules: `polynomial_schedule`, `one_shot`, `schedule_within`, of type `Schedule`.
Structures: `element`, `block`, `n_of_m`, `filters`, `channels`, `heads`,
`layers`, `experts`, of type `Structure`.
Rules: `Rule`, `dense`, `match_rules`.
Optimizer: `prune`, `PruneState`, `get_masks`.
Masks: `make_masks`, `apply_masks`, `sparsity`, `fingerprint`.
Thinning: `find_couplings` and what it gives, `Couplings`; `plan_cut` and `Cut`; `thin`,
`thin_opt_state`, `thin_function`, `check_cut`; `without_experts`.
Before training: `plan`, which gives a `PruningPlan`; `measure_cost`, a `Cost`.
"""

from agp_jax.costs import Cost, measure_cost
from agp_jax.couplings import Couplings
from agp_jax.masks import apply_masks, fingerprint, make_masks, sparsity
from agp_jax.planning import PruningPlan, plan
from agp_jax.programs.grouping import find_couplings
from agp_jax.pruning import PruneState, get_masks, prune
from agp_jax.rules import Rule, dense, match_rules
from agp_jax.schedules import Schedule, one_shot, polynomial_schedule, schedule_within
from agp_jax.structures import (
    Structure,
    block,
    channels,
    element,
    experts,
    filters,
    heads,
    layers,
    n_of_m,
)
from agp_jax.thinning.checks import check_cut
from agp_jax.thinning.cuts import Cut, plan_cut
from agp_jax.thinning.replay import thin_function
from agp_jax.thinning.routers import without_experts
from agp_jax.thinning.states import thin_opt_state
from agp_jax.thinning.trees import thin

__version__ = "0.1.0"
__all__ = [
    "Cost",
    "Couplings",
    "Cut",
    "PruneState",
    "PruningPlan",
    "Rule",
    "Schedule",
    "Structure",
    "apply_masks",
    "block",
    "channels",
    "check_cut",
    "dense",
    "element",
    "experts",
    "filters",
    "find_couplings",
    "fingerprint",
    "get_masks",
    "heads",
    "layers",
    "make_masks",
    "match_rules",
    "measure_cost",
    "n_of_m",
    "one_shot",
    "plan",
    "plan_cut",
    "polynomial_schedule",
    "prune",
    "schedule_within",
    "sparsity",
    "thin",
    "thin_function",
    "thin_opt_state",
    "without_experts",
]


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__version__"]
