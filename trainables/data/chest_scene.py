"""Draws a radiograph-like chest with any of the 14 findings: image, lung and heart masks, and boxes from one scene.

A patient has one anatomy and places for their findings; each image adds its own pose, breath, noise and strength of
the findings. What is drawn is attenuation: air 0, soft tissue about 0.7, bone brighter. `draw_chest` is a pure
function of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainables.data.chestxray14 import CLASSES as FINDINGS
from trainables.data.scenes import SIZE, Map, Radiograph, bump, disc, grid, ridges, smooth_noise, step, to_bytes

STRUCTURES = ("left_lung", "right_lung", "heart")

# Findings that are a place in the image, as in BBox_List_2017.csv; the others are diffuse.
BOXED = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax")


@dataclass(frozen=True)
class ChestScene:
    """A drawn image.

    Attributes:
        pixels: (96, 96) uint8 grey values.
        masks: structure → (96, 96) bool; left and right are the patient's, so the left lung is on the right.
        boxes: finding → (x, y, width, height) in px of the image, for the findings of `BOXED` that were drawn.
    """

    pixels: npt.NDArray[np.uint8]
    masks: dict[str, npt.NDArray[np.bool_]]
    boxes: dict[str, tuple[float, float, float, float]]


@dataclass(frozen=True)
class _Anatomy:
    """A patient's chest; lengths in half image heights."""

    spread: float  # distance of a lung's axis from the midline
    lung_width: float
    apex: float
    base: float  # height of the diaphragm's dome at the patient's right
    flatness: float  # 0 domed, 1 flat diaphragm
    heart_width: float  # half width
    heart_height: float
    heart_shift: float
    density: float  # attenuation added by soft tissue in front of the lungs
    rib_frequency: float
    rib_phase: float
    rib_contrast: float
    breast: float
    vessels: float
    knob: float
    bubble: bool  # gas in the stomach
    nipples: float

    @classmethod
    def of(cls, rng: np.random.Generator, ap: bool, findings: frozenset[str]) -> _Anatomy:
        """Sample a chest and reshape it where a finding changes its form rather than adding an opacity."""
        flatness, width = rng.uniform(0, 0.45), rng.normal(1, 0.05)
        base, apex, spread = rng.normal(0.4, 0.05), rng.normal(-0.74, 0.03), rng.normal(0.415, 0.018)
        heart = rng.normal(0.325, 0.024) * (1.05 if ap else 1.0)
        density, vessels = rng.normal(0.0, 0.03), rng.uniform(0.7, 1.3)
        severity = rng.uniform(0.55, 1.0)
        if "Cardiomegaly" in findings:
            heart *= 1 + 0.3 * severity
        if "Emphysema" in findings:
            flatness, base, width = flatness + 0.65 * severity, base + 0.08 * severity, width * (1 + 0.05 * severity)
            heart, vessels = heart * (1 - 0.1 * severity), vessels * (1 - 0.5 * severity)
        if "Fibrosis" in findings:
            base -= 0.06 * severity
        return cls(
            spread=spread,
            lung_width=0.31 * width,
            apex=apex,
            base=base,
            flatness=min(flatness, 1.1),
            heart_width=heart,
            heart_height=rng.normal(0.285, 0.02),
            heart_shift=rng.normal(0.115, 0.015),
            density=density,
            rib_frequency=rng.uniform(4.3, 5.3),
            rib_phase=rng.uniform(0, 1),
            rib_contrast=rng.uniform(0.03, 0.075),
            breast=rng.choice([0.0, rng.uniform(0.03, 0.08)]),
            vessels=vessels,
            knob=rng.uniform(0.06, 0.1),
            bubble=bool(rng.random() < 0.4),
            nipples=rng.choice([0.0, 0.0, 0.05]),
        )


