"""Cuts of ImageNet's ResNets against what others have found in theirs.

The cuts that Distiller published are rows of test_published.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import agp_jax as agp
from agp_jax.models import make_model
from agp_jax.trees import flatten_with_paths

IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


@functools.cache
def network(name):
    """(fn, abstract variables, couplings) of a model."""
    model = make_model(name, 1000)
    fn = functools.partial(model.apply, train=False)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), IMAGE)
    return fn, variables, agp.find_couplings(fn, variables, IMAGE)


def test_half_of_everything_in_resnet18_is_what_torch_pruning_published():
    fn, variables, couplings = network("resnet18")
    whole = agp.measure_cost(fn, variables, IMAGE)
    assert whole.subtree("params").params == 11_689_512
    removed = {g.name: np.arange(g.num_units // 2) for g in couplings.groups}
    cut = agp.plan_cut(couplings.masks(removed), couplings)
    thinned = jax.eval_shape(lambda tree: agp.thin(tree, cut), variables)
    cost = agp.measure_cost(fn, thinned, IMAGE)  # the model itself, narrower
    assert cost.subtree("params").params == 3_055_880


def test_a_resnet50_has_a_group_inside_of_each_block_and_one_per_stream():
    _, variables, couplings = network("resnet50")
    producers = [
        {m.path for m in group.members if m.role == "out"} for group in couplings.groups
    ]
    inner = [
        f"stage{s + 1}/block{b}" for s, n in enumerate((3, 4, 6, 3)) for b in range(n)
    ]
    expected = {f"params/{block}/conv{i}/kernel" for block in inner for i in (1, 2)}
    assert len(couplings.groups) == 37 and all(g.exact for g in couplings.groups)
    alone = {path for found in producers if len(found) == 1 for path in found}
    assert expected <= alone
    paths, _, _ = flatten_with_paths(variables)
    kernels = {path for path in paths if path.endswith("kernel")}
    assert set().union(*producers) == kernels - {"params/head/kernel"}
