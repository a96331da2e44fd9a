"""DICOM files as 8-bit grey images: modality and VOI look-up tables, MONOCHROME1 inverted, scaled to their own range.

pydicom is an optional extra. Its own decoders and Pillow read uncompressed, RLE and JPEG files; pylibjpeg-openjpeg JPEG
2000; JPEG Lossless needs python-gdcm besides, which is not part of the extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainables.data.index import Claims, DataError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)  # from which on Pillow refuses an image as a bomb
INSTALL = "install the extra: pip install 'spft-studies[dicom]'"


class WrongImageError(ValueError):
    """A file is readable, but not what the data set claims: of another modality or body part."""


def is_dicom(path: Path) -> bool:
    """Whether the file says that it is DICOM: 128 bytes, then `DICM`."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_dicom(path: Path, claims: Claims | None = None) -> Image.Image:
    """Decode one frame to mode 'L' (or 'RGB' where the file holds colour).

    Grey values pass the modality LUT or rescale, then the file's first VOI LUT or window, and are scaled so that the
    darkest pixel is 0 and the brightest 255; a file without a window keeps its full range. MONOCHROME1 is inverted, so
    that bone is bright in every image.

    Raises:
        DataError: pydicom is not installed.
        WrongImageError: the file says that it is of another modality or body part than claimed.
        ValueError: the file cannot be decoded, holds several frames, or needs a decoder that is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise DataError(f"{path}: reading DICOM needs pydicom; {INSTALL}") from error
    # Its validation warns of values that are read all the same, once a file.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        data = pydicom.dcmread(path)
        if claims is not None:
            _check(data, claims)
        return _image(data)
    except WrongImageError:
        raise
    except Exception as error:  # elements are parsed when they are asked for: damage may raise anything, anywhere
        raise ValueError(_reason(error)) from error


def dicom_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels, from the header alone.

    Raises:
        DataError: pydicom is not installed.
        ValueError: the header cannot be read, or lacks its rows or columns.
    """
    try:
        import pydicom
    except ImportError as error:
        raise DataError(f"{path}: reading DICOM needs pydicom; {INSTALL}") from error
    try:
        data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Rows", "Columns"])
        return int(data.Columns), int(data.Rows)
    except Exception as error:  # as in `read_dicom`
        raise ValueError(_reason(error)) from error


def claimed(path: Path) -> tuple[str, str]:
    """Modality and BodyPartExamined that a DICOM file says of itself, '' where it says nothing.

    Raises:
        DataError: pydicom is not installed.
        ValueError: the header cannot be read.
    """
    try:
        import pydicom
    except ImportError as error:
        raise DataError(f"{path}: reading DICOM needs pydicom; {INSTALL}") from error
    try:
        data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Modality", "BodyPartExamined"])
        return str(data.get("Modality") or ""), str(data.get("BodyPartExamined") or "").upper()
    except Exception as error:  # as in `read_dicom`
        raise ValueError(_reason(error)) from error


def _check(data: Dataset, claims: Claims) -> None:
    """What a file does not say of itself is not held against it: released files are often stripped."""
    modality = str(data.get("Modality") or "")
    if modality and modality not in claims.modalities:
        raise WrongImageError(f"Modality is {modality}; expected {' or '.join(claims.modalities)}")
    part = str(data.get("BodyPartExamined") or "")
    if part and not any(word in part.upper() for word in claims.body_parts):
        raise WrongImageError(f"BodyPartExamined is {part}; expected {' or '.join(claims.body_parts)}")


def _image(data: Dataset) -> Image.Image:
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
    from pydicom.pixels.utils import pixel_array

    frames = int(data.get("NumberOfFrames") or 1)
    if frames != 1:
        raise ValueError(f"holds {frames} frames; expected a single image")
    if data.Rows * data.Columns > MOST_PIXELS:
        raise ValueError(f"{data.Columns} × {data.Rows} pixels; expected at most {MOST_PIXELS:,}")
    pixels = pixel_array(data)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        coloured = apply_color_lut(pixels, data)
        return Image.fromarray((coloured >> (8 * coloured.itemsize - 8)).astype(np.uint8))
    if pixels.ndim == 3:
        return Image.fromarray(_scaled(pixels))
    values = _scaled(apply_voi_lut(apply_modality_lut(pixels, data), data))
    return Image.fromarray(255 - values if data.PhotometricInterpretation == "MONOCHROME1" else values)


def _scaled(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Darkest 0, brightest 255; an image of one value is black. Eight-bit colour stays as it is."""
    if values.ndim == 3 and values.dtype == np.uint8:
        return values.astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    scaled: npt.NDArray[np.float64] = (values.astype(np.float64) - low) * (255 / max(high - low, 1e-12))
    return np.round(scaled).astype(np.uint8)


def _reason(error: Exception) -> str:
    """The first line of what pydicom says, with the remedy where a decoder is missing."""
    said = (str(error).strip() or "not readable as DICOM").splitlines()[0]
    if "missing required dependencies" not in str(error) and "missing dependencies" not in str(error):
        return f"{type(error).__name__}: {said}" if not isinstance(error, ValueError) else said
    return f"{said} No decoder is installed: {INSTALL}; JPEG Lossless needs python-gdcm besides"