@dataclass(frozen=True)
class _Thorax:
    """The drawn anatomy that findings are placed in: (96, 96) maps in the patient's own coordinates."""

    anatomy: _Anatomy
    x: Map
    y: Map
    right: Map  # patient's right lung: left in the image
    left: Map
    heart: Map
    floor_right: Map  # y of the diaphragm
    floor_left: Map
    reach: Map  # distance from the lung's axis as a fraction of its half width there: 1 at the chest wall
    hilum: Map  # 1 at the hila, falling to 0 in the periphery
    texture: Map  # branching vessels, 0 … 1

    @property
    def lungs(self) -> Map:
        return np.maximum(self.right, self.left)

    def lung(self, on_left: bool) -> Map:
        return self.left if on_left else self.right

    def at(self, on_left: bool, across: float, height: float) -> tuple[float, float]:
        """A point in a lung: across −1 (midline) … 1 (chest wall), height 0 (apex) … 1 (base)."""
        a, side = self.anatomy, 1 if on_left else -1
        y = a.apex + height * (a.base - a.apex)
        width = a.lung_width * float(np.sqrt(max(0.15, 1 - (1 - min(height, 1) * 0.9 - 0.1) ** 2)))
        return side * (a.spread + across * width), y


Effect = tuple[Map, Map]  # attenuation added; where it is visible
_Drawer = Callable[[_Thorax, np.random.Generator, float], Effect]


def draw_chest(hospital: int, patient: int, follow_up: int, findings: Sequence[str], *, ap: bool = False) -> ChestScene:
    """Draw one image of a patient.

    Args:
        hospital: seed of the scanner and of all its patients.
        patient: number of the patient: anatomy and the places of findings.
        follow_up: number of the image among the patient's: pose, breath, noise.
        findings: names out of `FINDINGS`.
        ap: taken from the front, lying: a larger heart, a shallower breath.
    """
    present = frozenset(findings)
    rng = np.random.default_rng([hospital, patient, follow_up, 3])
    anatomy = _Anatomy.of(np.random.default_rng([hospital, patient, 1]), ap, present)
    thorax = _thorax(anatomy, *_pose(rng, ap), np.random.default_rng([hospital, patient, 2]))
    attenuation = _body(thorax)
    extents: dict[str, Map] = {}
    for number, finding in enumerate(FINDINGS):
        if finding in present:
            # Generators of their own: pose and noise are the same whatever else is found.
            place = np.random.default_rng([hospital, patient, 5, number])
            strength = np.random.default_rng([hospital, patient, follow_up, 6, number]).uniform(0.65, 1.15)
            effect, extents[finding] = _DRAWERS[finding](thorax, place, strength)
            attenuation = attenuation + effect
    attenuation = attenuation + _distractions(thorax, rng, ap)
    pixels = to_bytes(Radiograph.of(hospital).expose(np.clip(attenuation, 0, 1), rng))
    masks = {"left_lung": thorax.left > 0.5, "right_lung": thorax.right > 0.5, "heart": thorax.heart > 0.5}
    return ChestScene(pixels, masks, {f: _box(extents[f]) for f in BOXED if f in extents})


def _box(extent: Map) -> tuple[float, float, float, float]:
    """Smallest (x, y, width, height) around what is at least half as strong as the extent's maximum."""
    rows, columns = np.nonzero(extent >= 0.5 * extent.max())
    left, top = columns.min(), rows.min()
    return float(left), float(top), float(columns.max() + 1 - left), float(rows.max() + 1 - top)


def _pose(rng: np.random.Generator, ap: bool) -> tuple[Map, Map]:
    """Coordinates of the image's pixels in the patient: shifted, turned, scaled, and squeezed by a shallow breath."""
    x, y = grid(SIZE, SIZE)
    angle, zoom = rng.normal(0, 0.035), rng.normal(1, 0.035)
    u = (x + angle * y) / zoom - rng.normal(0, 0.035)
    v = (y - angle * x) / zoom - rng.normal(0, 0.035)
    breath = rng.normal(1.0, 0.03) * (0.96 if ap else 1.0)
    return u, (v + 0.2) / breath - 0.2


