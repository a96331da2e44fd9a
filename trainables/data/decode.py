"""One image file → one square array of bytes."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainables.data.placing import Fit, place

LETTERBOX_GREY = 114  # what YOLO and RT-DETR were pretrained with around their images

# What Pillow's decoders raise on files that are damaged, foreign or too large.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def decode(path: Path, image_size: int, fit: Fit, channels: int) -> npt.NDArray[np.uint8]:
    """Decode, reduce to 8 bits, resize with antialiasing.

    Args:
        path: PNG, JPEG or anything else Pillow reads.
        image_size: S, px.
        fit: 'crop': the centre square of the image, scaled to S; 'squash': the whole image, both sides scaled to S;
            'letterbox': the whole image, its longer side scaled to S, on grey.
        channels: 1: grey (colour is reduced to luminance); 3: RGB (grey is repeated).

    Returns:
        (S, S, channels) uint8.

    Raises:
        one of `UNREADABLE`: the file cannot be decoded.
    """
    with Image.open(path) as image:
        plain = _eight_bits(image, "L" if channels == 1 else "RGB")
    if fit == "letterbox":
        plain = _letterboxed(plain, image_size)
    elif plain.size != (image_size, image_size):
        box = _centre_square(*plain.size) if fit == "crop" else None
        # reducing_gap: large images are first halved by whole factors; indistinguishable from a full-size filter at 3.
        plain = plain.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.asarray(plain).reshape(image_size, image_size, channels)


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
