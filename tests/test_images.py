"""One image file: the grey level that each PIL mode gives, orientation, and the sentence for every file that is no image."""

from __future__ import annotations

import errno
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from velora.data.images import ListedImages, image_collate
from velora.errors import ConfigError, original_text
from velora.models.images import ImageTransform

TRANSFORM = ImageTransform(256, "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
RAMP = np.arange(65536).reshape(256, 256)  # every 16-bit value once; at 256 x 256 nothing is resized


def read(path: Path, size: int = 256) -> np.ndarray:
    """(3 x S x S) as whole numbers."""
    return ImageTransform(size, "bicubic", TRANSFORM.mean, TRANSFORM.std).read(path).numpy().astype(int)


@pytest.mark.parametrize(
    ("name", "mode", "values"),
    [
        ("grey.png", "I;16", RAMP.astype("<u2")),
        ("little.tif", "I;16", RAMP.astype("<u2")),
        ("big.tif", "I;16B", RAMP.astype(">u2")),
        ("int.tif", "I", RAMP.astype("i4")),
        ("unit.tif", "F", (RAMP / 65535).astype("f4")),
        ("bytes.tif", "F", (RAMP / 257).astype("f4")),
    ],
)
def test_a_ramp_of_more_than_8_bits_stays_a_ramp(tmp_path, name, mode, values):
    image = Image.frombytes(mode, (256, 256), values.tobytes()) if mode == "I;16B" else Image.fromarray(values)
    image.save(tmp_path / name)
    with Image.open(tmp_path / name) as saved:
        assert saved.mode == mode
    found = read(tmp_path / name)
    assert found.mean() == pytest.approx(127.5, abs=0.01)
    assert np.abs(found - RAMP / 257).max() <= 0.5 + 1e-4  # rounded, in float32
    assert (found.min(), found.max()) == (0, 255)


def test_a_16_bit_pgm(tmp_path):
    (tmp_path / "ramp.pgm").write_bytes(b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes())
    assert read(tmp_path / "ramp.pgm").mean() == pytest.approx(127.5, abs=0.01)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.zeros((4, 4), "i4"), 0),
        (np.zeros((4, 4), "f4"), 0),
        (np.full((4, 4), 51400, "u2"), 200),
        (np.full((4, 4), 200, "u2"), 1),  # 16 bits say what is white, however dark the picture is
        (np.full((4, 4), 51400, "i4"), 200),
        (np.full((4, 4), 0.2, "f4"), 51),
        (np.full((4, 4), 51.0, "f4"), 51),
    ],
)
def test_scales(tmp_path, values, found):
    Image.fromarray(values).save(tmp_path / "flat.tif")
    assert np.unique(read(tmp_path / "flat.tif", 4)).tolist() == [found]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0, 255], "0 to 255"), ([0, 65536], "0 to 65536"), ([-1, 300], "-1 to 300"),  # 32-bit integers
        ([0.0, 1.5], "0 to 1.5"), ([0.0, 16.0], "0 to 16"), ([-1.0, 1.0], "-1 to 1"), ([0.0, 65535.0], "0 to 65535"),
        ([0.0, float("nan")], "nan to nan"), ([0.0, float("inf")], "0 to inf"),
    ],
)  # fmt: skip
def test_an_unclear_scale_is_refused(tmp_path, values, shown):
    kind = "i4" if all(isinstance(v, int) for v in values) else "f4"
    Image.fromarray(np.array([values, values], kind)).save(tmp_path / "odd.tif")
    with pytest.raises(ConfigError, match=rf"odd\.tif is not a readable image \(its values, {shown}, do not fit "):
        read(tmp_path / "odd.tif")


COLOUR = (200, 100, 50)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (4, 4), 1), (255,) * 3),
        (Image.new("L", (4, 4), 7), (7,) * 3),
        (Image.new("LA", (4, 4), (7, 0)), (7,) * 3),  # alpha is dropped
        (Image.new("RGBA", (4, 4), (*COLOUR, 0)), COLOUR),
        (Image.new("RGB", (4, 4), COLOUR).quantize(2), COLOUR),
        (Image.new("CMYK", (4, 4), (55, 155, 205, 0)), COLOUR),  # 255 - ink
        (Image.new("CMYK", (4, 4), (0, 0, 0, 255)), (0,) * 3),
    ],
)
def test_modes_of_8_bits(tmp_path, image, expected):
    file = tmp_path / "image.tif"
    image.save(file)
    assert read(file, 4)[:, 0, 0].tolist() == list(expected)


