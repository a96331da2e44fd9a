"""Draws a dermatoscopic-like image of a pigmented or vascular lesion of one of HAM10000's seven classes.

A lesion is a set of cues (size, border, pigment, network, globules, vessels, scale, …) sampled around its class's
profile; profiles overlap and are blended with a class that is mistaken for it in practice. Colour follows the
Lambert-Beer law: skin × exp(−melanin · a_m − blood · a_b). `draw_lesion` is a pure function of its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainables.data.scenes import SIZE, Map, blur, bump, disc, grid, ridges, smooth_noise, step, to_bytes

CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
WIDTH = 128  # px: 4:3 as in HAM10000, whose images are 600 × 450

_MELANIN = np.array([0.62, 1.0, 1.35])  # absorption of red, green, blue
_BLOOD = np.array([0.18, 1.0, 0.8])
_SKIN = np.array([[0.91, 0.76, 0.68], [0.86, 0.68, 0.56], [0.93, 0.72, 0.67]])
_VEIL = np.array([0.45, 0.5, 0.6])  # blue-white: melanin deep in the skin
_SCALE = np.array([0.93, 0.9, 0.82])  # keratin
_HAIR = np.array([0.75, 0.85, 0.9])[:, None, None]  # light that a hair takes

_CUES = (
    "size",
    "irregular",
    "soft",
    "melanin",
    "rim",  # pigment at the edge rather than in the centre
    "asymmetry",
    "variegation",
    "network",
    "globules",
    "blood",
    "vessels",
    "dots",  # dotted vessels
    "lacunae",
    "veil",
    "nests",  # blue-grey ovoid nests
    "scales",
    "milia",  # milia-like cysts and comedo-like openings
    "scar",
)
# fmt: off
_PROFILES = {  # means of the cues, in the order above
    #         size irre soft mela  rim asym vari netw glob bloo vess dots lacu veil nest scal mili scar
    "akiec": (0.46, 0.50, 0.80, 0.20, 0.0, 0.3, 0.4, 0.05, 0.05, 0.55, 0.15, 0.50, 0.00, 0.00, 0.00, 0.55, 0.10, 0.05),
    "bcc":   (0.45, 0.40, 0.55, 0.20, 0.0, 0.4, 0.4, 0.00, 0.10, 0.45, 0.55, 0.05, 0.05, 0.10, 0.55, 0.15, 0.05, 0.10),
    "bkl":   (0.52, 0.45, 0.20, 0.50, 0.1, 0.3, 0.4, 0.15, 0.15, 0.10, 0.05, 0.05, 0.00, 0.05, 0.00, 0.25, 0.60, 0.05),
    "df":    (0.38, 0.20, 0.70, 0.35, 0.7, 0.1, 0.2, 0.35, 0.05, 0.20, 0.05, 0.15, 0.00, 0.00, 0.00, 0.05, 0.05, 0.65),
    "mel":   (0.60, 0.65, 0.40, 0.80, 0.2, 0.7, 0.7, 0.40, 0.35, 0.25, 0.15, 0.15, 0.00, 0.45, 0.05, 0.05, 0.05, 0.15),
    "nv":    (0.46, 0.25, 0.45, 0.60, 0.0, 0.2, 0.3, 0.45, 0.30, 0.10, 0.02, 0.05, 0.00, 0.05, 0.00, 0.00, 0.05, 0.00),
    "vasc":  (0.38, 0.25, 0.20, 0.10, 0.0, 0.2, 0.3, 0.00, 0.05, 0.75, 0.05, 0.00, 0.65, 0.10, 0.05, 0.05, 0.00, 0.00),
}
# fmt: on
_SPREAD = 0.17
_MISTAKEN_FOR = {
    "akiec": "bkl",
    "bcc": "akiec",
    "bkl": "mel",
    "df": "nv",
    "mel": "nv",
    "nv": "mel",
    "vasc": "bcc",
}


@dataclass(frozen=True)
class Dermatoscope:
    """The look of a clinic's instrument; every value follows from the hospital's number."""

    tint: npt.NDArray[np.float64]  # (3,) white balance
    gamma: float
    noise: float
    psf: float
    ring: float  # radius of the dark ring of the tube; above 1.7 outside of the image
    shade: tuple[float, float]  # gradient of the illumination, right and down
    patients: npt.NDArray[np.float64]  # (3,) share of the skin types

    @classmethod
    def of(cls, hospital: int) -> Dermatoscope:
        """The instrument of a hospital."""
        rng = np.random.default_rng([hospital, 21])
        return cls(
            tint=1 + rng.normal(0, 0.035, 3),
            gamma=rng.uniform(0.85, 1.2),
            noise=rng.uniform(0.008, 0.02),
            psf=rng.uniform(0.4, 0.8),
            ring=rng.uniform(1.3, 2.4),
            shade=(rng.normal(0, 0.05), rng.normal(0, 0.05)),
            patients=rng.dirichlet([4, 2, 3]),
        )

    def record(self, reflectance: Map, rng: np.random.Generator) -> Map:
        """Turn reflectance (3, H, W) into the image this instrument would take."""
        x, y = grid(SIZE, WIDTH)
        light = 1 + self.shade[0] * x + self.shade[1] * y + rng.normal(0, 0.04)
        light = light * (1 - 0.12 * (x**2 + y**2))
        light = light * step(self.ring * rng.uniform(0.95, 1.05) - np.sqrt(x**2 + y**2), 0.06)
        image = blur(np.clip(reflectance * (self.tint[:, None, None] * light), 0, 1) ** self.gamma, self.psf)
        grain = rng.standard_normal((1, SIZE, WIDTH)) + 0.5 * rng.standard_normal((3, SIZE, WIDTH))
        return np.clip(image + self.noise * grain, 0, 1)


def draw_lesion(hospital: int, lesion: int, view: int, dx: str) -> npt.NDArray[np.uint8]:
    """Draw one image of a lesion, (96, 128, 3) uint8.

    Args:
        hospital: seed of the instrument and of all its lesions.
        lesion: number of the lesion: skin, cues and their places.
        view: number of the image among the lesion's: pose, light, hair, noise.
        dx: class, out of `CLASSES`.
    """
    shape, now = np.random.default_rng([hospital, lesion, 22]), np.random.default_rng([hospital, lesion, view, 23])
    scope = Dermatoscope.of(hospital)
    cue = _sample_cues(dx, shape)
    skin = _SKIN[shape.choice(3, p=scope.patients)] * (1 + shape.normal(0, 0.035, 3))
    x, y = _pose(now)
    radius, mask = _outline(cue, shape, x, y)
    mottle = smooth_noise(shape, 24, width=WIDTH) + smooth_noise(shape, 4, width=WIDTH)
    reflectance = skin[:, None, None] * (1 + 0.02 * mottle)
    reflectance = reflectance * _absorption(cue, shape, x, y, radius, mask)
    reflectance = _overlays(cue, shape, x, y, mask, reflectance)
    reflectance = _hair(reflectance, now)
    return np.ascontiguousarray(to_bytes(scope.record(reflectance, now)).transpose(1, 2, 0))


def _sample_cues(dx: str, rng: np.random.Generator) -> dict[str, float]:
    """Cues in [0, 1.2] around the class's profile, blended with that of the class it may be mistaken for."""
    own, other = np.array(_PROFILES[dx]), np.array(_PROFILES[_MISTAKEN_FOR[dx]])
    blend = rng.uniform(0, 0.55)
    values = (1 - blend) * own + blend * other + _SPREAD * rng.standard_normal(len(own))
    return dict(zip(_CUES, np.clip(values, 0, 1.2).tolist(), strict=True))