def _thorax(a: _Anatomy, x: Map, y: Map, rng: np.random.Generator) -> _Thorax:
    """Lay out lungs, heart and diaphragm."""
    floors, lungs, reaches = [], [], []
    heart = _heart(a, x, y)
    for side in (-1, 1):
        across = side * x - a.spread
        depth = np.clip((y - a.apex) / (a.base - a.apex), 0, 1.3)
        half_width = a.lung_width * np.clip(1 - (1 - np.clip(depth * 0.98 + 0.02, 0, 1)) ** 2.4, 0, 1) ** 0.5
        floor = a.base + 0.05 * (side > 0) + (1 - a.flatness) * (0.16 * (across + 0.12) + 0.75 * across**2)
        outline = np.minimum(half_width - np.abs(across), np.minimum(y - a.apex, floor - y))
        lungs.append(step(outline, 0.03) * (1 - heart))
        floors.append(floor)
        reaches.append(across / (half_width + 1e-6))
    hilum = np.maximum(bump(x, y, -0.2, -0.1, 0.42, 0.6), bump(x, y, 0.22, -0.14, 0.42, 0.6))
    texture = ridges(smooth_noise(rng, 9), 0.4) * 0.6 + ridges(smooth_noise(rng, 14), 0.4) * 0.4
    return _Thorax(a, x, y, lungs[0], lungs[1], heart, floors[0], floors[1], np.where(x < 0, *reaches), hilum, texture)


def _heart(a: _Anatomy, x: Map, y: Map) -> Map:
    """A tilted ellipse on the diaphragm, wider to the patient's left."""
    u = x - a.heart_shift
    v = y - (a.base - 0.12)
    u, v = u - 0.3 * v, v - 0.25 * u
    return step(1 - (u / a.heart_width) ** 2 - (v / a.heart_height) ** 2, 0.14) * step(a.base + 0.12 - y, 0.06)


def _body(t: _Thorax) -> Map:
    """Attenuation of a chest without findings."""
    a, x, y = t.anatomy, t.x, t.y
    shoulder = 0.95 - 0.55 * np.clip(-y - 0.62, 0, 0.6)
    body = step(shoulder - np.abs(x), 0.05)
    tissue = 0.62 + a.density + 0.07 * step(y - t.anatomy.base - 0.1, 0.25)
    tissue = tissue + 0.08 * bump(x, y * 0, 0, 0, 0.2) + 0.07 * bump(x, y, -0.26, a.apex - 0.16, 0.3, 0.15)
    air = 0.36 + 0.05 * np.clip(t.reach, -1, 1) ** 2
    chest = tissue - t.lungs * air
    chest = chest + t.lungs * (0.14 * a.vessels * t.texture * (0.25 + t.hilum) + 0.08 * t.hilum)
    chest = chest + 0.07 * t.heart * step(a.base - y + 0.05, 0.15)
    chest = chest + _bones(t) + _mediastinum(t)
    if a.breast:
        for side in (-1, 1):
            chest = chest + a.breast * disc(x, y, side * 0.45, 0.22, 0.32, 0.2)
    if a.bubble:
        chest = chest - 0.25 * bump(x, y, 0.42, a.base + 0.3, 0.16, 0.11)
    for side in (-1, 1):
        chest = chest + a.nipples * bump(x, y, side * 0.5, 0.2, 0.045)
    return body * chest


