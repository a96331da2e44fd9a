"""The phantoms: tables of synthetic patients and lesions, drawn in the layouts of ChestX-ray14 and HAM10000.

The table is a pure function of (hospital, number of images) and costs no drawing, so that a plan needs no files; the
drawn folder holds the same table as a file, read by the same code as the real data set. A smaller number of images is
a prefix of a larger one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import NormalDist

import numpy as np

from trainables.data import chestxray14, ham10000
from trainables.data.adapter import Adapter, DatasetInfo, Table
from trainables.data.boxes import Boxes
from trainables.settings import DatasetSettings

CHEST_IMAGES = 1200
DERM_IMAGES = 1400


@dataclass(frozen=True)
class _Finding:
    """How often a finding occurs and with what.

    `loadings` are weights of four standard normal traits of the patient (general, cardiac, infectious, chronic);
    `persistence` is the share of the remaining variance that a patient's images have in common.
    """

    prevalence: float
    loadings: tuple[float, float, float, float]
    persistence: float


_FINDINGS = {
    "Atelectasis": _Finding(0.13, (0.50, 0.20, 0.30, 0.10), 0.4),
    "Cardiomegaly": _Finding(0.11, (0.30, 0.60, 0.00, 0.00), 0.9),
    "Effusion": _Finding(0.14, (0.50, 0.45, 0.25, 0.00), 0.5),
    "Infiltration": _Finding(0.16, (0.45, 0.10, 0.50, 0.00), 0.4),
    "Mass": _Finding(0.11, (0.40, 0.00, 0.00, 0.10), 0.9),
    "Nodule": _Finding(0.12, (0.40, 0.00, 0.00, 0.10), 0.9),
    "Pneumonia": _Finding(0.10, (0.40, 0.00, 0.60, 0.00), 0.4),
    "Pneumothorax": _Finding(0.11, (0.40, 0.00, 0.00, 0.30), 0.5),
    "Consolidation": _Finding(0.11, (0.45, 0.10, 0.50, 0.00), 0.4),
    "Edema": _Finding(0.10, (0.40, 0.65, 0.00, 0.00), 0.4),
    "Emphysema": _Finding(0.08, (0.30, 0.00, 0.00, 0.60), 0.95),
    "Fibrosis": _Finding(0.075, (0.30, 0.00, 0.00, 0.55), 0.95),
    "Pleural_Thickening": _Finding(0.10, (0.40, 0.00, 0.10, 0.40), 0.9),
    "Hernia": _Finding(0.07, (0.20, 0.00, 0.00, 0.20), 0.95),
}
_LOADINGS = np.array([_FINDINGS[f].loadings for f in chestxray14.CLASSES])
_PERSISTENCE = np.array([_FINDINGS[f].persistence for f in chestxray14.CLASSES])
_THRESHOLDS = np.array([NormalDist().inv_cdf(1 - _FINDINGS[f].prevalence) for f in chestxray14.CLASSES])
_UNIQUE = np.sqrt(1 - (_LOADINGS**2).sum(1))

# HAM10000's numbers of images a class to this power: as unbalanced in kind, with every class still measurable.
_TEMPER = 0.7
_HAM_COUNTS = {"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142}
_LOCALIZATIONS = ("back", "lower extremity", "trunk", "upper extremity", "abdomen", "face", "chest", "foot", "scalp")


@dataclass(frozen=True)
class ChestImage:
    """A row of the chest phantom's table."""

    patient: int
    follow_up: int
    findings: tuple[str, ...]
    age: int
    sex: str
    ap: bool

    @property
    def name(self) -> str:
        """File name, as in ChestX-ray14."""
        return f"{self.patient:08d}_{self.follow_up:03d}.png"


@dataclass(frozen=True)
class LesionImage:
    """A row of the dermatoscopic phantom's table."""

    lesion: int
    view: int
    number: int
    dx: str
    age: int | None
    sex: str
    localization: str

    @property
    def name(self) -> str:
        """Image id, as in HAM10000: a file name without its extension."""
        return f"ISIC_{self.number:07d}"

    @property
    def lesion_id(self) -> str:
        """Lesion, as in HAM10000."""
        return f"HAM_{self.lesion:07d}"


def chest_images(hospital: int, images: int) -> list[ChestImage]:
    """Sample the table of a hospital's chest patients: one to four images each."""
    return list(islice(_chest_stream(hospital), images))


def _chest_stream(hospital: int) -> Iterator[ChestImage]:
    patient = 0
    while True:
        patient += 1
        rng = np.random.default_rng([hospital, patient, 31])
        follow_ups = 1 + int(rng.choice(4, p=[0.3, 0.25, 0.25, 0.2]))
        common = _LOADINGS @ rng.standard_normal(4) + _UNIQUE * np.sqrt(_PERSISTENCE) * rng.standard_normal(14)
        age, sex = int(rng.integers(18, 90)), str(rng.choice(["M", "F"]))
        for follow_up in range(follow_ups):
            score = common + _UNIQUE * np.sqrt(1 - _PERSISTENCE) * rng.standard_normal(14)
            present = score > _THRESHOLDS
            ap = bool(rng.random() < 0.2 + 0.08 * min(5, present.sum()))
            findings = tuple(f for f, shown in zip(chestxray14.CLASSES, present, strict=True) if shown)
            yield ChestImage(patient, follow_up, findings, age, sex, ap)


def lesion_images(hospital: int, images: int) -> list[LesionImage]:
    """Sample the table of a hospital's lesions: one or two images each."""
    return list(islice(_lesion_stream(hospital), images))