def _pose(rng: np.random.Generator) -> tuple[Map, Map]:
    x, y = grid(SIZE, WIDTH)
    angle, zoom = rng.uniform(-0.3, 0.3), rng.normal(1, 0.07)
    u = (np.cos(angle) * x + np.sin(angle) * y) / zoom - rng.normal(0, 0.06)
    v = (np.cos(angle) * y - np.sin(angle) * x) / zoom - rng.normal(0, 0.06)
    return u, v


def _outline(cue: dict[str, float], rng: np.random.Generator, x: Map, y: Map) -> tuple[Map, Map]:
    """Distance from the centre as a fraction of the lesion's radius, and the lesion's soft mask."""
    size, stretch = 0.22 + 0.62 * cue["size"], rng.uniform(0.75, 1.0)
    turn = rng.uniform(0, np.pi)
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    radius = np.sqrt((u / size) ** 2 + (v / (size * stretch)) ** 2)
    ragged = 0.28 * smooth_noise(rng, 4, width=WIDTH) + 0.12 * smooth_noise(rng, 9, width=WIDTH)
    return radius, step(1 - radius + cue["irregular"] * ragged, 0.06 + 0.4 * cue["soft"])


def _absorption(cue: dict[str, float], rng: np.random.Generator, x: Map, y: Map, radius: Map, mask: Map) -> Map:
    """Light left by melanin and blood, (3, H, W)."""
    lean = rng.uniform(0, 2 * np.pi)
    slope = np.clip(0.5 + 0.9 * (np.cos(lean) * x + np.sin(lean) * y), 0, 1.4)
    profile = 1 + cue["rim"] * (np.clip(radius, 0, 1) ** 2 * 1.2 - 0.9)
    melanin = cue["melanin"] * profile * (1 + cue["asymmetry"] * (slope - 0.5))
    melanin = melanin * (1 + 0.5 * cue["variegation"] * smooth_noise(rng, 6, width=WIDTH))
    mesh = np.maximum(ridges(smooth_noise(rng, 13, width=WIDTH), 0.4), ridges(smooth_noise(rng, 15, width=WIDTH), 0.4))
    melanin = melanin + 0.55 * cue["network"] * (mesh - 0.35) * np.clip(radius * 1.3, 0.2, 1)
    melanin = melanin + 0.9 * _spots(cue["globules"], rng, x, y, (0.02, 0.045), 22)
    blood = 0.9 * cue["blood"] * (1 + 0.3 * smooth_noise(rng, 5, width=WIDTH))
    blood = blood + 1.4 * _spots(cue["lacunae"], rng, x, y, (0.07, 0.14), 12)
    blood = blood + 0.9 * _spots(cue["dots"], rng, x, y, (0.018, 0.03), 30)
    vessels = ridges(smooth_noise(rng, 5, width=WIDTH), 0.09)
    blood = blood + 1.1 * cue["vessels"] * min(1.0, 2 * cue["vessels"]) * vessels
    melanin, blood = 1.1 * mask * np.clip(melanin, 0, 3), 0.75 * mask * np.clip(blood, 0, 3)
    transmitted: Map = np.exp(-(_MELANIN[:, None, None] * melanin + _BLOOD[:, None, None] * blood))
    return transmitted