def _bones(t: _Thorax) -> Map:
    """Posterior ribs falling to the sides, fainter anterior ribs rising, clavicles and scapular edges."""
    a, x, y = t.anatomy, t.x, t.y
    u = np.abs(x)
    chest = step(0.86 - u, 0.06) * step(y - a.apex + 0.1, 0.08) * step(u - 0.12, 0.08)
    posterior = np.clip(
        np.cos(2 * np.pi * (a.rib_frequency * (y - 0.55 * u + 0.9 * (u - 0.35) ** 2) + a.rib_phase)), 0, 1
    )
    anterior = np.clip(np.cos(2 * np.pi * (a.rib_frequency * 0.8 * (y + 0.6 * u) + a.rib_phase)), 0, 1) ** 2
    ribs = chest * a.rib_contrast * (posterior + 0.45 * anterior)
    clavicle = np.clip(1 - np.abs(y - (a.apex + 0.13 - 0.28 * (u - 0.1))) / 0.045, 0, 1)
    clavicle = clavicle * step(u - 0.08, 0.03) * step(0.78 - u, 0.05)
    spine = np.clip(np.cos(2 * np.pi * (6.5 * y + a.rib_phase)), 0, 1) * bump(x, y * 0, 0, 0, 0.1)
    return ribs * (0.4 + 0.6 * t.lungs) + 0.12 * clavicle + 0.05 * spine


def _mediastinum(t: _Thorax) -> Map:
    """Great vessels, the aortic knob and the dark trachea."""
    a, x, y = t.anatomy, t.x, t.y
    vessels = step(0.13 - np.abs(x - 0.02), 0.05) * step(a.base - y, 0.1) * 0.1
    knob = 0.14 * disc(x, y, 0.13, a.apex + 0.34, a.knob, 0.4)
    trachea = 0.13 * step(0.035 - np.abs(x + 0.01), 0.02) * step(-0.25 - y, 0.06)
    return vessels + knob - trachea


def _distractions(t: _Thorax, rng: np.random.Generator, ap: bool) -> Map:
    """What a radiograph shows besides findings: a tube or wire, an electrode, a skin fold."""
    x, y = t.x, t.y
    shown = np.zeros_like(x)
    if rng.random() < (0.4 if ap else 0.12):
        course = rng.uniform(-0.4, 0.4) + rng.normal(0, 0.3) * y + rng.normal(0, 0.3) * y**2
        shown += 0.16 * np.clip(1 - np.abs(x - course) / 0.02, 0, 1) * step(rng.uniform(0, 0.6) - y, 0.02)
    if rng.random() < (0.3 if ap else 0.08):
        shown += 0.25 * disc(x, y, rng.uniform(-0.7, 0.7), rng.uniform(-0.6, 0.5), 0.035, 0.4)
    if rng.random() < 0.25:
        fold = x * rng.uniform(0.6, 1) + y * rng.normal(0, 0.4) - rng.uniform(-0.6, 0.6)
        shown += 0.035 * step(fold, 0.03) * t.lungs
    return shown + 0.02 * smooth_noise(rng, 5)


