"""Which detectors exist: names, weight tags, wildcards, deprecated names, and the grammar of unregistered names.

A registered name is a function; the table ``cfgs`` of its module maps ``name.tag`` to a ``PretrainedCfg``, the first
being the default. Unregistered names of the form ``<family>_<timm backbone>[_dyhead<N>]`` go to the family's builder.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dyhead_zoo.pretrained import PretrainedCfg

if TYPE_CHECKING:
    from dyhead_zoo.detector import Detector


class FamilyBuilder(Protocol):
    """Builds a detector of one family from a name, the user's arguments, and defaults that these override."""

    def __call__(self, name: str, pretrained: bool, user: dict[str, Any], **defaults: Any) -> Detector: ...


Entrypoint = Callable[..., "Detector"]
_F = TypeVar("_F", bound=Callable[..., Any])

_entrypoints: dict[str, Entrypoint] = {}
_modules: dict[str, str] = {}
_families: dict[str, FamilyBuilder] = {}
_deprecated: dict[str, str] = {}


class UnknownDetectorError(ValueError):
    """No detector, tag or family of that name."""


def register_detector(fn: _F) -> _F:
    """Decorator: the function's name becomes a detector's name; its module's ``cfgs`` holds its weight tags."""
    name = fn.__name__
    if name in _entrypoints:
        raise ValueError(f"a detector named {name!r} is registered already, by {_modules[name]}")
    _entrypoints[name] = fn
    _modules[name] = fn.__module__.rpartition(".")[2]
    return fn


def register_family(name: str) -> Callable[[_F], _F]:
    """Decorator for the builder of a family, which the grammar of names falls back to."""

    def decorate(fn: _F) -> _F:
        _families[name] = fn
        return fn

    return decorate


def register_deprecated(names: dict[str, str]) -> None:
    """Old ``name`` or ``name.tag`` to new; using an old one warns."""
    _deprecated.update(names)


def _load() -> None:
    importlib.import_module("dyhead_zoo.models")


def split_name(name: str) -> tuple[str, str]:
    """``'name.tag'`` to ``('name', 'tag')``, the tag empty if there is none; deprecated names are replaced.

    Raises:
        UnknownDetectorError: for what looks like a path or a repository.
    """
    if any(mark in name for mark in "/\\:"):
        raise UnknownDetectorError(
            f"{name!r} is no detector name; for a folder use 'local-dir:{name}', for a Hub repository 'hf-hub:ORG/REPO'"
        )
    _load()
    if name in _deprecated:
        warnings.warn(f"{name!r} is now {_deprecated[name]!r}", DeprecationWarning, stacklevel=3)
        name = _deprecated[name]
    arch, _, tag = name.partition(".")
    if arch in _deprecated and _deprecated[arch] != arch:
        warnings.warn(f"{arch!r} is now {_deprecated[arch]!r}", DeprecationWarning, stacklevel=3)
        arch, _, default_tag = _deprecated[arch].partition(".")
        tag = tag or default_tag
    return arch, tag


def _tags(arch: str) -> dict[str, PretrainedCfg]:
    """Tags of a registered name, default first."""
    table: dict[str, PretrainedCfg] = getattr(sys.modules[_entrypoints[arch].__module__], "cfgs", {})
    return {key.partition(".")[2]: cfg for key, cfg in table.items() if key.partition(".")[0] == arch}


def list_tags(name: str) -> list[str]:
    """Weight tags of a registered detector, the default first."""
    arch = split_name(name)[0]
    detector_entrypoint(arch)
    return [tag for tag in _tags(arch) if tag]


def is_detector(name: str) -> bool:
    """Whether a name, with or without a tag, is registered."""
    arch, tag = split_name(name)
    return arch in _entrypoints and (not tag or tag in _tags(arch))


def detector_entrypoint(name: str) -> Entrypoint:
    """The function behind a registered name.

    Raises:
        UnknownDetectorError: with similar names.
    """
    arch, _ = split_name(name)
    if arch not in _entrypoints:
        raise UnknownDetectorError(unknown(arch))
    return _entrypoints[arch]


