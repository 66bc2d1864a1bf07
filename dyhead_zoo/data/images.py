"""Anything that shows a picture, to one form: a (3, H, W) uint8 RGB tensor, the way up that its EXIF tag says."""

from __future__ import annotations

import io
import mmap
import warnings
from collections.abc import Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

ImageSource = str | PathLike[str] | bytes | Image.Image | np.ndarray | Tensor

MAX_PIXELS = 178_956_970
"""Pillow's limit against decompression bombs: a quarter of a GiB of RGB, about 13,000 x 13,000."""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What is tried on a file. Left out on purpose: formats that run other programs (EPS) or have no signature (TGA)."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each EXIF orientation upright (CIPA DC-008, table 6); 5 to 8 swap height and width."""
_SIXTEEN_BIT_MODES = {"I", "I;16", "I;16L", "I;16B", "I;16N"}


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read one picture as RGB.

    Files and bytes may be in any of ``FORMATS``. The EXIF orientation is applied; of an animation the first frame is
    taken; an alpha channel is dropped (colours stay as stored, nothing is composited); grey is repeated; palette, CMYK
    and 1-bit pictures are converted by Pillow; 16-bit grey is scaled by 255 / 65535. Colour profiles are ignored.
    Plain RGB JPEGs go through torchvision, which gives the same pixels as Pillow in half the time.

    Args:
        source: path, encoded bytes, PIL image, array (H, W), (H, W, 1) or (H, W, 3), or tensor (H, W), (1, H, W) or
            (3, H, W). Arrays and tensors are uint8, or float in 0..255 (rounded).
        max_pixels: refuse pictures of more than this many pixels before decoding them.

    Returns:
        (3, H, W) uint8 tensor on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what is there is no readable picture, or its values are ambiguous; the message says what to do.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source.detach().cpu())
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pil(source, "PIL image", max_pixels)
    if isinstance(source, bytes):
        return _from_bytes(source, f"image of {len(source)} bytes", max_pixels)
    if isinstance(source, (str, PathLike)):
        return _from_bytes(_read_file(source), repr(str(source)), max_pixels)
    raise ValueError(
        f"cannot read a picture from {type(source).__name__}: give a path, bytes, PIL image, array or tensor"
    )


def image_size(path: str | PathLike[str]) -> tuple[int, int]:
    """(height, width) of what ``read_image`` would return; of all but TIFF files only the header is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a picture.
    """
    name = repr(str(path))
    with _open(_regular_file(path), name, max_pixels=None) as image:
        if image.format == "TIFF":  # whether Pillow turns these upright before or while it loads them varies
            upright = read_image(path)
            return upright.shape[1], upright.shape[2]
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def _regular_file(path: str | PathLike[str]) -> Path:
    """The path, once it is known to be a file that can be read to its end."""
    file = Path(path)
    try:
        if file.is_file():
            return file
        exists = file.exists()
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a usable path ({error})") from error
    if not exists:
        hint = "download it first" if "://" in str(path) else f"working directory: {Path.cwd()}"
        raise FileNotFoundError(f"no such image file: {str(path)!r} ({hint})")
    kind = "a folder; give the files in it" if file.is_dir() else "not a regular file"
    raise ValueError(f"{str(path)!r} is {kind}")


def _read_file(path: str | PathLike[str]) -> bytes:
    file = _regular_file(path)
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}; check its permissions") from error


