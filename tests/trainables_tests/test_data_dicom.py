"""DICOM files written by pydicom itself, in the forms in which radiographs are distributed."""

from __future__ import annotations

import builtins
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from made_indices import made_index
from PIL import Image

from trainables.data.decode import UNREADABLE, decode, decode_whole
from trainables.data.dicom import WrongImageError
from trainables.data.images import ImageCache
from trainables.data.index import Claims, DataError, Index

pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.pixels import get_decoder  # noqa: E402
from pydicom.uid import (  # noqa: E402
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    generate_uid,
)

CHEST = Claims(modalities=("CR", "DX"), body_parts=("CHEST", "THORAX"))


def radiograph(pixels: np.ndarray, **tags: object) -> Dataset:
    """A DX image of one frame, uncompressed; 12 of 16 bits are used unless `tags` say otherwise."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.Modality, data.BodyPartExamined = "DX", "CHEST"
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = 8 * pixels.itemsize
    data.BitsStored = 12 if pixels.itemsize == 2 else 8
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.HighBit = data.BitsStored - 1
    return data


def save(path: Path, data: Dataset) -> Path:
    data.save_as(path, enforce_file_format=True)
    return path


def ramp(top: int = 4095, dtype: type = np.uint16) -> np.ndarray:
    """(16, 16) values from 0 to `top`, both included."""
    return np.linspace(0, top, 256).round().astype(dtype).reshape(16, 16)


def scaled(values: np.ndarray) -> np.ndarray:
    """Darkest 0, brightest 255."""
    low, high = float(values.min()), float(values.max())
    return np.round((values - low) / (high - low) * 255).astype(np.uint8)


def test_twelve_bits_are_scaled_to_their_own_range(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dicom", radiograph(ramp(3000) + 500))
    assert np.array_equal(decode(path, 16, "crop", 1)[..., 0], scaled(ramp(3000).astype(float)))


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dcm", radiograph(ramp(), PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(decode(path, 16, "crop", 1)[..., 0], 255 - scaled(ramp().astype(float)))


def test_the_first_window_is_applied_and_clips(tmp_path: Path) -> None:
    """PS3.3 C.11.2.1.2: y = (x − (c − 0.5)) / (w − 1) + 0.5, clipped to 0 … 1."""
    path = save(tmp_path / "a.dcm", radiograph(ramp(), WindowCenter=[2048, 100], WindowWidth=[1000, 50]))
    expected = np.clip((ramp() - 2047.5) / 999 + 0.5, 0, 1)
    assert abs(decode(path, 16, "crop", 1)[..., 0].astype(float) - expected * 255).max() <= 1


def test_a_voi_lut_and_a_rescale_are_applied(tmp_path: Path) -> None:
    lut = Dataset()
    lut.LUTDescriptor, lut.LUTData = [256, 0, 16], np.arange(0, 65536, 256)[::-1].astype("<u2").tobytes()
    data = radiograph(np.arange(256, dtype=np.uint8).reshape(16, 16), VOILUTSequence=[lut])
    pixels = decode(save(tmp_path / "lut.dcm", data), 16, "crop", 1)[..., 0]
    assert np.array_equal(pixels, np.arange(256, dtype=np.uint8)[::-1].reshape(16, 16))
    data = radiograph(ramp(), RescaleSlope=-1, RescaleIntercept=4095)
    pixels = decode(save(tmp_path / "slope.dcm", data), 16, "crop", 1)[..., 0]
    assert np.array_equal(pixels, scaled(4095.0 - ramp()))


def test_signed_values_are_read(tmp_path: Path) -> None:
    values = (ramp(2000).astype(np.int16) - 1000).astype(np.int16)
    path = save(tmp_path / "a.dcm", radiograph(values))
    assert np.array_equal(decode(path, 16, "crop", 1)[..., 0], scaled(values.astype(float)))


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEG2000Lossless])
def test_jpeg_and_jpeg_2000_are_read(tmp_path: Path, syntax: str) -> None:
    pixels = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG" if syntax == JPEGBaseline8Bit else "JPEG2000", quality=95)
    raw = stream.getvalue()
    if syntax == JPEG2000Lossless:  # Pillow writes a file around the code stream, which DICOM holds alone
        raw = raw[raw.index(b"\xff\x4f\xff\x51") :]
    data = radiograph(pixels, PixelData=encapsulate([raw]))
    data.file_meta.TransferSyntaxUID = syntax
    decoded = decode(save(tmp_path / "a.dcm", data), 64, "crop", 1)[..., 0]
    assert abs(decoded.astype(int) - pixels).max() <= (3 if syntax == JPEGBaseline8Bit else 0)


def test_colour_is_reduced_where_grey_is_wanted(tmp_path: Path) -> None:
    pixels = np.full((16, 16, 3), (255, 0, 0), np.uint8)
    data = radiograph(pixels, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    path = save(tmp_path / "a.dcm", data)
    assert decode(path, 16, "crop", 3)[3, 3].tolist() == [255, 0, 0]
    assert np.array_equal(np.unique(decode(path, 16, "crop", 1)), [76])


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_is_looked_up(tmp_path: Path, bits: int) -> None:
    """PALETTE COLOR: pixels are places in three tables; a reversed grey palette makes 0 white, as ultrasound has it."""
    top = 2**bits - 1
    levels = np.linspace(top, 0, 256).round().astype(f"<u{bits // 8}")
    data = radiograph(np.arange(256, dtype=np.uint8).reshape(16, 16), PhotometricInterpretation="PALETTE COLOR")
    for colour in ("Red", "Green", "Blue"):
        setattr(data, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, bits])
        setattr(data, f"{colour}PaletteColorLookupTableData", levels.tobytes())
    decoded = decode(save(tmp_path / "a.dcm", data), 16, "crop", 1)[..., 0]
    assert abs(decoded.ravel().astype(int) - np.arange(255, -1, -1)).max() <= 1


def test_an_image_of_one_value_is_black(tmp_path: Path) -> None:
    path = save(tmp_path / "a.dcm", radiograph(np.full((16, 16), 700, np.uint16)))
    assert decode(path, 16, "crop", 1).max() == 0


def test_a_file_without_the_suffix_is_known_by_what_it_says(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", radiograph(ramp()))
    assert decode(path, 16, "crop", 1).max() == 255


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"Modality": "CT"}, "Modality is CT; expected CR or DX"),
        ({"BodyPartExamined": "HAND"}, "BodyPartExamined is HAND; expected CHEST or THORAX"),
    ],
)
def test_what_is_not_what_the_data_set_claims_is_told(tmp_path: Path, tags: dict[str, str], said: str) -> None:
    path = save(tmp_path / "a.dcm", radiograph(ramp(), **tags))
    with pytest.raises(WrongImageError, match=said):
        decode(path, 16, "crop", 1, CHEST)
    assert decode(path, 16, "crop", 1).shape == (16, 16, 1)


def test_what_a_file_does_not_say_is_not_held_against_it(tmp_path: Path) -> None:
    data = radiograph(ramp(), BodyPartExamined="Chest PA")
    assert decode(save(tmp_path / "a.dcm", data), 16, "crop", 1, CHEST).max() == 255
    del data.Modality, data.BodyPartExamined
    assert decode(save(tmp_path / "b.dcm", data), 16, "crop", 1, CHEST).max() == 255


def test_broken_files_are_unreadable_and_nothing_else(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.dcm", radiograph(ramp(), NumberOfFrames=1)).read_bytes()
    rng = np.random.default_rng(0)
    for number in range(200):
        broken = bytearray(whole[: rng.integers(0, len(whole))] if number % 2 else whole)
        for _ in range(8):
            if broken:
                broken[rng.integers(0, len(broken))] = rng.integers(0, 256)
        (tmp_path / "b.dcm").write_bytes(broken)
        try:
            decode_whole(tmp_path / "b.dcm", 1, CHEST)
        except UNREADABLE as error:
            assert str(error)


def test_several_frames_are_refused(tmp_path: Path) -> None:
    data = radiograph(ramp(), NumberOfFrames=2, PixelData=ramp().tobytes() * 2)
    with pytest.raises(ValueError, match="holds 2 frames; expected a single image"):
        decode(save(tmp_path / "a.dcm", data), 16, "crop", 1)


def test_a_missing_decoder_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = radiograph(ramp(), PixelData=encapsulate([b"\xff\xd8\xff\xd9"]))
    data.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    path = save(tmp_path / "a.dcm", data)
    monkeypatch.setattr(get_decoder(JPEGLosslessSV1), "_available", {})
    with pytest.raises(ValueError, match=r"JPEG Lossless.*\[dicom\]'; JPEG Lossless needs python-gdcm besides"):
        decode(path, 16, "crop", 1)


def test_without_pydicom_one_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    (root / "train").mkdir(parents=True)
    for name in ("a", "b"):
        save(root / "train" / f"{name}.dicom", radiograph(ramp()))
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("pydicom"):
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"a.dicom: reading DICOM needs pydicom; .*pip install 'spft-studies\[dicom\]'"):
        ImageCache.open(index_of("a", "b"), root, image_size=16, fit="crop", folder=tmp_path / "cache")


def test_the_cache_reads_them_and_names_those_of_another_modality(tmp_path: Path) -> None:
    root = tmp_path / "data"
    (root / "train").mkdir(parents=True)
    for name, tags in (("a", {}), ("b", {"Modality": "CT"})):
        save(root / "train" / f"{name}.dicom", radiograph(ramp(), **tags))
    cache = ImageCache.open(index_of("a"), root, image_size=16, fit="crop", folder=tmp_path / "cache")
    assert np.array_equal(cache.pixels[0, ..., 0], scaled(ramp().astype(float)))
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read: .*b.dicom \(WrongImageError: Modality is CT"):
        ImageCache.open(index_of("a", "b"), root, image_size=16, fit="crop", folder=tmp_path / "cache")


def index_of(*names: str) -> Index:
    return made_index(names, ("ILD",), dataset="vindr_cxr", claims=CHEST)
