"""Decoding against hand-computed pixels, and a cache that notices changed files, damage, rivals and sudden death."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainables.data import image_store
from trainables.data.decode import decode
from trainables.data.images import ImageCache, cache_bytes, images_to_decode
from trainables.data.index import DataError, Index

SIZE = 16


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


class TestDecode:
    def test_grey_of_the_right_size_is_unchanged(self, tmp_path: Path) -> None:
        pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
        assert np.array_equal(decode(save(tmp_path / "a.png", pixels), 16, "crop", 1)[..., 0], pixels)

    def test_sixteen_bits_are_scaled_not_saturated(self, tmp_path: Path) -> None:
        pixels = np.full((16, 16), 65535, np.uint16)
        pixels[0, :4] = 0, 257, 257 * 128, 256
        decoded = decode(save(tmp_path / "a.png", pixels), 16, "crop", 1)[..., 0]
        assert decoded[0, :5].tolist() == [0, 1, 128, 1, 255]

    def test_sixteen_bits_in_rgb_are_repeated(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", np.full((16, 16), 257 * 40, np.uint16))
        assert np.array_equal(decode(path, 16, "crop", 3), np.full((16, 16, 3), 40))

    def test_rgba_is_laid_over_black(self, tmp_path: Path) -> None:
        pixels = np.zeros((16, 16, 4), np.uint8)
        pixels[:8] = (200, 100, 50, 255)
        pixels[8:] = (200, 100, 50, 0)
        decoded = decode(save(tmp_path / "a.png", pixels), 16, "crop", 3)
        assert decoded[0, 0].tolist() == [200, 100, 50]
        assert decoded[15, 0].tolist() == [0, 0, 0]

    def test_colour_becomes_luminance_where_grey_is_wanted(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", np.full((16, 16, 3), (255, 0, 0), np.uint8))
        assert np.array_equal(np.unique(decode(path, 16, "crop", 1)), [76])  # 0.299 · 255, ITU-R 601

    def test_palettes_are_looked_up(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", np.full((16, 16, 3), (255, 0, 0), np.uint8), mode="P")
        assert Image.open(path).mode == "P"
        assert decode(path, 16, "crop", 3)[3, 3].tolist() == [255, 0, 0]

    def test_reversed_palettes_are_looked_up_too(self, tmp_path: Path) -> None:
        """Index 0 is white, as some exports of radiographs have it; the indices themselves would be a negative."""
        image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
        image.putpalette([value for level in range(255, -1, -1) for value in (level, level, level)])
        image.save(tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").mode == "P"
        decoded = decode(tmp_path / "a.png", 16, "crop", 1)[..., 0]
        assert np.array_equal(decoded, np.arange(255, -1, -1, dtype=np.uint8).reshape(16, 16))

    def test_transparent_palettes_are_laid_over_black(self, tmp_path: Path) -> None:
        image = Image.fromarray(np.full((16, 16), 9, np.uint8))
        image.putpalette([200] * 768)
        image.save(tmp_path / "a.png", transparency=9)
        assert decode(tmp_path / "a.png", 16, "crop", 1).max() == 0

    def test_pages_are_refused(self, tmp_path: Path) -> None:
        page = Image.fromarray(np.zeros((16, 16), np.uint8))
        page.save(tmp_path / "a.tif", save_all=True, append_images=[page])
        with pytest.raises(ValueError, match="holds several pages; expected a single image"):
            decode(tmp_path / "a.tif", 16, "crop", 1)

    def test_crop_takes_the_centre_and_squash_takes_all(self, tmp_path: Path) -> None:
        pixels = np.zeros((16, 48), np.uint8)
        pixels[:, 16:32] = 200
        path = save(tmp_path / "a.png", pixels)
        assert np.array_equal(np.unique(decode(path, 16, "crop", 1)), [200])
        squashed = decode(path, 16, "squash", 1)
        assert squashed[8, [0, 7, 15], 0].tolist() == [0, 200, 0]

    def test_reduction_is_antialiased(self, tmp_path: Path) -> None:
        """A checkerboard of single pixels becomes even grey; picking every eighth pixel would give black or white."""
        board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
        decoded = decode(save(tmp_path / "a.png", board), 16, "crop", 1)
        assert abs(decoded.astype(int) - 127).max() <= 2

    def test_jpeg_is_read(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.jpg", np.full((32, 32, 3), (180, 90, 60), np.uint8))
        assert abs(decode(path, 16, "crop", 3).astype(int) - (180, 90, 60)).max() <= 3


@pytest.fixture
def data(tmp_path: Path) -> tuple[Index, Path]:
    """Twelve random grey images in ChestX-ray14's layout, and their index."""
    return make_data(tmp_path / "data", 12)


