"""The fields of a config on the command line: all there, all described, or nearest."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from agp_jax.training.config import Config, Prune
from agp_jax.training.fields import list_fields, nearest

ROOT = Path(__file__).parents[1]


def test_every_field_is_listed_with_its_default_and_what_it_means():
    fields = {field.name: field for field in list_fields()}
    for name, field in fields.items():
        value = Config()
        for part in name.split("."):
            value = getattr(value, part)
        assert value == field.default, name
        assert field.about, f"the docstring says nothing of {name}"
    own = {f.name for f in dataclasses.fields(Prune)}
    assert {f"prune.{name}" for name in own} <= fields.keys()
    assert fields["seed"].about.startswith("of the initial weights")
    # What stands together is said together.
    assert fields["prune.begin"].about == fields["prune.end"].about


def test_a_slip_finds_what_was_meant():
    names = [field.name for field in list_fields()]
    for slip, meant in {
        "prune.final_sparsty": "prune.final_sparsity",
        "final_sparsity": "prune.final_sparsity",
        "optimizer.lr": "optimizer.name",
        "batchsize": "batch_size",
        "data.augmentation": "data.augment",
    }.items():
        found = nearest(slip, names).split(", ")
        assert len(found) == 3
        assert meant in found, (slip, found)


def test_help_lists_configs_and_fields():
    command = [sys.executable, ROOT / "train.py", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    output = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    for path in (ROOT / "configs").glob("*.py"):
        runs = "def get_config" in path.read_text()
        assert (f"  {path.stem}" in lines) == runs, path
    assert "  prune.final_sparsity=0.9" in lines and "      the first event." in lines
    assert "  --workdir:" in output
