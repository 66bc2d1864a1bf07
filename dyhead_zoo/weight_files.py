"""Weight files: read without running anything in them, within bounded memory; written in one step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dyhead_zoo.convert import CheckpointError, unwrap

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""Names in a saved folder or a repository: its record, and its weights, one file or shards that the index names."""


def read_state_dict(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors from a file without running anything that is in it.

    Args:
        path: ``.safetensors``, or ``model.safetensors.index.json``, the index of shards; ``.pth``, ``.pt`` or ``.bin``
            (PyTorch, ``weights_only=True``); ``.pkl`` (detectron2, by an unpickler that admits numpy arrays and nothing
            else).

    Returns:
        Tensors by name, on the CPU; metadata: the header's of a safetensors file, ``meta`` of mmengine's, else empty.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: for a damaged file, one that holds more than tensors, or an unknown suffix.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}" + (": it is a directory" if path.is_dir() else ""))
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise CheckpointError(f"{path}: unknown suffix {path.suffix!r}; weights are read from {', '.join(_READERS)}")
    try:
        return reader(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


_AGAIN = "Delete it and fetch it again"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


_MAX_HEADER = 16 << 20  # bytes; a detector's needs less than 1 MB, the format allows 100 MB
_MAX_JSON = 4 << 20  # bytes
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    """``safe_open``, after a look at what the header would cost to parse; mends its errors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > size - 8:
        raise CheckpointError(
            f"not a safetensors file, or a truncated one: it has {size} bytes, its header alone would need {header}. "
            f"{_AGAIN}"
        )
    if header > _MAX_HEADER:
        raise CheckpointError(f"its header has {header} bytes, and no detector needs more than {_MAX_HEADER}: refused")
    try:
        with safe_open(path, "pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"damaged or truncated safetensors file ({_first_line(error)}). {_AGAIN}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with _open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_header(path: str | Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by name, and the metadata, of a safetensors file or of shards, without reading any tensor.

    Args:
        path: ``.safetensors``, or the index of shards.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: for a damaged file, or a header too large to be a detector's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    shapes: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    for part in shard_files(path) if path.suffix == ".json" else [path]:
        try:
            with _open_safetensors(part) as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                metadata |= file.metadata() or {}
        except CheckpointError as error:
            raise CheckpointError(f"{part}: {error}") from error
    return shapes, metadata


def read_json(path: Path) -> Any:
    """A JSON file that somebody else wrote.

    Raises:
        ValueError: if it is larger than 4 MB, or no JSON.
    """
    if (size := path.stat().st_size) > _MAX_JSON:
        raise ValueError(f"{path.name} has {size} bytes, more than {_MAX_JSON}: refused")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply: refused") from None


def shard_files(index: Path) -> list[Path]:
    """Files of the shards that an index names; they need not exist.

    Raises:
        CheckpointError: for an index that cannot be read, or that names files with other names than shards have.
    """
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not the index of a sharded detector ({error!r}). {_AGAIN}") from error
    if wrong := [name for name in names if not (isinstance(name, str) and _SHARD_NAME.fullmatch(name))]:
        raise CheckpointError(
            f"{index} names {wrong[0]!r} as a shard: refused, expected model-00001-of-00002.safetensors"
        )
    return [index.with_name(name) for name in names]


def _read_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for path in shard_files(index):
        if not path.is_file():
            raise CheckpointError(f"it names {path.name}, which is not there: an upload or copy that was not finished?")
        part, header = _read_safetensors(path)
        if twice := tensors.keys() & part.keys():
            raise CheckpointError(f"{path.name} repeats {sorted(twice)[0]} of another shard. {_AGAIN}")
        tensors |= part
        metadata |= header
    return tensors, metadata


def weights_in(folder: Path) -> Path:
    """The weights of a saved folder: ``model.safetensors``, or the index of its shards.

    Raises:
        FileNotFoundError: if it has neither, or lacks shards that the index names.
    """
    if (whole := folder / WEIGHTS_FILE).is_file():
        return whole
    if not (index := folder / INDEX_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: a copy or upload that was not finished?"
        )
    if missing := [path.name for path in shard_files(index) if not path.is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing[:3])}: a copy or upload that was not finished?")
    return index


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with path.open("rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # zip archive, or the plain pickle of PyTorch before 1.6
        raise CheckpointError(f"not a PyTorch file (a web page saved under its name?). {_AGAIN}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"it holds {refused[1]} beside tensors, and to load that could run code: refused. If you trust whoever "
                "made it, save its tensors alone, in a process where you accept that risk: "
                "torch.save({'state_dict': torch.load(path, weights_only=False)['state_dict']}, new_path), or, for a "
                "whole module, torch.save(torch.load(path, weights_only=False).state_dict(), new_path)"
            ) from error
        raise CheckpointError(f"damaged or truncated PyTorch file ({_first_line(error)}). {_AGAIN}") from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"expected a dictionary of tensors, found {type(checkpoint).__name__}")
    return unwrap(checkpoint)


class _Refused(pickle.UnpicklingError):
    """Something in a pickle that is neither an array nor made of plain Python values."""


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What protocol 2 pickles of Python 3 call to restore bytes; other codecs are refused."""
    if encoding != "latin1":
        raise _Refused(f"codec {encoding!r}")
    return text.encode("latin1")


def _number_type(code: str, align: bool = False, copy: bool = True) -> np.dtype[Any]:
    """``numpy.dtype`` for plain numbers; others could hold objects, or sizes that do not agree with their data."""
    if not isinstance(code, str) or np.dtype(code).kind not in "biuf":
        raise _Refused(f"an array of {code!r}")
    return np.dtype(code, align=align, copy=copy)


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_FROM_BUFFER = np.empty(0).__reduce_ex__(5)[0]
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # numpy 1
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # numpy 2
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _number_type,
    ("_codecs", "encode"): _encode_latin1,
    ("collections", "OrderedDict"): dict,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits dictionaries, lists, numbers, strings and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with path.open("rb") as file:
            checkpoint = _ArrayUnpickler(file, encoding="latin1").load()
    except _Refused as error:
        raise CheckpointError(
            f"refused: only numpy arrays are read from a pickle, this one asks for {error}"
        ) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"damaged pickle ({_first_line(error)}). {_AGAIN}") from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"expected a dictionary of arrays, found {type(checkpoint).__name__}")
    arrays = checkpoint["model"] if isinstance(checkpoint.get("model"), Mapping) else checkpoint
    return unwrap({key: _as_tensor(key, value) for key, value in arrays.items()})


