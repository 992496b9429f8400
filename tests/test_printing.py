"""Sentences and tables that fit terminals of 80 and 120 columns, and files."""

import pytest
from runs import printed_lines

from agp_jax.training.printing import group_rows, print_table, say


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_sentence_breaks_at_spaces_alone(width):
    path = "/a/very/long/directory/name/that/is/longer/than/a/narrow/terminal"
    sentence = f"work directory: {path} has 21 events from step 100 to 500, every 20"
    lines = printed_lines(lambda console: say(console, sentence), width)
    assert [word for line in lines for word in line.split()] == sentence.split()
    assert all(len(line) <= width or line.strip() == path for line in lines)
    assert printed_lines(lambda console: say(console, sentence)) == [sentence]


@pytest.mark.parametrize("width", [80, 120, None])
def test_a_table_keeps_names_and_numbers_whole(width):
    titles = ["tensor", "shape", "non-zero"]
    rows = [["a", "3x3x16x16", "2,304"], ["b" * 59, "10", "10"], ["[bold]", "", ""]]
    lines = printed_lines(lambda console: print_table(console, titles, rows), width)
    words = [word for line in lines for word in line.split()]
    assert words == [*titles, *(cell for row in rows for cell in row if cell)]
    assert max(map(len, lines)) <= 80
    assert len(lines) == 4
    assert len({len(line) for line in lines[:3]}) == 1  # numbers end in one column


def test_a_table_too_wide_gives_up_its_last_column_and_then_its_form():
    titles, row = ["tensor", "non-zero", "sparsity"], ["x" * 30, "2,304", "50.00%"]

    def lines(width):
        return printed_lines(
            lambda console: print_table(console, titles, [row], spare_last=True), width
        )

    assert lines(60)[1].split() == row
    assert lines(45)[1].split() == row[:2]
    assert [line.split() for line in lines(30)[2:]] == [row[:1], row[1:]]
    assert lines(None)[1].split() == row


def test_rows_that_differ_in_a_number_are_one():
    equal = [
        [f"stage{i}/block{j}/conv{k}/kernel", "9", "8"]
        for i in (1, 2)
        for j in (0, 1, 2, 4, 5)
        for k in (1, 2)
    ]
    assert group_rows([*equal, ["stage2/block3/conv1/kernel", "7", "8"]]) == [
        ["stage[1-2]/block[0,1,2,4,5]/conv[1-2]/kernel", "9", "8"],
        ["stage2/block3/conv1/kernel", "7", "8"],
    ]
    assert group_rows([]) == []
    apart = [["stage1/conv2", "1"], ["stage2/conv1", "1"], ["head", "1"]]
    assert group_rows(apart) == apart
    assert group_rows([["layer9", ""], ["layer10", ""]]) == [["layer[9-10]", ""]]
