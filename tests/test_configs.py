"""Each file in configs/ describes an experiment that runs."""

import ast
import dataclasses
import importlib
import math
import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from runs import Stop, StopAt, run_quietly

import agp_jax as agp
import agp_jax.training.experiment
from agp_jax.boxes import any_in_boxes
from agp_jax.data.corpora import CORPORA
from agp_jax.models import MODELS
from agp_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from agp_jax.structures import box_shape
from agp_jax.training import checkpoint, loop
from agp_jax.training.experiment import (
    init_state,
    set_up,
)
from agp_jax.training.plans import make_plan
from agp_jax.training.records import read_metrics
from agp_jax.training.steps import make_train_step
from agp_jax.trees import flatten_with_paths

FILES = {
    file.stem: file
    for file in sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
    if "def get_config" in file.read_text()
}


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


TEXT = [name for name in FILES if load(name).data.name in CORPORA]
IMAGES = [name for name in FILES if name not in TEXT]
PUBLISHED = [name for name in IMAGES if load(name).published]
OWN = [name for name in IMAGES if name not in PUBLISHED]


def kind(config):
    """What a run goes through: rows of one kind differ in levels and numbers alone."""
    prune, data = config.prune, config.data
    structures = sorted({str(r.structure) for r in prune.rules if r.structure})
    switches = prune.cut_step > 0, prune.fold_norms, config.lasso.strength > 0
    decay = config.optimizer.decay
    return config.model.name, *structures, *switches, decay, data.hold_out > 0


KINDS = {kind(load(name)): name for name in reversed(PUBLISHED)}

# Small data is no news here.
pytestmark = pytest.mark.filterwarnings("ignore:.*results are not comparable")


@pytest.fixture
def data_dirs(digits_dir, cifar_dir, imagenet_dir):
    return {"digits": digits_dir, "cifar10": cifar_dir, "imagenet2012": imagenet_dir}


@pytest.mark.parametrize("name", OWN)
def test_a_step_at_the_last_event_prunes_as_asked(name, data_dirs):
    config = load(name)
    config.data.dir = data_dirs[config.data.name]
    config.batch_size = 16
    config.model.width = 8
    experiment = set_up(config)
    state = init_state(experiment)
    last = config.prune.end_step
    state = state._replace(opt_state=state.opt_state._replace(step=np.int32(last - 1)))
    batch = next(experiment.task.load().train(0))
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


EPOCHS_PER_STEP = 16


def make_shallow(config):
    """As deep as the rules go: with those blocks of each stage that they name."""
    named = any("block1" in rule.pattern for rule in config.prune.rules)
    blocks = (2, 2, 2, 2) if named else (1, 1, 1, 1)
    block = {
        "resnet18": BasicBlock,
        "resnet50": Bottleneck,
        "resnext101": partial(Bottleneck, groups=4, inner=2),
    }[config.model.name]
    return lambda classes, width: ResNet(classes, blocks, block, width)


def in_miniature(config, data_dirs):
    """The experiment with narrow layers, small images, and a step for 16 epochs."""
    epoch = EPOCHS_PER_STEP * config.steps_per_epoch

    def shrink(steps):
        return math.ceil(steps / epoch)

    def shrink_rule(rule):
        if rule.schedule is None:
            return rule
        schedule = dataclasses.replace(
            rule.schedule,
            begin_step=shrink(rule.schedule.begin_step),
            end_step=shrink(rule.schedule.end_step),
            frequency=1,
        )
        return dataclasses.replace(rule, schedule=schedule)

    is_imagenet = config.data.name == "imagenet2012"
    config.data.dir = data_dirs[config.data.name]
    config.data.image_size = 64 * is_imagenet
    config.model.width = 8
    config.model.weights = ""
    config.batch_size = 8
    config.steps = shrink(config.steps)
    config.log_every, config.checkpoint_every = 1, config.steps
    config.prune.rules = tuple(map(shrink_rule, config.prune.rules))
    config.prune.cut_step = shrink(config.prune.cut_step)
    config.lasso.end_step = shrink(config.lasso.end_step)
    optimizer = config.optimizer
    optimizer.decay_at = tuple(map(shrink, optimizer.decay_at))
    for name in ("decay_every", "decay_begin", "decay_end"):
        setattr(optimizer, name, shrink(getattr(optimizer, name)))
    return config