def _atelectasis(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """Plate-like band, nearly horizontal, above the diaphragm."""
    on_left = bool(rng.random() < 0.5)
    cx, cy = t.at(on_left, rng.uniform(-0.3, 0.4), rng.uniform(0.6, 0.86))
    slope, width, length = rng.normal(0, 0.3), rng.uniform(0.022, 0.038), rng.uniform(0.13, 0.24)
    along, across = (t.x - cx) + slope * (t.y - cy), (t.y - cy) - slope * (t.x - cx)
    band = np.clip(1 - (across / width) ** 2, 0, 1) * step(length - np.abs(along), 0.06) * t.lung(on_left)
    return 0.23 * strength * band, band


def _cardiomegaly(t: _Thorax, _rng: np.random.Generator, _strength: float) -> Effect:
    """The anatomy is widened already; the extent is the heart."""
    return np.zeros_like(t.x), t.heart


def _effusion(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """Fluid that blunts the costophrenic angle, its surface a meniscus that climbs the chest wall."""
    on_left = bool(rng.random() < 0.5)
    a = t.anatomy
    side = 1 if on_left else -1
    outward = np.clip((side * t.x - a.spread) / a.lung_width, -1, 1.2)
    level = a.base + 0.02 - (0.03 + 0.17 * strength * rng.uniform(0.4, 1.1)) - 0.26 * np.clip(outward, 0, 1.2) ** 2
    fluid = step(t.y - level, 0.05) * t.lung(on_left)
    return 0.26 * fluid, fluid


def _infiltration(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """Faint, ill-defined mottling."""
    on_left = bool(rng.random() < 0.5)
    cx, cy = t.at(on_left, rng.uniform(-0.5, 0.4), rng.uniform(0.35, 0.8))
    region = bump(t.x, t.y, cx, cy, rng.uniform(0.28, 0.4), rng.uniform(0.3, 0.45)) * t.lung(on_left)
    mottle = np.clip(0.5 + smooth_noise(rng, 13), 0, 2)
    return 0.15 * strength * region * mottle, region


def _mass(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """Large round opacity with a lobulated edge."""
    return _opacity(t, rng, 0.2 * strength, rng.uniform(0.12, 0.17))


def _nodule(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """One to four small round opacities."""
    effect, extent = _opacity(t, rng, 0.27 * strength, rng.uniform(0.05, 0.072))
    for _ in range(int(rng.integers(0, 4))):
        more, _where = _opacity(t, rng, 0.27 * strength, rng.uniform(0.05, 0.072))
        effect = np.maximum(effect, more)
    return effect, extent


def _opacity(t: _Thorax, rng: np.random.Generator, contrast: float, radius: float) -> Effect:
    on_left = bool(rng.random() < 0.5)
    cx, cy = t.at(on_left, rng.uniform(-0.55, 0.6), rng.uniform(0.2, 0.85))
    wobble = 1 + 0.12 * smooth_noise(rng, 6)
    round_ = disc(t.x * wobble + (1 - wobble) * cx, t.y * wobble + (1 - wobble) * cy, cx, cy, radius, 0.35)
    shown = round_ * (0.35 + 0.65 * t.lung(on_left))
    return contrast * shown, round_


def _pneumonia(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """Patchy, fluffy, confluent opacities in one lower zone."""
    on_left = bool(rng.random() < 0.5)
    patches = np.zeros_like(t.x)
    for _ in range(int(rng.integers(3, 6))):
        cx, cy = t.at(on_left, rng.uniform(-0.6, 0.5), rng.uniform(0.55, 0.95))
        patches = np.maximum(patches, bump(t.x, t.y, cx, cy, rng.uniform(0.1, 0.19)) * rng.uniform(0.6, 1))
    shown = patches * t.lung(on_left)
    return 0.2 * strength * shown, shown


def _pneumothorax(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """Air without vessels around the apex, bounded by the thin line of the collapsed lung's pleura."""
    on_left = bool(rng.random() < 0.5)
    cx, cy = t.at(on_left, -0.35, 0.62)
    size = rng.uniform(0.82, 0.96) - 0.14 * strength
    collapsed = 1 - ((t.x - cx) / (0.38 * size)) ** 2 - ((t.y - cy) / (0.72 * size)) ** 2
    air = step(-collapsed, 0.06) * step(0.3 - t.y, 0.15) * t.lung(on_left)
    vessels = 0.14 * t.anatomy.vessels * t.texture * (0.25 + t.hilum) + 0.08 * t.hilum
    line = np.clip(1 - np.abs(collapsed) / 0.09, 0, 1) * step(0.3 - t.y, 0.15) * t.lung(on_left)
    return 0.16 * line - air * (0.1 + vessels), air


def _consolidation(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """Homogeneous opacity that ends sharply at a fissure, with dark air bronchograms."""
    on_left = bool(rng.random() < 0.5)
    cx, cy = t.at(on_left, rng.uniform(-0.2, 0.3), rng.uniform(0.35, 0.65))
    tilt, upward = rng.normal(0.1, 0.25), rng.choice([-1, 1])
    beyond_fissure = step(upward * ((t.y - cy) - tilt * (t.x - cx)), 0.02)
    lobe = beyond_fissure * bump(t.x, t.y, cx, cy + upward * 0.12, 0.36, 0.36) ** 0.5 * t.lung(on_left)
    bronchi = ridges(smooth_noise(rng, 8), 0.25)
    return 0.15 * strength * lobe * (1 - 0.6 * bronchi), lobe


def _edema(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """Perihilar haze on both sides, thickened vessels, short horizontal lines at the bases."""
    haze = np.maximum(bump(t.x, t.y, -0.3, -0.02, 0.36, 0.5), bump(t.x, t.y, 0.32, -0.04, 0.36, 0.5)) * t.lungs
    kerley = np.clip(np.cos(2 * np.pi * (11 * t.y + rng.uniform())), 0, 1) * step(np.abs(t.reach) - 0.45, 0.2)
    kerley = kerley * step(t.y - t.anatomy.base + 0.35, 0.1) * t.lungs
    return strength * (0.085 * haze + 0.09 * haze * t.texture + 0.05 * kerley), haze


def _emphysema(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """Dark lungs with bullae; the diaphragm is flattened by the anatomy."""
    bullae = np.zeros_like(t.x)
    for on_left in (False, True):
        cx, cy = t.at(on_left, rng.uniform(0, 0.5), rng.uniform(0.1, 0.4))
        bullae = np.maximum(bullae, bump(t.x, t.y, cx, cy, 0.2, 0.25))
    return -strength * t.lungs * (0.035 + 0.05 * bullae), t.lungs


def _fibrosis(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """Reticular lines in the periphery and at the bases."""
    net = np.maximum(ridges(smooth_noise(rng, 17), 0.35), ridges(smooth_noise(rng, 20), 0.3))
    depth = np.clip((t.y - t.anatomy.apex) / (t.anatomy.base - t.anatomy.apex), 0, 1)
    region = np.clip(0.75 * depth**2 + 0.35 * np.abs(t.reach) - 0.1, 0, 1) * t.lungs
    return 0.17 * strength * region * net, region


def _pleural_thickening(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """Bright rind of uneven thickness along the chest wall, or a cap on the apex."""
    on_left = bool(rng.random() < 0.5)
    rind = step(np.abs(t.reach) - (0.86 - 0.1 * strength) + 0.05 * smooth_noise(rng, 7), 0.12)
    outer = step(np.where(t.x < 0, -t.x, t.x) - t.anatomy.spread, 0.06)
    a = t.anatomy
    if rng.random() < 0.4:
        where = step(a.apex + 0.15 - t.y + 0.03 * smooth_noise(rng, 7), 0.05)
    else:
        _, cy = t.at(on_left, 0, rng.uniform(0.4, 0.7))
        where = rind * outer * step(0.4 - np.abs(t.y - cy), 0.12)
    shown = where * t.lung(on_left)
    return 0.25 * strength * shown, shown


def _hernia(t: _Thorax, rng: np.random.Generator, strength: float) -> Effect:
    """Round opacity behind the heart, on the diaphragm, with a level of air in it."""
    a = t.anatomy
    cx, cy, radius = rng.uniform(-0.04, 0.14), a.base - rng.uniform(0.08, 0.16), rng.uniform(0.13, 0.18)
    sac = disc(t.x, t.y, cx, cy, radius, 0.3)
    air = disc(t.x, t.y, cx, cy - 0.02, radius * 0.75, 0.3) * step(cy - t.y, 0.02)
    return strength * (0.16 * sac - 0.2 * air), sac


_DRAWERS: dict[str, _Drawer] = {
    "Atelectasis": _atelectasis,
    "Cardiomegaly": _cardiomegaly,
    "Effusion": _effusion,
    "Infiltration": _infiltration,
    "Mass": _mass,
    "Nodule": _nodule,
    "Pneumonia": _pneumonia,
    "Pneumothorax": _pneumothorax,
    "Consolidation": _consolidation,
    "Edema": _edema,
    "Emphysema": _emphysema,
    "Fibrosis": _fibrosis,
    "Pleural_Thickening": _pleural_thickening,
    "Hernia": _hernia,
}
