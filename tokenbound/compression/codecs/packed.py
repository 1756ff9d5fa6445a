"""Integer tensors that hold packed codes: other tools' quantized weights, kept bit for bit.

GPTQ, AWQ, HQQ, bitsandbytes, compressed-tensors and torchao pack codes of 2 to 8 bits into wider words, along one axis
or the other, some across word boundaries. General codecs see bytes in which codes are joined or cut. Here the words are
taken apart again and the codes range-coded, each under the mean of the codes before it in its lane, which follows
the zero points of groups. Which layout a tensor has is not asked of its name: the layout with the smallest histogram
entropy is looked for, and kept if its code is the shortest. The order of codes within a word does not matter for that.

A layout is (code bits b, word bits w, axis, across, group), and a lane is one column of words along the axis.
`across`: codes run on from word to word (GPTQ's 3 bits: 32 codes in 3 words); otherwise every word holds w // b codes
and the bits above them. Sorted indices such as `g_idx` are coded as differences.

Many codes whose means do not help, as those of symmetric quantizers, are coded under one static table (see `static`):

    static    layout without groups | 0x40 | bits of a word | spare bits (a block) | one table | segments, each of as
              few steps as have 2^17 codes, the last of those that are left
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.bytestreams import Bytes, decode_general, encode_general, entropy_bytes
from tokenbound.compression.codecs.uniform import matrix_shape
from tokenbound.compression.coder import COUNT_UNIT, Contexts, Ints, Pass, ReadingPass, Tokens, WritingPass
from tokenbound.compression.container import ArtifactError, Reader, block
from tokenbound.compression.dtypes import bytes_tensor, tensor_bytes
from tokenbound.compression.integers import encode_vector, vector_parts
from tokenbound.compression.static import (
    CUT_ELEMENTS,
    SYMBOLS,
    SegmentReader,
    SegmentWriter,
    decode_tables,
    encode_tables,
    fit_table,
)

if TYPE_CHECKING:
    import torch

Words = NDArray[np.unsignedinteger[Any]]

CODE_BITS = (2, 3, 4, 8)
LEVELS = 24
"""Contexts: running means of a lane's codes, in equal parts of their range."""
MEMORY = 16
"""Codes that a running mean looks back on where no groups are assumed."""
GROUPS = (0, 32, 64, 128)
"""Group sizes at which a lane's mean may start anew; 0 for none."""
MAX_STEPS = 1 << 12
"""Steps that codes with fewer lanes than steps may have."""
MAX_LANES = 1 << 19
"""Codes of one step, all held as wide integers at once; a matrix that is wider is read along its other axis."""
CARRIED = 3
"""Codes that the mean before is worth at the start of a group."""
SAMPLE = 1 << 20
"""Words whose histograms are looked at when a layout is chosen."""
TRIAL = 1 << 13
"""Words that are coded in each layout that comes into question."""
WITHIN = 0.2
"""Layouts whose histograms promise no more than this part of the packed size above the best are tried."""
STATIC_CODES = 1 << 18
"""So many codes are coded under a static table if that is no longer on a part of them."""
STATIC_TRIAL = 1 << 15
"""Words of that part."""
_STATIC = 0x40
WORTH_CODING = 0.985
"""A layout is tried if its codes' histogram promises at most this part of the packed size."""
_DIFFERENCES = 0xFF
MAX_DIFFERENCE_VALUE = 1 << 30


@dataclass(frozen=True)
class Layout:
    """How codes lie in words; see the module's docstring."""

    bits: int
    word_bits: int
    axis: int
    across: bool
    group: int = 0

    def to_byte(self) -> int:
        """Wire form: two bits for the code bits, one each for axis and across, two for the group size."""
        return CODE_BITS.index(self.bits) | self.axis << 2 | self.across << 3 | GROUPS.index(self.group) << 4

    @staticmethod
    def read(byte: int, word_bits: int) -> Layout:
        """Inverse of `to_byte`."""
        if byte >> 6:
            raise ArtifactError(f"artifact: packed layout {byte} is unknown")
        return Layout(CODE_BITS[byte & 3], word_bits, byte >> 2 & 1, bool(byte >> 3 & 1), GROUPS[byte >> 4])

    def fits(self, steps: int) -> bool:
        """Whether words in this number can be taken apart this way."""
        if self.across:
            return self.word_bits % self.bits != 0 and steps % self.bits == 0
        return self.bits <= self.word_bits

    def count(self, steps: int) -> int:
        """Codes in this many words."""
        return steps * self.word_bits // self.bits if self.across else steps * (self.word_bits // self.bits)

    @property
    def spare_bits(self) -> int:
        """Bits of each word above its codes."""
        return 0 if self.across else self.word_bits % self.bits


