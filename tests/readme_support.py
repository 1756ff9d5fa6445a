"""The fences of the README, as they stand there."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Fence:
    """One fence."""

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
    found = FENCE.finditer(README.read_text())
    return [Fence(match["mark"] or "", match["language"], match["text"]) for match in found]