@pytest.mark.parametrize("name", sorted(KINDS.values()))
def test_a_published_run_in_miniature(name, data_dirs, tmp_path, monkeypatch):
    """Through events, cut, evaluation and checkpoint to the final sparsity.

    Two of them are stopped on the way and resumed, as test_loop does with other models.
    """
    config = in_miniature(load(name), data_dirs)
    if config.model.name in ("resnet18", "resnet50", "resnext101"):
        shallow = make_shallow(config), config.model.width
        monkeypatch.setitem(MODELS, config.model.name, shallow)
    # One device: a program for eight takes half as long again to compile.
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    monkeypatch.setattr(agp_jax.training.experiment, "make_mesh", lambda fsdp: one)

    cut_step = config.prune.cut_step
    if name in ("alexnet_element_88", "resnet20_filters_1"):
        config.checkpoint_every = 1
        with pytest.raises(Stop):
            loop.run(config, tmp_path, StopAt(cut_step or 3))
    summary = run_quietly(config, tmp_path)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(1, config.steps + 1))
    assert all(np.isfinite(r["loss"]) for r in records)
    assert (summary["cut"] is not None) == (cut_step > 0)

    params = checkpoint.restore_variables(tmp_path, step="latest")["params"]
    paths, leaves, _ = flatten_with_paths(params)
    pruned = 0
    for path, leaf in zip(paths, leaves, strict=True):
        rules = [r for r in config.prune.rules if re.fullmatch(r.pattern, path)]
        if rules and rules[0].structure and not rules[0].prunes_units:
            box = box_shape(rules[0].structure, leaf.shape)
            alive = any_in_boxes(np.asarray(leaf) != 0, box)
            level = rules[0].schedule.final_sparsity
            assert (~alive).sum() == int(level * alive.size), path
            pruned += 1
    assert pruned or cut_step
    if cut_step:
        after, before = (
            summary["cut"][when]["weights"] for when in ("after", "before")
        )
        assert after < before


@pytest.mark.parametrize(
    "name", [n for n in TEXT if not load(n).published] + ["wikitext2_lstm_large_80"]
)
def test_a_run_on_text_in_miniature(name, tmp_path):
    """Through events and cut, with a narrow model and short rows, in twenty steps."""
    config = load(name)
    for part in ("train", "valid", "test"):
        text = "a small text of few words that goes on and on\n" * 50
        (tmp_path / f"wiki.{part}.tokens").write_text(text)
    if config.data.name == "wikitext2":
        config.data.dir = str(tmp_path)
        epochs = [
            dataclasses.replace(rule.schedule, begin_step=4, end_step=12, frequency=4)
            for rule in config.prune.rules
        ]
        config.prune.rules = tuple(
            dataclasses.replace(rule, schedule=schedule)
            for rule, schedule in zip(config.prune.rules, epochs, strict=True)
        )
    config.data.bptt, config.data.eval_rows = 8, 256
    config.model.width = 16
    config.batch_size = 8
    config.steps, config.log_every, config.checkpoint_every = 20, 7, 14
    config.prune.frequency = 2
    config.optimizer.warmup_steps = 2
    config.prune.cut_step = 14 * (config.prune.cut_step > 0)
    summary = run_quietly(config, tmp_path / "run")
    assert 1 < summary["test_perplexity"] < 40_000
    plan = make_plan(set_up(config))
    assert summary["nonzero"] == plan.nonzero
    assert summary["average_weights"] == plan.average_weights
    assert (summary["cut"] is not None) == (config.prune.cut_step > 0)


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_has_the_command(name):
    docstring = ast.get_docstring(ast.parse(FILES[name].read_text()))
    assert "python train.py" in docstring
    option = f"--config=configs/{name}.py"
    assert option in docstring or name == "digits_resnet20_element_90"
