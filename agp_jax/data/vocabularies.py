"""What the numbers in an array of tokens stand for."""

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np

from agp_jax.data.sources import DataError, one_line

UNITS = ("word", "character", "byte")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The distinct words, characters or bytes of a text; token i is `entries[i]`.

    A byte's entry is the character of its number, so there are always the same 256.
    """

    unit: str  # one of UNITS
    entries: tuple[str, ...] = dataclasses.field(repr=False)  # tens of thousands

    def __post_init__(self):
        problem = _problem(self.unit, self.entries)
        if problem:
            raise ValueError(f"no vocabulary: {problem}")

    def __len__(self) -> int:
        return len(self.entries)


def _problem(unit: str, entries: Sequence[str]) -> str | None:
    if unit not in UNITS:
        return f"its unit {unit!r} is not in {list(UNITS)}"
    if not entries:
        return "it has no entries"
    for i, entry in enumerate(entries):
        whole = entry.split() == [entry] if unit == "word" else len(entry) == 1
        if not whole:
            return f"entry {i}, {entry!r}, is not one {unit}"
    ((most_common, count),) = collections.Counter(entries).most_common(1)
    if count > 1:
        return f"the {unit} {most_common!r} comes {count} times"
    if unit == "byte" and tuple(entries) != _BYTES:
        return "the bytes are not 0 to 255"
    return None


_BYTES = tuple(map(chr, range(256)))
BYTES = Vocabulary("byte", _BYTES)


def encode(vocabulary: Vocabulary, text: str) -> np.ndarray:
    """The tokens of a text, int32: its words, its characters or its bytes as UTF-8.

    Words are what stands between white space, so the end of a line is written `<eos>`.

    >>> encode(Vocabulary("word", ("<eos>", "no", "yes")), "yes no <eos>").tolist()
    [2, 1, 0]
    >>> encode(BYTES, "é").tolist()
    [195, 169]
    """
    if vocabulary.unit == "byte":
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return number(vocabulary, text.split() if vocabulary.unit == "word" else text)


def number(vocabulary: Vocabulary, pieces: Iterable[str]) -> np.ndarray:
    """The tokens of words or characters, int32; an unknown one is a `DataError`."""
    numbers = {entry: i for i, entry in enumerate(vocabulary.entries)}
    try:
        return np.array([numbers[piece] for piece in pieces], np.int32)
    except KeyError as error:
        raise DataError(
            f"the {vocabulary.unit} {error.args[0]!r} is not among the "
            f"{len(vocabulary)} of the vocabulary"
        ) from None


def decode(vocabulary: Vocabulary, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of some tokens: words with spaces between, characters, or UTF-8 bytes.

    Bytes that are no UTF-8, as a model may draw them, become U+FFFD.

    >>> decode(Vocabulary("word", ("<eos>", "no", "yes")), [2, 1, 0])
    'yes no <eos>'
    >>> decode(BYTES, [195, 169, 195])
    'é\ufffd'
    """
    numbers = np.asarray(tokens).tolist()
    for value in numbers:
        if not 0 <= value < len(vocabulary):
            raise ValueError(f"token {value} is not in 0..{len(vocabulary) - 1}")
    if vocabulary.unit == "byte":
        return bytes(numbers).decode(errors="replace")
    separator = " " if vocabulary.unit == "word" else ""
    return separator.join(vocabulary.entries[value] for value in numbers)


def write_vocabulary(path: str | os.PathLike, vocabulary: Vocabulary) -> None:
    """Writes a file of JSON, as a whole or not at all."""
    content = json.dumps(dataclasses.asdict(vocabulary), indent=0)
    unfinished = f"{os.fspath(path)}.incomplete"
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(content + "\n")
    os.replace(unfinished, path)


def read_vocabulary(path: str | os.PathLike) -> Vocabulary:
    """What `write_vocabulary` wrote; a `DataError` if that is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    fields = ["entries", "unit"]
    if not isinstance(content, dict) or sorted(content) != fields:
        raise _unreadable(path, f"it is no JSON object with the fields {fields}")
    entries = content["entries"]
    if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
        raise _unreadable(path, "its entries are no list of strings")
    try:
        return Vocabulary(content["unit"], tuple(entries))
    except ValueError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike, problem: object) -> DataError:
    return DataError(
        f"{os.fspath(path)} cannot be read as a vocabulary ({one_line(problem)}); "
        f"bring back the file that was written with the model"
    )
