"""Language models in training: text in, perplexity out, exact resume, units cut."""

import json
import math

import jax
import numpy as np
import pytest
from runs import (
    Stop,
    StopAt,
    assert_same_bits,
    assert_same_run,
    lstm_config,
    run_quietly,
)

import agp_jax as agp
from agp_jax.training import checkpoint, loop
from agp_jax.training.config import ConfigError, Data, Distill, Model, Optimizer, Prune
from agp_jax.training.experiment import set_up, with_teacher
from agp_jax.training.records import read_metrics
from agp_jax.training.sampling import write_text
from agp_jax.training.workdirs import WorkdirError


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run_quietly(lstm_config(), workdir)
    return workdir


def test_a_text_is_learned_pruned_and_cut(uninterrupted):
    records = read_metrics(uninterrupted)
    assert [r["step"] for r in records] == [5, 10, 15, 20]
    for r in records:
        for split in ("test", "validation"):
            np.testing.assert_allclose(
                r[f"{split}_perplexity"], math.exp(r[f"{split}_loss"])
            )
        assert r["tokens_per_second"] > 0
    assert records[-1]["test_perplexity"] < 256

    cut = json.loads((uninterrupted / "summary.json").read_text())["cut"]
    whole = 256 * 12 + 4 * 12 * 48
    # The first layer has six units left, which the second reads.
    left = 256 * 12 + 12 * 24 + 6 * 24 + 6 * 48 + 12 * 48
    assert (cut["before"]["weights"], cut["after"]["weights"]) == (whole, left)
    assert (cut["before"]["macs"], cut["after"]["macs"]) == (whole, left)
    np.testing.assert_allclose(
        cut["after"]["test_perplexity"], cut["before"]["test_perplexity"], rtol=1e-5
    )


def test_a_checkpoint_holds_carry_and_vocabulary(uninterrupted):
    variables = checkpoint.restore_variables(uninterrupted, step="latest")
    shapes = [variables["carry"][f"layer{i}"]["cell_state"].shape for i in (0, 1)]
    assert shapes == [(8, 6), (8, 12)]
    with checkpoint.open_checkpoints(uninterrupted) as manager:
        vocabulary = checkpoint.read_value(manager, "vocabulary")
        corpus = checkpoint.read_value(manager, "corpus")
    assert vocabulary == {"unit": "byte", "entries": [chr(i) for i in range(256)]}
    assert "CPython" in corpus["version"] and len(corpus["checksum"]) == 64


def test_the_teacher_is_the_model_before_its_first_event(uninterrupted, tmp_path):
    for step in (10, 15):  # what is on disk then is of 5 steps, and of 10
        with pytest.raises(Stop):
            loop.run(lstm_config(), tmp_path, StopAt(step))
    shapes = set_up(lstm_config()).shapes
    taught = with_teacher(set_up(lstm_config())).shapes
    with checkpoint.open_checkpoints(tmp_path, writes=False) as manager:
        _, before = checkpoint.restore(manager, loop.as_items(shapes), step=5)
        _, after = checkpoint.restore(manager, loop.as_items(taught), step=10)
    assert_same_bits(after["teacher"]["params"], before["variables"]["params"])
    # It reads the text on its own, so what it carries is not what the model does.
    teacher, model = (after[x]["carry"]["layer0"] for x in ("teacher", "variables"))
    assert not np.array_equal(teacher["cell_state"], model["cell_state"])

    with pytest.raises(Stop):
        loop.run(lstm_config(), tmp_path, StopAt(20))  # after the cut
    run_quietly(lstm_config(), tmp_path)
    assert_same_run(tmp_path, uninterrupted, lstm_config())


def test_a_run_ends_without_its_teacher(uninterrupted):
    last = uninterrupted / "checkpoints" / "20"
    assert (last / "variables").is_dir() and not (last / "teacher").exists()


def test_a_checkpoint_writes_text_thinned_or_not(uninterrupted):
    options = dict(length=20, seed=1)
    text = write_text(lstm_config(), uninterrupted, "The ", **options)
    assert text.startswith("The ") and len(text.encode()) >= 24
    assert text == write_text(lstm_config(), uninterrupted, "The ", **options)
    calm = write_text(lstm_config(), uninterrupted, "The ", length=20, temperature=0.0)
    again = write_text(
        lstm_config(), uninterrupted, "The ", length=20, temperature=0.0, seed=5
    )
    assert calm == again
    with pytest.raises(ConfigError, match="begin with at least one token"):
        write_text(lstm_config(), uninterrupted, "")


