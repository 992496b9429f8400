"""Text against PyTorch's word_language_model and against whole streams of tokens."""

import hashlib
import itertools
import json
import platform
from pydoc_data.topics import topics

import numpy as np
import pytest

from agp_jax.data.corpora import CORPORA, corpus_facts, load_corpus
from agp_jax.data.sources import DataError
from agp_jax.data.text import eval_tokens, steps_per_epoch, train_tokens
from agp_jax.data.vocabularies import (
    BYTES,
    Vocabulary,
    decode,
    encode,
    read_vocabulary,
    write_vocabulary,
)

PARTS = ("train", "validation", "test")

# As the archives have them: headings, blank lines that are a space, <unk>, @-@.
TEXTS = {
    "wikitext2": (
        " \n = Café = \n \n It is an <unk> @-@ house . \n No\u2028break\x85here \n",
        " \n = Park = \n \n It is here . \n",
        " \n = Café = \n \n\n No park\u3000is an <unk>",  # ends within a line
    ),
    "ptb": (
        " aer banknote berlitz <unk> \n the N shares of <unk> \n",
        " consumers may <unk> \n",
        " no it was n't <unk> N \n",
    ),
}


def write_files(directory, name, texts=None, newline="\n"):
    for file, text in zip(corpus_facts(name).files, texts or TEXTS[name], strict=True):
        (directory / file).write_bytes(text.replace("\n", newline).encode())
    return str(directory)


def load_small(directory, name="wikitext2", **options):
    with pytest.warns(UserWarning, match="results are not comparable"):
        return load_corpus(name, str(directory), **options)


def take(batches, count):
    return list(itertools.islice(batches, count))