def family_of(name: str) -> str:
    """The family of a registered or grammar name, such as ``mask_rcnn``; of another name its first word."""
    _load()
    families = sorted(_families, key=len, reverse=True)
    own = name.removeprefix("test_")
    return next((family for family in families if own.startswith(f"{family}_") or own == family), own.partition("_")[0])


def parse_grammar(name: str) -> tuple[FamilyBuilder, str, int]:
    """``<family>_<backbone>[_dyhead<N>]`` to the family's builder, the backbone and N (0 without DyHead).

    Raises:
        UnknownDetectorError: if no family begins the name, or N is beyond what a neck takes.
    """
    from dyhead_zoo.layers.fpn import MAX_BLOCKS  # late, like the models: it needs torch

    _load()
    for family in sorted(_families, key=len, reverse=True):
        if match := re.fullmatch(rf"{family}_(.+?)(?:_dyhead(\d+))?", name):
            number = int(match[2] or 0)
            if number > MAX_BLOCKS:
                raise UnknownDetectorError(f"{name!r} asks for {number} DyHead blocks: use at most {MAX_BLOCKS}")
            return _families[family], match[1], number
    raise UnknownDetectorError(unknown(name))


def unknown(name: str) -> str:
    """What to say of a name that is no detector, with similar ones."""
    close = difflib.get_close_matches(name, [*_entrypoints, *_deprecated], n=3, cutoff=0.6)
    hint = f"Did you mean {', '.join(close)}? " if close else ""
    return (
        f"unknown detector {name!r}. {hint}Registered names: list_detectors(); any timm backbone: "
        f"<family>_<backbone>[_dyhead<N>] with a family of {sorted(_families)}"
    )


def get_pretrained_cfg(name: str) -> PretrainedCfg:
    """Record of a ``name`` (its default tag) or ``name.tag``.

    Raises:
        UnknownDetectorError: for unknown names and tags; lists the tags that exist.
    """
    arch, tag = split_name(name)
    detector_entrypoint(arch)
    tags = _tags(arch)
    if not tag:
        return next(iter(tags.values()), PretrainedCfg())
    if tag not in tags:
        close = difflib.get_close_matches(tag, tags, n=1)
        hint = f"Did you mean {arch}.{close[0]}? " if close else ""
        raise UnknownDetectorError(
            f"{arch} has no weight tag {tag!r}. {hint}Its tags: {', '.join(filter(None, tags)) or 'none'}"
        )
    return tags[tag]


def list_detectors(
    filter: str | Sequence[str] = "",
    *,
    pretrained: bool = False,
    exclude: str | Sequence[str] = "",
    module: str = "",
) -> list[str]:
    """Registered names in natural order.

    Args:
        filter: wildcards, one or several; ``'atss*'``, ``'*swin*'``. A filter without a tag matches all tags.
        pretrained: list ``name.tag`` for every tag that has weights, instead of bare names.
        exclude: wildcards of names to leave out.
        module: only those of ``dyhead_zoo/models/<module>.py``.
    """
    _load()
    names = [n for n in _entrypoints if not module or _modules[n] == module]
    if pretrained:
        names = [f"{n}.{tag}" for n in names for tag, cfg in _tags(n).items() if tag and cfg.has_weights]

    def matches(name: str, patterns: str | Sequence[str]) -> bool:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        return any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(name, f"{p}.*") for p in patterns if p)

    names = [n for n in names if (not filter or matches(n, filter)) and not matches(n, exclude)]
    return sorted(names, key=lambda n: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", n)])


def list_pretrained(filter: str | Sequence[str] = "", *, exclude: str | Sequence[str] = "") -> list[str]:
    """``name.tag`` of all weights: ``list_detectors(filter, pretrained=True, exclude=exclude)``."""
    return list_detectors(filter, pretrained=True, exclude=exclude)
