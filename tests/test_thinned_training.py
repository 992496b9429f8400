"""Training that goes on after a cut is the masked training, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import agp_jax as agp
from agp_jax.trees import flatten_with_paths

EVENT, LATER = 2, 5  # updates before the cut, and after it


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# --- A residual net with zero-initialised scales, statistics and dropout ------


def conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normalise(x, params, stats, train):
    """The normalised activations and the new statistics."""
    used = stats
    if train:
        used = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
        stats = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, used)
    scale = lax.rsqrt(used["var"] + 1e-5) * params["scale"]
    shift = params["bias"] - used["mean"] * scale
    return x * scale[None, None, None] + shift[None, None, None], stats


def network(variables, x, key=None):
    """Logits and new statistics; with a key as in training."""
    params, stats, train = variables["params"], {}, key is not None

    def layer(x, name):
        old = variables["batch_stats"][name]
        x = conv(x, params[name]["kernel"])
        x, stats[name] = normalise(x, params[name], old, train)
        return x

    x = jax.nn.relu(layer(x, "stem"))
    hidden = jax.nn.relu(layer(x, "up"))
    if train:
        kept = jax.random.bernoulli(key, 0.8, hidden.shape)
        hidden = jnp.where(kept, hidden / 0.8, 0)
    # The scale starts at 0, so relu sees exact zeros here.
    x = jax.nn.relu(x + layer(hidden, "down"))
    logits = x.mean((1, 2)) @ params["head"]["kernel"]
    return logits + params["head"]["bias"][None], stats


def make_variables():
    rng = np.random.default_rng(0)
    widths = {"stem": (3, 6), "up": (6, 10), "down": (10, 6)}
    params, stats = {}, {}
    for name, (read, made) in widths.items():
        params[name] = {
            "kernel": jnp.asarray(rng.normal(size=(3, 3, read, made)) / (3 * read)),
            "scale": jnp.zeros(made) if name == "down" else jnp.ones(made),
            "bias": jnp.zeros(made),
        }
        stats[name] = {"mean": jnp.zeros(made), "var": jnp.ones(made)}
    kernel = jnp.asarray(rng.normal(size=(6, 4)))
    params["head"] = {"kernel": kernel, "bias": jnp.zeros(4)}
    return {"params": params, "batch_stats": stats}


def predict(variables, x):
    return network(variables, x)[0]


def objective(variables, batch, key):
    logits, stats = network(variables, batch["images"], key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.mean(), stats


def batch_at(step):
    rng = np.random.default_rng(100 + step)
    images = jnp.asarray(rng.normal(size=(4, 6, 6, 3)))
    return {"images": images, "labels": jnp.asarray(rng.integers(0, 4, 4))}


def make_trainer(objective, tx):
    """From `(variables, optimizer state)` and steps to the same later, and losses."""

    @jax.jit
    def update(state, batch, key):
        variables, opt_state = state
        params = variables["params"]

        def loss_of(params):
            return objective({**variables, "params": params}, batch, key)

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return ({"params": params, "batch_stats": stats}, opt_state), loss

    def train(state, steps):
        losses = []
        for step in steps:
            state, loss = update(state, batch_at(step), jax.random.key(step))
            losses.append(float(loss))
        return state, losses

    return train


def difference(found, expected):
    """The largest difference in any leaf, relative to the leaf's largest entry."""
    errors = {}
    paths, leaves, _ = flatten_with_paths(expected)
    for path, x, y in zip(paths, jax.tree.leaves(found), leaves, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype, path
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        errors[path] = np.abs(x - y).max() / max(np.abs(y).max(), 1e-3)
    assert all(map(np.isfinite, errors.values()))
    return max(errors.values())


def rules_at(step):
    """Two thirds of the stream stay, and half of what is hidden."""
    return [
        agp.Rule("up/kernel", agp.filters(), agp.one_shot(0.5, step=step)),
        agp.Rule("(stem|down)/kernel", agp.filters(), agp.one_shot(0.34, step=step)),
    ]


OPTIMIZERS = {
    "sgd, nesterov": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lamb, clipped": optax.chain(
        optax.clip_by_global_norm(0.5), optax.lamb(1e-2, weight_decay=0.1)
    ),
    "adam, averaged": optax.chain(optax.adam(1e-2), optax.ema(0.9)),
}


def compare(optimizer, event):
    """Prunes at `event`, cuts after `EVENT` updates, and trains on in both ways."""
    variables = make_variables()
    images = batch_at(0)["images"]
    couplings = agp.find_couplings(predict, variables, images)
    assert all(group.exact for group in couplings.groups)

    of_params = couplings.subtree("params")
    tx = agp.prune(optimizer, rules_at(event), couplings=of_params)
    opt_state = jax.jit(tx.init)(variables["params"])
    params = agp.apply_masks(variables["params"], agp.get_masks(opt_state))
    train = make_trainer(objective, tx)
    state, _ = train(({**variables, "params": params}, opt_state), range(EVENT))
    variables, opt_state = state
    cut = agp.plan_cut({"params": agp.get_masks(opt_state)}, couplings)
    assert cut.thin_shape("params/down/kernel") == (3, 3, 5, 4)

    small = agp.thin(variables, cut)
    params_cut = cut.subtree("params")
    small_opt = agp.thin_opt_state(opt_state, variables["params"], params_cut)
    small_predict = agp.thin_function(predict, variables, cut)
    # Nothing is left to prune: the wrapped optimizer goes on by itself.
    assert all(bool(mask.all()) for mask in jax.tree.leaves(agp.get_masks(small_opt)))
    small_objective = agp.thin_function(objective, variables, cut)
    small_train = make_trainer(small_objective, optimizer)

    later = range(EVENT, EVENT + LATER)
    (full, full_opt), losses = train(state, later)
    (found, found_opt), found_losses = small_train(
        (small, small_opt.inner_state), later
    )
    np.testing.assert_allclose(found_losses, losses, rtol=1e-12)
    assert len(set(losses)) == LATER
    assert difference(found, agp.thin(full, cut)) < 1e-12
    expected = agp.thin_opt_state(full_opt, full["params"], params_cut)
    assert difference(found_opt, expected.inner_state) < 1e-12
    np.testing.assert_allclose(
        small_predict(found, images), predict(full, images), rtol=1e-11
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_been_cut(name):
    compare(OPTIMIZERS[name], event=EVENT)


def test_factored_moments_go_on_if_what_goes_never_had_any():
    """Means over more zeros are smaller, which cancels in their quotient."""
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    compare(optax.chain(factored, optax.scale(-1e-2)), event=0)