def join(parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_equal(batch, expected):
    assert batch.keys() == expected.keys()
    for name in expected:
        assert batch[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(batch[name], expected[name])


# --- corpora ------------------------------------------------------------------------


def read_as_pytorch_does(directory, files):
    """word_language_model's Corpus: words in order, and each file's ids."""
    words, parts = [], []
    for file in files:
        ids = []
        with open(f"{directory}/{file}", encoding="utf8") as lines:
            for line in lines:
                for word in line.split() + ["<eos>"]:
                    if word not in words:
                        words.append(word)
                    ids.append(words.index(word))
        parts.append(ids)
    return words, parts


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", TEXTS)
def test_files_are_read_as_pytorch_reads_them(tmp_path, name, newline):
    directory = write_files(tmp_path, name, newline=newline)
    corpus = load_small(directory, name)
    words, parts = read_as_pytorch_does(directory, corpus_facts(name).files)
    assert corpus.vocabulary == Vocabulary("word", tuple(words))
    for part, expected in zip(PARTS, parts, strict=True):
        found = getattr(corpus, part)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)


def test_a_line_is_its_words_and_eos(tmp_path):
    corpus = load_small(write_files(tmp_path, "wikitext2"))
    assert decode(corpus.vocabulary, corpus.train) == (
        "<eos> = Café = <eos> <eos> It is an <unk> @-@ house . <eos> "
        "No break here <eos>"
    )
    assert decode(corpus.vocabulary, corpus.test[-5:]) == "park is an <unk> <eos>"


def test_a_text_of_the_known_size_loads_without_a_warning(tmp_path):
    facts = corpus_facts("ptb")
    words = [str(i) for i in range(facts.vocabulary_size - 1)]
    texts = []
    for size in facts.sizes:
        text = itertools.islice(itertools.cycle(words), size - 1)  # and <eos>
        texts.append(" ".join(text))
    corpus = load_corpus("ptb", write_files(tmp_path, "ptb", texts))
    assert [len(getattr(corpus, part)) for part in PARTS] == [*facts.sizes]


def test_a_text_of_another_size_warns(tmp_path):
    with pytest.warns(UserWarning) as record:
        load_corpus("ptb", write_files(tmp_path, "ptb"))
    assert record[0].filename == __file__
    assert str(record[0].message) == (
        f"{tmp_path} holds 11, 4, 7 tokens to train, validate and test, of 15 types, "
        f"but all of ptb are 929,589, 73,760, 82,430 tokens to train, validate and "
        f"test, of 10,000 types: results are not comparable"
    )


def test_the_checksum_is_that_of_the_three_files(tmp_path):
    content = "".join(TEXTS["ptb"]).encode()
    corpus = load_small(write_files(tmp_path, "ptb"), "ptb")
    assert corpus.checksum == hashlib.sha256(content).hexdigest()
    assert corpus.version == "the Penn Treebank of 10,000 word types"


def test_a_stored_vocabulary_numbers_the_words(tmp_path):
    first = load_small(write_files(tmp_path, "wikitext2"))
    vocabulary = Vocabulary("word", (*reversed(first.vocabulary.entries), "more"))
    again = load_small(tmp_path, vocabulary=vocabulary)
    assert again.vocabulary is vocabulary
    for part in PARTS:
        text = decode(vocabulary, getattr(again, part))
        assert text == decode(first.vocabulary, getattr(first, part))


def test_the_embedded_corpora_are_the_documentation_of_this_python():
    for name in "pydoc_bytes", "pydoc_chars":
        corpus = load_corpus(name)
        texts = [decode(corpus.vocabulary, getattr(corpus, part)) for part in PARTS]
        whole = "".join(texts)
        assert corpus.checksum == hashlib.sha256(whole.encode()).hexdigest()
        assert corpus.version == f"CPython {platform.python_version()} documentation"
        for text, percent in zip(texts, (90, 5, 5), strict=True):
            assert abs(len(text) - percent / 100 * len(whole)) <= 1
        assert "\ufffd" not in whole and len(whole) > 300_000
        paragraphs = {p.strip("\n") for t in topics.values() for p in t.split("\n\n")}
        found = whole.rstrip("\n").split("\n\n")
        assert sorted(found) == sorted(p for p in paragraphs if p.strip())


def test_both_embedded_corpora_have_the_same_parts():
    bytewise, characterwise = load_corpus("pydoc_bytes"), load_corpus("pydoc_chars")
    assert bytewise.vocabulary is BYTES
    assert bytewise.checksum == characterwise.checksum
    entries = characterwise.vocabulary.entries
    assert [*entries] == sorted(set(entries)) and 90 < len(entries) < 256
    for part in PARTS:
        text = decode(characterwise.vocabulary, getattr(characterwise, part))
        np.testing.assert_array_equal(getattr(bytewise, part), [*text.encode()])


def test_the_embedded_text_does_not_change_behind_a_version():
    if platform.python_version() != "3.11.7":
        pytest.skip("the numbers are those of Python 3.11.7")
    corpus = load_corpus("pydoc_bytes")
    assert corpus.checksum[:16] == "d1292362aabd294b"
    assert corpus_facts("pydoc_bytes").sizes == (336_693, 18_699, 18_685)
    facts = corpus_facts("pydoc_chars")
    assert facts.sizes == (335_894, 18_661, 18_661) and facts.vocabulary_size == 103


@pytest.mark.parametrize("name", CORPORA)
def test_sizes_are_known_without_files(name):
    facts = corpus_facts(name)
    assert facts.name == name and min(facts.sizes) > 10_000
    assert steps_per_epoch(facts.sizes.train, 20, 35) > 0
    if not facts.files:
        corpus = load_corpus(name)
        assert facts.sizes == tuple(len(getattr(corpus, part)) for part in PARTS)
        assert facts.vocabulary_size == len(corpus.vocabulary)
        assert facts.unit == corpus.vocabulary.unit


# --- what is wrong with files -------------------------------------------------------


def remove(path):
    path.unlink()


def make_directory(path):
    path.unlink()
    path.mkdir()


def empty(path):
    path.write_bytes(b"\n \n")


def cut_within_a_character(path):
    content = path.read_bytes()
    path.write_bytes(content[: content.index("é".encode()) + 1])


def compress(path):
    path.write_bytes(b"\x1f\x8b\x08" + path.read_bytes())


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove, "no file .*wiki.test.tokens; name the directory that holds wiki"),
        (make_directory, "no file .*wiki.test.tokens; name the directory"),
        (empty, "wiki.test.tokens holds no words; get the file anew"),
        (cut_within_a_character, "not UTF-8: byte 8 of 9 is 0xc3 .unexpected end of"),
        (compress, "not UTF-8: byte 1 of .* is 0x8b .*get the file anew, and unpacked"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_named(tmp_path, damage, message):
    write_files(tmp_path, "wikitext2")
    damage(tmp_path / "wiki.test.tokens")
    with pytest.raises(DataError, match=message) as error:
        load_corpus("wikitext2", str(tmp_path))
    assert "\n" not in str(error.value)


def test_the_files_that_are_wanted_are_named(tmp_path):
    wanted = (
        "name the directory that holds ptb.train.txt, ptb.valid.txt and ptb.test.txt of"
    )
    file = tmp_path / "file"
    file.write_text("")
    for directory, problem in [
        ("", "ptb is read from files"),
        (str(tmp_path / "nowhere"), "nowhere is no directory"),
        (str(file), "file is no directory"),
        (str(tmp_path), "no file .*ptb.train.txt"),
    ]:
        with pytest.raises(DataError, match=f"{problem}; {wanted}"):
            load_corpus("ptb", directory)
    with pytest.raises(ValueError, match="no corpus 'enwik8' in .*'wikitext2'"):
        load_corpus("enwik8")
    with pytest.raises(ValueError, match="no corpus 'enwik8' in"):
        corpus_facts("enwik8")


def test_what_a_stored_vocabulary_does_not_know_is_named(tmp_path):
    directory = write_files(tmp_path, "wikitext2")
    vocabulary = Vocabulary("word", ("=",))
    with pytest.raises(
        DataError,
        match="wiki.train.tokens: the word '<eos>' is not among the 1 of the "
        "vocabulary; give the text that",
    ):
        load_corpus("wikitext2", directory, vocabulary=vocabulary)
    with pytest.raises(
        DataError, match="made of words, but the vocabulary is one of b"
    ):
        load_corpus("wikitext2", directory, vocabulary=BYTES)
    letters = Vocabulary("character", tuple("abc"))
    with pytest.raises(DataError, match="the character .* run the version of Python"):
        load_corpus("pydoc_chars", vocabulary=letters)


# --- vocabularies -------------------------------------------------------------------

VOCABULARIES = [
    BYTES,
    Vocabulary("character", tuple('\n\r\t "\\é\u2028\x00\ud800😀')),
    Vocabulary("word", ("<eos>", "café", "\\n", '"', "@-@", "n't")),
]


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=lambda v: v.unit)
def test_a_vocabulary_comes_back_as_it_was_written(tmp_path, vocabulary):
    path = tmp_path / "vocabulary.json"
    path.write_text("an older one")
    write_vocabulary(path, vocabulary)
    assert read_vocabulary(str(path)) == vocabulary
    assert path.read_bytes().isascii()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=lambda v: v.unit)
