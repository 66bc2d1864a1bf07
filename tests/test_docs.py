"""The documentation is true: its code runs, its commands parse, its tables are fresh, its reference is complete."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from dyhead_zoo import create_detector
from dyhead_zoo.cli import build_parser
from dyhead_zoo.engine.checkpoint import write_weights
from dyhead_zoo.testing import LoopbackHub
from tests.data_helpers import coco_dict, write_coco

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("cards/*.md"))]
NOT_RUN = 2
"""Blocks marked ``python no-run``, since they need a network or a checkpoint of somebody else's."""

SHELL = {"python", "python3", "pip", "source", "pytest"}
"""Commands of the docs, besides ours, that are taken as they are."""


class Block(NamedTuple):
    """A fenced block: its page and first line, its info string, its text."""

    page: str
    line: int
    info: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    content = page.read_text()
    for match in re.finditer(r"^```([^\n`]*)\n(.*?)^```$", content, re.DOTALL | re.MULTILINE):
        line = content.count("\n", 0, match.start(2)) + 1
        yield Block(page.relative_to(ROOT).as_posix(), line, match[1].strip(), match[2])


BLOCKS = [block for page in PAGES for block in blocks(page)]
WITH_PYTHON = list(dict.fromkeys(block.page for block in BLOCKS if block.info == "python"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages speak of, tiny: photos, a data set, weights of an own run and in a plain ``.pth``."""
    for part in ("train", "val"):
        content = coco_dict([(64, 48), (48, 64)], [(10, 3, [4, 4, 20, 20], 0), (20, 1, [8, 8, 30, 30], 0)])
        images, annotations = write_coco(tmp_path / "made" / part, content)
        images.rename(tmp_path / part)
        annotations.rename(tmp_path / f"{part}.json")
    (tmp_path / "photos").mkdir()
    for target in ("photo.jpg", "photos/one.jpg"):
        (tmp_path / target).write_bytes((tmp_path / "train" / "0.png").read_bytes())
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    write_weights(tmp_path / "runs/mine/best.safetensors", create_detector("test_atss", class_names=["ant", "bee"]), {})
    foreign = create_detector("test_atss_dyhead1", coarse_offsets="reinterpret")
    torch.save({"state_dict": foreign.state_dict()}, tmp_path / "mine.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub of this machine alone, with an empty cache, which ``me`` may write to."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("DYHEAD_ZOO_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with LoopbackHub({"hf_me": "me"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        yield


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs(page: str, workplace: Path, hub: None) -> None:
    names: dict[str, object] = {"__name__": "docs"}
    for block in BLOCKS:
        if block.page == page and block.info == "python":
            padded = "\n" * (block.line - 1) + block.text  # tracebacks then show the page's own line numbers
            exec(compile(padded, page, "exec"), names)


def test_few_blocks_are_exempt() -> None:
    exempt = [block for block in BLOCKS if block.info == "python no-run"]
    assert len(exempt) == NOT_RUN, [f"{block.page}:{block.line}" for block in exempt]
    for block in exempt:
        compile(block.text, block.page, "exec")
    assert {block.info for block in BLOCKS} <= {"", "python", "python no-run", "bash", "json", "bibtex"}


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell script, comments and continuations resolved, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.info == "bash"], ids=lambda b: f"{b.page}:{b.line}"
)
def test_commands_parse(block: Block) -> None:
    for words in commands(block.text):
        words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]  # environment variables
        program = Path(words[0]).name
        if program == "torchrun":
            build_parser().parse_args(words[words.index("dyhead_zoo") + 1 :])
        elif program == "dyhead-zoo":
            build_parser().parse_args(words[1:])
        else:
            assert program in SHELL, f"{block.page}:{block.line}: what is {program}?"
            for script in (word for word in words[1:] if word.endswith(".py")):
                assert (ROOT / script).is_file(), f"{block.page}:{block.line}: there is no {script}"


def test_readme_links() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), f"README.md links to {target}"


def test_every_module_is_in_the_reference() -> None:
    package = ROOT / "dyhead_zoo"
    there = set()
    for path in package.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] not in ("__init__", "__main__", "version"):
            there.add(".".join(parts))
    listed = re.findall(r"^::: (\S+)$", "".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.MULTILINE)
    assert len(listed) == len(set(listed))
    missing = sorted(there - set(listed))
    assert not missing, "add a line '::: MODULE' to a page of docs/api"


def test_every_card_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for card in (ROOT / "hub").glob("*.*/README.md"):
        page = f"cards/{card.parent.name}/README.md"
        assert (DOCS / page).is_file(), f"ln -s ../../hub/{card.parent.name} docs/cards/{card.parent.name}"
        assert page in navigation, f"add {page} to the nav of mkdocs.yml"


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    sys.path.insert(0, str(DOCS))
    import generate

    yield generate
    sys.path.remove(str(DOCS))


def test_nothing_generated_is_stale(generate: ModuleType) -> None:
    pytest.importorskip("matplotlib", reason="the figures show its sample photograph")
    assert not generate.stale(generate.generated()), "run python docs/generate.py"


def test_stale_content_is_noticed(generate: ModuleType, tmp_path: Path) -> None:
    page, figure = tmp_path / "page.md", tmp_path / "figure.svg"
    page.write_text("| AP | 9.7 |")
    figure.write_text('<text>0.50</text><image href="data:image/png;base64,AAAA"/>')
    assert not generate.stale(
        {page: "| AP | 9.7 |", figure: '<text>0.51</text><image href="data:image/png;base64,BB"/>'}
    )
    assert generate.stale({page: "| AP | 9.8 |"}) == [page]
    assert generate.stale({figure: figure.read_text().replace("0.50", "0.60")}) == [figure]
    assert generate.stale({figure: figure.read_text().replace("text", "tspan")}) == [figure]
    assert generate.stale({tmp_path / "new.svg": "<svg/>"}) == [tmp_path / "new.svg"]


def test_measured_and_reported_stay_apart(generate: ModuleType) -> None:
    for name in generate.records():
        assert name in generate.measured() and name not in generate.reported()


def test_a_page_without_a_place_for_its_table_is_refused(generate: ModuleType) -> None:
    with pytest.raises(ValueError, match="begin measured"):
        generate.fill("no place here", {"measured": lambda: ""})
