from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import FUZZ
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dyhead_zoo.data.images import FORMATS, ImageCache, image_size, read_image

Image.init()
WRITABLE = [name for name in FORMATS if name in Image.SAVE]  # not every Pillow has AVIF


def gradient(height: int = 12, width: int = 20) -> np.ndarray:
    """A smooth picture in which no two corners are alike."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 3], axis=2).astype(np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


# ---- what is read


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_files_come_back_as_they_were(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"picture.{format}"
    path.write_bytes(encoded(Image.fromarray(gradient()), format))
    assert torch.equal(read_image(path), as_tensor(gradient()))
    assert torch.equal(read_image(str(path)), read_image(path.read_bytes()))
    assert image_size(path) == (12, 20)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_files_give_the_pixels_of_pillow(format: str) -> None:
    data = encoded(Image.fromarray(gradient()), format)
    assert torch.equal(read_image(data), as_tensor(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))))


def test_one_pixel() -> None:
    data = encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")
    assert read_image(data).flatten().tolist() == [9, 8, 7]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(tmp_path: Path, format: str, orientation: int) -> None:
    # what a picture must be stored as, so that it is seen upright (0 and 9 do not exist and mean nothing)
    store = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a, -1),
    }.get(orientation, lambda a: a)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    path.write_bytes(encoded(Image.fromarray(np.ascontiguousarray(store(gradient()))), format, exif=exif))
    image = read_image(path)
    assert image_size(path) == (12, 20) == image.shape[1:]
    assert (image.int() - as_tensor(gradient()).int()).abs().max() <= (40 if format == "JPEG" else 0)


def test_grey_palette_alpha_and_one_bit() -> None:
    colour = Image.fromarray(gradient())
    grey = read_image(encoded(colour.convert("L"), "PNG"))
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], torch.from_numpy(np.array(colour.convert("L"))))
    assert torch.equal(
        read_image(encoded(colour.convert("L"), "JPEG"))[0], read_image(encoded(colour.convert("L"), "JPEG"))[2]
    )

    palette = colour.quantize(16)
    assert torch.equal(read_image(encoded(palette, "GIF")), as_tensor(np.asarray(palette.convert("RGB"))))

    transparent = colour.copy()
    transparent.putalpha(Image.new("L", colour.size, 0))
    assert torch.equal(read_image(encoded(transparent, "PNG")), as_tensor(gradient()))
    assert read_image(encoded(palette, "PNG", transparency=bytes(16))).shape == (3, 12, 20)

    assert set(read_image(encoded(colour.convert("1"), "PNG")).unique().tolist()) == {0, 255}


def test_cmyk_jpeg_is_not_inverted() -> None:
    white = read_image(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"))
    black = read_image(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "JPEG"))
    assert white.min() > 250 and black.max() < 5


def test_sixteen_bits_are_scaled_not_cut() -> None:
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        image = read_image(encoded(Image.fromarray(values), format))
        assert image.tolist() == [[[0, 0, 1, 1, 128, 255]]] * 3


def test_sixteen_bits_and_orientation_together() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.array([[0, 65535]], dtype=np.uint16)
    assert read_image(encoded(Image.fromarray(values), "PNG", exif=exif))[0].tolist() == [[0], [255]]


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(data)[:, 0, 0].tolist() == [255, 0, 0]


def test_pil_arrays_and_tensors() -> None:
    array, tensor = gradient(), as_tensor(gradient())
    for source in (
        Image.fromarray(array),
        array,
        array.astype(np.float64),
        tensor,
        tensor.float(),
        array[:, ::-1][:, ::-1],
    ):
        assert torch.equal(read_image(source), tensor)
    grey = array[..., 0]
    for source in (grey, grey[..., None], torch.from_numpy(grey.copy()), torch.from_numpy(grey.copy())[None]):
        assert torch.equal(read_image(source), tensor[:1].expand(3, -1, -1))
    assert torch.equal(read_image(np.array([[0.4, 254.6]]))[0], torch.tensor([[0, 255]], dtype=torch.uint8))
    assert read_image(np.zeros((2, 2))).max() == 0


def test_the_result_is_a_copy() -> None:
    array, tensor = gradient(), as_tensor(gradient())
    read_image(array).zero_()
    read_image(tensor).zero_()
    assert array.any() and tensor.any()


# ---- what is refused, and how


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((4, 4, 4), np.uint8), "alpha"),
        (np.zeros((3, 8, 8), np.uint8), "(H, W, 3)"),
        (np.zeros((8, 8), np.uint16), "astype"),
        (np.zeros((8, 8), bool), "astype"),
        (np.full((8, 8, 3), 0.5), "multiply by 255"),
        (np.full((8, 8, 3), 256.0), "256"),
        (np.full((8, 8, 3), -1.0), "-1"),
        (np.full((8, 8, 3), np.nan), "nan"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (torch.zeros(2, 3, 8, 8), "list(batch)"),
        (torch.zeros(8, 8, 3), "(3, H, W)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "uint8"),
        (torch.ones(3, 8, 8), "multiply by 255"),
        (17, "int"),
        (Image.new("F", (4, 4)), "32-bit floats"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "32-bit integers"),
        (b"", "0 bytes"),
    ],
)
def test_ambiguous_values_are_errors_that_say_why(source: object, words: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        read_image(source)  # type: ignore[arg-type]
    assert words in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    missing = tmp_path / "missing.jpg"
    with pytest.raises(FileNotFoundError, match="missing.jpg"):
        read_image(missing)
    with pytest.raises(FileNotFoundError, match="download"):
        read_image("https://example.org/a.jpg")
    with pytest.raises(ValueError, match="folder"):
        read_image(tmp_path)
    with pytest.raises(ValueError, match="not a usable path"):
        read_image("x" * 5000)
    with pytest.raises(FileNotFoundError, match="x00"):
        read_image("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_image(tmp_path / "pipe")
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ValueError, match=r"text.jpg.*no picture"):
        read_image(tmp_path / "text.jpg")
    (tmp_path / "empty.jpg").touch()
    for read in (read_image, image_size):
        with pytest.raises(ValueError, match=r"empty.jpg.*0 bytes"):
            read(tmp_path / "empty.jpg")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_truncated_files(tmp_path: Path, format: str) -> None:
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)), format)
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="half"):
        read_image(path)


def test_postscript_is_not_run() -> None:
    with pytest.raises(ValueError, match="no picture"):
        read_image(encoded(Image.fromarray(gradient()), "EPS"))


def test_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(Image.new("1", (3000, 2000)), "PNG"))
    with pytest.raises(ValueError, match=r"bomb.png.*3000 x 2000.*max_pixels=5000000"):
        read_image(path, max_pixels=5_000_000)
    assert read_image(path, max_pixels=6_000_000).shape == (3, 2000, 3000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb.png.*MAX_IMAGE_PIXELS"):
        read_image(path)


def test_message_for_bytes_names_what_was_given_and_no_object() -> None:
    with pytest.raises(ValueError, match=r"^image of 4 bytes is no picture in one of \('JPEG'.*damaged$"):
        read_image(b"junk")


def test_damaged_exif_is_no_reason_to_refuse() -> None:
    data = encoded(Image.fromarray(gradient()), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert read_image(data).shape == (3, 12, 20)


@settings(max_examples=80 * FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_a_picture_or_a_clear_error(tmp_path: Path, data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(WRITABLE))
    content = bytearray(encoded(Image.fromarray(gradient()), format))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, max(len(content) - 1, 0)))
        what = data.draw(st.binary(min_size=1, max_size=4))
        change = data.draw(st.sampled_from(["overwrite", "insert", "truncate"]))
        if change == "truncate":
            del content[where:]
        else:
            content[where : where + len(what) * (change == "overwrite")] = what
    path = tmp_path / "fuzzed.img"
    path.write_bytes(content)
    try:
        image = read_image(path, max_pixels=100_000)
    except ValueError as error:
        assert "fuzzed.img" in str(error)
    else:
        assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3 and image.numel() <= 300_000
        assert image_size(path) == image.shape[1:]


# ---- cache


def test_cache_returns_what_was_put_and_survives_pickling_empty() -> None:
    import pickle

    cache = ImageCache([(12, 20), (1, 1)])
    assert cache.get(0) is None
    cache.put(0, as_tensor(gradient()))
    cached = cache.get(0)
    assert cached is not None and torch.equal(cached, as_tensor(gradient())) and cache.get(1) is None
    assert pickle.loads(pickle.dumps(cache)).get(0) is None