class Fields:
    """The codes inside words [steps, lanes], read and written step by step in place.

    A step of codes is `fold` rows of them, side by side: narrow matrices (bitsandbytes stores [n, 1]) are folded so
    that lanes are long vectors. The words keep their own width, and nothing else of their size is held.
    """

    def __init__(self, words: Words, layout: Layout) -> None:
        """Look into words.

        Args:
            words: Unsigned, of `layout.word_bits` bits or more [steps, lanes].
            layout: One that fits them.
        """
        self.words, self._layout = words, layout
        self._mask = words.dtype.type((1 << layout.bits) - 1)
        self._whole = words.dtype.type((1 << layout.word_bits) - 1)
        self.steps, self.fold = _folded(layout.count(len(words)), words.shape[1])

    @property
    def lanes(self) -> int:
        """Codes of a step."""
        return self.fold * int(self.words.shape[1])

    def _places(self, step: int) -> tuple[NDArray[np.intp], Words]:
        """Of each code row of a step: the word row that it begins in, and the bits before it there [fold]."""
        index, layout = np.arange(self.fold) * self.steps + step, self._layout
        if layout.across:
            row, offset = np.divmod(layout.bits * index, layout.word_bits)
        else:
            row, place = np.divmod(index, layout.word_bits // layout.bits)
            offset = place * layout.bits
        return row, offset.astype(self.words.dtype)

    def read(self, step: int) -> Tokens:
        """The codes of a step [lanes]."""
        row, offset = self._places(step)
        codes = self.words[row] >> offset[:, None]
        beyond = offset > self._layout.word_bits - self._layout.bits
        if beyond.any():
            codes[beyond] |= self.words[row[beyond] + 1] << (self._layout.word_bits - offset[beyond])[:, None]
        return (codes & self._mask).astype(np.int32).reshape(-1)

    def write(self, step: int, codes: Tokens | Bytes) -> None:
        """Join the codes of a step [lanes] to words that are zero there; no two of its rows share a word."""
        row, offset = self._places(step)
        rows = codes.reshape(self.fold, -1).astype(self.words.dtype)
        self.words[row] |= rows << offset[:, None] & self._whole
        beyond = offset > self._layout.word_bits - self._layout.bits
        if beyond.any():
            self.words[row[beyond] + 1] |= rows[beyond] >> (self._layout.word_bits - offset[beyond])[:, None]

    def codes(self) -> Bytes:
        """All codes, step after step."""
        return np.concatenate([self.read(step).astype(np.uint8) for step in range(self.steps)])

    def spare(self) -> Bytes:
        """Bits of each word above its codes [steps * lanes]; empty where there are none."""
        above = self._layout.word_bits - self._layout.spare_bits
        if not self._layout.spare_bits:
            return np.zeros(0, np.uint8)
        spare = np.empty(self.words.shape, np.uint8)
        for row, words in zip(spare, self.words, strict=True):
            row[:] = words >> self.words.dtype.type(above)
        return spare.reshape(-1)

    def set_spare(self, spare: Bytes) -> None:
        """Inverse of `spare`, for words that are zero there."""
        kind = self.words.dtype.type
        if not len(spare):
            return
        for words, row in zip(self.words, spare.reshape(self.words.shape), strict=True):
            words |= row.astype(kind) << kind(self._layout.word_bits - self._layout.spare_bits)


def _folded(count: int, lanes: int) -> tuple[int, int]:
    """Steps and how many rows of codes stand side by side in one."""
    steps, fold = count, 1
    while lanes * fold < steps and steps % 2 == 0 and steps > 256:
        steps, fold = steps // 2, fold * 2
    return steps, fold


# Coding


def _code_fields(run: Pass, fields: Fields, layout: Layout, *, reading: bool) -> None:
    """Code all steps in place, each code under the running mean of its lane or group."""
    top = (1 << layout.bits) - 1
    count = CARRIED
    sums = np.full(fields.lanes, (top << 7) * count, np.int64)  # 8 fraction bits
    for step in range(fields.steps):
        restart = step % layout.group == 0 if layout.group else count == MEMORY
        if restart and count > CARRIED:
            kept = CARRIED if layout.group else MEMORY - 1
            sums, count = sums * kept // count, kept
        contexts: Contexts = (sums * (LEVELS - 1) // (top << 8) // count).astype(np.uint8)
        got = run.code(None if reading else fields.read(step), contexts)
        if reading:
            fields.write(step, got)
        sums += got.astype(np.int64) << 8
        count += 1


def _prior(bits: int) -> Ints:
    return np.full((LEVELS, 1 << bits), COUNT_UNIT // 2, np.int64)


def _steps_allowed(count: int, lanes: int) -> bool:
    """Whether codes fold into few enough steps, so that no forged shape can take for ever, nor wide ones all memory."""
    steps, fold = _folded(count, lanes)
    return lanes * fold <= MAX_LANES and steps <= max(lanes * fold, MAX_STEPS)


def encode_packed(tensor: torch.Tensor, shorter_than: int) -> bytes | None:
    """Code of an integer tensor as packed codes or sorted indices; None if that would not be shorter."""
    words = _words(tensor)
    if words is None:
        return None
    if tensor.ndim == 1:
        coded = _encode_differences(tensor)
    else:
        layout = _best_layout(words)
        encode = encode_static if layout is not None and _is_static(words, layout) else _encode_layout
        coded = None if layout is None else encode(words, layout)
    return coded if coded is not None and len(coded) < shorter_than else None


def _words(tensor: torch.Tensor) -> Words | None:
    """The elements as unsigned integers of their own width, without a copy; None where there are no axes to code."""
    import torch

    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        return None
    if not tensor.ndim or not tensor.numel():
        return None
    data = tensor_bytes(tensor)
    unsigned: Words = data.reshape(-1).view(f"<u{data.shape[1]}")
    return unsigned.reshape(matrix_shape(tuple(tensor.shape)) if tensor.ndim > 1 else (1, -1))


def _encode_differences(tensor: torch.Tensor) -> bytes | None:
    values = tensor.detach().cpu().numpy()
    if not -MAX_DIFFERENCE_VALUE < int(values.min()) <= int(values.max()) < MAX_DIFFERENCE_VALUE:
        return None
    return bytes([_DIFFERENCES]) + encode_vector(np.diff(values.astype(np.int64), prepend=0))


def _oriented(words: Words, axis: int) -> Words:
    return words if axis == 0 else words.T


def _layouts(words: Words, width: int) -> list[Layout]:
    options = (Layout(b, width, axis, across) for b, axis, across in product(CODE_BITS, (0, 1), (False, True)))
    return [
        layout
        for layout in options
        if layout.fits(words.shape[layout.axis])
        and _steps_allowed(layout.count(words.shape[layout.axis]), words.shape[1 - layout.axis])
    ]


def _best_layout(words: Words) -> Layout | None:
    width = _word_bits(words)
    scored = []
    for layout in _layouts(words, width):
        part = _sample(_oriented(words, layout.axis), layout, SAMPLE)
        size = entropy_bytes(Fields(part, layout).codes()) + part.size * layout.spare_bits / 8
        scored.append((size / (part.size * width / 8), layout))
    best = min((score for score, _ in scored), default=1.0)
    if best >= WORTH_CODING:
        return None
    plain = [layout for score, layout in scored if score < best + WITHIN]
    chosen = min(plain, key=lambda layout: _trial_size(words, layout))
    grouped = [replace(chosen, group=group) for group in GROUPS]
    return min(grouped, key=lambda layout: _trial_size(words, layout))


def _trial_size(words: Words, layout: Layout) -> float:
    """Coded bytes for each word of a part of the tensor."""
    part = _sample(_oriented(words, layout.axis), layout, TRIAL)
    return len(_encode_layout(part, replace(layout, axis=0))) / part.size


def _word_bits(words: Words) -> int:
    top = int(words.max())
    return next(width for width in (8, 16, 32, 64) if top >> width == 0)


def _sample(words: Words, layout: Layout, size: int) -> Words:
    """The first lanes, and of them all steps if that is not too many."""
    lanes = max(1, min(words.shape[1], size // len(words), size >> 6))
    steps = max(layout.bits, size // lanes // layout.bits * layout.bits)
    return np.ascontiguousarray(words[:steps, :lanes])


def _encode_layout(words: Words, layout: Layout) -> bytes:
    fields = Fields(np.ascontiguousarray(_oriented(words, layout.axis)), layout)
    run = WritingPass(_prior(layout.bits))
    _code_fields(run, fields, layout, reading=False)
    return _head(fields, layout, layout.to_byte()) + run.finish()


def _head(fields: Fields, layout: Layout, first: int) -> bytes:
    narrow = encode_general(fields.spare()) if layout.spare_bits else b""
    return bytes([first, layout.word_bits]) + block(narrow)


def _is_static(words: Words, layout: Layout) -> bool:
    """Whether a part of many codes is no longer under a static table."""
    if layout.count(words.shape[layout.axis]) * words.shape[1 - layout.axis] < STATIC_CODES:
        return False
    part = _sample(_oriented(words, layout.axis), layout, STATIC_TRIAL)
    coded = _encode_layout(part, replace(layout, axis=0))
    return entropy_bytes(Fields(part, layout).codes()) + part.size * layout.spare_bits / 8 <= len(coded)


def encode_static(words: Words, layout: Layout) -> bytes:
    """Code words in a layout that fits them under a static table."""
    layout = replace(layout, group=0)
    fields = Fields(np.ascontiguousarray(_oriented(words, layout.axis)), layout)
    counts = np.zeros(SYMBOLS, np.int64)
    for step in range(fields.steps):
        counts += np.bincount(fields.read(step), minlength=SYMBOLS)
    table, writer = fit_table(counts), SegmentWriter()
    for steps in reversed(_segments(fields)):
        writer.write(table, np.concatenate([fields.read(step).astype(np.uint8) for step in steps]))
    return _head(fields, layout, layout.to_byte() | _STATIC) + encode_tables([table]) + writer.finish()


def _segments(fields: Fields) -> list[range]:
    """Steps that are coded at once."""
    height = -(-CUT_ELEMENTS // fields.lanes)
    return [range(start, min(start + height, fields.steps)) for start in range(0, fields.steps, height)]


def _read_static(reader: Reader, fields: Fields, layout: Layout) -> None:
    tables = decode_tables(reader)
    if len(tables) != 1 or int(tables[0].symbols[-1]) >> layout.bits:
        raise ArtifactError("artifact: a packed tensor has a table that does not fit its codes")
    source = SegmentReader(reader.take(reader.remaining), reader.what)
    for steps in _segments(fields):
        codes = source.read(tables[0], len(steps) * fields.lanes).reshape(len(steps), -1)
        for step, row in zip(steps, codes, strict=True):
            fields.write(step, row)
    source.finish()


def decode_packed(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `encode_packed`.

    Raises:
        ArtifactError: the payload is not such a code of this shape and dtype.
    """
    reader = Reader(payload, "a packed tensor")
    first = reader.byte()
    if dtype.is_floating_point or dtype.is_complex:
        raise ArtifactError(f"artifact: a packed tensor cannot have dtype {dtype}")
    if first == _DIFFERENCES:
        return _decode_differences(reader, shape, dtype)
    word_bits = reader.byte()
    is_static = bool(first & _STATIC)
    layout = Layout.read(first & ~_STATIC, word_bits)
    rows, columns = matrix_shape(shape) if len(shape) > 1 else (0, 0)
    steps, lanes = (rows, columns)[:: -1 if layout.axis else 1]
    if (
        word_bits not in (8, 16, 32, 64)
        or word_bits > 8 * dtype.itemsize
        or not rows * columns
        or not layout.fits(steps)
        or (is_static and layout.group)
    ):
        raise ArtifactError("artifact: a packed tensor has a layout that does not fit it")
    if not _steps_allowed(layout.count(steps), lanes):
        raise ArtifactError("artifact: a packed tensor runs along the long side of its matrix")
    words = np.zeros((steps, lanes), f"<u{dtype.itemsize}")
    fields = Fields(words, layout)
    fields.set_spare(_decode_spare(reader.block(), steps, lanes, layout))
    if is_static:
        _read_static(reader, fields, layout)
    else:
        _code_fields(ReadingPass(_prior(layout.bits), reader.take(reader.remaining)), fields, layout, reading=True)
    return bytes_tensor(np.ascontiguousarray(_oriented(words, layout.axis)).view(np.uint8), shape, dtype)


def _decode_spare(payload: memoryview, steps: int, lanes: int, layout: Layout) -> Bytes:
    if not layout.spare_bits:
        if len(payload):
            raise ArtifactError("artifact: a packed tensor has spare bits where its words have none")
        return np.zeros(0, np.uint8)
    spare = decode_general(payload, steps * lanes, "spare bits")
    if int(spare.max(initial=0)) >> layout.spare_bits:
        raise ArtifactError("artifact: spare bits of a packed tensor overflow")
    return spare


def _decode_differences(reader: Reader, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    import torch

    if len(shape) != 1 or dtype == torch.bool:
        raise ArtifactError("artifact: only vectors of integers are coded as differences")
    tensor = torch.empty(shape, dtype=dtype)
    last = np.int64(0)
    for cut, differences in vector_parts(reader.take(reader.remaining), shape[0]):
        values = np.cumsum(differences) + last
        tensor[cut], last = torch.from_numpy(values).to(dtype), values[-1]
    return tensor


def packed_bytes(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The packed words as they are: what a general codec would be given."""
    return tensor_bytes(decode_packed(payload, shape, dtype)).tobytes()
