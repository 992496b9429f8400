"""Plans against what training ends with."""

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console
from runs import cut_config, run_quietly, tiny_config

import agp_jax as agp
from agp_jax.training import checkpoint, loop
from agp_jax.training.config import ConfigError
from agp_jax.training.experiment import set_up
from agp_jax.training.plans import make_plan
from agp_jax.training.published import Published, compare
from agp_jax.trees import flatten_with_paths


def elements(data_dir):
    return tiny_config(data_dir)


def ranked_together(data_dir):
    config = tiny_config(data_dir)
    config.prune.rules = (agp.Rule(".*/kernel", agp.element(), scope="rule"),)
    return config


def units_without_cut(data_dir):
    config = cut_config(data_dir)
    config.prune.cut_step = 0
    return config


def uncoupled(data_dir):
    config = cut_config(data_dir)
    config.prune.coupled = False
    return config


def filters_then_elements(data_dir):
    """Elements of the classifier before and after the cut, others only after it."""
    config = cut_config(data_dir, steps=40)
    schedule = agp.polynomial_schedule(0.75, begin_step=15, end_step=35, frequency=5)
    config.prune.rules = (
        agp.Rule("hidden.*/kernel", agp.filters()),
        agp.Rule("(hidden1|head)/.*", agp.element(), schedule),
    )
    return config


@pytest.mark.parametrize(
    "make_config",
    [elements, ranked_together, units_without_cut, uncoupled, filters_then_elements],
)
def test_training_ends_with_what_was_planned(make_config, digits_dir, tmp_path):
    config = make_config(digits_dir)
    plan = make_plan(set_up(config))
    run_quietly(config, tmp_path)
    variables = checkpoint.restore_variables(tmp_path, step="latest")
    paths, leaves, _ = flatten_with_paths(variables["params"])
    kernels = {
        path: np.asarray(leaf)
        for path, leaf in zip(paths, leaves, strict=True)
        if leaf.ndim > 1
    }
    shapes = {t.path: t.after.shape for t in plan.tensors}
    assert shapes == {path: kernel.shape for path, kernel in kernels.items()}
    nonzero = {path: int((kernel != 0).sum()) for path, kernel in kernels.items()}
    assert plan.nonzero == sum(nonzero.values())
    if make_config is not ranked_together:  # there it depends on the weights
        assert {t.path: t.after.nonzero for t in plan.tensors} == nonzero


def test_a_plan_needs_no_data_and_lets_the_run_follow(digits_dir, tmp_path):
    config = cut_config(str(tmp_path / "no data"))
    workdir = tmp_path / "run"
    console = Console(file=io.StringIO(), width=100)
    plan = loop.show_plan(config, workdir, console)
    assert not (tmp_path / "no data").exists()
    assert json.loads((workdir / "plan.json").read_text()) == plan.to_dict()
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["10", "0.5", "35.19%"] in lines  # of 22 steps per epoch
    assert ["weights", "2,720", "1,232", "45.2941%"] in lines
    config.data.dir = digits_dir
    assert run_quietly(config, workdir)["nonzero"] == plan.nonzero


def test_plan_json_has_events_tensors_and_totals(digits_dir):
    plan = make_plan(set_up(filters_then_elements(digits_dir))).to_dict()
    whole, rest = [64 * 32, 32 * 16, 16 * 10], [64 * 16, 16 * 8, 8 * 10]
    nonzero = [64 * 16, 16 * 8 // 4, 8 * 10 // 4]
    assert plan["weights"] == plan["macs"] == sum(whole)
    after = plan["cut"]["after"]
    assert after["weights"] == after["macs"] == sum(rest)
    assert after["all_params"] == sum(rest) + 16 + 8 + 10
    assert plan["nonzero"] == sum(nonzero)
    np.testing.assert_allclose(plan["sparsity"], 1 - sum(nonzero) / sum(whole))
    assert [rule["steps"] for rule in plan["rules"]] == [
        [5, 10, 15, 20],
        [15, 20, 25, 30, 35],
    ]
    tensors = plan["tensors"]
    assert [t["path"] for t in tensors] == [
        f"{name}/kernel" for name in ("head", "hidden0", "hidden1")
    ]
    assert [t["nonzero"] for t in tensors] == [nonzero[2], nonzero[0], nonzero[1]]
    assert [t["cells"] for t in tensors] == [160, 32, 16]
    assert tensors[2]["rules"] == ["hidden.*/kernel", "(hidden1|head)/.*"]
    assert {t["published_name"] for t in tensors} == {None}


def test_figures_are_compared_as_they_are_printed(digits_dir):
    plan = make_plan(set_up(elements(digits_dir)))
    sparsity = 100 * plan.sparsity  # 79.98
    published = Published(
        source="a table",
        sparsity=f"{sparsity:.1f}",
        params_kept="99.99",
        nonzero=plan.nonzero + 1,
        macs=plan.after.macs,
    )
    rows = {row.quantity: row for row in compare(published, plan.before, plan.after)}
    assert [row.agrees for row in rows.values()] == [True, False, False, True]
    assert rows["zero weights (%)"].here == "80.0"
    assert rows["weights kept (%)"].here == "100.00"


def test_a_plan_of_a_bad_config_is_refused(digits_dir):
    config = tiny_config(digits_dir)
    config.prune.rules = (agp.Rule("stem/kernel", agp.element()),)
    with pytest.raises(ConfigError, match="matches no parameter"):
        loop.show_plan(config)


def test_a_dense_model_can_be_planned(digits_dir):
    config = tiny_config(digits_dir)
    config.prune.enabled = False
    plan = make_plan(set_up(config))
    assert plan.nonzero == plan.before.weight_params
    assert jax.tree.leaves(plan.rules) == []
