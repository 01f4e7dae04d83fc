"""The pages people read, as blocks, links and tables; the tests of this folder hold them to the program."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.structure.tree import ROOT

OTHERS = ("docs/real-data.md", "docs/benchmarks.md")  # their commands need real data or minutes: tests of their own
MADE = ("docs/configuration.md",)  # written by `make frozen`


@dataclass(frozen=True)
class Block:
    """A fenced block: ```` ```language name ````; a named one is a file that the page's commands may use."""

    page: str
    line: int
    language: str
    name: str
    text: str
    heading: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Every page of ours, by its path from the root."""
    found = [*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(str(p.relative_to(ROOT)) for p in found if str(p.relative_to(ROOT)) not in OTHERS)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    found = []
    heading, opened, held = "", None, list[str]()
    for number, line in enumerate(text_of(page).splitlines(), 1):
        fence = re.match(r"```(\S*) ?(.*)$", line)
        if opened is None and fence:
            opened, held = (number, fence[1], fence[2].strip()), []
        elif opened is not None and line.startswith("```"):
            found.append(Block(page, opened[0], opened[1], opened[2], "\n".join(held) + "\n", heading))
            opened = None
        elif opened is not None:
            held.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("#").strip()
    assert opened is None, f"{page}:{opened}: a block that never ends"
    return found


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def links(page: str) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: str) -> set[str]:
    """Headings as a repository's page names them."""
    titles = re.findall(r"^#+ +(.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def table(page: str, first: str) -> list[list[str]]:
    """The rows, as cells, of every table of the page whose first column is called `first`."""
    rows: list[list[str]] = []
    inside = False
    for line in prose(page).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        if not cells:
            inside = False
        elif cells[0] == first:
            inside = True
        elif inside and not set("".join(cells)) <= set("-: "):
            rows.append(cells)
    return rows


def names_in(cell: str) -> list[str]:
    """What stands in `code` in a table's cell."""
    return re.findall(r"`([^`]+)`", cell)


def folder_of(page: str) -> Path:
    return (ROOT / page).parent


def all_blocks(*languages: str) -> Iterator[Block]:
    for page in pages():
        yield from (block for block in blocks(page) if block.language in languages)
