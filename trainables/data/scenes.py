"""Primitives that the phantoms are drawn with: grids, soft shapes, smooth noise, blur and the scanner's look.

Everything is float64 and, but for a few cosines, polynomial: the last bits may differ between processors, the 8-bit
pixels then do not. Shapes are (H, W) maps in [0, 1]; coordinates are in units of half the image height, x to the
right, y downwards, (0, 0) the centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Map = npt.NDArray[np.float64]

SIZE = 96  # px: height of every phantom; drawn larger than the tiny encoder's 64 px, so that resizing is exercised

# Letters of the side marker, 5 × 4 px.
_LETTERS = {
    "L": ("#...", "#...", "#...", "#...", "####"),
    "R": ("###.", "#..#", "###.", "#.#.", "#..#"),
}


@lru_cache(maxsize=8)
def grid(height: int, width: int) -> tuple[Map, Map]:
    """Coordinates (x, y) of the pixel centres, (H, W) each."""
    y = (np.arange(height) + 0.5) * (2 / height) - 1
    x = ((np.arange(width) + 0.5) - width / 2) * (2 / height)
    xx, yy = np.meshgrid(x, y)
    xx.setflags(write=False)
    yy.setflags(write=False)
    return xx, yy


def step(distance: Map, softness: float) -> Map:
    """Smooth step from 0 (distance ≤ −softness) to 1 (≥ softness)."""
    t = np.clip(distance * (0.5 / softness) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def bump(x: Map, y: Map, cx: float, cy: float, rx: float, ry: float | None = None) -> Map:
    """Bell with compact support: 1 at the centre, 0 from the ellipse of radii (rx, ry) on."""
    r2 = ((x - cx) / rx) ** 2 + ((y - cy) / (ry or rx)) ** 2
    t = np.clip(1 - r2, 0, 1)
    return t * t


def disc(x: Map, y: Map, cx: float, cy: float, radius: float, softness: float) -> Map:
    """Disc with a soft edge `softness` wide (a fraction of the radius)."""
    r2 = ((x - cx) ** 2 + (y - cy) ** 2) / radius**2
    return step(1 - r2, softness)


def ridges(noise: Map, width: float) -> Map:
    """Thin bright lines along the zero crossings of a noise map."""
    return np.clip(1 - np.abs(noise) / width, 0, 1)


def smooth_noise(rng: np.random.Generator, cells: int, height: int = SIZE, width: int = SIZE) -> Map:
    """Gaussian noise of about unit variance that varies over height / cells pixels: a cubic B-spline of a grid."""
    across = max(1, round(cells * width / height))
    knots = rng.standard_normal((cells + 3, across + 3))
    noise: Map = _interpolate(_interpolate(knots, height, cells).T, width, across).T
    return noise


def _interpolate(knots: Map, size: int, cells: int) -> Map:
    """(cells + 3, K) knots → (size, K) values of the B-spline, scaled to keep the variance of independent knots.

    Four shifted sums rather than a matrix product: BLAS would start all cores for a map this small.
    """
    first, weights = _spline(size, cells)
    values: Map = weights[0][:, None] * knots[first]
    for tap in range(1, 4):
        values += weights[tap][:, None] * knots[first + tap]
    return values


@lru_cache(maxsize=64)
def _spline(size: int, cells: int) -> tuple[npt.NDArray[np.intp], Map]:
    """First of the four knots that reach each pixel (size,), and their weights (4, size): uniform cubic B-splines."""
    at = (np.arange(size) + 0.5) / size * cells
    first = np.floor(at).astype(np.intp)
    t = at - first
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    return first, weights / np.sqrt((weights**2).sum(0).mean())


def blur(image: Map, sigma: float) -> Map:
    """Gaussian blur of the last two axes, sigma in px, edges repeated; the kernel is cut at 3 sigma."""
    reach = round(3 * sigma)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (-2, -1):
        image = _convolve(image, taps, axis)
    return image


def _convolve(image: Map, taps: Map, axis: int) -> Map:
    reach, size = len(taps) // 2, image.shape[axis]
    around = [(0, 0)] * image.ndim
    around[axis] = (reach, reach)
    padded = np.pad(image, around, mode="edge")
    total = np.zeros_like(image)
    for shift, tap in enumerate(taps.tolist()):
        window = padded[..., shift : shift + size, :] if axis == -2 else padded[..., shift : shift + size]
        total += tap * window
    return total


def to_bytes(image: Map) -> npt.NDArray[np.uint8]:
    """[0, 1] → 0 … 255, rounded."""
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Radiograph:
    """The look of a hospital's X-ray unit; every value follows from the hospital's number."""

    gamma: float  # exponent of the film curve
    contrast: float  # slope of the film curve at mid grey
    noise: float  # standard deviation of the quantum noise in mid grey
    psf: float  # px: blur of the detector
    sharpening: float  # strength of unsharp masking, as many units apply it
    vignette: float  # fall of brightness from the centre to the corners
    collimated: float  # probability that the collimator's black border is in the image
    marker: str  # side letter
    marker_left: bool
    marker_grey: float

    @classmethod
    def of(cls, hospital: int) -> Radiograph:
        """The unit of a hospital."""
        rng = np.random.default_rng([hospital, 11])
        return cls(
            gamma=rng.uniform(0.85, 1.2),
            contrast=rng.uniform(0.95, 1.3),
            noise=rng.uniform(0.018, 0.035),
            psf=rng.uniform(0.45, 0.8),
            sharpening=rng.uniform(0.0, 0.5),
            vignette=rng.uniform(0.0, 0.15),
            collimated=rng.uniform(0.1, 0.5),
            marker=str(rng.choice(["L", "R"])),
            marker_left=bool(rng.random() < 0.5),
            marker_grey=rng.uniform(0.7, 0.95),
        )

    def expose(self, attenuation: Map, rng: np.random.Generator) -> Map:
        """Turn attenuation (0 air … 1 metal) into grey values in [0, 1] as this unit would."""
        x, y = grid(*attenuation.shape)
        exposure = rng.normal(0, 0.035)
        image = blur(attenuation, self.psf * rng.uniform(0.8, 1.2))
        image = np.clip((image - 0.5) * self.contrast * rng.uniform(0.9, 1.1) + 0.5 + exposure, 0, 1) ** self.gamma
        if self.sharpening > 0.1:
            image = image + self.sharpening * (image - blur(image, 2.0))
        image = image * (1 - self.vignette * (x**2 + y**2) / 2)
        grain = rng.standard_normal(image.shape) * self.noise * rng.uniform(0.8, 1.25)
        image = image + grain * (1.25 - 0.5 * np.clip(image, 0, 1))
        self._stamp(image, rng)
        if rng.random() < self.collimated:
            image = image * _collimator(x, y, rng)
        return np.clip(image, 0, 1)

    def _stamp(self, image: Map, rng: np.random.Generator) -> None:
        """Draw the side marker into an upper corner, in place."""
        letter = np.array([[c == "#" for c in line] for line in _LETTERS[self.marker]])
        top = int(rng.integers(3, 10))
        inset = int(rng.integers(3, 10))
        left = inset if self.marker_left else image.shape[1] - inset - letter.shape[1]
        patch = image[top : top + letter.shape[0], left : left + letter.shape[1]]
        patch[letter] = self.marker_grey


def _collimator(x: Map, y: Map, rng: np.random.Generator) -> Map:
    """1 inside a slightly turned rectangle, 0 outside."""
    turn = rng.normal(0, 0.03)
    left, right, top, bottom = rng.uniform(0.9, 1.08, 4)
    u, v = x + turn * y, y - turn * x
    return step(np.minimum(np.minimum(u + left, right - u), np.minimum(v + top, bottom - v)), 0.02)
