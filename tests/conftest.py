"""Eight CPU devices, strict shapes, cheap compilation: the same for every test."""

import importlib.metadata
import os

# Tests check results, not speed: compiling less carefully halves their time.
_FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
# Where XLA still has its older code for fusions, that compiles in a third of the time;
# a version that does not know the flag ends the process.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])

import jax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
import pytest  # noqa: E402
from cifar_archives import cifar_contents, write_archive  # noqa: E402
from imagenet_archives import archive_contents, write_archives  # noqa: E402

from agp_jax import data  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Each device would save its slice of every array, and compile a program for each.
ocp.type_handlers.get_type_handler(jax.Array)._use_replica_parallel = False
jax.config.update("jax_numpy_rank_promotion", "raise")

collect_ignore = ["torch_agreement.py"]  # a script, which imports torch

# What a newcomer runs first: a part of everything, in a minute or two.
_QUICK = (
    "test_api test_atoms test_bits test_couplings test_cuts test_layers test_masks "
    "test_planning test_rules test_schedules test_selection test_structures test_trees "
    "test_wrong_calls"
).split()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in _QUICK:
            item.add_marker("quick")


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("digits"))
    data.prepare("digits", data_dir=directory)
    return directory


@pytest.fixture(scope="session")
def digits(digits_dir):
    return data.load("digits", "train", data_dir=digits_dir)


@pytest.fixture(scope="session")
def cifar_dir(tmp_path_factory):
    """A few images in CIFAR-10's true format, prepared as the real ones are."""
    directory = tmp_path_factory.mktemp("cifar")
    write_archive(directory / "cifar.tar.gz", cifar_contents())
    data.prepare("cifar10", data_dir=str(directory), source=directory / "cifar.tar.gz")
    return str(directory)


@pytest.fixture(scope="session")
def imagenet_tars(tmp_path_factory):
    """A few images in ImageNet's true format."""
    return write_archives(tmp_path_factory.mktemp("tars"), archive_contents())


@pytest.fixture(scope="session")
def imagenet_dir(imagenet_tars, tmp_path_factory):
    """These images, prepared as the real ones are."""
    directory = str(tmp_path_factory.mktemp("imagenet"))
    data.prepare("imagenet2012", data_dir=directory, source=str(imagenet_tars))
    return directory
