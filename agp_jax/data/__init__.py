"""Image datasets without TensorFlow, prepared by tfds as ArrayRecord.

python -m agp_jax.data prepare digits
python -m agp_jax.data prepare cifar10 --source=cifar-10-binary.tar.gz
python -m agp_jax.data prepare imagenet2012 --source=DIRECTORY_OF_THE_TARS
"""

from agp_jax.data.command import main as main
from agp_jax.data.datasets import DATASETS as DATASETS
from agp_jax.data.datasets import Dataset as Dataset
from agp_jax.data.directories import default_data_dir as default_data_dir
from agp_jax.data.preparation import prepare as prepare
from agp_jax.data.sources import DataError as DataError
from agp_jax.data.splits import hold_out as hold_out
from agp_jax.data.splits import load as load
