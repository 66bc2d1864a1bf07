"""Detectors in folders and on the Hugging Face Hub: save, push, pull, and fetch for loading.

One detector a repository. ``config.json`` (``Detector.config()``) and safetensors are all that loading needs; a card,
the record of an evaluation, golden tensors and a recipe may lie beside them. Nothing is ever pickled, and of a
repository no file is fetched but those named here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyhead_zoo.download import DownloadError, MissingFile, explain_hub_error, hub_file, offline
from dyhead_zoo.saved import check_config, saved_config
from dyhead_zoo.weight_files import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    shard_files,
    state_sha256,
    weights_in,
    write_weights_folder,
)

if TYPE_CHECKING:
    from dyhead_zoo.detector import Detector

CARD_FILE, RECORD_FILE, RESULTS_FOLDER = "README.md", "eval.json", ".eval_results"
MAX_SHARD_SIZE = 5_000_000_000
"""Bytes of a weight file, above which it is written in shards; what transformers and timm take."""

_OF_THE_WEIGHTS = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    INDEX_FILE,
    "model-*-of-*.safetensors",
    "golden.safetensors",
    RECORD_FILE,
    "recipe.json",
    f"{RESULTS_FOLDER}/*.yaml",
)
"""Files that new weights replace or remove, since they would say something of the old ones."""
_FILES = (*_OF_THE_WEIGHTS, CARD_FILE, "LICENSE", "NOTICE")
"""All that is pushed and pulled."""

_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")

_NO_SOURCE: dict[str, Any] = {
    **dict.fromkeys(("file", "url", "hf_hub_id", "hf_hub_revision", "sha256", "hash_prefix")),
    "mirrors": (),
    "source": "native",
}
"""Where other weights once came from; the place of those in a folder or repository is that folder or repository."""


class PushError(OSError):
    """A push that failed; the message says why and what to do."""


# --- saving -----------------------------------------------------------------------------------------------------------


def save_for_hub(
    model: Detector,
    folder: str | Path,
    *,
    card: str | None = None,
    record: Mapping[str, Any] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    license: str | None = None,
    golden: bool = True,
    repo_id: str | None = None,
) -> Path:
    """Write a detector to a folder as it would lie on the Hub; ``create_detector("local-dir:FOLDER")`` loads it.

    A reader sees the old detector, none, or the new one, never a mixture. What an earlier save left in the folder is
    replaced, except for a card that was not written by this package.

    Args:
        model: a detector.
        folder: created if need be.
        card: text of ``README.md``; by default one is rendered from the record, unless you have one there already.
        record: of an evaluation of these weights, as ``dyhead-zoo eval --output`` writes it; becomes ``eval.json`` and
            ``.eval_results/*.yaml``.
        max_shard_size: bytes; larger weights are written in shards.
        license: of the weights, an identifier of the Hub's such as ``apache-2.0``; by default that of the cfg.
        golden: also write golden tensors, which ``dyhead-zoo verify`` recomputes.
        repo_id: where it will be, for the card.

    Returns:
        The folder.

    Raises:
        ValueError: for a detector that could not be loaded again, a record that is none or of another detector, or a
            licence that is no identifier.
        FileExistsError: if the folder holds a ``config.json`` of something else, or is a file.
    """
    folder = Path(folder).absolute()
    _check_place(folder)
    if record is not None:
        _check_record(model, record)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary) / "new"  # with the permissions that the user's folders have
        new.mkdir()
        config = _config(model, license)
        write_weights_folder(new, model.state_dict(), _header(model, config), max_shard_size)
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
        if golden:
            from dyhead_zoo.golden import write_golden

            write_golden(model, new)
        if card is not None or not _is_own(folder / CARD_FILE):
            text = _card(config, record, repo_id, golden) if card is None else card
            (new / CARD_FILE).write_text(text, encoding="utf-8")
        if record is not None:
            _write_record(config, record, new)
        _move(new, folder)
    return folder


def _config(model: Detector, license: str | None) -> dict[str, Any]:
    cfg = model.pretrained_cfg.replace(**_NO_SOURCE)
    if license is not None:
        if not _LICENCE_ID.fullmatch(license):
            raise ValueError(f"license={license!r}: give the Hub's identifier, such as apache-2.0, cc-by-4.0 or other")
        cfg = cfg.replace(license=license)
    config = json.loads(json.dumps({**model.config(), "pretrained_cfg": cfg.to_dict()}))
    try:
        return check_config(config)
    except ValueError as error:
        raise ValueError(f"{model.name} cannot be saved, because it could not be loaded again: {error}") from error


def _header(model: Detector, config: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of the weight files, which with them alone give the detector again."""
    return {
        "name": model.name,
        "format_version": str(config["format_version"]),
        "config": json.dumps(config),
        "label_space": json.dumps(model.label_space.to_dict()),
        "license": config["pretrained_cfg"]["license"] or "unknown",
    }


def _check_place(folder: Path) -> None:
    """Refuse a place where something of the user's would be lost."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: name a folder")
    if (folder / CONFIG_FILE).is_file():
        try:
            saved_config(folder)
        except ValueError as error:
            raise FileExistsError(
                f"{folder / CONFIG_FILE} is not a saved detector's ({error}): choose another folder, or remove it"
            ) from error


def _check_record(model: Detector, record: Mapping[str, Any]) -> None:
    """Refuse the record of another detector's evaluation."""
    try:
        theirs = str(record["detector"]).partition(".")[0], record["model"]["parameters"]
        weights = record.get("state_sha256")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"no record of an evaluation ({error!r}): give one that `dyhead-zoo eval --output FILE` wrote"
        ) from error
    ours = model.name, sum(p.numel() for p in model.parameters())
    if theirs != ours or weights not in (None, state_sha256(model)):
        raise ValueError(
            f"the record is of {theirs[0]} with {theirs[1]:,} parameters, not of these weights of {ours[0]} with "
            f"{ours[1]:,}: evaluate them, or leave the record out"
        )


def _is_own(card: Path) -> bool:
    """Whether a card exists that was not written by this package, or was changed by its owner."""
    from dyhead_zoo.card import MARK

    return card.is_file() and MARK not in card.read_text(encoding="utf-8", errors="replace")


def _card(config: Mapping[str, Any], record: Mapping[str, Any] | None, repo_id: str | None, golden: bool) -> str:
    from dyhead_zoo.card import render_card

    try:
        return render_card(config, record, repo_id=repo_id, golden=golden)
    except KeyError as error:
        raise ValueError(f"the record has no {error}: give one that `dyhead-zoo eval --output FILE` wrote") from error


def _write_record(config: Mapping[str, Any], record: Mapping[str, Any], folder: Path) -> None:
    from dyhead_zoo.card import eval_results_yaml

    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    for name, text in eval_results_yaml(config, record).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def _move(new: Path, folder: Path) -> None:
    """Put the files of ``new`` in place of those of an earlier save. While that goes on there is no ``config.json``."""
    if not folder.exists():
        new.rename(folder)
        return
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for name in saved_files(folder):
        if _matches(name, _OF_THE_WEIGHTS):
            (folder / name).unlink()
    with contextlib.suppress(OSError):  # absent, or other files are in it
        (folder / RESULTS_FOLDER).rmdir()
    for name in sorted(saved_files(new), key=lambda name: name == CONFIG_FILE):
        (folder / name).parent.mkdir(exist_ok=True)
        (new / name).replace(folder / name)


def saved_files(folder: Path) -> list[str]:
    """Files of a saved detector that a folder has, relative to it, with slashes: what a push would send."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if _matches(name, _FILES))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns) and name.count("/") <= 1 and ".." not in name


# --- pushing ----------------------------------------------------------------------------------------------------------


def push_to_hub(
    model: Detector | str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    card: str | None = None,
    eval_results: Mapping[str, Any] | None = None,
    commit_message: str = "Upload detector",
    tag: str | None = None,
) -> str:
    """Push a detector to a repository of the Hub, in one commit or none.

    Files of an earlier push are replaced; those that spoke of its weights and have no successor are deleted. A
    repository that changes meanwhile refuses the commit.

    Args:
        model: a detector, or a folder that ``save_for_hub`` wrote.
        repo_id: ``org/name``; created if need be.
        private: whether a repository that is created is private; an existing one stays what it is.
        revision: branch, created if need be; main by default.
        token: with the right to write; by default the one of ``HF_TOKEN`` or of ``hf auth login``.
        card: text of ``README.md``. Without it, a card of your own that is there already stays, else one is rendered.
        eval_results: record of an evaluation, see ``save_for_hub``; a folder has its own.
        commit_message: title of the commit.
        tag: a new tag for the commit.

    Returns:
        Id of the commit, for ``hf-hub:org/name@<id>``.

    Raises:
        PushError: if nothing was committed, or the tag could not be made; the message says which, and why.
        ValueError: for a folder together with ``eval_results``.
        FileNotFoundError: for a folder without a saved detector.
    """
    if setting := offline():
        raise PushError(f"{setting} forbids the network: unset it to push to {repo_id}")
    with tempfile.TemporaryDirectory() as temporary:
        if isinstance(model, (str, Path)):
            folder = Path(model)
            if eval_results is not None:
                raise ValueError(
                    f"{folder} has its own {RECORD_FILE}: leave eval_results out, or save the detector anew"
                )
            saved_config(folder)
            weights_in(folder)
        else:
            folder = save_for_hub(model, Path(temporary) / "new", card=card, record=eval_results, repo_id=repo_id)
        with _explained(repo_id, revision):
            return _push(folder, repo_id, private, revision, token, card, commit_message, tag)


def _push(
    folder: Path,
    repo_id: str,
    private: bool,
    revision: str | None,
    token: str | None,
    card: str | None,
    commit_message: str,
    tag: str | None,
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        refs = api.list_repo_refs(repo_id)
    except RepositoryNotFoundError:  # a token need not have the right to create where there is a repository
        api.create_repo(repo_id, private=private, exist_ok=True)
        refs = api.list_repo_refs(repo_id)
    if tag in [ref.name for ref in refs.tags]:
        raise PushError(f"{repo_id} has a tag {tag!r} already: choose another, or delete that one")
    if revision not in (None, *(ref.name for ref in refs.branches)):
        api.create_branch(repo_id, branch=str(revision))
    head = api.model_info(repo_id, revision=revision)
    there = {file.rfilename for file in head.siblings or ()}
    contents: dict[str, Path | bytes] = {name: folder / name for name in saved_files(folder)}
    if card is not None:
        contents[CARD_FILE] = card.encode()
    elif CARD_FILE in there and _is_own(hub_file(repo_id, CARD_FILE, revision=head.sha, token=token)):
        contents.pop(CARD_FILE, None)
    stale = sorted(name for name in there - set(contents) if _matches(name, _OF_THE_WEIGHTS))
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()),
        ],
        commit_message=commit_message,
        revision=revision,
        parent_commit=head.sha,  # whoever pushed meanwhile must not be overwritten, nor mixed with
    )
    if tag is not None:
        try:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
        except Exception as error:  # as in _explained
            message = f"{repo_id} has the commit {commit.oid}, but the tag {tag!r} could not be made: {error}"
            raise PushError(message) from error
    return str(commit.oid)


@contextlib.contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Say what an error of a push means and what to do."""
    try:
        yield
    except PushError:
        raise
    except Exception as error:  # those of the client's HTTP library, which differs between its versions, come through
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = {
            401: "this needs a token with the right to write: set HF_TOKEN, or run `hf auth login`",
            403: "this token may not write there: use one with the right to write, or a repository of your own",
            412: "somebody else pushed to it meanwhile: look at what changed, and push again",
        }
        what = advice.get(status or 0) or explain_hub_error(error, repo_id, revision)
        raise PushError(f"the push to {repo_id} failed: {what}") from error


# --- pulling ----------------------------------------------------------------------------------------------------------


def fetch_repository(
    repo_id: str, revision: str | None = None, *, cache_dir: str | Path | None = None, token: str | None = None
) -> Path:
    """What loading needs of a repository, in the Hub's cache: ``config.json`` and weights of one commit, verified.

    ``config.json`` is asked for at every call, since the Hub counts that as a download.

    Args:
        repo_id: ``org/name``.
        revision: branch, tag or commit; main by default.
        cache_dir: instead of the Hub's default cache.
        token: for private repositories; by default the one of ``HF_TOKEN`` or of ``hf auth login``.

    Returns:
        ``<cache>/.../snapshots/<commit>``, a folder for ``create_detector("local-dir:...")``.

    Raises:
        DownloadError: if something cannot be had; the message says what to do.
        ValueError: for a repository that is not one of dyhead_zoo's.
    """
    access: dict[str, Any] = {"cache_dir": cache_dir, "token": token}
    folder = hub_file(repo_id, CONFIG_FILE, revision=revision, **access).parent
    try:
        saved_config(folder)  # before anything large is fetched
    except ValueError as error:
        raise ValueError(f"{repo_id} on the Hub: {error}") from error
    access["revision"] = folder.name  # the commit: another may come while this one is being fetched
    try:
        hub_file(repo_id, WEIGHTS_FILE, **access)
    except MissingFile as no_weights:
        try:
            index = hub_file(repo_id, INDEX_FILE, **access)
        except MissingFile:
            message = f"{no_weights}, nor an index of shards: was its upload finished?"
            raise MissingFile(message) from no_weights
        for shard in shard_files(index):
            hub_file(repo_id, shard.name, **access)
    return folder


def pull(
    repo_id: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
) -> Path:
    """Copy a detector from the Hub to a folder: weights, card, records and golden tensors, nothing else.

    Args:
        repo_id: ``org/name``.
        folder: created if need be; files of an earlier pull are replaced.
        revision, cache_dir, token: see ``fetch_repository``.

    Returns:
        The folder, for ``create_detector("local-dir:...")`` and ``push_to_hub``.

    Raises:
        DownloadError, ValueError: see ``fetch_repository``.
    """
    from huggingface_hub import HfApi

    if setting := offline():
        raise DownloadError(f"{setting} forbids the network: unset it to pull {repo_id}")
    cached = fetch_repository(repo_id, revision, cache_dir=cache_dir, token=token)
    commit = cached.name
    try:
        names = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token).list_repo_files(repo_id, revision=commit)
    except Exception as error:  # as in hub_file
        raise DownloadError(explain_hub_error(error, repo_id, revision)) from error
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        for name in filter(lambda name: _matches(name, _FILES), names):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(hub_file(repo_id, name, revision=commit, cache_dir=cache_dir, token=token), new / name)
        _move(new, folder)
    return folder
