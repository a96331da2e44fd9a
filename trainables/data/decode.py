"""One image file → one square array of bytes."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainables.data.dicom import dicom_size, is_dicom, read_dicom
from trainables.data.files import DICOM_SUFFIXES
from trainables.data.index import Claims, DataError
from trainables.data.placing import Fit, place

LETTERBOX_GREY = 114  # what YOLO and RT-DETR were pretrained with around their images

FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "WEBP", "PPM")  # Pillow's others run programs, or are films

# What decoders raise on files that are damaged, foreign or too large.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    OverflowError,
    MemoryError,
    Image.DecompressionBombError,
)


def decode(path: Path, image_size: int, fit: Fit, channels: int, claims: Claims | None = None) -> npt.NDArray[np.uint8]:
    """Decode, reduce to 8 bits, resize with antialiasing.

    Args:
        path: of one of `FORMATS`, or DICOM.
        image_size: S, px.
        fit: 'crop': the centre square of the image, scaled to S; 'squash': the whole image, both sides scaled to S;
            'letterbox': the whole image, its longer side scaled to S, on grey.
        channels: 1: grey (colour is reduced to luminance); 3: RGB (grey is repeated).
        claims: what a DICOM file must say of itself.

    Returns:
        (S, S, channels) uint8.

    Raises:
        one of `UNREADABLE`: the file cannot be decoded.
    """
    return decode_sized(path, image_size, fit, channels, claims)[0]


def decode_sized(
    path: Path, image_size: int, fit: Fit, channels: int, claims: Claims | None = None
) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """As `decode`, with the (width, height) of the image itself, px.

    Raises:
        one of `UNREADABLE`: the file cannot be decoded.
    """
    plain = decode_whole(path, channels, claims)
    size = plain.size
    if fit == "letterbox":
        plain = _letterboxed(plain, image_size)
    elif plain.size != (image_size, image_size):
        box = _centre_square(*plain.size) if fit == "crop" else None
        # reducing_gap: large images are first halved by whole factors; indistinguishable from a full-size filter at 3.
        plain = plain.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(plain).reshape(image_size, image_size, channels), size


def decode_whole(path: Path, channels: int, claims: Claims | None = None) -> Image.Image:
    """Decode at full size to mode 'L' (one channel) or 'RGB' (three).

    Raises:
        one of `UNREADABLE`: the file cannot be decoded.
    """
    mode = "L" if channels == 1 else "RGB"
    if holds_dicom(path):
        return read_dicom(path, claims).convert(mode)
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
                raise ValueError("holds several pages; expected a single image")
            return _eight_bits(image, mode)
    except UNREADABLE:
        raise
    except Exception as error:  # what damage makes of a header may raise anything
        raise ValueError(f"{type(error).__name__}: {error}") from error


def size_of(path: Path) -> tuple[int, int]:
    """(width, height) of an image, px, from its header.

    Raises:
        DataError: the header cannot be read.
    """
    try:
        if holds_dicom(path):
            return dicom_size(path)
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except UNREADABLE as error:
        raise DataError(f"{path}: its size cannot be read: {error}") from error


def holds_dicom(path: Path) -> bool:
    """Whether a file is to be read as DICOM, by its name or its first bytes."""
    return path.name.lower().endswith(DICOM_SUFFIXES) or is_dicom(path)


def _letterboxed(image: Image.Image, image_size: int) -> Image.Image:
    left, top, width, height = map(int, place(*image.size, image_size, "letterbox"))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    grey = (LETTERBOX_GREY,) * len(image.getbands())
    square = Image.new(image.mode, (image_size, image_size), grey if len(grey) > 1 else grey[0])
    square.paste(image, (left, top))
    return square


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _scale_sixteen_bits(image).convert(mode)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # Over black, the background of a radiograph.
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert(mode)
    return image.convert(mode)


def _scale_sixteen_bits(image: Image.Image) -> Image.Image:
    """0 … 65535 → 0 … 255, rounded; Pillow's own conversion would saturate at 255."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError(f"pixels of mode {image.mode} outside of 0 … 65535; expected 8 or 16 bits a channel")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def _centre_square(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
