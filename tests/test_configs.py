"""Each file in configs/ describes an experiment that runs."""

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import agp_jax as agp
from agp_jax.experiment import init_state, make_train_step, set_up
from agp_jax.structures import any_in_boxes, box_shape
from agp_jax.trees import flatten_with_paths

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.filterwarnings("ignore:.*results are not comparable")  # tiny CIFAR-10
def test_a_step_at_the_last_event_prunes_as_asked(file, digits_dir, cifar_dir):
    config = load(file)
    is_digits = config.data.name == "digits"
    config.data.dir = digits_dir if is_digits else cifar_dir
    config.batch_size = 16
    config.model.width = 8
    experiment = set_up(config)
    state = init_state(experiment)
    last = config.prune.end_step
    state = state._replace(opt_state=state.opt_state._replace(step=np.int32(last - 1)))
    batch = experiment.train_source[np.arange(16)]
    state, _ = make_train_step(experiment)(state, batch)

    removed, cells = {}, {}
    for path, rule, mask, weights in pruned_tensors(experiment, state):
        assert not weights[~mask].any() and weights[mask].all(), path
        alive = any_in_boxes(mask, box_shape(rule.structure, mask.shape))
        contest = rule if rule.scope == "rule" else path
        removed[contest] = removed.get(contest, 0) + int((~alive).sum())
        cells[contest] = cells.get(contest, 0) + alive.size
    level = config.prune.final_sparsity
    assert removed == {contest: int(level * n) for contest, n in cells.items()}
    assert removed


def pruned_tensors(experiment, state):
    paths, weights, treedef = flatten_with_paths(state.params)
    rules = treedef.flatten_up_to(experiment.matched)
    masks = treedef.flatten_up_to(agp.get_masks(state.opt_state))
    for path, rule, mask, leaf in zip(paths, rules, masks, weights, strict=True):
        if rule is not None:
            yield path, rule, np.asarray(mask), np.asarray(leaf)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_docstring_has_the_command(file):
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    name = f"--config=configs/{file.name}"
    assert "python train.py" in docstring
    assert name in docstring or file.stem == "digits_resnet20_element_90"
