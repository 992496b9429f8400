"""What is known of each dataset."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is known of a dataset without reading it."""

    name: str
    version: str  # the one tfds knows, hence the directory `name/version`
    num_classes: int
    image_shape: tuple[int, int, int]  # (height, width, channels)
    train_size: int
    test_size: int
    mean: tuple[float, ...]  # per channel, of pixels in 0..1
    std: tuple[float, ...]
    source: str = ""  # what it is prepared from, as in a command
    test_split: str = "test"  # its name in the prepared data
    whole_images: bool = False  # of any size, of which image_shape is a crop


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(
        name="digits",
        version="1.0.0",
        num_classes=10,
        image_shape=(8, 8, 1),
        train_size=1347,
        test_size=450,
        mean=(0.3045,),  # measured on the training split
        std=(0.3759,),
    ),
    "cifar10": Dataset(
        name="cifar10",
        version="3.0.2",
        num_classes=10,
        image_shape=(32, 32, 3),
        train_size=50_000,
        test_size=10_000,
        mean=(0.5, 0.5, 0.5),  # as in the published runs, not the pixels' own
        std=(0.5, 0.5, 0.5),
        source="cifar-10-binary.tar.gz",
    ),
    "imagenet2012": Dataset(
        name="imagenet2012",
        version="5.1.0",
        num_classes=1000,
        image_shape=(224, 224, 3),
        train_size=1_281_167,
        test_size=50_000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        source="DIRECTORY_OF_THE_TARS",
        test_split="validation",  # the labels of the test images are not public
        whole_images=True,
    ),
}
