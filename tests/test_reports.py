"""What a run prints, at the widths of terminals and in files."""

import pytest
from runs import printed_lines

import agp_jax as agp
from agp_jax.training import reports
from agp_jax.training.counts import TensorCount
from agp_jax.training.tasks import Quality, Task

ACCURACY = Quality("accuracy", ".2%", higher_is_better=True)
TASK = Task(*[None] * 3, "image", *[None] * 3, ACCURACY, None)
COUNTS = [
    TensorCount("conv/kernel", (1, 4), (1, 4), 2, 0.8, "rule"),
    TensorCount("head0/kernel", (3, 2), (3, 2), 6, None, "tensor"),
    TensorCount("head1/kernel", (3, 2), (3, 2), 6, None, "tensor"),
]
CUT = [
    TensorCount("conv/kernel", (4, 4), (4, 2), 8, 0.5, "units"),
    TensorCount("head/kernel", (4, 2), (2, 2), 4, None, "tensor"),
]


@pytest.fixture(params=[80, 120, None], ids=lambda width: f"{width}")
def printed(request):
    """The lines that a terminal of each width gets, and a file; split into words."""

    def print_with(print_it):
        width = request.param
        lines = printed_lines(print_it, width)
        assert all(len(line) <= (width or 999) for line in lines)
        return [line.split() for line in lines]

    return print_with


def test_the_table_has_a_line_for_equal_tensors_and_the_totals(printed):
    assert printed(lambda console: reports.print_counts(console, COUNTS)) == [
        ["tensor", "shape", "non-zero", "each", "sparsity", "asked", "for"],
        ["conv/kernel", "1x4", "2", "50.00%", "80%", "of", "all"],
        ["head[0-1]/kernel", "3x2", "6", "0.00%", "dense"],
        ["total", "14", "12.50%", "20%"],
    ]


def test_a_dense_model_is_asked_for_nothing(printed):
    lines = printed(lambda console: reports.print_counts(console, COUNTS[1:]))
    assert lines[0] == ["tensor", "shape", "non-zero", "each", "sparsity"]
    assert lines[-1] == ["total", "12", "0.00%"]


def test_after_a_cut_the_table_has_both_shapes_and_the_whole_as_its_basis(printed):
    assert printed(lambda console: reports.print_counts(console, CUT)) == [
        ["tensor", "before", "after", "non-zero", "sparsity"],
        ["conv/kernel", "4x4", "4x2", "8", "50.00%"],
        ["head/kernel", "4x2", "2x2", "4", "50.00%"],
        ["total", "12", "50.00%"],
    ]


def test_the_result_has_the_model_before_and_after_its_cut(printed):
    sizes = {"weights": 24, "all_params": 30, "macs": 24}
    parts = {
        "before": sizes | {"test_accuracy": 0.75, "seconds_per_step": 0.25},
        "after": {**sizes, "weights": 12, "test_accuracy": 0.75}
        | {"seconds_per_step": None},
    }
    summary = {"test_accuracy": 0.875, "weights": 24, "nonzero": 12, "sparsity": 0.5}
    summary["cut"] = parts
    lines = printed(lambda c: reports.print_result(c, TASK, CUT, summary))
    assert ["the", "cut", "before", "after"] in lines
    assert ["weights", "24", "12"] in lines
    assert ["seconds", "per", "step", "0.2500"] in lines  # none was timed after it
    sentence = "test accuracy 87.50% with 12 of 24 weights left, sparsity 50.00%"
    assert lines[-1] == sentence.split()
    summary["cut"] = None
    lines = printed(lambda c: reports.print_result(c, TASK, CUT, summary))
    assert ["weights", "24", "12"] not in lines


def test_a_record_is_described_by_its_figures():
    record = {"loss": 0.5, "train_accuracy": 0.9, "test_accuracy": 0.8, "sparsity": 0.7}
    figures = reports.describe_record(TASK, record | {"images_per_second": 1234.5})
    assert list(figures.values()) == [
        "loss 0.5000",
        "train 90.00%",
        "test 80.00%",
        "sparsity 70.00%",
        "1,234 images/s",
    ]
    figures = reports.describe_record(TASK, record | {"images_per_second": None})
    assert "speed" not in figures  # where all steps were compiled


def test_of_many_events_a_plan_shows_both_ends(printed):
    def lines(frequency):
        schedule = agp.polynomial_schedule(
            0.5, begin_step=0, end_step=1000, frequency=frequency
        )
        return printed(lambda c: reports._print_events(c, schedule, 60))

    few, many = lines(100), lines(1)
    assert few[1:3] == [["0", "0.0", "0.00%"], ["100", "1.7", "13.55%"]]
    assert len(few) == 12 and few[-1] == ["1,000", "16.7", "50.00%"]
    assert len(many) == 26 and ["..."] * 3 in many and many[-1] == few[-1]