def _open(source: Path | bytes, name: str, max_pixels: int | None) -> Image.Image:
    """Open lazily (header only) and refuse what is too large, whatever Pillow's own limit is set to."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size == 0:
        raise ValueError(f"{name} is empty (0 bytes): copy or download it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name}: {error}; if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS and max_pixels"
        ) from error
    except UnidentifiedImageError as error:  # whose message names the object that holds the bytes
        raise ValueError(f"{name} is no picture in one of {FORMATS}, or its beginning is damaged") from error
    except Exception as error:  # Pillow's plugins raise almost anything on damaged headers
        raise ValueError(f"{name} is no picture in one of {FORMATS}, or is damaged ({error})") from error
    _check_pixels(image, name, max_pixels)
    return image


@cache
def _formats() -> list[str]:
    """Those of ``FORMATS`` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_pixels(image: Image.Image, name: str, max_pixels: int | None) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name} is {width} x {height}: a picture needs at least one pixel")
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"{name} is {width} x {height}, more than max_pixels={max_pixels}: shrink it, or raise the limit"
        )


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8."""
    try:
        orientation = int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a damaged EXIF block is no reason to refuse the pixels
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _from_bytes(data: bytes, name: str, max_pixels: int) -> Tensor:
    with _open(data, name, max_pixels) as image:
        if image.format != "JPEG" or image.mode != "RGB" or _orientation(image) != 1:
            return _from_pil(image, name, max_pixels)
    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        reason = str(error).rpartition(", ")[2]
        raise ValueError(f"{name} is a damaged JPEG ({reason}): copy or download it again") from error


def _from_pil(image: Image.Image, name: str, max_pixels: int) -> Tensor:
    _check_pixels(image, name, max_pixels)
    if image.mode == "F":
        raise ValueError(f"{name} holds 32-bit floats, whose range is unknown: convert it to 8 bits first")
    deep = image.mode in _SIXTEEN_BIT_MODES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            orientation = _orientation(image)
            pixels = np.asarray(image, dtype=np.int64) if deep else np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError, ...
        raise ValueError(f"{name} cannot be decoded ({error}): damaged? Copy or download it again") from error
    if deep:
        pixels = _from_sixteen_bit(pixels, name)
    if orientation != 1:
        pixels = np.asarray(Image.fromarray(pixels).transpose(_UPRIGHT[orientation]))
    return torch.tensor(pixels).permute(2, 0, 1).contiguous()


def _from_sixteen_bit(values: np.ndarray, name: str) -> np.ndarray:
    """Grey (H, W) of the full 16-bit range to (H, W, 3) in 0..255; 65535 / 255 = 257 exactly."""
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name} holds 32-bit integers {values.min()}..{values.max()}: convert it to 8 bits first")
    return np.repeat(((values + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)


def _from_array(array: np.ndarray) -> Tensor:
    if array.ndim == 3 and array.shape[2] == 4:
        raise ValueError(f"array of shape {array.shape} has four channels: drop the alpha channel by array[..., :3]")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise ValueError(f"array of shape {array.shape}: expected (H, W, 3) or (H, W); tensors are (3, H, W)")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"array of {array.dtype}: scale the values to 0..255 and convert by .astype('uint8')")
    dtype = np.uint8 if array.dtype == np.uint8 else np.float32
    pixels = torch.from_numpy(np.array(array if array.ndim == 3 else array[..., None], dtype=dtype, order="C"))
    return _to_uint8(pixels.permute(2, 0, 1), f"array of shape {array.shape}")


def _from_tensor(tensor: Tensor) -> Tensor:
    shape = tuple(tensor.shape)
    if tensor.ndim == 4:
        raise ValueError(f"tensor of shape {shape} is a batch: give the pictures one by one, e.g. list(batch)")
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and shape[0] not in (1, 3)):
        raise ValueError(f"tensor of shape {shape}: expected (3, H, W) or (H, W); arrays are (H, W, 3)")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise ValueError(f"tensor of {tensor.dtype}: scale the values to 0..255 and convert by .to(torch.uint8)")
    return _to_uint8(tensor if tensor.ndim == 3 else tensor[None], f"tensor of shape {shape}")


def _to_uint8(pixels: Tensor, name: str) -> Tensor:
    """(1 or 3, H, W) of uint8, or of floats that are plainly in 0..255, to a fresh (3, H, W) uint8."""
    if pixels.numel() == 0:
        raise ValueError(f"{name} has no pixels")
    if pixels.is_floating_point():
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 255):  # also catches NaN
            raise ValueError(f"{name} holds floats from {low:g} to {high:g}: images are uint8, or float in 0..255")
        if 0 < high <= 1:
            raise ValueError(f"{name} holds floats in 0..1, which is ambiguous: multiply by 255 (images are in 0..255)")
        pixels = pixels.round().to(torch.uint8)
    return pixels.expand(3, -1, -1).clone(memory_format=torch.contiguous_format)


class ImageCache:
    """Decoded pictures in one block of anonymous memory: lazily filled, shared with worker processes made by fork.

    Memory is taken as pictures arrive: three bytes a pixel. Workers started by spawn get an empty cache each.

    Args:
        sizes: (height, width) of every picture.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self._sizes = list(sizes)
        self._allocate()

    def _allocate(self) -> None:
        self._offsets = np.cumsum([0] + [3 * height * width for height, width in self._sizes]).tolist()
        self._pixels = torch.frombuffer(mmap.mmap(-1, max(self._offsets[-1], 1)), dtype=torch.uint8)
        self._filled = torch.frombuffer(mmap.mmap(-1, max(len(self._sizes), 1)), dtype=torch.uint8)

    def get(self, index: int) -> Tensor | None:
        """The picture (3, H, W), a view that must not be written to, or None."""
        return self._view(index) if self._filled[index] else None

    def put(self, index: int, image: Tensor) -> None:
        """Store a picture; two workers that store the same one write the same bytes."""
        self._view(index).copy_(image)
        self._filled[index] = 1

    def _view(self, index: int) -> Tensor:
        return self._pixels[self._offsets[index] : self._offsets[index + 1]].view(3, *self._sizes[index])

    def __getstate__(self) -> dict[str, Any]:
        return {"_sizes": self._sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._allocate()
