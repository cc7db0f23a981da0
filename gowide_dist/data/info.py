"""dataset.json: the contents of a folder of encoded images. Light to import: a login node reads it too."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    computed_field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gowide_dist.errors import DataError
from gowide_dist.networks.normalise import Channels

FILE_NAME = "dataset.json"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Split(_Model):
    """One FFCV file of a dataset.

    checksum: SHA-256 of the whole file. index_checksum: SHA-256 of the file without its images (the labels and each
    image's position), quick to check whenever the file is opened.
    """

    file: str
    samples: int
    bytes: int
    checksum: str
    index_checksum: str


class DatasetInfo(_Model):
    """The content of dataset.json.

    classes: names in the order of the labels. Sides in pixels, over all splits; fixed_side_px where every image is a
    square of the same side. mean and std: of the training images' channels (R, G, B), on a scale of 0 to 1.
    encoding: the arguments of `gowide encode`, by which the same command finds its work done.

    Fingerprints know the moments by the training file's checksum; `moments_checksum` tells whether they are still those
    that were computed when it was written.
    """

    format: Literal[1] = 1
    source: str
    encoding: dict[str, str | int | float | bool | None]
    classes: tuple[str, ...]
    min_side_px: int
    max_side_px: int
    fixed_side_px: int | None
    mean: Channels
    std: Channels
    splits: dict[Literal["train", "val", "test"], Split]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def moments_checksum(self) -> str:
        """SHA-256 of mean and std."""
        return hashlib.sha256(json.dumps([self.mean, self.std]).encode()).hexdigest()

    @model_validator(mode="wrap")
    @classmethod
    def _check_moments(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        given = values.pop("moments_checksum", None) if isinstance(values, dict) else None
        info = handler(values)
        if given not in (None, info.moments_checksum):
            raise PydanticCustomError(
                "edited",
                "mean and std are no longer those of the images; put them back, and say others in the recipe: "
                "networks.NAME.normalise",
            )
        return info

    @property
    def summary(self) -> str:
        """For example "60,000 train, 10,000 val images in 10 classes"."""
        counts = ", ".join(f"{split.samples:,} {name}" for name, split in self.splits.items())
        return f"{counts} images in {len(self.classes)} classes"


def read_dataset_info(beton_path: Path) -> DatasetInfo:
    """Read the dataset.json beside an FFCV file. Raises DataError if it is absent or damaged."""
    path = beton_path.parent / FILE_NAME
    try:
        return DatasetInfo.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        folder = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise DataError(f"{path}: not found{folder}; make the dataset with `gowide encode`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise DataError(f"{path}: {key}: {error.errors()[0]['msg']}; make it again with `gowide encode`") from None


def check_split(beton_path: Path) -> Split:
    """The entry of an FFCV file in dataset.json. Raises DataError unless the file exists in the size noted there."""
    splits = {split.file: split for split in read_dataset_info(beton_path).splits.values()}
    if (split := splits.get(beton_path.name)) is None:
        raise DataError(f"{beton_path}: not one of the files in {FILE_NAME} ({', '.join(splits)})")
    try:
        size = beton_path.stat().st_size
    except OSError as error:
        raise DataError(f"{beton_path}: cannot be read ({error.strerror}); `gowide encode` makes it") from None
    if size != split.bytes:
        raise DataError(f"{beton_path}: {size:,} bytes instead of {split.bytes:,}; delete it and encode again")
    return split
