"""What `import agp_jax` brings is listed, explained and on a page."""

import inspect
import sys
from pathlib import Path

import pytest

import agp_jax as agp

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import api  # noqa: E402


def test_the_page_is_what_the_docstrings_say():
    assert (ROOT / "docs" / "api.md").read_text() == api.make_page(), (
        "run python docs/api.py"
    )


def test_every_public_name_is_on_the_page_and_in_the_tour():
    listed = [name for names in api.PARTS.values() for name in names.split()]
    assert sorted(listed) == sorted(set(agp.__all__))
    for name in agp.__all__:
        assert f"`{name}`" in agp.__doc__, name


def test_dir_shows_public_names():
    assert set(dir(agp)) == {*agp.__all__, "__doc__", "__version__"}


@pytest.mark.parametrize("name", agp.__all__)
def test_every_docstring_has_an_example_that_runs(name):
    doc = inspect.getdoc(getattr(agp, name))
    assert ">>> " in doc  # which pytest runs: `--doctest-modules`
    assert len(doc.splitlines()[0]) <= 88
