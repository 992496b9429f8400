"""The benchmarks run, at tiny sizes, and say what they should; times are not tested."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUMBERS = (int, float)

# By script: its options, and for each of its tables the types of some columns.
BENCHMARKS = {
    "mask_event": (
        ["--rounds=1"],
        {
            "mask_event": {
                "case": str,
                "weights": int,
                "event": str,
                "ns/weight": NUMBERS,
                "reads": NUMBERS,
                "x_faster_than_peer": NUMBERS,
                "temp_B/weight": NUMBERS,
                "compile_s": NUMBERS,
            }
        },
    ),
    "step_cost": (
        ["--rounds=1", "--compile-rounds=1"],
        {
            "optimizer_step": {"step": str, "ms": NUMBERS, "of_bare": NUMBERS},
            "training_step": {"step": str, "ms": NUMBERS, "of_bare": NUMBERS},
            "compilation": {
                "step_of": str,
                "pruned": str,
                "trace_s": NUMBERS,
                "compile_s": NUMBERS,
                "temporaries_MB": NUMBERS,
            },
        },
    ),
    "input_pipeline": (
        ["--rounds=1"],
        {
            "batches": {
                "data": str,
                "batches": str,
                "threads": int,
                "images/s": NUMBERS,
                "images/s_per_core": NUMBERS,
            },
            "preparation": {"images": int, "images/s_per_core": NUMBERS},
        },
    ),
    "collectives": (
        [],
        {
            "by_structure": {
                "structure": str,
                "kinds": dict,
                "temporaries_per_weight": NUMBERS,
                "keeps_shardings": str,
            },
            "by_number": {"tensors": int, "kinds": dict},
        },
    ),
    "thinned_inference": (
        ["--rounds=1"],
        {
            "inference": {
                "network": str,
                "of_dense": NUMBERS,
                "MACs_of_dense": NUMBERS,
                "parameters_of_dense": NUMBERS,
            },
            "thinning": {
                "groups": int,
                "find_couplings_s": NUMBERS,
                "cut_s": NUMBERS,
                "first_trace_s": NUMBERS,
            },
        },
    ),
    "language_speed": (
        ["--rounds=1"],
        {
            "training_step": {
                "model": str,
                "parameters": int,
                "ms": NUMBERS,
                "tokens/s": NUMBERS,
                "of_agp_jax": NUMBERS,
            },
            "pruned": {
                "model": str,
                "weights": str,
                "doing": str,
                "tokens/s": NUMBERS,
                "of_dense": NUMBERS,
                "MACs_of_dense": NUMBERS,
            },
        },
    ),
    "abstract_scale": (
        [],
        {
            "abstract_scale": {
                "model": str,
                "memory": dict,
                "collectives": dict,
                "beyond_bare": dict,
                "compile_s": NUMBERS,
                "keeps_shardings": str,
            }
        },
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each script wrote; they run side by side."""
    directory = tmp_path_factory.mktemp("benchmarks")
    running = {
        name: subprocess.Popen(
            [
                *(sys.executable, "-m", f"benchmarks.{name}", "--small"),
                *options,
                f"--json={directory / name}.json",
            ],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (options, _) in BENCHMARKS.items()
    }
    found = {}
    for name, process in running.items():
        printed, errors = process.communicate()
        assert process.returncode == 0, errors
        found[name] = printed, json.loads((directory / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_tables_come_out_with_their_columns(name, results):
    printed, result = results[name]
    assert result["device"] and result["jax"]
    assert f"device: {result['device']}" in printed
    tables = BENCHMARKS[name][1]
    assert set(result["tables"]) == set(tables)
    for table, columns in tables.items():
        assert result["tables"][table]
        for row in result["tables"][table]:
            for column, kind in columns.items():
                assert isinstance(row[column], kind), (column, row)
                if kind is NUMBERS:
                    assert math.isfinite(row[column]) and row[column] >= 0


def test_sharded_tensors_are_never_gathered(results):
    _, result = results["collectives"]
    for row in sum(result["tables"].values(), []):
        assert row["keeps_shardings"] == "yes", row
        for kind in row["kinds"].values():
            assert kind["largest_bytes"] < 1024, row  # a tensor has 32 kB


def test_tables_are_markdown(results):
    printed, _ = results["step_cost"]
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert lines
    assert all(line.endswith("|") for line in lines)
