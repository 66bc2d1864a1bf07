"""Generations of huggingface_hub against one LoopbackHub: ``python tests/hub_generations.py``; needs uv and a network.

Not part of the test suite: it makes a virtual environment per generation, in which the round trip below runs in a
process of its own, without dyhead_zoo.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

GENERATIONS = ("0.36.*", "1.*", "2.*")
TOKEN = "hf_tester"


def main() -> int:
    """Run the round trip in every generation; returns how many failed."""
    from dyhead_zoo.testing import LoopbackHub

    failures = 0
    with tempfile.TemporaryDirectory() as work, LoopbackHub() as hub:
        for index, generation in enumerate(GENERATIONS):
            folder = Path(work) / str(index)
            python = folder / "venv" / "bin" / "python"
            subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, folder / "venv"], check=True)
            package = f"huggingface_hub=={generation}"
            subprocess.run(["uv", "pip", "install", "--quiet", "--python", python, package], check=True)
            variables = {**os.environ, **hub.environment(folder / "home", TOKEN)}
            done = subprocess.run([python, __file__, f"tester/model{index}", folder], env=variables)
            failures += done.returncode != 0
            print(f"huggingface_hub {generation}: {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
    return failures


def round_trip(repo_id: str, folder: Path) -> None:
    """Create, push, tag, list, pull and be refused, with whatever huggingface_hub is installed."""
    import huggingface_hub
    from huggingface_hub import HfApi, errors

    print("huggingface_hub", huggingface_hub.__version__)
    header = b'{"w":{"dtype":"U8","shape":[4096],"data_offsets":[0,4096]}}'
    weights = len(header).to_bytes(8, "little") + header + bytes(range(256)) * 16
    files = {"model.safetensors": weights, "config.json": b"{}", "README.md": b"---\nlibrary_name: dyhead_zoo\n---\n"}
    upload = folder / "upload"
    upload.mkdir()
    for name, content in files.items():
        (upload / name).write_bytes(content)

    api = HfApi()
    api.create_repo(repo_id, private=True)
    api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=upload)
    first = api.model_info(repo_id).sha
    api.upload_folder(repo_id=repo_id, folder_path=upload)
    check("a second push without changes makes no commit", api.model_info(repo_id).sha == first)
    api.create_tag(repo_id, tag="v1")
    api.upload_file(path_or_fileobj=b"{1}", path_in_repo="config.json", repo_id=repo_id)

    tagged = Path(api.hf_hub_download(repo_id, "config.json", revision="v1"))
    check("the tag holds what it held", tagged.read_bytes() == b"{}")
    snapshot = Path(api.snapshot_download(repo_id))
    check("the weights come back", (snapshot / "model.safetensors").read_bytes() == weights)
    check("the cache holds them", Path(api.snapshot_download(repo_id, local_files_only=True)) == snapshot)
    check("ranges", api.get_safetensors_metadata(repo_id).parameter_count == {"U8": 4096})
    check("listing", repo_id in {model.id for model in api.list_models(filter="dyhead_zoo", author="tester")})
    check("files", set(files) <= set(api.list_repo_files(repo_id)))

    refused(errors.EntryNotFoundError, lambda: api.hf_hub_download(repo_id, "none"))
    refused(errors.RevisionNotFoundError, lambda: api.hf_hub_download(repo_id, "config.json", revision="v2"))
    refused(errors.RepositoryNotFoundError, lambda: api.hf_hub_download("tester/none", "config.json"))
    refused(errors.RepositoryNotFoundError, lambda: HfApi(token=False).model_info(repo_id))


def check(what: str, right: bool) -> None:
    """Raise if something is not right."""
    if not right:
        raise RuntimeError(f"not so: {what}")


def refused(expected: type[Exception], call: Callable[[], object]) -> None:
    """Raise unless the call ends in the expected error."""
    try:
        call()
    except expected:
        return
    raise RuntimeError(f"no {expected.__name__}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        round_trip(sys.argv[1], Path(sys.argv[2]))
    else:
        sys.exit(main())
