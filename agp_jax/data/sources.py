"""Where examples come from: memory, or encoded images on disk."""

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image


class DataError(ValueError):
    """Data is missing or wrong; the message says what, where and how to mend it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One split in memory; an index, a slice or an array of indices gives examples."""

    images: np.ndarray  # uint8 (num_examples, height, width, channels)
    labels: np.ndarray  # int32 (num_examples,)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}

    def subset(self, indices: np.ndarray) -> "Source":
        return Source(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSource:
    """One split on disk, of images of any size, which are decoded when they are read.

    Attributes:
      name: what messages call it.
      records: gives by index a record with an encoded `image`, `label` and `file_name`.
      indices: int64 (num_examples,), the records that the source is made of.
      image_size: height and width of the squares that become of the images.
    """

    name: str
    records: Sequence[Any]
    indices: np.ndarray
    image_size: int

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: np.ndarray) -> dict[str, Any]:
        """The labels at an array of indices, and an iterator of the whole RGB images.

        An image is decoded when the iterator comes to it, so few are in memory.
        """
        records = [self._read(i) for i in self.indices[index].tolist()]
        labels = np.array([record["label"] for record in records], np.int32)
        return {"image": self._decode(records), "label": labels}

    def subset(self, indices: np.ndarray) -> "EncodedSource":
        return dataclasses.replace(self, indices=self.indices[indices])

    def _read(self, i: int) -> Any:
        try:
            return self.records[i]
        except Exception as error:  # array_record and protobuf: each has its own
            raise self._damaged(f"record {i}", error) from error

    def _decode(self, records: Sequence[Any]) -> Iterator[Image.Image]:
        for record in records:
            try:
                image = Image.open(io.BytesIO(record["image"]))
                image.load()
                if image.mode != "RGB":  # otherwise this would copy it
                    image = image.convert("RGB")
            except (OSError, SyntaxError, ValueError) as error:
                raise self._damaged(record["file_name"].decode(), error) from error
            yield image

    def _damaged(self, what: str, error: Exception) -> DataError:
        return DataError(
            f"{what} of {self.name} cannot be read ({one_line(error)}); "
            f"prepare the data anew"
        )


AnySource = Source | EncodedSource


def one_line(problem: object) -> str:
    """A problem in a few words, for the middle of a message."""
    return " ".join(str(problem).split())[:300]