def test_tokens_of_a_decoded_text_are_those_it_was_decoded_from(vocabulary):
    count = 128 if vocabulary.unit == "byte" else len(vocabulary)
    tokens = np.random.default_rng(0).integers(0, count, 200)
    found = encode(vocabulary, decode(vocabulary, tokens))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, tokens)
    assert encode(vocabulary, "").shape == (0,) and decode(vocabulary, []) == ""


def test_bytes_are_those_of_utf8():
    text = "“é” – 😀\n"
    assert encode(BYTES, text).tolist() == [*text.encode()]
    assert decode(BYTES, encode(BYTES, text)) == text


def test_what_cannot_be_encoded_or_decoded_is_named():
    words, letters = VOCABULARIES[2], Vocabulary("character", tuple("ab"))
    with pytest.raises(DataError, match="the word 'tea' is not among the 6 of the"):
        encode(words, "café tea")
    with pytest.raises(DataError, match="the character 'c' is not among the 2"):
        encode(letters, "abc")
    for tokens in [0, 6], [-1], np.array([7]):
        with pytest.raises(ValueError, match=r"token -?\d is not in 0..5"):
            decode(words, tokens)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        (b"", "Expecting value"),
        (b'{"unit": "word", "entries": ["a", "b"', "Expecting ',' delimiter"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        (b"[]", "no JSON object with the fields"),
        (b'{"unit": "word"}', "no JSON object with the fields"),
        (b'{"unit": "word", "entries": "ab"}', "no list of strings"),
        (b'{"unit": "word", "entries": [1]}', "no list of strings"),
        (b'{"unit": "word", "entries": []}', "it has no entries"),
        (b'{"unit": ["word"], "entries": ["a"]}', "its unit .* is not in"),
        (b'{"unit": "line", "entries": ["a"]}', "its unit 'line' is not in"),
        (b'{"unit": "word", "entries": ["a", "b", "a"]}', "word 'a' comes 2 times"),
        (b'{"unit": "word", "entries": ["a", "b c"]}', "entry 1, 'b c', is not one w"),
        (b'{"unit": "word", "entries": [""]}', "entry 0, '', is not one word"),
        (b'{"unit": "character", "entries": ["ab"]}', "is not one character"),
        (b'{"unit": "byte", "entries": ["a"]}', "the bytes are not 0 to 255"),
    ],
)
def test_a_damaged_vocabulary_is_named(tmp_path, content, message):
    path = tmp_path / "vocabulary.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_vocabulary(path)
    assert str(error.value).startswith(f"{path} cannot be read as a vocabulary (")
    assert "\n" not in str(error.value)