def test_transparent_palettes_show_their_colours(tmp_path):
    image = Image.new("RGB", (4, 4), COLOUR).quantize(2)
    image.save(tmp_path / "one.png", transparency=0)
    image.save(tmp_path / "bytes.png", transparency=bytes([0, 128]))
    for name in ("one.png", "bytes.png"):
        assert read(tmp_path / name, 4)[:, 0, 0].tolist() == list(COLOUR)


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud), (5, np.transpose),
        (6, lambda a: np.rot90(a, -1)), (7, lambda a: np.rot90(a, 2).T), (8, np.rot90),
    ],
)  # fmt: skip
def test_exif_orientation_is_applied(tmp_path, orientation, shown):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read(tmp_path / "turned.png", 4)[0], shown(pixels))
    Image.fromarray(pixels.astype("u2") * 257).save(tmp_path / "deep.png", exif=exif)
    assert np.array_equal(read(tmp_path / "deep.png", 4)[0], shown(pixels))


def test_damaged_exif_is_no_damaged_image(tmp_path):
    Image.new("L", (4, 4), 9).save(tmp_path / "image.png", exif=b"Exif\0\0nothing of TIFF")
    assert np.unique(read(tmp_path / "image.png", 4)).tolist() == [9]


def huge_text(file: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 2**21, zip=True)
    Image.new("L", (4, 4)).save(file, "png", pnginfo=text)


def cut(form: str, share: float):
    def write(file: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, form)
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return write


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def broken_chunk(file: Path) -> None:
    """A chunk whose name is no name, in the middle of the pixels: PIL raises SyntaxError while it decodes."""
    Image.new("L", (4, 4)).save(file, "png")
    pixels = zlib.compress(bytes(4 * 5))
    head = file.read_bytes()[:33]  # signature and IHDR
    file.write_bytes(head + chunk(b"IDAT", pixels[:4]) + chunk(b"\0\1\2\3", pixels[4:]) + chunk(b"IEND", b""))


BAD = {
    "empty": (lambda file: file.write_bytes(b""), "in no format that PIL knows"),
    "text": (lambda file: file.write_text("no image"), "in no format that PIL knows"),
    "folder": (lambda file: file.mkdir(), "Is a directory"),
    "missing": (lambda file: None, "No such file"),
    "png with a huge text": (huge_text, "Decompressed data too large"),
    "png with a broken chunk": (broken_chunk, "broken PNG file"),
    "cut jpeg": (cut("jpeg", 0.5), "image file is truncated"),
    "cut png": (cut("png", 0.5), ""),
    "cut gif": (cut("gif", 0.5), ""),
    "cut bmp": (cut("bmp", 0.5), "image file is truncated"),
    "cut tiff": (cut("tiff", 0.01), ""),
    "cut webp": (cut("webp", 0.5), ""),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_is_one_sentence(tmp_path, kind):
    write, reason = BAD[kind]
    write(tmp_path / "bad.img")
    sentence = (
        rf"^{re.escape(str(tmp_path))}/bad\.img is not a readable image \([^\n]*{reason}[^\n]*\): replace or remove it$"
    )
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path / "bad.img")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("side", "limit"), [(12, 100), (20, 200)]
)  # PIL warns above its limit and refuses above twice its limit
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, side, limit):
    Image.new("L", (side, side)).save(tmp_path / "bomb.png")
    assert read(tmp_path / "bomb.png", 4).shape == (3, 4, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ConfigError, match=rf"bomb\.png is not a readable image \([^\n]* {limit}\b[^\n]*\)"):
        read(tmp_path / "bomb.png", 4)


def test_memory_errors_stay_what_they_are(tmp_path, monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(MemoryError):
        read(tmp_path / "any.png")


def test_a_sentence_survives_a_data_loaders_process(tmp_path):
    cut("jpeg", 0.5)(tmp_path / "bad.jpg")
    loader = DataLoader(
        ListedImages([(tmp_path / "bad.jpg", 0)], TRANSFORM), num_workers=1, collate_fn=image_collate(TRANSFORM)
    )
    with pytest.raises(ConfigError) as raised:
        next(iter(loader))
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/bad\.jpg is not a readable image \(.*\): .*", str(raised.value))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("bad value"), "bad value"),
        (ValueError("two\nlines: Error: x"), "two\nlines: Error: x"),
        (OSError(errno.ENOSPC, "No space left"), "[Errno 28] No space left"),
        (re.error("needs no more than its text"), "needs no more than its text"),
    ],
)
def test_the_text_of_any_error_of_a_data_loaders_process(error, text):
    try:
        raise error
    except Exception:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")  # what torch sends from there
    with pytest.raises(type(error)) as raised:
        wrapper.reraise()
    assert "Original Traceback" in str(raised.value)
    assert original_text(raised.value) == text
    assert original_text(error) == str(error)
