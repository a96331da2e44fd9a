"""What happens to images before a model, for the record: the same facts for every task."""

from __future__ import annotations

from torch import Tensor

from trainables.data.images import ImageCache
from trainables.data.placing import Fit
from trainables.views import Views


def image_transforms(images: ImageCache, fit: Fit, mean: Tensor, std: Tensor, views: Views) -> dict[str, object]:
    """Size (px), channels, fit, normalisation (values in [0, 1], one a channel) and flips as applied."""
    return {
        "image_size": int(images.pixels.shape[1]),
        "channels": int(images.pixels.shape[3]),
        "fit": fit,
        "mean": mean.flatten().tolist(),
        "std": std.flatten().tolist(),
        "augmentation": views.told(),
    }
