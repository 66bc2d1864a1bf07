"""What a saved detector says of itself, read as if an enemy had written it.

A record (``Detector.config()``) comes from a ``config.json`` or from the header of a weight file. It may name a
registered detector or family, a backbone of timm, and plain numbers within bounds; nothing in it makes anybody read
another file or use the network. What it asks for is built on the meta device first, where it costs nothing, and is
compared with the header of the weights: memory is allocated only for tensors that the weight file really has.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import threading
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from dyhead_zoo.convert import CheckpointError
from dyhead_zoo.detector import FORMAT_VERSION, Detector
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.weight_files import CONFIG_FILE, read_header, read_json
from dyhead_zoo.weights import check_shapes

_KEYS = {"format_version", "name", "arch", "pretrained_cfg"}
_MAX_NUMBER = 65_536  # of any argument: channels, queries, candidates
_MAX_SIDE = 10_000  # pixels
_MAX_ITEMS = 1_000  # of any list
_MAX_PARAMETERS = 8_000  # tensors; the largest detectors have some 2,000
_WORD = re.compile(r"[\w.+-]{1,100}")  # no path, no URL


def saved_config(path: str | Path) -> dict[str, Any] | None:
    """The record of a saved detector: a folder's ``config.json``, or a weight file's header (its tensors stay unread).

    Returns:
        The record, checked; None for a weight file without one.

    Raises:
        FileNotFoundError: if there is nothing at ``path``, or no ``config.json`` in the folder.
        CheckpointError: for a damaged weight file.
        ValueError: for a record that is damaged, not ours, of a newer format, or beyond all bounds.
    """
    path = Path(path)
    try:
        if path.is_dir():
            config = read_json(path / CONFIG_FILE)
        else:
            if path.is_file() and path.suffix not in (".safetensors", ".json"):
                return None  # other tools' metadata have a "config" too
            header = read_header(path)[1]
            if "config" not in header:
                return None
            config = json.loads(header["config"])
        return check_config(config)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: expected a folder with config.json and model.safetensors, or a weight file ({error})"
        ) from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no detector that this dyhead_zoo can read: {error}") from error


def check_config(config: Any) -> dict[str, Any]:
    """A record, if every part of it is of the right type and within bounds.

    Raises:
        ValueError: with what is wrong.
    """
    if not isinstance(config, dict) or "format_version" not in config:
        raise ValueError(f"its record is not one of dyhead_zoo's, which have a format_version{_whose(config)}")
    version = config["format_version"]
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version is {version!r}, expected a number from 1")
    if version > FORMAT_VERSION:
        raise ValueError(f"it has format {version}, this dyhead_zoo reads up to {FORMAT_VERSION}: upgrade dyhead_zoo")
    if odd := set(config) ^ _KEYS:
        raise ValueError(f"its record has keys {sorted(config)[:20]}, expected {sorted(_KEYS)}; see {sorted(odd)[:3]}")
    if not isinstance(config["name"], str) or not re.fullmatch(r"\w{1,100}", config["name"]):
        raise ValueError(f"name is {str(config['name'])[:100]!r}, expected the name of a detector")
    if not isinstance(config["arch"], dict):
        raise ValueError("arch is not a dictionary of arguments")
    _check_value("arch", config["arch"])
    _check_cfg(config["pretrained_cfg"])
    return config


def _whose(config: Any) -> str:
    """A guess at the library that wrote a foreign ``config.json``."""
    for key, library in (("model_type", "transformers"), ("architecture", "timm"), ("diffusers", "diffusers")):
        if isinstance(config, dict) and any(str(name).strip("_").startswith(key) for name in config):
            return f" (it looks like one of {library}'s: use that library)"
    return ""


def _check_value(name: str, value: Any) -> None:
    """Plain values of bounded size only: flags, numbers, words, and short lists and dictionaries of them."""
    if isinstance(value, (list, dict)):
        if len(value) > _MAX_ITEMS:
            raise ValueError(f"{name} has {len(value)} items, more than {_MAX_ITEMS}: refused")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_value(f"{name}.{str(key)[:100]}", item)
    elif isinstance(value, str):
        if not _WORD.fullmatch(value):
            raise ValueError(f"{name} is {value[:100]!r}: refused, words of a record name no file and no address")
    elif isinstance(value, (int, float)) and not abs(value) <= _MAX_NUMBER:  # NaN, too
        raise ValueError(f"{name} is {value:.6g}, beyond {_MAX_NUMBER}: refused")


def _check_cfg(data: Any) -> None:
    if not isinstance(data, dict):
        raise ValueError("pretrained_cfg is not a dictionary")
    cfg = PretrainedCfg.from_dict(data)
    for key, hint in typing.get_type_hints(PretrainedCfg).items():
        if not _is_a(getattr(cfg, key), hint):
            raise ValueError(f"pretrained_cfg.{key} is {str(getattr(cfg, key))[:100]!r}, expected {hint}")
    _ = cfg.label_space  # names and ids must be unique
    for key in ("short_side", "long_side", "pad_divisor"):
        if not 1 <= getattr(cfg, key) <= _MAX_SIDE:
            raise ValueError(f"pretrained_cfg.{key} is {getattr(cfg, key):.6g}, expected 1..{_MAX_SIDE}")
    if not (
        len(cfg.mean) == len(cfg.std) > 0 and all(map(math.isfinite, cfg.mean)) and all(0 < s < 1e6 for s in cfg.std)
    ):
        raise ValueError(
            f"pretrained_cfg.mean and .std are {cfg.mean[:9]} and {cfg.std[:9]}: expected one each a channel"
        )


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a field of ``PretrainedCfg``; whole numbers pass for floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, option) for option in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, arguments[0]) for item in value)
    if origin is not None:
        return isinstance(value, Mapping) and all(_is_a(item, arguments[1]) for item in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return hint is Any or type(value) is hint


def check_weights(path: Path, build: Callable[[], Detector]) -> None:
    """Compare what a record asks for with the header of the weights, before anything is allocated.

    Args:
        path: the weights, or the index of their shards.
        build: makes the detector of the record.

    Raises:
        CheckpointError: if the keys or shapes differ; lists them.
        ValueError: if the record asks for something that cannot be built.
    """
    shapes, _ = read_header(path)
    try:
        with torch.device("meta"), _few_parameters():
            expected = build().state_dict()
    except Exception as error:  # arguments of any kind reach constructors of any kind
        raise ValueError(f"the record of {path} asks for what cannot be built: {error}") from error
    try:
        check_shapes(shapes, expected)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: its record and its tensors do not agree: {error}") from error


@contextlib.contextmanager
def _few_parameters() -> Iterator[None]:
    """End the construction of modules (in this thread) that would never end, such as a million blocks."""
    thread, number = threading.get_ident(), itertools.count(1)

    def count(*_: Any) -> None:
        if threading.get_ident() == thread and next(number) > _MAX_PARAMETERS:
            raise ValueError(f"more than {_MAX_PARAMETERS} parameters: refused")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
