"""The fences of the README and of the pages in docs/, as they stand there."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def pages() -> list[Path]:
    """The README, then the pages of the documentation in the order of its navigation."""
    nav = yaml.safe_load(re.sub(r"!!?\S+", "", (ROOT / "mkdocs.yml").read_text()))["nav"]
    named = [name for entry in nav for name in ([entry] if isinstance(entry, str) else next(iter(entry.values())))]
    return [README, *(path for name in named if (path := ROOT / "docs" / name).exists())]


@dataclass(frozen=True)
class Fence:
    """One fence."""

    page: str
    """Name of its file."""

    mark: str
    """What the comment before it says; empty where there is none."""
    language: str
    text: str

    @property
    def is_slow(self) -> bool:
        """Whether it belongs to the long suite."""
        return self.mark == "slow" or self.mark.startswith("slow, with: ")

    @property
    def commands(self) -> list[list[str]]:
        """The command lines of a shell's fence, in words, with the options that its mark adds."""
        joined, more = self.text.replace("\\\n", " "), shlex.split(self.mark.partition("with: ")[2])
        return [[*words, *more] for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def fences() -> list[Fence]:
    """All of them, in order."""
    return [
        Fence(page.name, match["mark"] or "", match["language"], match["text"])
        for page in pages()
        for match in FENCE.finditer(page.read_text())
    ]
