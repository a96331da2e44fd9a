"""Where an image lies in the square network input: the one geometry that decoding, boxes and masks share."""

from __future__ import annotations

from typing import Literal, NamedTuple

Fit = Literal["crop", "squash", "letterbox"]


class Place(NamedTuple):
    """The rectangle that a whole image is scaled to, in px of the network input; what lies outside is cut off."""

    left: float
    top: float
    width: float
    height: float


def place(width: int, height: int, image_size: int, fit: Fit) -> Place:
    """Rectangle of an image of width × height px in an input of image_size × image_size px.

    crop: the shorter side is image_size long, the centre is kept; squash: both sides are; letterbox: the longer side
    is, whole pixels, centred (rounded towards the upper left).
    """
    if fit == "squash":
        return Place(0, 0, image_size, image_size)
    if fit == "crop":
        scale = image_size / min(width, height)
        return Place((image_size - width * scale) / 2, (image_size - height * scale) / 2, width * scale, height * scale)
    scale = image_size / max(width, height)
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    return Place((image_size - wide) // 2, (image_size - high) // 2, wide, high)
