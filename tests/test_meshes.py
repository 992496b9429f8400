"""Where arrays lie on eight devices, and that training leaves them there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from runs import tiny_config

import agp_jax as agp
from agp_jax.training.config import ConfigError, Devices, Optimizer
from agp_jax.training.experiment import init_state, set_up
from agp_jax.training.meshes import make_mesh, place, put_batch
from agp_jax.training.steps import make_train_step
from agp_jax.trees import flatten_with_paths


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_a_mesh_has_all_devices(fsdp):
    mesh = make_mesh(fsdp)
    assert dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp}
    assert mesh.devices.flatten().tolist() == jax.devices()


def test_a_mesh_of_groups_that_do_not_fit_is_refused():
    with pytest.raises(ConfigError, match="config.devices.fsdp .* which is 8, got 5"):
        make_mesh(5)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 32), ("fsdp",)),
        ((32, 64), (None, "fsdp")),
        ((64, 64), ("fsdp",)),  # of equals the first
        ((66, 64), (None, "fsdp")),  # 4 does not divide 66
        ((3, 3, 16, 32), (None, None, None, "fsdp")),
        ((1024,), ("fsdp",)),
        ((1023,), ()),
        ((31, 32), ()),  # too few entries
        ((127, 129), ()),  # nothing fits
        ((0, 4096), ()),
        ((), ()),
    ],
)
def test_the_largest_axis_that_fits_is_divided(shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    placed = place({"x": leaf}, make_mesh(4))["x"]
    assert (placed.shape, placed.dtype) == (leaf.shape, leaf.dtype)
    assert placed.sharding.spec == PartitionSpec(*spec)
    assert place(leaf, make_mesh(1)).sharding.is_fully_replicated


def test_a_batch_is_divided_in_order():
    batch = put_batch({"label": np.arange(16)}, make_mesh(2))["label"]
    np.testing.assert_array_equal(batch, np.arange(16))
    for i, device in enumerate(jax.devices()):
        (part,) = [s.data for s in batch.addressable_shards if s.device == device]
        np.testing.assert_array_equal(part, [2 * i, 2 * i + 1])


@pytest.mark.parametrize(
    ("fsdp", "optimizer"), [(1, "adamw"), (4, "sgd"), (4, "adamw")]
)
def test_training_keeps_every_array_where_it_was_born(digits_dir, fsdp, optimizer):
    config = tiny_config(
        digits_dir,
        devices=Devices(fsdp=fsdp),
        optimizer=Optimizer(name=optimizer, learning_rate=0.01),
    )
    experiment = set_up(config)
    batches = experiment.task.load().train(0)
    state, train_step = init_state(experiment), make_train_step(experiment)
    shardings = functools.partial(jax.tree.map, lambda x: x.sharding)
    born = shardings(state)
    assert born == shardings(experiment.shapes)
    for _ in range(11):  # events are at 5 and 10
        batch = put_batch(next(batches), experiment.mesh)
        state, sums = train_step(state, batch)
        assert shardings(state) == born
    assert train_step._cache_size() == 1
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(sums))
    assert agp.sparsity(agp.get_masks(state.opt_state))["total"] > 0.5

    paths, leaves, _ = flatten_with_paths(born.opt_state)
    mirrors = [x for path, x in zip(paths, leaves, strict=True) if "hidden0/k" in path]
    assert len(mirrors) == (3 if optimizer == "adamw" else 2)  # moments and a mask
    assert set(mirrors) == {born.params["hidden0"]["kernel"]}
    assert mirrors[0].is_fully_replicated == (fsdp == 1)