def test_a_vocabulary_is_readable_json(tmp_path):
    write_vocabulary(tmp_path / "v", Vocabulary("character", ("\n", "é")))
    content = json.loads((tmp_path / "v").read_text())
    assert content == {"unit": "character", "entries": ["\n", "é"]}


# --- batches for training -----------------------------------------------------------


def batchify(tokens, batch_size):
    """word_language_model's: (part_length, batch_size), a column for each part."""
    part_length = len(tokens) // batch_size
    return tokens[: part_length * batch_size].reshape(batch_size, -1).T


SIZES = [(1000, 4, 7), (1001, 8, 5), (56, 8, 7), (57, 8, 7), (111, 8, 7), (3, 1, 2)]


@pytest.mark.parametrize("num_tokens, batch_size, bptt", SIZES)
def test_an_epoch_is_pytorchs_batchify_of_the_opened_ring(num_tokens, batch_size, bptt):
    tokens = np.random.default_rng(1).permutation(num_tokens).astype(np.int32)
    steps = steps_per_epoch(num_tokens, batch_size, bptt)
    batches = train_tokens(tokens, batch_size=batch_size, bptt=bptt, seed=3)
    openings = set()
    for _ in range(3):
        epoch = take(batches, steps)
        opening = int(np.flatnonzero(tokens == epoch[0]["tokens"][0, 0])[0])
        openings.add(opening)
        opened = np.roll(tokens, -opening)
        columns = batchify(opened[: steps * batch_size * bptt], batch_size)
        followers = batchify(np.roll(opened, -1)[: columns.size], batch_size)
        for i, batch in enumerate(epoch):
            part = slice(i * bptt, (i + 1) * bptt)
            expected = {
                "tokens": columns[part].T,
                "targets": followers[part].T,
                "starts": np.full(batch_size, i == 0),
            }
            assert_equal(batch, expected)
        targets = np.concatenate([batch["targets"].ravel() for batch in epoch])
        assert len(set(targets.tolist())) == len(targets)  # none comes twice
        assert 0 <= num_tokens - len(targets) < batch_size * bptt
    assert num_tokens < 50 or len(openings) == 3


