"""The picture of a run: what it draws, and what its line passes by."""

import numpy as np
from PIL import Image

from agp_jax.training.pictures import Baseline, plot_metrics, split_at_events
from agp_jax.training.tasks import Quality

ACCURACY = Quality("accuracy", ".2%", higher_is_better=True)
PERPLEXITY = Quality("perplexity", ".2f", higher_is_better=False)


def make_records(steps, *, target=True):
    return [
        {
            "step": step,
            "sparsity": min(step, 8) / 10,
            "sparsity_target": min(step, 8) / 10 if target else None,
            "test_accuracy": 0.5,
            "test_perplexity": 300.0 / step,
        }
        for step in steps
    ]


def draw(workdir, *arguments, **options):
    return np.asarray(Image.open(plot_metrics(workdir, *arguments, **options)))


def test_the_picture_shows_curves_events_cut_and_baseline(tmp_path):
    records = make_records(range(1, 10))
    empty = draw(tmp_path, [], ACCURACY, events=[3])
    drawn = draw(tmp_path, records, ACCURACY, events=[3])
    assert drawn.shape == empty.shape and drawn.std() > empty.std() > 0
    more = {"cut_step": 5, "baseline": Baseline("dense", 0.9), "events": range(3, 99)}
    assert (draw(tmp_path, records, ACCURACY, **more) != drawn).any()
    (path,) = tmp_path.iterdir()
    assert path.name == "sparsity_and_accuracy.png"


def test_a_dense_run_has_one_panel_and_the_name_of_its_directory(tmp_path):
    pictures = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        records = make_records(range(1, 10), target=False)
        pictures.append(draw(tmp_path / name, records, PERPLEXITY))
    assert (pictures[0] != pictures[1]).any()
    both = draw(tmp_path / "first", records, PERPLEXITY, events=[3])
    assert pictures[0].shape[0] < both.shape[0]


def test_the_line_passes_by_evaluations_just_after_an_event():
    records = make_records([5, 10, 15, 20, 25, 30])

    def steps(events):
        return [[r["step"] for r in part] for part in split_at_events(records, events)]

    assert steps([10, 20]) == [[5, 15, 25, 30], [10, 20]]
    assert steps([8, 20, 32]) == [[5, 10, 15, 25, 30], [20]]
    # With no other between them there is nothing else to draw a line through.
    assert steps([10, 15, 20]) == [[5, 10, 15, 20, 25, 30], [10, 15, 20]]
    assert steps([7]) == [[5, 10, 15, 20, 25, 30], []]