def make_data(root: Path, count: int, size: int = 40) -> tuple[Index, Path]:
    rng = np.random.default_rng(count)
    index = make_index(count)
    for name in index.names.tolist():
        save(root / "images" / name, rng.integers(0, 256, (size, size), dtype=np.uint8))
    return index, root


def make_index(count: int) -> Index:
    names = [f"{i:08d}_000.png" for i in range(count)]
    return Index(
        dataset="chestxray14",
        classes=("Mass",),
        names=np.array(names),
        groups=np.array(names),
        labels=np.zeros((count, 1), np.uint8),
        split=np.zeros(count, np.uint8),
        group_kind="patient",
        single_label=False,
        channels=1,
        synthetic=False,
    )


def open_cache(data: tuple[Index, Path], folder: Path, workers: int = 1) -> ImageCache:
    return ImageCache.open(data[0], data[1], image_size=SIZE, fit="crop", folder=folder, workers=workers)


def pixel_file(folder: Path) -> Path:
    (path,) = folder.glob("*/pixels-*.u8")
    return path


class TestCache:
    def test_it_holds_the_decoded_images_in_the_order_of_the_index(
        self, data: tuple[Index, Path], tmp_path: Path
    ) -> None:
        cache = open_cache(data, tmp_path / "cache", workers=3)
        assert cache.decoded == 12
        expected = [decode(data[1] / "images" / name, SIZE, "crop", 1) for name in data[0].names.tolist()]
        assert np.array_equal(cache.pixels, np.stack(expected))
        hashes = b"".join(hashlib.sha256(image.tobytes()).digest() for image in expected)
        assert cache.contents_digest == hashlib.sha256(hashes).hexdigest()

    def test_it_is_decoded_once(self, data: tuple[Index, Path], tmp_path: Path) -> None:
        first, second = open_cache(data, tmp_path / "cache"), open_cache(data, tmp_path / "cache")
        assert (first.decoded, second.decoded) == (12, 0)
        assert first.contents_digest == second.contents_digest
        assert np.array_equal(first.pixels, second.pixels)

    def test_its_pixels_cannot_be_written(self, data: tuple[Index, Path], tmp_path: Path) -> None:
        cache = open_cache(data, tmp_path / "cache")
        with pytest.raises(ValueError, match="read-only"):
            cache.pixels[0, 0, 0, 0] = 1

    def test_size_fit_and_rows_have_caches_of_their_own(self, data: tuple[Index, Path], tmp_path: Path) -> None:
        index, root = data
        folder = tmp_path / "cache"
        one = {f: getattr(index, f)[:4] for f in ("names", "groups", "labels", "split")}
        open_cache(data, folder)
        for changed, size, fit in ((index, 8, "crop"), (index, SIZE, "squash"), (replace(index, **one), SIZE, "crop")):
            assert images_to_decode(changed, size, fit, folder) == len(changed)
            assert ImageCache.open(changed, root, image_size=size, fit=fit, folder=folder).decoded == len(changed)
        assert open_cache(data, folder).decoded == 0

    def test_the_split_and_the_labels_are_no_part_of_it(self, data: tuple[Index, Path], tmp_path: Path) -> None:
        open_cache(data, tmp_path / "cache")
        other = replace(data[0], split=data[0].split + 1, labels=data[0].labels + 1)
        assert open_cache((other, data[1]), tmp_path / "cache").decoded == 0

    def test_the_plan_knows_without_the_files_what_will_be_decoded(
        self, data: tuple[Index, Path], tmp_path: Path
    ) -> None:
        folder = tmp_path / "cache"
        assert images_to_decode(data[0], SIZE, "crop", folder) == 12
        open_cache(data, folder)
        shutil.rmtree(data[1])
        assert images_to_decode(data[0], SIZE, "crop", folder) == 0
        assert cache_bytes(data[0], SIZE) == 12 * SIZE * SIZE == pixel_file(folder).stat().st_size

    def test_a_changed_file_alone_is_decoded_again(self, data: tuple[Index, Path], tmp_path: Path) -> None:
        before = open_cache(data, tmp_path / "cache")
        kept = np.array(before.pixels)
        save(data[1] / "images" / data[0].names[5], np.full((40, 40), 7, np.uint8))
        after = open_cache(data, tmp_path / "cache")
        assert after.decoded == 1
        assert np.array_equal(np.unique(after.pixels[5]), [7])
        assert np.array_equal(np.delete(after.pixels, 5, 0), np.delete(kept, 5, 0))
        assert after.contents_digest != before.contents_digest
        assert np.array_equal(before.pixels, kept)  # what others have open does not change under them

    def test_another_data_set_with_equal_names_lengths_and_times_is_not_taken_for_this_one(
        self, data: tuple[Index, Path], tmp_path: Path
    ) -> None:
        """Uncompressed files of one size, which an archive gave one time: only their contents differ."""
        roots = [tmp_path / name for name in ("one", "other")]
        rng = np.random.default_rng(0)
        index = replace(data[0], names=np.array([f"n{i}.bmp" for i in range(12)]))
        for root in roots:
            for name in index.names.tolist():
                path = save(root / "images" / name, rng.integers(0, 256, (SIZE, SIZE), np.uint8))
                os.utime(path, ns=(10**18, 10**18))
        one, other = (open_cache((index, root), tmp_path / "cache") for root in roots)
        assert other.decoded == 12
        assert one.contents_digest != other.contents_digest
        assert np.array_equal(other.pixels[7], decode(roots[1] / "images" / "n7.bmp", SIZE, "crop", 1))
        (roots[1] / "images" / "n3.bmp").write_bytes((roots[0] / "images" / "n3.bmp").read_bytes())
        assert open_cache((index, roots[1]), tmp_path / "cache").decoded == 1, "one file was exchanged, and says so"
        assert open_cache((index, roots[0]), tmp_path / "cache").decoded == 12, "though one stamp differs now"

    def test_it_knows_the_size_of_every_image_itself(self, data: tuple[Index, Path], tmp_path: Path) -> None:
        save(data[1] / "images" / data[0].names[3], np.zeros((20, 60), np.uint8))
        expected = [[60, 20] if row == 3 else [40, 40] for row in range(12)]
        for _ in range(2):
            assert open_cache(data, tmp_path / "cache").sizes.tolist() == expected

    def test_a_flipped_bit_is_noticed_said_and_mended(
        self, data: tuple[Index, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = open_cache(data, tmp_path / "cache")
        path = pixel_file(tmp_path / "cache")
        raw = bytearray(path.read_bytes())
        raw[3 * SIZE * SIZE + 17] ^= 4
        path.write_bytes(raw)
        after = open_cache(data, tmp_path / "cache")
        assert after.decoded == 1
        assert "1 images do not fit their digest" in caplog.text
        assert after.contents_digest == before.contents_digest
        assert open_cache(data, tmp_path / "cache").decoded == 0

    @pytest.mark.parametrize("length", [0, 1000])
    def test_a_truncated_file_is_noticed_said_and_rebuilt(
        self, data: tuple[Index, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, length: int
    ) -> None:
        digest = open_cache(data, tmp_path / "cache").contents_digest
        os.truncate(pixel_file(tmp_path / "cache"), length)
        assert images_to_decode(data[0], SIZE, "crop", tmp_path / "cache") == 12
        after = open_cache(data, tmp_path / "cache")
        assert (after.decoded, after.contents_digest) == (12, digest)
        assert f"{length} bytes instead of {12 * SIZE * SIZE}" in caplog.text

    def test_a_damaged_state_is_noticed_said_and_rebuilt(
        self, data: tuple[Index, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = open_cache(data, tmp_path / "cache")
        digest = before.contents_digest
        (state,) = (tmp_path / "cache").glob("*/state.npz")
        raw = bytearray(state.read_bytes())
        raw[raw.index(hashlib.sha256(before.pixels[6].tobytes()).digest())] ^= 1
        state.write_bytes(raw)
        after = open_cache(data, tmp_path / "cache")
        assert (after.decoded, after.contents_digest) == (12, digest)
        assert "damaged" in caplog.text

    def test_unreadable_images_are_counted_and_the_first_are_named(
        self, data: tuple[Index, Path], tmp_path: Path
    ) -> None:
        for position in (2, 3, 4, 5):
            (data[1] / "images" / data[0].names[position]).write_bytes(b"no image")
        broken = data[1] / "images" / data[0].names[7]
        broken.write_bytes(broken.read_bytes()[:300])
        with pytest.raises(DataError, match=r"^5 of 12 images cannot be read: .*00000002_000.png .*; …\. Replace"):
            open_cache(data, tmp_path / "cache", workers=2)
        assert images_to_decode(data[0], SIZE, "crop", tmp_path / "cache") == 12

    def test_when_unreadable_images_are_mended_only_they_are_decoded(
        self, data: tuple[Index, Path], tmp_path: Path
    ) -> None:
        path = data[1] / "images" / data[0].names[4]
        whole = path.read_bytes()
        path.write_bytes(b"no image")
        with pytest.raises(DataError, match=r"^1 of 12 images cannot be read"):
            open_cache(data, tmp_path / "cache")
        path.write_bytes(whole)
        cache = open_cache(data, tmp_path / "cache")
        assert cache.decoded == 1
        assert cache.contents_digest == open_cache(data, tmp_path / "other").contents_digest
        assert {p.suffix for p in (tmp_path / "cache").glob("*/*")} == {".npz", ".u8"}
        assert len(list((tmp_path / "cache").glob("*/*"))) == 2

    def test_a_cache_that_nobody_opened_for_a_day_makes_room_and_one_that_is_in_use_does_not(
        self, data: tuple[Index, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def of_size(size: int) -> ImageCache:
            return ImageCache.open(data[0], data[1], image_size=size, fit="crop", folder=tmp_path / "cache")

        old, used = of_size(16), of_size(20)
        folders = {path.name.split("-")[1]: path for path in (tmp_path / "cache").glob("*/")}
        day = 25 * 3600
        os.utime(folders["16"] / "state.npz", (time.time() - day,) * 2)
        usage = shutil.disk_usage(tmp_path)

        def free(_: Path) -> object:  # a disk that holds two of these caches and no more
            return usage._replace(free=12 * 24 * 24 if not folders["16"].exists() else 0)

        monkeypatch.setattr(image_store.shutil, "disk_usage", free)
        kept = old.pixels.copy()
        assert of_size(24).decoded == 12
        assert not folders["16"].exists() and folders["20"].exists()
        assert np.array_equal(old.pixels, kept), "who reads it goes on"
        assert used.pixels.shape[1] == 20
        usage = usage._replace(total=1)
        monkeypatch.setattr(image_store.shutil, "disk_usage", lambda _: usage._replace(free=0))
        with pytest.raises(DataError, match="make room"):
            of_size(28)
        assert folders["20"].exists()

    def test_all_caches_together_stay_below_the_bound_that_is_set(
        self, data: tuple[Index, Path], tmp_path: Path
    ) -> None:
        def of_size(size: int, most: int) -> ImageCache:
            return ImageCache.open(
                data[0], data[1], image_size=size, fit="crop", folder=tmp_path / "cache", most_bytes=most
            )

        most = 12 * (16**2 + 20**2)
        of_size(16, most), of_size(20, most)
        with pytest.raises(DataError, match=r"dataset.cache_gb: .* caches in use today take .*; allow more"):
            of_size(17, most)
        (old,) = (tmp_path / "cache").glob("*-16-crop-*/state.npz")
        os.utime(old, (time.time() - 25 * 3600,) * 2)
        assert of_size(12, most).decoded == 12
        sizes = sorted(path.stat().st_size for path in (tmp_path / "cache").glob("*/pixels-*.u8"))
        assert sizes == [12 * 12**2, 12 * 20**2], "the one that was of no use for a day made room"
        assert of_size(20, 1).decoded == 0, "what is there is read"

    def test_a_disk_that_is_too_full_is_an_error_before_writing(
        self, data: tuple[Index, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(image_store.shutil, "disk_usage", lambda _: usage._replace(free=100))
        with pytest.raises(DataError, match=r"decoded images need 0\.00 GB, 0\.00 GB are free; make room"):
            open_cache(data, tmp_path / "cache")
        bound = {"image_size": 32, "fit": "crop", "folder": tmp_path / "cache", "most_bytes": 10**9}
        with pytest.raises(DataError, match="make room"):  # a bound that would allow more is no remedy
            ImageCache.open(data[0], data[1], **bound)  # type: ignore[arg-type]

    def test_a_refreshed_cache_leaves_no_old_files(self, data: tuple[Index, Path], tmp_path: Path) -> None:
        open_cache(data, tmp_path / "cache")
        first = pixel_file(tmp_path / "cache")
        save(data[1] / "images" / data[0].names[0], np.zeros((40, 40), np.uint8))
        open_cache(data, tmp_path / "cache")
        assert pixel_file(tmp_path / "cache") != first
        assert {path.name for path in first.parent.iterdir()} == {"state.npz", pixel_file(tmp_path / "cache").name}


OPEN = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_data_images as t
from trainables.data import images
slow = images.decode_sized
def decode(*arguments):
    time.sleep({delay})
    return slow(*arguments)
images.decode_sized = decode
images.KEEP_EVERY = {keep_every}
index, data, folder = t.make_index({count}), Path({data!r}), Path({folder!r})
cache = images.ImageCache.open(index, data, image_size=t.SIZE, fit="crop", folder=folder)
print(cache.decoded, cache.contents_digest)
"""


def start(data: Path, folder: Path, count: int, delay: float, keep_every: int = 1000) -> subprocess.Popen[str]:
    """Open the cache in another process that takes `delay` seconds an image."""
    here = str(Path(__file__).parent)
    code = OPEN.format(tests=here, data=str(data), folder=str(folder), count=count, delay=delay, keep_every=keep_every)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_after_sudden_death_while_decoding_the_next_opening_is_whole(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 40)
    process = start(tmp_path / "data", tmp_path / "cache", 40, delay=0.5)
    wait_for(lambda: any((tmp_path / "cache").glob("*/pixels-*.u8")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert images_to_decode(data[0], SIZE, "crop", tmp_path / "cache") == 40
    cache = open_cache(data, tmp_path / "cache")
    assert cache.decoded == 40
    assert np.array_equal(cache.pixels[39], decode(data[1] / "images" / data[0].names[39], SIZE, "crop", 1))
    assert len(list((tmp_path / "cache").glob("*/*"))) == 2  # nothing half-made is left


def test_decoding_that_was_killed_goes_on_from_what_was_done(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 40)
    process = start(tmp_path / "data", tmp_path / "cache", 40, delay=0.05, keep_every=5)
    wait_for(lambda: any((tmp_path / "cache").glob("*/begun.npz")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert images_to_decode(data[0], SIZE, "crop", tmp_path / "cache") == 40
    cache = open_cache(data, tmp_path / "cache")
    assert cache.decoded <= 35
    assert cache.contents_digest == open_cache(data, tmp_path / "anew").contents_digest
    assert len(list((tmp_path / "cache").glob("*/*"))) == 2, "nothing half-made is left"


def test_processes_that_open_one_cache_at_once_decode_it_once(tmp_path: Path) -> None:
    make_data(tmp_path / "data", 40)
    processes = [start(tmp_path / "data", tmp_path / "cache", 40, delay=0.02) for _ in range(3)]
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(int(answer[0]) for answer in answers) == [0, 0, 40]
    assert len({answer[1] for answer in answers}) == 1


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < deadline, "it never began"
        time.sleep(0.01)


def test_real_radiographs_of_all_modes_are_read(real_data: Path) -> None:
    """Four of the 48 originals are RGBA; all must look like their 256 px copies, which others made."""
    originals = sorted((real_data / "chestxray14" / "original_1024").glob("*.png"))
    modes = {Image.open(path).mode for path in originals}
    assert modes == {"L", "RGBA"}
    for path in originals:
        mine = decode(path, 256, "crop", 1)[..., 0].astype(float)
        copy = np.asarray(Image.open(real_data / "chestxray14" / "images" / path.name).convert("L"), float)
        assert np.abs(mine - copy).mean() < 2


def test_real_lesions_are_read_in_colour(real_data: Path) -> None:
    path = next((real_data / "ham10000" / "HAM10000_images_part_2").glob("*.jpg"))
    decoded = decode(path, 112, "crop", 3)
    assert decoded.shape == (112, 112, 3)
    assert decoded[..., 0].mean() > decoded[..., 2].mean()  # skin is redder than blue
