"""Weight files: bundled, from the Hugging Face Hub, or from a URL with mirrors; cached, and checked by their hash.

Environment:
    DYHEAD_ZOO_CACHE: where downloads are kept; default ``$XDG_CACHE_HOME/dyhead_zoo`` or ``~/.cache/dyhead_zoo``.
        Files from the Hub stay in its own cache (``HF_HOME``).
    DYHEAD_ZOO_OFFLINE, HF_HUB_OFFLINE: ``1`` forbids the network; what is cached keeps working.
    DYHEAD_ZOO_BUNDLED: ``0`` passes over the weights in the package, so that they come from the Hub.
    HF_TOKEN, HF_ENDPOINT: for private repositories, and for another Hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from tqdm import tqdm

from dyhead_zoo.pretrained import BUNDLED, PretrainedCfg
from dyhead_zoo.version import __version__
from dyhead_zoo.weight_files import CONFIG_FILE, WEIGHTS_FILE

_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20
_OFFLINE_VARIABLES = ("DYHEAD_ZOO_OFFLINE", "HF_HUB_OFFLINE")

_logger = logging.getLogger(__name__)


class DownloadError(OSError):
    """No source gave the file; the message lists each with its reason."""


class MissingFile(DownloadError):
    """A repository that has no file of this name, or that has none of it in the cache while the network is out."""


class HashMismatch(ValueError):
    """A file that is not the one that was published."""


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, 64 lower-case hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_directory(cache_dir: str | Path | None = None) -> Path:
    """Where downloads are kept: the argument, ``DYHEAD_ZOO_CACHE``, or the user's cache directory."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("DYHEAD_ZOO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dyhead_zoo"


def offline() -> str | None:
    """The environment setting that forbids the network, such as ``DYHEAD_ZOO_OFFLINE=1``, or None."""
    for name in _OFFLINE_VARIABLES:
        value = os.environ.get(name, "")
        if value.lower() in ("1", "true", "yes", "on"):
            return f"{name}={value}"
    return None


def fetch(cfg: PretrainedCfg, cache_dir: str | Path | None = None, token: str | None = None) -> Path:
    """Local path of the weight file of ``cfg``, downloaded if need be.

    A file in the package comes first (unless ``DYHEAD_ZOO_BUNDLED=0``), then the Hub where its hash is known (or there
    is no URL), then the URL and its mirrors. Whatever hash the record states is checked at every use. Where it states
    none, the hash of the first download is kept beside the cached file (``<file>.sha256``) and holds from then on.

    Args:
        cfg: record of the weights.
        cache_dir: instead of the default caches.
        token: for private repositories of the Hub; by default the one of ``HF_TOKEN`` or of ``hf auth login``.

    Raises:
        ValueError: if the record names no weights at all.
        FileNotFoundError: for a bundled or absolute path that does not exist.
        HashMismatch: for such a file with another hash.
        DownloadError: if no source gave the right file, or the network is forbidden.
    """
    failures = []
    if cfg.file and (Path(cfg.file).is_absolute() or os.environ.get("DYHEAD_ZOO_BUNDLED") != "0"):
        return _local_file(cfg.file, cfg.sha256)
    if cfg.file:
        failures.append(f"{cfg.file} in the package: DYHEAD_ZOO_BUNDLED=0 says to pass it over")
    if cfg.hf_hub_id and (cfg.sha256 or not cfg.url):
        try:
            return _from_hub(cfg, cfg.hf_hub_id, cache_dir, token)
        except DownloadError as error:
            failures.append(f"{cfg.hf_hub_id} on the Hub: {error}")
    if cfg.url:
        return _from_urls(cfg, cfg.url, cache_directory(cache_dir), failures)
    if failures:
        raise DownloadError(_failure_message(failures))
    raise ValueError("this detector has no published weights (no file, Hub repository or URL): use pretrained=False")


def _local_file(name: str, sha256: str | None) -> Path:
    if not Path(name).is_absolute() and Path(name).name != name:
        raise ValueError(f"file={name!r}: expected the name of a bundled file or an absolute path")
    path = BUNDLED / name
    if not path.is_file():
        raise FileNotFoundError(f"weight file {path} does not exist; is the installation complete?")
    if problem := _hash_problem(path, sha256):
        raise HashMismatch(f"{path} is damaged or was changed ({problem}): fetch or install it again")
    return path