def _lesion_stream(hospital: int) -> Iterator[LesionImage]:
    shares = np.array([_HAM_COUNTS[dx] ** _TEMPER for dx in ham10000.CLASSES])
    lesion, number = 0, 0
    while True:
        lesion += 1
        rng = np.random.default_rng([hospital, lesion, 32])
        dx = ham10000.CLASSES[int(rng.choice(len(shares), p=shares / shares.sum()))]
        age = None if rng.random() < 0.006 else int(5 * rng.integers(3, 18))
        sex, localization = str(rng.choice(["male", "female"])), str(rng.choice(_LOCALIZATIONS))
        for view in range(2 if rng.random() < 0.25 else 1):
            number += 1
            yield LesionImage(lesion, view, number, dx, age, sex, localization)


def _chest_table(settings: DatasetSettings) -> Table:
    rows = chest_images(settings.hospital, settings.images or CHEST_IMAGES)
    return chestxray14.to_table([r.name for r in rows], [str(r.patient) for r in rows], [r.findings for r in rows])


def _lesion_table(settings: DatasetSettings) -> Table:
    rows = lesion_images(settings.hospital, settings.images or DERM_IMAGES)
    return ham10000.to_table([r.name for r in rows], [r.lesion_id for r in rows], [r.dx for r in rows])


def draw_chest_phantom(settings: DatasetSettings, root: Path) -> None:
    """Draw the chest phantom into an empty folder, in ChestX-ray14's layout, with masks beside it.

    `BBox_List_2017.csv` counts in px of a 1024 px image, as the distributed list does for every copy of the images.
    """
    from PIL import Image

    from trainables.data.chest_scene import STRUCTURES, draw_chest
    from trainables.data.scenes import SIZE

    rows = chest_images(settings.hospital, settings.images or CHEST_IMAGES)
    (root / "images").mkdir()
    for structure in STRUCTURES:
        (root / "masks" / structure).mkdir(parents=True)
    boxes: list[list[object]] = []
    for row in rows:
        scene = draw_chest(settings.hospital, row.patient, row.follow_up, row.findings, ap=row.ap)
        Image.fromarray(scene.pixels).save(root / "images" / row.name, compress_level=1)
        for structure, mask in scene.masks.items():
            Image.fromarray(mask.astype(np.uint8) * 255).save(root / "masks" / structure / row.name, compress_level=1)
        for finding, box in scene.boxes.items():
            label = chestxray14.BOX_SPELLING.get(finding, finding)
            boxes.append([row.name, label, *(v * 1024 / SIZE for v in box), "", "", ""])
    _write_csv(root / chestxray14.BOXES_FILE, chestxray14.BOXES_HEADER, boxes)
    entries = (_chest_entry(row, SIZE) for row in rows)
    _write_csv(root / chestxray14.TABLE_FILES[0], chestxray14.HEADER, entries)


def _chest_entry(row: ChestImage, size: int) -> list[object]:
    findings = "|".join(row.findings) or "No Finding"
    spacing = round(0.143 * 2048 / size, 3)
    view = "AP" if row.ap else "PA"
    return [row.name, findings, row.follow_up, row.patient, row.age, row.sex, view, size, size, spacing, spacing]


def draw_lesion_phantom(settings: DatasetSettings, root: Path) -> None:
    """Draw the dermatoscopic phantom into an empty folder, in HAM10000's layout."""
    from PIL import Image

    from trainables.data.derm_scene import draw_lesion

    rows = lesion_images(settings.hospital, settings.images or DERM_IMAGES)
    for folder in ham10000.IMAGE_FOLDERS[:2]:
        (root / folder).mkdir()
    for position, row in enumerate(rows):
        part = ham10000.IMAGE_FOLDERS[2 * position // len(rows)]
        pixels = draw_lesion(settings.hospital, row.lesion, row.view, row.dx)
        Image.fromarray(pixels).save(root / part / f"{row.name}.jpg", quality=90)
    entries = (
        [r.lesion_id, r.name, r.dx, "synthetic", "" if r.age is None else f"{r.age}.0", r.sex, r.localization]
        for r in rows
    )
    _write_csv(root / ham10000.TABLE_FILES[0], ",".join(ham10000.HEADER), entries)


def _write_csv(path: Path, header: str, rows: Iterable[Sequence[object]]) -> None:
    """Write the header as it stands: ChestX-ray14's bracketed names hold unquoted commas."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(header + "\n")
        csv.writer(file, lineterminator="\n").writerows(rows)


def boxes_drawn(settings: DatasetSettings) -> Boxes | None:
    """Boxes of a phantom that lies in `settings.root`; None where it is not drawn yet.

    Raises:
        DataError: see `chestxray14.read_boxes`.
    """
    return None if settings.root is None else chestxray14.read_boxes(settings)


_NOTE = "Synthetic images drawn by this project: for trying and testing, no evidence about patients."

CHEST = Adapter(
    DatasetInfo(
        name="phantom",
        title="chest phantom (synthetic)",
        classes=chestxray14.CLASSES,
        group_kind="patient",
        single_label=False,
        channels=1,
        synthetic=True,
        licence="Apache-2.0 (drawn by this project)",
        default_images=CHEST_IMAGES,
        notes=(_NOTE,),
    ),
    _chest_table,
    chestxray14.image_folders,
    draw_chest_phantom,
    read_boxes=boxes_drawn,
)
DERM = Adapter(
    DatasetInfo(
        name="phantom-derm",
        title="dermatoscopic phantom (synthetic)",
        classes=ham10000.CLASSES,
        group_kind="lesion",
        single_label=True,
        channels=3,
        synthetic=True,
        licence="Apache-2.0 (drawn by this project)",
        default_images=DERM_IMAGES,
        notes=(_NOTE,),
    ),
    _lesion_table,
    ham10000.image_folders,
    draw_lesion_phantom,
)