def test_a_row_goes_on_where_it_ended():
    tokens = np.arange(1003, dtype=np.int32)
    options = dict(batch_size=6, bptt=8, seed=0)
    steps = steps_per_epoch(len(tokens), 6, 8)
    for before, after in itertools.pairwise(take(train_tokens(tokens, **options), 60)):
        follows = after["tokens"][:, 0] == before["targets"][:, -1]
        assert (follows | after["starts"]).all()
        np.testing.assert_array_equal(
            before["tokens"][:, 1:], before["targets"][:, :-1]
        )
    starts = [b["starts"].all() for b in take(train_tokens(tokens, **options), 60)]
    assert np.flatnonzero(starts).tolist() == [*range(0, 60, steps)]


@pytest.mark.parametrize("start_step", [1, 4, 5, 6, 1234567, 2**31])
def test_a_batch_is_a_function_of_seed_and_step(start_step):
    tokens = np.random.default_rng(0).integers(0, 50, 163).astype(np.int32)
    options = dict(batch_size=4, bptt=8, seed=7)
    early = max(start_step - 3, 0)
    skipped = take(train_tokens(tokens, start_step=early, **options), 12)
    started = take(train_tokens(tokens, start_step=start_step, **options), 9)
    for batch, expected in zip(started, skipped[start_step - early :], strict=False):
        assert_equal(batch, expected)


def test_seeds_and_epochs_open_the_ring_everywhere():
    tokens = np.arange(24)
    firsts = [
        batch["tokens"][0, 0]
        for seed in range(4)
        for batch in take(train_tokens(tokens, batch_size=2, bptt=12, seed=seed), 60)
    ]
    assert set(firsts) == set(range(24))


