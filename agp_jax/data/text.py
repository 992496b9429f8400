"""Batches of text: rows of tokens, each with the token that follows it.

Rows are contiguous in the text from one batch to the next, so a model may carry its
state along, as in truncated backpropagation through time (BPTT).
"""

import functools
import itertools
from collections.abc import Iterator

import numpy as np


def steps_per_epoch(num_tokens: int, batch_size: int, bptt: int) -> int:
    """How many batches of `train_tokens` go once through a text.

    >>> steps_per_epoch(2_088_628, batch_size=20, bptt=35)  # WikiText-2, as published
    2983
    """
    _check_at_least_one(batch_size=batch_size, bptt=bptt)
    steps = num_tokens // (batch_size * bptt)
    if not steps:
        raise ValueError(
            f"a batch of {batch_size} rows of {bptt} tokens needs {batch_size * bptt}, "
            f"but the text has {num_tokens}; choose a smaller batch_size or bptt"
        )
    return steps


def train_tokens(
    tokens: np.ndarray,
    *,
    batch_size: int,
    bptt: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches; the i-th is that of training step `start_step + i`.

    A batch is `{"tokens": int32 (rows, bptt), "targets": int32 (rows, bptt), "starts":
    bool (rows,)}`, targets being the tokens that follow. Each process has a contiguous
    part of the `batch_size` rows.

    In an epoch of `steps_per_epoch`, the text is a ring, which the seed and the number
    of the epoch open somewhere and which is divided there into `batch_size` equal
    parts. Row r goes through part r, `bptt` tokens a step, so it goes on where row r
    of the step before ended. All rows have `starts` in the first step of an epoch. The
    ring's last tokens that fill no batch, fewer than `batch_size * bptt`, are other
    ones each epoch. Where the ring was closed, the first token follows the last.

    >>> batches = train_tokens(np.arange(17), batch_size=2, bptt=4, seed=0)
    >>> for _ in range(2):
    ...     batch = next(batches)
    ...     print(batch["tokens"].tolist(), batch["starts"].tolist())
    [[9, 10, 11, 12], [0, 1, 2, 3]] [True, True]
    [[13, 14, 15, 16], [4, 5, 6, 7]] [False, False]
    """
    tokens = _check_tokens(tokens)
    rows = _own_rows(batch_size, process_index, process_count)
    epoch_steps = steps_per_epoch(len(tokens), batch_size, bptt)
    if start_step < 0 or not 0 <= seed < 2**32:
        raise ValueError(
            f"start_step must be at least 0 and seed in 0..2**32-1, "
            f"but they are {start_step} and {seed}"
        )

    @functools.lru_cache(maxsize=1)
    def opening(epoch: int) -> int:
        return np.random.RandomState([seed, epoch]).randint(len(tokens))

    def make_batch(step: int) -> dict[str, np.ndarray]:
        epoch, i = divmod(step, epoch_steps)
        begins = opening(epoch) + (rows * epoch_steps + i) * bptt
        window = tokens.take(begins[:, None] + np.arange(bptt + 1), mode="wrap")
        starts = np.full(len(rows), i == 0)
        return {"tokens": window[:, :-1], "targets": window[:, 1:], "starts": starts}

    return map(make_batch, itertools.count(start_step))


def eval_tokens(
    tokens: np.ndarray,
    *,
    bptt: int,
    eval_rows: int = 1,
    pad_rows_to: int = 1,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Every token but the first is once the target, in order, in batches of one shape.

    A batch is one of `train_tokens` with a `"weight"`, float32 (rows, bptt): 1 for a
    target, 0 for what fills the shape. The text is one row, one long sequence, or
    `eval_rows` rows, each of which starts without state: faster, but its results are
    those of so many rows. Rows without weight make them a multiple of `pad_rows_to`,
    the number of devices. Neither this nor `bptt` nor the number of processes, which
    have contiguous parts of the rows, changes what a token is predicted from.

    >>> for batch in eval_tokens(np.arange(10, 15), bptt=3):
    ...     print(batch["tokens"].tolist(), batch["weight"].tolist())
    [[10, 11, 12]] [[1.0, 1.0, 1.0]]
    [[13, 0, 0]] [[1.0, 0.0, 0.0]]
    """
    tokens = _check_tokens(tokens)
    _check_at_least_one(bptt=bptt, eval_rows=eval_rows, pad_rows_to=pad_rows_to)
    num_targets = len(tokens) - 1
    if num_targets < eval_rows:
        raise ValueError(
            f"{eval_rows} rows need {eval_rows + 1} tokens, but the text has "
            f"{len(tokens)}; choose fewer eval_rows or another text"
        )
    row_length = -(-num_targets // eval_rows)
    num_rows = -(-eval_rows // pad_rows_to) * pad_rows_to
    rows = _own_rows(num_rows, process_index, process_count)

    def make_batch(begin: int) -> dict[str, np.ndarray]:
        places = begin + np.arange(bptt)  # in a row; those past its end weigh nothing
        positions = rows[:, None] * row_length + places
        counts = (places < row_length) & (positions < num_targets)
        return {
            "tokens": np.where(counts, tokens.take(positions, mode="clip"), 0),
            "targets": np.where(counts, tokens.take(positions + 1, mode="clip"), 0),
            "starts": np.full(len(rows), begin == 0),
            "weight": counts.astype(np.float32),
        }

    return map(make_batch, range(0, row_length, bptt))


def _own_rows(num_rows: int, process_index: int, process_count: int) -> np.ndarray:
    """The numbers of the rows that a process has."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in 0..process_count-1")
    if num_rows < 1 or num_rows % process_count:
        raise ValueError(
            f"the rows of all processes must be a positive multiple of the "
            f"{process_count} processes, but they are {num_rows}"
        )
    count = num_rows // process_count
    return process_index * count + np.arange(count)


def _check_tokens(tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"a text is one row of integers, but this is {tokens.dtype} of shape "
            f"{tokens.shape}; give one part of a corpus"
        )
    return tokens.astype(np.int32, copy=False)


def _check_at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, but it is {count}")