@pytest.mark.filterwarnings("ignore:.*results are not comparable")
def test_a_run_does_not_go_on_with_another_text(tmp_path):
    text = "the cat sat on the mat and looked at the dog\n" * 40
    for part in ("train", "valid", "test"):
        (tmp_path / f"ptb.{part}.txt").write_text(text)
    config = lstm_config(
        data=Data(name="ptb", dir=str(tmp_path), bptt=4, eval_rows=8),
        model=Model(name="lstm", width=4),
        distill=Distill(),
        prune=Prune(enabled=False),
    )
    with pytest.raises(Stop):
        loop.run(config, tmp_path / "run", StopAt(10))
    (tmp_path / "ptb.valid.txt").write_text("a bird\n" * 40)
    with pytest.raises(WorkdirError, match="the data's corpus is not that of"):
        run_quietly(config, tmp_path / "run")


def decoder_config(rule, *, steps=4, checkpoint_every=4, cut=False, **model):
    """A decoder of which half goes in two steps, and is cut out after them."""
    return lstm_config(
        distill=Distill(),
        steps=steps,
        log_every=2,
        checkpoint_every=checkpoint_every,
        model=Model(name="gpt", **model),
        optimizer=Optimizer(name="adamw", learning_rate=0.01, clip_norm=1.0),
        prune=Prune(
            final_sparsity=0.5,
            end_step=2,
            rules=(rule,),
            coupled=cut,
            cut_step=2 if cut else 0,
        ),
    )


def test_a_decoder_trains_with_its_layers_stacked(tmp_path):
    rule = agp.Rule("blocks/.*/kernel", agp.element(), stacked_axes=1)
    config = decoder_config(rule, width=16, depth=2, num_heads=4, num_kv_heads=2)
    summary = run_quietly(config, tmp_path)
    params = checkpoint.restore_variables(tmp_path, step="latest")["params"]
    for kind in ("gate", "up", "down"):
        kernel = params["blocks"]["mlp"][kind]["kernel"]
        assert kernel.shape[0] == 2
        for layer in kernel:  # each for itself
            assert (layer == 0).sum() == layer.size // 2
    assert summary["test_perplexity"] < 256
    text = write_text(config, tmp_path, "def", length=15)  # beyond a window of 12
    assert text.startswith("def") and len(text.encode()) >= 18


def test_a_decoder_loses_layers_and_trains_on(tmp_path):
    """Stopped after its cut, it goes on with the layers that are left."""
    model = dict(width=8, depth=4, num_heads=2, dropout=0.1)
    rule = agp.Rule("blocks/.*", agp.layers())
    config = decoder_config(rule, steps=6, checkpoint_every=2, cut=True, **model)
    with pytest.raises(Stop):
        loop.run(config, tmp_path, StopAt(4))
    cut = run_quietly(config, tmp_path)["cut"]
    layer = 4 * 8 * 8 + 3 * 8 * 24
    assert cut["before"]["weights"] - cut["after"]["weights"] == 2 * layer
    assert cut["before"]["test_perplexity"] == cut["after"]["test_perplexity"]
    params = checkpoint.restore_variables(tmp_path, step="latest")["params"]
    assert {x.shape[0] for x in jax.tree.leaves(params["blocks"])} == {2}
    config.prune.coupled = False
    with pytest.raises(ConfigError, match="set config.prune.coupled=True"):
        set_up(config)


def test_a_decoder_loses_experts_in_events_and_goes_on_without(tmp_path):
    rule = agp.Rule("blocks/mlp/(gate|up|down)/kernel", agp.experts())
    model = dict(width=8, depth=2, num_heads=2, num_experts=4)
    config = decoder_config(rule, cut=True, **model)
    summary = run_quietly(config, tmp_path)
    params = checkpoint.restore_variables(tmp_path, step="latest")["params"]
    assert params["blocks"]["mlp"]["router"]["kernel"].shape == (2, 8, 2)
    assert params["blocks"]["mlp"]["down"]["kernel"].shape[:2] == (2, 2)
    assert np.isfinite(summary["test_perplexity"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=Model(name="resnet20")), "config.model.name must be one of lstm"),
        (dict(model=Model(name="gpt", dtype="half")), "config.model.dtype must be one"),
        (
            dict(model=Model(name="gpt", num_experts=1)),
            "config.model.experts_per_token must be from 1 to the 1 of",
        ),
        (
            dict(prune=Prune(rules=(agp.Rule("blocks/.*", agp.experts()),))),
            "whose place only couplings tell: set config.prune.coupled=True",
        ),
        (dict(data=Data(name="pydoc_bytes", bptt=0)), "config.data.bptt must be at"),
        (dict(data=Data(name="pydoc_bytes", augment="shift")), "config.data.augment"),
        (dict(data=Data(name="pydoc_bytes", bptt=10**6)), "choose a smaller batch"),
        (dict(data=Data(name="digits")), "config.model.name must be one of mlp"),
    ],
)
def test_what_does_not_go_with_a_text_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        set_up(lstm_config(**changes))
