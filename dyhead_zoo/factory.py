"""From a name to a detector: ``create_detector``, and ``build_detector``, the one place that composes the parts."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from dyhead_zoo import registry
from dyhead_zoo.data.label_space import LabelSpace
from dyhead_zoo.detector import Detector
from dyhead_zoo.hub import fetch_repository
from dyhead_zoo.layers.backbone import Backbone, backbone_data_config, resolve_backbone_name
from dyhead_zoo.layers.fpn import DyHeadNeck, Neck
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.saved import check_weights, saved_config
from dyhead_zoo.weight_files import weights_in
from dyhead_zoo.weights import LoadReport, fetch, load_checkpoint

_logger = logging.getLogger(__name__)

_RESERVED = {"pretrained", "pad_divisor"}
"""Keyword arguments of the parts that do not go by the same name, or not from the user."""
_FREEZING = {"frozen_stages", "norm_eval", "freeze_norm"}
_OF_WEIGHTS = {*_FREEZING, "norm_eps"}
"""Arguments of a tag that apply only where weights are loaded."""

_FREE = {
    *_FREEZING,
    *("zero_init_offset", "image_size"),  # of initialisation, and of the canvas
    *("drop_path", "dropout", "full_precision"),  # of training
    *("score_threshold", "pre_nms", "nms_threshold", "max_detections"),  # of decoding
    *("samples", "proposals", "rpn_pre_nms", "rpn_nms", "rpn_score_threshold"),  # of two stages
}
"""Arguments that may differ from those of the weights."""


def create_detector(
    name: str,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | LabelSpace | None = None,
    backbone: str | None = None,
    in_chans: int = 3,
    pretrained_backbone: bool | str | Path | Mapping[str, Tensor] | None = None,
    checkpoint: str | Path | Mapping[str, Tensor] | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    **kwargs: Any,
) -> Detector:
    """Build a detector by name.

    Args:
        name: a registered name with an optional tag (``atss_resnet50_dyhead6.official_1x_coco``), a grammar name
            (``atss_<any timm backbone>_dyhead<N>``), ``hf-hub:<org>/<repository>[@<revision>]``: a detector on the
            Hugging Face Hub, or ``local-dir:<path>``: a folder with ``config.json`` and ``model.safetensors``, or a
            weight file that ``train`` wrote. The last two load their weights whatever ``pretrained`` is.
        pretrained: load the tag's weights: bundled, from the cache, or downloaded and verified.
        num_classes: rows of the classifier; the classes stay unnamed unless they are the weights' own.
        class_names: names of the classes, in the order of the labels. Rows of classes that the weights name too are
            copied, the others are fresh.
        backbone: another timm backbone, or a timm tag of the same one.
        in_chans: channels of the images.
        pretrained_backbone: ImageNet weights for the backbone: ``True`` downloads timm's; a file or state dict in
            timm's layout works offline. Not used when detector weights are loaded.
        checkpoint: detector weights of your own, see ``load_checkpoint``. A file that names its classes decides the
            classes, unless ``num_classes`` or ``class_names`` does.
        cache_dir: where downloads are kept; default ``$DYHEAD_ZOO_CACHE`` or ``~/.cache/dyhead_zoo``, for those from
            the Hub its own cache.
        token: for private repositories of the Hub; by default the one of ``HF_TOKEN`` or of ``hf auth login``.
        **kwargs: arguments of the backbone, neck or head, such as ``coarse_offsets='aligned'`` or ``frozen_stages=1``.

    Returns:
        The detector, in evaluation mode.

    Raises:
        UnknownDetectorError: for unknown names and tags, with similar ones.
        ValueError: for arguments that no part knows, or that contradict the weights to be loaded.
        DownloadError: if weights cannot be had; the message says why, and what to do.
    """
    user = dict(kwargs, num_classes=num_classes, class_names=class_names, backbone=backbone)
    user.update(pretrained_backbone=pretrained_backbone, checkpoint=checkpoint, cache_dir=cache_dir, token=token)
    user = {key: value for key, value in user.items() if value is not None}
    if in_chans < 1:
        raise ValueError(f"in_chans={in_chans}: images have at least one channel")
    if in_chans != 3:
        user["in_chans"] = in_chans
    scheme, _, rest = name.partition(":")
    if scheme == "local-dir":
        return _from_saved(Path(rest), user)
    if scheme == "hf-hub":
        return _from_hub(rest, user)
    arch, tag = registry.split_name(name)
    if registry.is_detector(arch):
        cfg = registry.get_pretrained_cfg(f"{arch}.{tag}" if tag else arch)
        return registry.detector_entrypoint(arch)(pretrained, **{"pretrained_cfg": cfg, **user})
    family, backbone_name, dyhead = registry.parse_grammar(arch)
    if tag:
        raise registry.UnknownDetectorError(f"{arch} is not registered and has no weight tag {tag!r}")
    try:
        resolve_backbone_name(backbone_name)
    except ValueError as error:
        raise registry.UnknownDetectorError(f"{registry.unknown(arch)}. {error}") from None
    # features of arbitrary bodies have arbitrary magnitudes; there are no weights to be compatible with
    return family(arch, pretrained, user, backbone=backbone_name, dyhead=dyhead, fpn_norm=True)


def _from_hub(name: str, user: dict[str, Any]) -> Detector:
    """``org/repo[@revision]`` to the detector that is saved there."""
    repo_id, _, revision = name.partition("@")
    folder = fetch_repository(repo_id, revision or None, cache_dir=user.get("cache_dir"), token=user.get("token"))
    detector = _from_saved(folder, user)
    origin = {"file": None, "hf_hub_id": repo_id, "hf_hub_revision": folder.name}  # the cache names folders by commit
    detector.pretrained_cfg = detector.pretrained_cfg.replace(**origin)
    return detector


def _from_saved(path: Path, user: dict[str, Any]) -> Detector:
    config = saved_config(path)
    if config is None:
        raise ValueError(
            f"{path} does not say which detector it belongs to: use create_detector(NAME, checkpoint={str(path)!r})"
        )
    weights = (weights_in(path) if path.is_dir() else path).absolute()
    cfg = PretrainedCfg.from_dict(config["pretrained_cfg"]).replace(
        file=str(weights), source="native", sha256=None, hash_prefix=None, arch=config["arch"]
    )
    name = config["name"]

    def build(pretrained: bool, arguments: dict[str, Any]) -> Detector:
        if registry.is_detector(name):
            return registry.detector_entrypoint(name)(pretrained, **{**arguments, "pretrained_cfg": cfg})
        family, backbone, dyhead = registry.parse_grammar(name)
        return family(name, pretrained, {**arguments, "pretrained_cfg": cfg}, backbone=backbone, dyhead=dyhead)

    check_weights(weights, lambda: build(False, {}))
    return build(True, user)


def build_detector(
    head_cls: type[nn.Module],
    name: str,
    pretrained: bool,
    user: Mapping[str, Any],
    *,
    neck_cls: type[DyHeadNeck] = Neck,
    **defaults: Any,
) -> Detector:
    """Compose backbone, neck and head, and load weights. Families call this with their head, neck and defaults.

    Arguments are flat; precedence: ``defaults`` < the cfg's ``arch`` < ``user``. Each goes to the part whose
    constructor names it. A cfg's frozen stages and norms are left out where no weights are loaded.
    """
    user = dict(user)
    cfg: PretrainedCfg | None = user.pop("pretrained_cfg", None)
    if cfg is None and registry.is_detector(name):
        cfg = registry.get_pretrained_cfg(name)
    cache_dir, token, checkpoint = (user.pop(key, None) for key in ("cache_dir", "token", "checkpoint"))
    if pretrained and checkpoint is not None:
        raise ValueError("pretrained=True and checkpoint= both name the weights: choose one")
    pretrained_backbone = user.pop("pretrained_backbone", False)
    num_classes, class_names = user.pop("num_classes", None), user.pop("class_names", None)
    saved = saved_config(checkpoint) if isinstance(checkpoint, (str, Path)) else None
    if num_classes is None and class_names is None and saved:
        class_names = PretrainedCfg.from_dict(saved["pretrained_cfg"]).label_space
    labels = _label_space(num_classes, class_names, cfg)
    if pretrained:
        _check_pretrained(name, cfg, user, {**_settings(Backbone, neck_cls, head_cls), **defaults})
    arch = dict(cfg.arch) if cfg else {}
    if not pretrained and checkpoint is None and pretrained_backbone is False:
        arch = {key: value for key, value in arch.items() if key not in _OF_WEIGHTS}  # random weights must learn
    options = {**defaults, **arch, **user}
    backbone_name = options["backbone"]
    if cfg is None or user.get("backbone", defaults["backbone"]) != defaults["backbone"]:
        cfg = (cfg or PretrainedCfg()).replace(**backbone_data_config(backbone_name))
    weights_cfg = cfg
    cfg = (cfg if pretrained and labels == cfg.label_space else cfg.without_claims()).with_labels(labels)

    parts = _route(
        {k: v for k, v in options.items() if k not in ("backbone", "in_chans")}, Backbone, neck_cls, head_cls
    )
    in_chans = options.get("in_chans", 3)
    loads_detector = pretrained or checkpoint is not None
    backbone = Backbone(
        backbone_name,
        in_chans=in_chans,
        pretrained=False if loads_detector else pretrained_backbone,
        **parts[Backbone],
    )
    if backbone.image_size is not None and max(cfg.short_side, cfg.long_side) > min(backbone.image_size):
        side = min(backbone.image_size) // cfg.pad_divisor * cfg.pad_divisor  # every image fits, upright or not
        cfg = cfg.replace(short_side=side, long_side=side)
    neck = cast(Any, neck_cls)(backbone.channels, backbone.strides, **parts[neck_cls])
    head = head_cls(neck.channels, neck.strides, len(labels), pad_divisor=cfg.pad_divisor, **parts[head_cls])
    detector = Detector(backbone, neck, head, name=name, arch=options, pretrained_cfg=cfg, in_chans=in_chans)
    if pretrained:
        path = fetch(weights_cfg, cache_dir, token)
        _report(load_checkpoint(detector, path, weights_cfg.source, label_space=weights_cfg.label_space))
    if checkpoint is not None:
        _report(load_checkpoint(detector, checkpoint))
    if saved:
        base = _settings(Backbone, neck_cls, head_cls)
        _check_record(str(checkpoint), {**base, **saved["arch"]}, {**base, **options}, user)
    return detector.eval()


def _report(report: LoadReport) -> None:
    if report.fresh_classes:
        _logger.warning("%s", report.summary())


def _check_pretrained(
    name: str, cfg: PretrainedCfg | None, user: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    if cfg is None or not cfg.has_weights:
        raise ValueError(
            f"{name} has no published weights: use pretrained=False (and pretrained_backbone=True), or one of "
            "list_pretrained()"
        )
    needed = {**defaults, **cfg.arch}
    for key in user:
        if key in needed and not _agree(key, user[key], needed[key]):
            raise ValueError(
                f"{key}={user[key]!r} contradicts the weights of {name}, which need {key}={needed[key]!r}: "
                "leave it out, or use pretrained=False"
            )


def _check_record(path: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], explicit: Mapping[str, Any]) -> None:
    """Refuse weights that fit by their shapes but were made for another setting, unless the user asked for ours."""
    for key in sorted(set(theirs) & set(ours) - set(explicit)):
        if not _agree(key, ours[key], theirs[key]):
            raise ValueError(
                f"{path} was trained with {key}={theirs[key]!r}, this detector has {key}={ours[key]!r}: "
                f"pass {key}= to say which is meant, or take the file's own settings by 'local-dir:{path}'"
            )


def _agree(key: str, given: Any, needed: Any) -> bool:
    """Whether weights made with one value of an argument work with the other; None leaves the choice to the part."""
    if key in _FREE or needed is None:
        return True
    if key == "backbone":
        given, needed = (resolve_backbone_name(name).partition(".")[0] for name in (given, needed))
    given, needed = (list(value) if isinstance(value, tuple) else value for value in (given, needed))
    return bool(given == needed)


def _label_space(
    num_classes: int | None, class_names: Sequence[str] | LabelSpace | None, cfg: PretrainedCfg | None
) -> LabelSpace:
    own = (cfg or PretrainedCfg()).label_space
    if class_names is not None:
        if isinstance(class_names, str):
            raise ValueError(f"class_names={class_names!r}: give a list of names")
        labels = class_names if isinstance(class_names, LabelSpace) else LabelSpace.from_names(class_names)
        if num_classes not in (None, len(labels)):
            raise ValueError(f"num_classes={num_classes} but {len(labels)} class names: leave num_classes out")
        return LabelSpace.unnamed(0) if not len(labels) else labels
    return own if num_classes in (None, len(own)) else LabelSpace.unnamed(int(num_classes or 0))


def _route(options: Mapping[str, Any], *parts: type) -> dict[type, dict[str, Any]]:
    """Give each option to the part whose constructor names it."""
    known = {part: _settings(part) for part in parts}
    routed: dict[type, dict[str, Any]] = {part: {} for part in parts}
    for key, value in options.items():
        owners = [part for part in parts if key in known[part]]
        if not owners:
            every = sorted(set().union(*known.values()))
            close = difflib.get_close_matches(key, [*every, *inspect.signature(create_detector).parameters], n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"no part of the detector knows the argument {key!r}: {hint}Known: {', '.join(every)}")
        for part in owners:
            routed[part][key] = value
    return routed


def _settings(*parts: type) -> dict[str, Any]:
    """The arguments that users may give to some parts (those by keyword only), with their defaults."""
    return {
        key: parameter.default
        for part in parts
        for key, parameter in inspect.signature(part).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in _RESERVED
    }
