"""The Python in README and docs runs as it stands."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page):
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == text.count("```python")  # none is left out
    names = {}
    with jax.numpy_rank_promotion("allow"):  # one after the other, as a reader would
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_are_there(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if ":" not in link]
    configs = re.findall(r"configs/\w+\.py", text)
    for target in [page.parent / link for link in links] + [ROOT / c for c in configs]:
        assert target.exists(), target