def _hash_problem(path: Path, sha256: str | None, prefix: str | None = None) -> str | None:
    """What is wrong with the hash of a file, or None; only hashes that are given are checked."""
    expected = [value.lower() for value in (sha256, prefix) if value]
    if not expected:
        return None
    actual = sha256_of(path)
    return next((f"SHA-256 is {actual}, expected {e:.<64}" for e in expected if not actual.startswith(e)), None)


# --- the Hub ----------------------------------------------------------------------------------------------------------


def _from_hub(cfg: PretrainedCfg, repo_id: str, cache_dir: str | Path | None, token: str | None) -> Path:
    """The weights of a record; ``config.json`` is asked for because the Hub counts its requests as downloads."""
    config = hub_file(repo_id, CONFIG_FILE, revision=cfg.hf_hub_revision, cache_dir=cache_dir, token=token)
    commit = config.parent.name
    return hub_file(repo_id, WEIGHTS_FILE, revision=commit, cache_dir=cache_dir, token=token, sha256=cfg.sha256)


def hub_file(
    repo_id: str,
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    sha256: str | None = None,
) -> Path:
    """A file of a Hub repository, in the Hub's cache, its bytes checked at every use.

    The client downloads in one step and resumes what breaks off, but it does not hash. Damaged files are downloaded
    again, once; a file that is wrong again does not stay in the cache.

    Args:
        repo_id: ``org/name``.
        name: of the file.
        revision: branch, tag or commit; main by default.
        cache_dir: instead of the Hub's default cache.
        token: for private repositories; by default the one of ``HF_TOKEN`` or of ``hf auth login``.
        sha256: that the file must have; by default the hash that the Hub states for it.

    Returns:
        ``<cache>/.../snapshots/<commit>/<name>``.

    Raises:
        MissingFile: if the repository has no such file, or the cache has none and there is no network.
        DownloadError: if it cannot be had or is wrong; the message says what to do.
    """
    path = _hub_download(repo_id, name, revision, cache_dir, token)
    if problem := _hub_problem(path, sha256):
        if setting := offline():
            raise DownloadError(f"{path} is damaged ({problem}), and {setting} forbids to download it again")
        _logger.warning("%s is damaged (%s) and is downloaded again", path, problem)
        path = _hub_download(repo_id, name, revision, cache_dir, token, force=True)
        if problem := _hub_problem(path, sha256):
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise DownloadError(f"{repo_id} gave twice another {name} than the published one: {problem}")
    return path


def _hub_problem(path: Path, sha256: str | None) -> str | None:
    """What is wrong with a cached file, or None.

    Behind the links of the cache lies a file that is named by the Hub's entity tag: the SHA-256 of a large file, git's
    SHA-1 of a small one (some mirrors give the plain SHA-1). File systems without links have no such name to check.
    """
    etag = path.resolve().name
    if sha256 or re.fullmatch(r"[0-9a-f]{64}", etag):
        return _hash_problem(path, sha256 or etag)
    if not re.fullmatch(r"[0-9a-f]{40}", etag):
        return None
    data = path.read_bytes()
    found = [hashlib.sha1(prefix + data).hexdigest() for prefix in (b"blob %d\0" % len(data), b"")]
    return None if etag in found else f"git's SHA-1 is {found[0]}, expected {etag}"


def _hub_download(
    repo_id: str, name: str, revision: str | None, cache_dir: str | Path | None, token: str | None, force: bool = False
) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(
                repo_id,
                name,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                endpoint=os.environ.get("HF_ENDPOINT"),  # the client knows only what it was at its import
                force_download=force,
                local_files_only=offline() is not None,
            )
        )
    except Exception as error:  # those of the client's HTTP library, which differs between its versions, come through
        kind = MissingFile if _says_missing(error) else DownloadError
        raise kind(explain_hub_error(error, repo_id, revision, name)) from error


def _says_missing(error: Exception) -> bool:
    from huggingface_hub.errors import EntryNotFoundError

    return isinstance(error, EntryNotFoundError)


def explain_hub_error(error: Exception, repo_id: str, revision: str | None = None, name: str | None = None) -> str:
    """What an error of the Hub's client means, and what to do about it.

    Args:
        error: as raised by the client.
        repo_id, revision, name: what was asked for.
    """
    from huggingface_hub import errors

    at = f" at {revision}" if revision else ""
    login = "set HF_TOKEN, or run `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated: ask its owners for access on its page, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo_id} does not exist, or is private and not for this token (the Hub does not tell which): check the "
            f"name; for a private one {login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no branch, tag or commit {revision!r}"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        if setting := offline():
            return (
                f"{name or repo_id} of {repo_id}{at} is not in the cache, and {setting} forbids the network: unset it"
            )
        cause = error.__cause__ or error.__context__ or error
        return f"{name or repo_id} of {repo_id}{at} could not be fetched, and is not in the cache ({_one_line(cause)})"
    if isinstance(error, errors.EntryNotFoundError):
        ours = ": every repository of dyhead_zoo has one at its root" if name == CONFIG_FILE else ""
        return f"{repo_id}{at} has no {name}{ours}"
    return f"{name or 'the answer'} of {repo_id}{at} could not be had ({_one_line(error)}): try again"