@pytest.mark.parametrize("process_count", [1, 2, 4, 8])
def test_processes_share_the_rows_of_one(process_count):
    tokens = np.random.default_rng(0).integers(0, 50, 500).astype(np.int32)
    options = dict(batch_size=8, bptt=6, seed=3, start_step=5)
    own = [
        train_tokens(tokens, process_index=i, process_count=process_count, **options)
        for i in range(process_count)
    ]
    for expected in take(train_tokens(tokens, **options), 25):
        parts = [next(batches) for batches in own]
        assert all(len(part["starts"]) == 8 // process_count for part in parts)
        assert_equal(join(parts), expected)


def test_batches_of_a_corpus_are_int32():
    corpus = load_corpus("pydoc_chars")
    batch = next(train_tokens(corpus.train, batch_size=32, bptt=64, seed=0))
    assert batch["tokens"].shape == batch["targets"].shape == (32, 64)
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
    assert batch["starts"].shape == (32,) and batch["starts"].dtype == bool


# --- batches for evaluation ---------------------------------------------------------


def read_rows(batches):
    """What each row predicts, in order: [(token, target)] where the weight is 1."""
    rows = [[] for _ in batches[0]["tokens"]]
    for batch in batches:
        for row, *values in zip(
            rows, batch["tokens"], batch["targets"], batch["weight"], strict=True
        ):
            weighed = zip(*(value.tolist() for value in values), strict=True)
            row += [(token, target) for token, target, weight in weighed if weight]
    return rows


@pytest.mark.parametrize("num_tokens", [2, 3, 7, 8, 9, 101])
@pytest.mark.parametrize("bptt", [1, 3, 8, 200])
def test_the_text_is_one_long_sequence(num_tokens, bptt):
    tokens = np.random.default_rng(0).permutation(num_tokens).astype(np.int32)
    batches = list(eval_tokens(tokens, bptt=bptt))
    assert read_rows(batches) == [[*itertools.pairwise(tokens.tolist())]]
    assert [batch["starts"].tolist() for batch in batches] == [
        [i == 0] for i in range(len(batches))
    ]
    for batch in batches:
        assert batch["tokens"].shape == batch["targets"].shape == (1, bptt)
        assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
        assert batch["weight"].shape == (1, bptt)
        assert batch["weight"].dtype == np.float32


@pytest.mark.parametrize("eval_rows, pad_rows_to", [(1, 8), (10, 1), (10, 8), (3, 2)])
@pytest.mark.parametrize("num_tokens, bptt", [(11, 4), (12, 4), (101, 7), (106, 35)])
def test_rows_follow_one_another_in_the_text(num_tokens, bptt, eval_rows, pad_rows_to):
    tokens = np.random.default_rng(0).permutation(num_tokens)
    options = dict(eval_rows=eval_rows, pad_rows_to=pad_rows_to)
    batches = list(eval_tokens(tokens, bptt=bptt, **options))
    rows = read_rows(batches)
    assert sum(rows, []) == [*itertools.pairwise(tokens.tolist())]
    assert len(rows) % pad_rows_to == 0 and len(rows) - eval_rows < pad_rows_to
    assert not any(rows[eval_rows:])
    longest = -(-(num_tokens - 1) // eval_rows)
    assert max(map(len, rows)) == longest and len(batches) == -(-longest // bptt)
    assert {len(batch["starts"]) for batch in batches} == {len(rows)}


@pytest.mark.parametrize("process_count", [1, 2, 4, 8])
@pytest.mark.parametrize("eval_rows", [1, 10])
def test_evaluation_in_several_processes_is_that_of_one(process_count, eval_rows):
    tokens = np.random.default_rng(0).integers(0, 50, 333).astype(np.int32)
    options = dict(bptt=6, eval_rows=eval_rows, pad_rows_to=8)
    parts = [
        eval_tokens(tokens, process_index=i, process_count=process_count, **options)
        for i in range(process_count)
    ]
    together = [join(part) for part in zip(*parts, strict=True)]
    for batch, expected in zip(together, eval_tokens(tokens, **options), strict=True):
        assert_equal(batch, expected)


def test_padding_changes_no_row_that_counts():
    tokens = np.random.default_rng(0).integers(1, 50, 333).astype(np.int32)
    plain = eval_tokens(tokens, bptt=6, eval_rows=3)
    padded = eval_tokens(tokens, bptt=6, eval_rows=3, pad_rows_to=8)
    for batch, expected in zip(padded, plain, strict=True):
        assert_equal({key: value[:3] for key, value in batch.items()}, expected)
        assert not batch["tokens"][3:].any() and not batch["weight"][3:].any()


# --- wrong options ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch_size=0), "positive multiple of the 1 processes, but they are 0"),
        (dict(bptt=0), "bptt must be at least 1, but it is 0"),
        (dict(bptt=51), "2 rows of 51 tokens needs 102, but the text has 100; choose"),
        (dict(batch_size=101), "101 rows of 5 tokens needs 505, but the text has 100"),
        (dict(process_count=3), "positive multiple of the 3 processes, but they are 2"),
        (dict(process_index=1), "process_index 1 is not in"),
        (dict(start_step=-1), "they are -1 and 0"),
        (dict(seed=-1), "they are 0 and -1"),
        (dict(seed=2**32), "they are 0 and 4294967296"),
    ],
)
def test_wrong_options_of_training_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        train_tokens(np.arange(100), **dict(batch_size=2, bptt=5, seed=0) | options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(bptt=0), "bptt must be at least 1"),
        (dict(eval_rows=0), "eval_rows must be at least 1"),
        (dict(pad_rows_to=-8), "pad_rows_to must be at least 1, but it is -8"),
        (dict(eval_rows=100), "100 rows need 101 tokens, but the text has 100; choose"),
        (dict(process_count=2), "positive multiple of the 2 processes, but they are 1"),
        (dict(process_index=-1), "process_index -1 is not in"),
    ],
)
def test_wrong_options_of_evaluation_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        eval_tokens(np.arange(100), **dict(bptt=5) | options)


@pytest.mark.parametrize("tokens", [np.zeros((5, 20), int), np.zeros(100), "a" * 100])
def test_what_is_no_row_of_tokens_is_refused(tokens):
    with pytest.raises(ValueError, match="a text is one row of integers, but this is"):
        train_tokens(tokens, batch_size=2, bptt=5, seed=0)
    with pytest.raises(ValueError, match="a text is one row of integers, but this is"):
        eval_tokens(tokens, bptt=5)
    with pytest.raises(ValueError, match="1 rows need 2 tokens, but the text has 0"):
        eval_tokens(np.zeros(0, np.int32), bptt=5)