def _as_tensor(key: str, value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{key}: torch has no {value.dtype}") from error


_READERS: dict[str, Callable[[Path], tuple[dict[str, Tensor], dict[str, Any]]]] = {
    ".safetensors": _read_safetensors,
    ".json": _read_shards,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
    ".pkl": _read_pickle,
}


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in one step: a reader sees the old file or the new one, never half of it.

    Args:
        path: its directory must exist.
        tensors: any device, any strides, may share memory.
        metadata: goes into the header, with ``format: pt``.

    Raises:
        TypeError: if a value of ``metadata`` is not a string.
    """
    path = Path(path)
    header = {"format": "pt", **(metadata or {})}
    if wrong := {key: value for key, value in header.items() if not isinstance(value, str)}:
        raise TypeError(f"safetensors metadata must be strings, got {wrong}: use json.dumps")
    # a copy each, because safetensors refuses shared memory
    copies = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; safetensors would leave 0600
        save_file(copies, temporary, metadata=header)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_weights_folder(
    folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], max_shard_size: int
) -> list[str]:
    """Write ``model.safetensors``, or shards and their index where it would be larger than ``max_shard_size`` bytes.

    Tensors that share memory are written once for each name, so that a reader need not know of the sharing.

    Returns:
        Names of the files written.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_size
    for key, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = max_shard_size
        shards[-1][key] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS_FILE, tensors, metadata)
        return [WEIGHTS_FILE]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, metadata)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
    return [*names, INDEX_FILE]


def state_sha256(module: nn.Module) -> str:
    """SHA-256 of a module's weights, whatever file they come from: names and float32 values of its state dict."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        array = value.detach().cpu()
        array = array.float() if array.is_floating_point() else array
        digest.update(f"{key} {tuple(array.shape)}".encode())
        digest.update(array.contiguous().numpy().tobytes())
    return digest.hexdigest()
