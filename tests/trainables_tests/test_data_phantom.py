"""The phantoms: the same table with and without files, in the true layouts, drawn whole or not at all."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from trainables.data import chestxray14, derm_scene, ham10000, phantom
from trainables.data.chest_scene import BOXED, FINDINGS, STRUCTURES, draw_chest
from trainables.data.derm_scene import draw_lesion
from trainables.data.index import Index
from trainables.data.registry import load_index, locate, prepare
from trainables.data.scenes import SIZE, blur, smooth_noise
from trainables.settings import DatasetSettings

CHEST = DatasetSettings(images=60)
DROP = tuple(name for name in FINDINGS if name not in ("Atelectasis", "Effusion", "Cardiomegaly"))
DERM = DatasetSettings(name="phantom-derm", images=60)


@pytest.fixture(scope="module")
def chest_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(CHEST, load_small(CHEST), tmp_path_factory.mktemp("phantoms"))


@pytest.fixture(scope="module")
def derm_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(DERM, load_small(DERM), tmp_path_factory.mktemp("phantoms"))


def load_small(settings: DatasetSettings) -> Index:
    """An index of few images: without the classes that so few cannot measure in every split."""
    drop = DROP if settings.name == "phantom" else ("akiec", "bcc", "df", "vasc")
    return load_index(settings.model_copy(update={"drop_classes": drop}))


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


class TestTable:
    def test_about_a_third_of_the_images_have_no_finding_and_each_finding_five_to_twenty_percent(self) -> None:
        rows = phantom.chest_images(0, 6000)
        assert 0.30 < np.mean([not row.findings for row in rows]) < 0.40
        for finding in FINDINGS:
            assert 0.05 < np.mean([finding in row.findings for row in rows]) < 0.20, finding

    def test_findings_come_together_as_they_do_in_patients(self) -> None:
        rows = phantom.chest_images(0, 6000)
        shown = np.array([[finding in row.findings for finding in FINDINGS] for row in rows], float)
        together = np.corrcoef(shown.T)
        at = FINDINGS.index
        assert together[at("Edema"), at("Effusion")] > 0.15
        assert together[at("Infiltration"), at("Pneumonia")] > 0.15
        assert together[at("Emphysema"), at("Edema")] < 0.1

    def test_patients_have_one_to_four_images_of_one_age_and_sex(self) -> None:
        rows = phantom.chest_images(0, 1000)[:-4]
        by_patient: dict[int, list[phantom.ChestImage]] = {}
        for row in rows:
            by_patient.setdefault(row.patient, []).append(row)
        assert {len(images) for images in list(by_patient.values())[:-1]} == {1, 2, 3, 4}
        assert all(len({(row.age, row.sex) for row in images}) == 1 for images in by_patient.values())

    @pytest.mark.parametrize("sample", [phantom.chest_images, phantom.lesion_images])
    def test_fewer_images_are_a_prefix_and_another_hospital_is_another_table(self, sample: object) -> None:
        assert callable(sample)
        assert sample(0, 100) == sample(0, 300)[:100]
        assert sample(0, 100) != sample(1, 100)

    def test_lesions_are_unbalanced_like_ham10000(self) -> None:
        diagnoses = [row.dx for row in phantom.lesion_images(0, 6000)]
        counts = {dx: diagnoses.count(dx) for dx in ham10000.CLASSES}
        assert sorted(counts, key=lambda dx: counts[dx])[-1] == "nv"
        assert counts["nv"] > 10 * counts["df"] > 0

    def test_some_lesions_have_two_images(self) -> None:
        lesions = [row.lesion for row in phantom.lesion_images(0, 1000)]
        assert 0.1 < 1 - len(set(lesions)) / len(lesions) < 0.3

    def test_reading_the_default_index_takes_less_than_a_third_of_a_second(self) -> None:
        load_index(DatasetSettings())
        begin = time.process_time()
        load_index(DatasetSettings())
        assert time.process_time() - begin < 0.3


class TestChestLayout:
    def test_the_reader_of_chestxray14_reads_the_very_same_table(self, chest_root: Path) -> None:
        real = chestxray14.read_table(DatasetSettings(name="chestxray14", root=str(chest_root)))
        own = phantom.CHEST.read_table(CHEST)
        assert real.names.tolist() == own.names.tolist()
        assert real.groups.tolist() == own.groups.tolist()
        assert np.array_equal(real.labels, own.labels)

    def test_the_header_is_the_true_one(self, chest_root: Path, real_data: Path) -> None:
        true = (real_data / "chestxray14" / "Data_Entry_2017_v2020.csv").read_text().splitlines()[0]
        assert (chest_root / "Data_Entry_2017_v2020.csv").read_text().splitlines()[0] == true
        true = (real_data / "chestxray14" / "BBox_List_2017.csv").read_text().splitlines()[0]
        assert (chest_root / "BBox_List_2017.csv").read_text().splitlines()[0] == true

    def test_images_are_eight_bit_grey_and_every_one_is_there(self, chest_root: Path) -> None:
        for path in locate(load_small(CHEST), chest_root):
            image = Image.open(path)
            assert (image.mode, image.size) == ("L", (SIZE, SIZE))

    def test_masks_are_binary_and_lungs_lie_on_their_side_of_the_image(self, chest_root: Path) -> None:
        for name in (row.name for row in phantom.chest_images(0, 60)):
            masks = {s: np.asarray(Image.open(chest_root / "masks" / s / name)) for s in STRUCTURES}
            assert all(set(np.unique(mask).tolist()) == {0, 255} for mask in masks.values())
            columns = {s: np.nonzero(mask)[1].mean() for s, mask in masks.items()}
            assert columns["right_lung"] < columns["heart"] < columns["left_lung"]
            assert not (masks["right_lung"] & masks["left_lung"]).any()

    def test_every_boxed_finding_has_a_box_inside_a_1024_px_image(self, chest_root: Path) -> None:
        boxes = read_csv(chest_root / "BBox_List_2017.csv")[1:]
        expected = {
            (row.name, chestxray14.BOX_SPELLING.get(finding, finding))
            for row in phantom.chest_images(0, 60)
            for finding in row.findings
            if finding in BOXED
        }
        assert {(box[0], box[1]) for box in boxes} == expected
        assert "Infiltrate" in {box[1] for box in boxes}
        for box in boxes:
            x, y, width, height = map(float, box[2:6])
            assert min(x, y) >= 0 < min(width, height)
            assert max(x + width, y + height) <= 1024

    def test_a_cardiomegaly_box_is_the_box_of_the_heart_mask(self, chest_root: Path) -> None:
        for box in read_csv(chest_root / "BBox_List_2017.csv")[1:]:
            if box[1] == "Cardiomegaly":
                mask = np.asarray(Image.open(chest_root / "masks" / "heart" / box[0]))
                rows, columns = np.nonzero(mask)
                x, y, width, height = (float(value) * SIZE / 1024 for value in box[2:6])
                assert abs(x - columns.min()) <= 1
                assert abs(y - rows.min()) <= 1
                assert abs(width - (np.ptp(columns) + 1)) <= 2
                assert abs(height - (np.ptp(rows) + 1)) <= 2


class TestLesionLayout:
    def test_the_reader_of_ham10000_reads_the_very_same_table(self, derm_root: Path) -> None:
        real = ham10000.read_table(DatasetSettings(name="ham10000", root=str(derm_root)))
        own = phantom.DERM.read_table(DERM)
        assert real.names.tolist() == own.names.tolist()
        assert real.groups.tolist() == own.groups.tolist()
        assert np.array_equal(real.labels, own.labels)

    def test_images_are_rgb_jpegs_in_two_parts(self, derm_root: Path) -> None:
        paths = locate(load_small(DERM), derm_root)
        assert {path.parent.name for path in paths} == {"HAM10000_images_part_1", "HAM10000_images_part_2"}
        images = [Image.open(path) for path in paths]
        assert {(i.format, i.mode, i.size) for i in images} == {("JPEG", "RGB", (derm_scene.WIDTH, SIZE))}


class TestScenes:
    def test_an_image_depends_on_its_own_arguments_alone(self) -> None:
        first = draw_chest(3, 7, 1, ["Mass"])
        draw_chest(3, 8, 0, [])
        again = draw_chest(3, 7, 1, ["Mass"])
        assert np.array_equal(first.pixels, again.pixels)
        assert first.boxes == again.boxes
        assert np.array_equal(draw_lesion(3, 7, 0, "mel"), draw_lesion(3, 7, 0, "mel"))

    @pytest.mark.parametrize("finding", FINDINGS)
    def test_every_finding_changes_the_image_more_than_rounding(self, finding: str) -> None:
        """Same patient, pose and noise: what differs is the finding."""
        changes = []
        for patient in range(6):
            healthy = draw_chest(0, patient, 0, []).pixels.astype(float)
            ill = draw_chest(0, patient, 0, [finding]).pixels.astype(float)
            changes.append(np.sort(np.abs(ill - healthy).ravel())[-40:].mean())
        assert min(changes) > 6, changes

    def test_cardiomegaly_widens_the_heart(self) -> None:
        for patient in range(10):
            widths = [
                np.ptp(np.nonzero(draw_chest(0, patient, 0, shown).masks["heart"])[1])
                for shown in ([], ["Cardiomegaly"])
            ]
            assert widths[1] > 1.08 * widths[0]

    def test_emphysema_darkens_and_lengthens_the_lungs(self) -> None:
        def lungs(shown: list[str], patient: int) -> tuple[float, int]:
            scene = draw_chest(0, patient, 0, shown)
            mask = scene.masks["left_lung"] | scene.masks["right_lung"]
            return float(scene.pixels[mask].mean()), int(mask.sum())

        for patient in range(10):
            (healthy, size), (dark, large) = lungs([], patient), lungs(["Emphysema"], patient)
            assert dark < healthy
            assert large > size

    @pytest.mark.parametrize("finding", ["Mass", "Nodule", "Atelectasis", "Effusion", "Pneumonia", "Infiltration"])
    def test_an_opacity_is_brighter_inside_its_box_than_without_it(self, finding: str) -> None:
        for patient in range(6):
            healthy, ill = draw_chest(0, patient, 0, []), draw_chest(0, patient, 0, [finding])
            x, y, width, height = (int(value) for value in ill.boxes[finding])
            inside = (slice(y, y + height), slice(x, x + width))
            assert mean(ill.pixels[inside]) > mean(healthy.pixels[inside])

    def test_images_of_a_patient_share_their_anatomy_but_not_their_noise(self) -> None:
        def alike(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
            return float(np.corrcoef(a[20:80, 15:80].ravel(), b[20:80, 15:80].ravel())[0, 1])

        own = [alike(draw_chest(0, p, 0, []).pixels, draw_chest(0, p, 1, []).pixels) for p in range(12)]
        others = [alike(draw_chest(0, p, 0, []).pixels, draw_chest(0, p + 50, 1, []).pixels) for p in range(12)]
        assert np.mean(own) > np.mean(others)
        assert max(own) < 0.999

    def test_hospitals_differ_in_their_look(self) -> None:
        looks = [np.mean([mean(draw_chest(h, p, 0, []).pixels) for p in range(20)]) for h in range(6)]
        assert np.ptp(looks) > 8

    def test_smooth_noise_has_unit_variance_and_changes_slowly(self) -> None:
        rng = np.random.default_rng(0)
        maps = np.stack([smooth_noise(rng, 8) for _ in range(200)])
        assert maps.std() == pytest.approx(1, abs=0.05)
        assert np.abs(np.diff(maps, axis=1)).mean() < 0.2

    def test_blur_keeps_the_mean_and_spreads_a_point_like_a_gaussian(self) -> None:
        point = np.zeros((41, 41))
        point[20, 20] = 1
        blurred = blur(point, 2.0)
        assert blurred.sum() == pytest.approx(1)
        assert blurred[20, 20] == pytest.approx(1 / (2 * np.pi * 4), rel=0.02)
        assert np.array_equal(blur(np.full((9, 9), 0.25), 1.0).round(12), np.full((9, 9), 0.25))

    def test_an_image_is_drawn_in_a_few_milliseconds(self) -> None:
        draw_chest(0, 0, 0, []), draw_lesion(0, 0, 0, "nv")
        begin = time.process_time()
        for patient in range(30):
            draw_chest(0, patient, 0, ["Mass", "Edema"])
            draw_lesion(0, patient, 0, "nv")
        assert (time.process_time() - begin) / 60 < 0.015  # about 0.004 on an idle core


def mean(pixels: npt.NDArray[np.uint8]) -> float:
    return float(pixels.mean(dtype=float))


PREPARE = """
import sys
from pathlib import Path
from trainables.data.registry import load_index, prepare
from trainables.settings import DatasetSettings
settings = DatasetSettings(images={images}, drop_classes={drop!r})
index = load_index(settings)
print(prepare(settings, index, Path({folder!r})))
"""


def start(folder: Path, images: int = 60) -> subprocess.Popen[str]:
    code = PREPARE.format(images=images, drop=DROP, folder=str(folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)


class TestDrawingOnDisk:
    def test_after_sudden_death_while_drawing_the_phantom_is_drawn_whole(self, tmp_path: Path) -> None:
        process = start(tmp_path, images=150)
        deadline = time.monotonic() + 30
        while not any(tmp_path.glob(".*.partial-*/images/*.png")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, "it never began to draw"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list(tmp_path.glob("phantom-*"))
        second = start(tmp_path, images=150)
        root = Path(second.communicate(timeout=120)[0].strip())
        assert second.returncode == 0
        assert len(list((root / "images").iterdir())) == 150
        assert not list(tmp_path.glob(".*.partial-*"))

    def test_processes_that_prepare_one_phantom_at_once_get_one_folder(self, tmp_path: Path) -> None:
        processes = [start(tmp_path) for _ in range(3)]
        roots = {process.communicate(timeout=120)[0].strip() for process in processes}
        assert [process.returncode for process in processes] == [0, 0, 0]
        assert len(roots) == 1
        assert len(list(tmp_path.glob("phantom-*"))) == 1

    def test_a_phantom_is_drawn_once(self, tmp_path: Path) -> None:
        root = prepare(CHEST, load_small(CHEST), tmp_path)
        drawn = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
        assert prepare(CHEST, load_small(CHEST), tmp_path) == root
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*.png")} == drawn
        assert len(drawn) == 60 * 4

    @pytest.mark.parametrize("damage", ["flip", "remove", "add"])
    def test_a_damaged_phantom_is_noticed_said_and_drawn_anew(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
    ) -> None:
        root = prepare(CHEST, load_small(CHEST), tmp_path)
        victim = sorted((root / "images").iterdir())[10]
        whole = victim.read_bytes()
        if damage == "flip":
            victim.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
        elif damage == "remove":
            victim.unlink()
        else:
            (root / "images" / "stranger.png").write_bytes(whole)
        assert prepare(CHEST, load_small(CHEST), tmp_path) == root
        assert "do not fit their digest; drawn anew" in caplog.text
        assert victim.read_bytes() == whole
        assert not (root / "images" / "stranger.png").exists()
