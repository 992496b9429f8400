"""Automated Gradual Pruning for JAX: schedules, masks and an optax wrapper."""

from agp_jax.costs import Cost as Cost
from agp_jax.costs import measure_cost as measure_cost
from agp_jax.masks import apply_masks as apply_masks
from agp_jax.masks import fingerprint as fingerprint
from agp_jax.masks import make_masks as make_masks
from agp_jax.masks import sparsity as sparsity
from agp_jax.optimizer import PruneState as PruneState
from agp_jax.optimizer import get_masks as get_masks
from agp_jax.optimizer import prune as prune
from agp_jax.rules import Rule as Rule
from agp_jax.rules import match_rules as match_rules
from agp_jax.schedules import Schedule as Schedule
from agp_jax.schedules import one_shot as one_shot
from agp_jax.schedules import polynomial_schedule as polynomial_schedule
from agp_jax.structures import Structure as Structure
from agp_jax.structures import block as block
from agp_jax.structures import channels as channels
from agp_jax.structures import element as element
from agp_jax.structures import filters as filters
from agp_jax.structures import heads as heads
from agp_jax.structures import n_m as n_m
