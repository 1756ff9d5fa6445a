"""A reader of static segments in Python integers, written from the format and nothing else."""

from __future__ import annotations

import struct

import numpy as np

from tokenbound.compression.static import Table


class AnsDecoder:
    """64 bits of state, 32-bit words, probabilities in 24 bits; the words are a stack."""

    def __init__(self, coded: bytes) -> None:
        self.words = [word for (word,) in struct.iter_unpack("<I", coded)]
        self.state = 0
        for _ in range(2):
            self.state = (
                self.state << 32 | (self.words.pop() if self.words else 0) if self.state < 1 << 32 else self.state
            )

    @property
    def is_empty(self) -> bool:
        return not self.state and not self.words

    def symbol(self, frequencies: list[int]) -> int:
        """The next of symbols with these frequencies, which sum to 2^24."""
        place, left = self.state & 0xFFFFFF, 0
        symbol = 0
        while place >= left + frequencies[symbol]:
            left += frequencies[symbol]
            symbol += 1
        width = frequencies[symbol]
        self.state = width * (self.state >> 24) + place - left
        if self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return symbol

    def read(self, table: Table, count: int) -> list[int]:
        """A segment of so many symbols."""
        symbols, found = np.flatnonzero(table.levels).tolist(), []
        size = len(symbols)
        alone = frequencies_of(table)
        if size == 1:
            return symbols * count
        pairs = [first * second for first in alone for second in alone]
        for _ in range(count // 2 if table.paired else count):
            index = self.symbol(pairs if table.paired else alone)
            found += [symbols[index // size], symbols[index % size]] if table.paired else [symbols[index]]
        if table.paired and count % 2:
            found.append(symbols[self.symbol([frequency << 12 for frequency in alone])])
        return found


def frequencies_of(table: Table) -> list[int]:
    """Of the symbols that occur."""
    weights = [int(2 ** ((level - 1) / 8) + 1e-9) for level in table.levels.tolist() if level]
    total = 1 << (12 if table.paired else 24)
    found = [max(1, weight * total // sum(weights)) for weight in weights]
    found[weights.index(max(weights))] += total - sum(found)
    return found