# --- URLs -------------------------------------------------------------------------------------------------------------


def cached_path(url: str, directory: Path) -> Path:
    """Where the file of a URL is kept: its own name, after eight digits that tell apart URLs of the same file name."""
    name = Path(unquote(urlsplit(url).path)).name or "weights"
    return directory / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"


def _from_urls(cfg: PretrainedCfg, url: str, directory: Path, failures: list[str]) -> Path:
    path = cached_path(url, directory)
    if _cached(path, cfg):
        return path
    if setting := offline():
        failures.append(f"{url}: {setting} forbids the network; unset it to download")
        raise DownloadError(_failure_message(failures, path))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock").acquire()  # of several processes one downloads, the others find the file
    except OSError as error:
        raise DownloadError(f"cannot write to {directory} ({error}): set DYHEAD_ZOO_CACHE to another place") from error
    with lock:
        if not _cached(path, cfg):
            _download_any((url, *cfg.mirrors), path, cfg, failures)
    return path


def _cached(path: Path, cfg: PretrainedCfg) -> bool:
    """Whether ``path`` is there and right; a wrong one is reported, and left for the download to replace."""
    if not path.is_file():
        return False
    recorded = _recorded_hash(path)
    if problem := _hash_problem(path, cfg.sha256 or recorded, cfg.hash_prefix):
        _logger.warning("%s is damaged or was changed (%s) and has to be downloaded again", path, problem)
        return False
    if not (cfg.sha256 or cfg.hash_prefix or recorded):  # put there by hand
        with contextlib.suppress(OSError):  # a shared cache may be read-only
            _record_hash(path, sha256_of(path))
    return True


def _download_any(urls: tuple[str, ...], path: Path, cfg: PretrainedCfg, failures: list[str]) -> None:
    """Download from the first URL that gives the right file, and put it at ``path`` in one step."""
    part = path.with_name(f"{path.name}.part")
    recorded = _recorded_hash(path)
    try:
        for url in urls:
            try:
                _download(url, part)
            except (OSError, http.client.HTTPException, ValueError) as error:
                failures.append(f"{url}: {_one_line(error)}")
                continue
            if problem := _hash_problem(part, cfg.sha256 or recorded, cfg.hash_prefix):
                since = f"; delete {_sidecar(path)} if you trust the new file" if recorded and not cfg.sha256 else ""
                failures.append(f"{url}: another file than the published one, {problem}{since}")
                continue
            if not (cfg.sha256 or cfg.hash_prefix):
                _record_hash(path, sha256_of(part))  # before the file: one without a record would be trusted anew
            os.replace(part, path)
            return
    finally:
        part.unlink(missing_ok=True)
    raise DownloadError(_failure_message(failures, path))


def _download(url: str, part: Path) -> None:
    """Stream ``url`` into ``part``; a body shorter than announced, or a web page, is an OSError."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError("only http and https URLs are fetched")
    request = urllib.request.Request(url, headers={"User-Agent": f"dyhead_zoo/{__version__}"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, open(part, "wb") as file:
        if response.headers.get_content_type() == "text/html":
            raise OSError("the server sent a web page, not a file")
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        with tqdm(total=total, unit="B", unit_scale=True, desc=part.stem, disable=None) as progress:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
        if total is not None and file.tell() != total:
            raise OSError(f"connection closed after {file.tell()} of {total} bytes")


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _recorded_hash(path: Path) -> str | None:
    sidecar = _sidecar(path)
    return sidecar.read_text().strip() or None if sidecar.is_file() else None


def _record_hash(path: Path, sha256: str) -> None:
    temporary = _sidecar(path).with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(f"{sha256}\n")
    os.replace(temporary, _sidecar(path))


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _failure_message(failures: list[str], path: Path | None = None) -> str:
    lines = "\n".join(f"  {failure}" for failure in failures)
    by_hand = f"\nThe file can also be fetched by other means and put at {path}" if path else ""
    return f"no source gave the weights:\n{lines}{by_hand}"
