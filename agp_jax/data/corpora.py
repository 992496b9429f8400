"""Where text comes from: files of words, or the documentation that Python brings."""

import dataclasses
import functools
import hashlib
import importlib
import io
import os
import platform
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from agp_jax.data.sources import DataError, one_line
from agp_jax.data.vocabularies import BYTES, Vocabulary, encode, number

END_OF_LINE = "<eos>"


class Sizes(NamedTuple):
    """Numbers of tokens."""

    train: int
    validation: int
    test: int


@dataclasses.dataclass(frozen=True)
class CorpusFacts:
    """What is known of a corpus without its files."""

    name: str
    title: str
    unit: str  # of its tokens: "word", "character" or "byte"
    sizes: Sizes
    vocabulary_size: int
    files: tuple[str, ...] = ()  # of train, validation, test; none: Python brings it


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A text in tokens.

    Attributes:
      name: as in `CORPORA`.
      version: which text of that name it is, for people.
      checksum: SHA-256 of its three parts, one after the other.
      vocabulary: what the tokens stand for.
      train, validation, test: int32 (num_tokens,).
    """

    name: str
    version: str
    checksum: str
    vocabulary: Vocabulary
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


_FILES = {
    "wikitext2": CorpusFacts(
        name="wikitext2",
        title="WikiText-2, the word-level version",
        unit="word",
        sizes=Sizes(2_088_628, 217_646, 245_569),
        vocabulary_size=33_278,
        files=("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
    ),
    "ptb": CorpusFacts(
        name="ptb",
        title="the Penn Treebank of 10,000 word types",
        unit="word",
        sizes=Sizes(929_589, 73_760, 82_430),
        vocabulary_size=10_000,
        files=("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
    ),
}
_DOCUMENTATION = {"pydoc_bytes": "byte", "pydoc_chars": "character"}  # name: unit
CORPORA = (*_FILES, *_DOCUMENTATION)


def corpus_facts(name: str) -> CorpusFacts:
    """Sizes of a corpus whose files need not be there.

    >>> corpus_facts("wikitext2").vocabulary_size
    33278
    """
    _check_name(name)
    if name in _FILES:
        return _FILES[name]
    corpus = load_corpus(name)
    sizes = Sizes(len(corpus.train), len(corpus.validation), len(corpus.test))
    unit, count = corpus.vocabulary.unit, len(corpus.vocabulary)
    return CorpusFacts(name, corpus.version, unit, sizes, count)


def load_corpus(
    name: str, directory: str = "", *, vocabulary: Vocabulary | None = None
) -> Corpus:
    """One of `CORPORA`.

    "wikitext2" and "ptb" are read from the files of their `corpus_facts`, which are in
    `directory`. As in PyTorch's `word_language_model`, each line is its words and
    `<eos>`, and words are numbered as they first appear in training, validation and
    test. Warns where the text is not as long as it is known to be.

    "pydoc_bytes" and "pydoc_chars" need no file: they are the documentation of the
    language that CPython brings, each paragraph once, in the order of its topics. Of
    its characters the first 90 % are for training and the next 5 % for validation.

    With a `vocabulary`, that of a checkpoint, tokens are numbered by it. Raises
    `DataError` where a file is missing or wrong, or a word is not in `vocabulary`.

    >>> corpus = load_corpus("pydoc_bytes")
    >>> corpus.train.dtype, len(corpus.vocabulary)
    (dtype('int32'), 256)
    """
    _check_name(name)
    unit = _FILES[name].unit if name in _FILES else _DOCUMENTATION[name]
    if vocabulary is not None and vocabulary.unit != unit:
        raise DataError(
            f"{name} is made of {unit}s, but the vocabulary is one of "
            f"{vocabulary.unit}s; give the one that was written with {name}"
        )
    if name in _FILES:
        return _load_files(_FILES[name], directory, vocabulary)
    return _load_documentation(name, vocabulary)


def _check_name(name: str) -> None:
    if name not in CORPORA:
        raise ValueError(f"no corpus {name!r} in {list(CORPORA)}")


# --- files of words -----------------------------------------------------------------


def _load_files(
    facts: CorpusFacts, directory: str, vocabulary: Vocabulary | None
) -> Corpus:
    paths = _find_files(facts, directory)
    contents = [_read(path) for path in paths]
    checksum = hashlib.sha256(b"".join(contents)).hexdigest()
    texts = [_to_text(*pair) for pair in zip(paths, contents, strict=True)]
    if vocabulary is None:
        every_word = dict.fromkeys(word for text in texts for word in _words(text))
        vocabulary = Vocabulary("word", tuple(every_word))
    parts = []
    for path, text in zip(paths, texts, strict=True):
        try:
            parts.append(number(vocabulary, _words(text)))
        except DataError as error:
            raise DataError(
                f"{path}: {error}; give the text that the vocabulary was made from"
            ) from None
    sizes = Sizes(*map(len, parts))
    if (sizes, len(vocabulary)) != (facts.sizes, facts.vocabulary_size):
        warnings.warn(
            f"{directory} holds {_counts(sizes, len(vocabulary))}, but all of "
            f"{facts.name} are {_counts(facts.sizes, facts.vocabulary_size)}: results "
            f"are not comparable",
            stacklevel=3,
        )
    return Corpus(facts.name, facts.title, checksum, vocabulary, *parts)


def _find_files(facts: CorpusFacts, directory: str) -> list[str]:
    names = f"{', '.join(facts.files[:-1])} and {facts.files[-1]}"
    remedy = f"name the directory that holds {names} of {facts.title}"
    if not directory:
        raise DataError(f"{facts.name} is read from files; {remedy}")
    root = os.path.expanduser(directory)
    if not os.path.isdir(root):
        raise DataError(f"{root} is no directory; {remedy}")
    paths = [os.path.join(root, name) for name in facts.files]
    for path in paths:
        if not os.path.isfile(path):
            raise DataError(f"no file {path}; {remedy}")
    return paths


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({one_line(error.strerror)}); mend that, or get "
            f"the file anew"
        ) from error
    if not content.strip():
        raise DataError(f"{path} holds no words; get the file anew")
    return content


def _to_text(path: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.start:,} of {len(content):,} is "
            f"{content[error.start]:#04x} ({error.reason}); get the file anew, and "
            f"unpacked"
        ) from None


def _words(text: str) -> Iterator[str]:
    # The lines of a file opened as text. str.splitlines would know eight more ends of
    # a line, among them characters that stand inside lines of WikiText.
    for line in io.StringIO(text, newline=None):
        yield from line.split()
        yield END_OF_LINE


def _counts(sizes: Sizes, num_types: int) -> str:
    tokens = ", ".join(f"{size:,}" for size in sizes)
    return f"{tokens} tokens to train, validate and test, of {num_types:,} types"


# --- the documentation that Python brings -------------------------------------------


def _load_documentation(name: str, vocabulary: Vocabulary | None) -> Corpus:
    text, python = _documentation(), platform.python_version()
    version = f"{platform.python_implementation()} {python} documentation"
    if vocabulary is None:
        characters = Vocabulary("character", tuple(sorted(set(text))))
        vocabulary = BYTES if _DOCUMENTATION[name] == "byte" else characters
    # Cut between characters, so that both corpora have the same three parts.
    ends = len(text) * 90 // 100, len(text) * 95 // 100
    texts = text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]
    try:
        parts = [encode(vocabulary, part) for part in texts]
    except DataError as error:
        raise DataError(
            f"{version}: {error}; run the version of Python that the vocabulary was "
            f"made with"
        ) from None
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(name, version, checksum, vocabulary, *parts)


@functools.cache
def _documentation() -> str:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:  # some distributions keep it in a package of its own
        raise DataError(
            f"this Python has no pydoc_data.topics ({one_line(error)}); install its "
            f"documentation, or choose another corpus"
        ) from error
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    # Topics quote one another: a sixth of the last 5 % would be in training, too.
    distinct = dict.fromkeys(paragraph.strip("\n") for paragraph in paragraphs)
    return "\n\n".join(filter(str.strip, distinct)) + "\n"