def _spots(amount: float, rng: np.random.Generator, x: Map, y: Map, radii: tuple[float, float], most: int) -> Map:
    """Up to `most` round spots around the centre, 0 … 1. Draws the same random numbers whatever the amount."""
    spots = np.zeros_like(x)
    places = rng.normal(0, 0.22, (most, 2))
    sizes = rng.uniform(*radii, most)
    for (cx, cy), size in zip(places[: round(most * max(0.0, amount - 0.12))], sizes, strict=False):
        near = _window(cx, cy, size)
        spots[near] = np.maximum(spots[near], disc(x[near], y[near], cx, cy, size, 0.5))
    return spots


def _window(cx: float, cy: float, size: float) -> tuple[slice, slice]:
    """Pixels that a spot can touch in any pose: drawing only these keeps an image under 4 ms."""
    reach = size + 0.45  # a pose moves a point near the centre by at most about 0.4
    top, left = (cy - reach + 1) * SIZE / 2, (cx - reach) * SIZE / 2 + WIDTH / 2
    side = reach * SIZE
    return slice(max(0, int(top)), int(top + side) + 1), slice(max(0, int(left)), int(left + side) + 1)


def _overlays(cue: dict[str, float], rng: np.random.Generator, x: Map, y: Map, mask: Map, under: Map) -> Map:
    """Lay over the (3, H, W) image what hides the skin's colour: veil, nests, scar, scale, cysts and openings."""
    cx, cy = rng.normal(0, 0.15, 2)
    veil = cue["veil"] * bump(x, y, cx, cy, 0.45, 0.35) * mask
    nests = 0.75 * _spots(cue["nests"], rng, x, y, (0.05, 0.1), 9) * mask
    scar = cue["scar"] * bump(x, y, cx / 3, cy / 3, 0.26)
    flakes = np.clip(smooth_noise(rng, 10, width=WIDTH) - 0.5, 0, 1) * cue["scales"] * mask
    cysts = _spots(cue["milia"], rng, x, y, (0.018, 0.032), 16) * mask
    openings = _spots(cue["milia"], rng, x, y, (0.02, 0.035), 12) * mask
    for layer, colour in (
        (0.8 * veil, _VEIL),
        (nests, _VEIL * 0.8),
        (0.8 * scar, _SCALE),
        (flakes, _SCALE),
        (0.7 * cysts, _SCALE),
        (0.7 * openings, _VEIL * np.array([0.6, 0.4, 0.25])),
    ):
        under = under + layer * (colour[:, None, None] - under)
    return under


def _hair(image: Map, rng: np.random.Generator) -> Map:
    """A few dark arcs in half of the images, and now and then the bubble of the immersion fluid."""
    x, y = grid(SIZE, WIDTH)
    if rng.random() < 0.5:
        for _ in range(int(rng.integers(1, 6))):
            offset, slope, bend = rng.uniform(-1.2, 1.2), rng.normal(0, 0.9), rng.normal(0, 0.3)
            hair = np.clip(1 - np.abs(x - offset - slope * y - bend * y**2) / 0.022, 0, 1) * rng.uniform(0.4, 0.8)
            image = image * (1 - hair * _HAIR)
    if rng.random() < 0.1:
        rim = ridges(np.sqrt((x - rng.uniform(-1, 1)) ** 2 + (y - rng.uniform(-0.8, 0.8)) ** 2) - 0.12, 0.03)
        image = image + 0.25 * rim
    return image
