"""The command line of `python -m agp_jax.data`."""

import argparse
import sys

import tensorflow_datasets as tfds

from agp_jax.data.datasets import DATASETS
from agp_jax.data.preparation import prepare
from agp_jax.data.sources import DataError


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m agp_jax.data")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("prepare", help="write a dataset as ArrayRecord")
    command.add_argument("name", choices=DATASETS)
    command.add_argument("--source", help="what it is made from, see the documentation")
    command.add_argument("--data_dir", default="", help="default: where tfds looks")
    args = parser.parse_args(argv)
    try:
        path = prepare(args.name, data_dir=args.data_dir, source=args.source)
        splits = tfds.builder_from_directory(path).info.splits
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return 130
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    dataset = DATASETS[args.name]
    num_train = splits["train"].num_examples
    num_test = splits[dataset.test_split].num_examples
    print(
        f"{args.name}: {num_train} of {dataset.train_size} train, "
        f"{num_test} of {dataset.test_size} test images in {path}"
    )
    return 0
