"""Integer tensors that hold packed codes: other tools' quantized weights, kept bit for bit.

GPTQ, AWQ, HQQ, bitsandbytes, compressed-tensors and torchao pack codes of 2 to 8 bits into wider words, along one axis
or the other, some across word boundaries. General codecs see bytes in which codes are joined or cut. Here the words are
taken apart again and the codes range-coded, each under the mean of the codes before it in its lane, which follows
the zero points of groups. Which layout a tensor has is not asked of its name: the layout with the smallest histogram
entropy is looked for, and kept if its code is the shortest. The order of codes within a word does not matter for that.

A layout is (code bits b, word bits w, axis, across, group), and a lane is one column of words along the axis.
`across`: codes run on from word to word (GPTQ's 3 bits: 32 codes in 3 words); otherwise every word holds w // b codes
and the bits above them. Sorted indices such as `g_idx` are coded as differences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenbound.compression.bytestreams import decode_general, encode_general, entropy_bytes
from tokenbound.compression.coder import COUNT_UNIT, Contexts, Ints, Pass, ReadingPass, Tokens, WritingPass
from tokenbound.compression.container import ArtifactError, Reader, block
from tokenbound.compression.dtypes import bytes_tensor, tensor_bytes
from tokenbound.compression.integers import decode_vector, encode_vector
from tokenbound.compression.methods.uniform import matrix_shape

if TYPE_CHECKING:
    import torch

Words = NDArray[np.uint64]
Fields = NDArray[np.uint8]

CODE_BITS = (2, 3, 4, 8)
LEVELS = 24
"""Contexts: running means of a lane's codes, in equal parts of their range."""
MEMORY = 16
"""Codes that a running mean looks back on where no groups are assumed."""
GROUPS = (0, 32, 64, 128)
"""Group sizes at which a lane's mean may start anew; 0 for none."""
MAX_STEPS = 1 << 12
"""Steps that codes with fewer lanes than steps may have."""
CARRIED = 3
"""Codes that the mean before is worth at the start of a group."""
SAMPLE = 1 << 20
"""Words whose histograms are looked at when a layout is chosen."""
TRIAL = 1 << 13
"""Words that are coded in each layout that comes into question."""
WITHIN = 0.2
"""Layouts whose histograms promise no more than this part of the packed size above the best are tried."""
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


def take_apart(words: Words, layout: Layout) -> tuple[Fields, Words]:
    """Codes [steps of codes, lanes] and spare bits [steps, lanes] of words [steps, lanes]."""
    if layout.across:
        return _take_apart_across(words, layout), words[:0]
    per_word = layout.word_bits // layout.bits
    mask = np.uint64((1 << layout.bits) - 1)
    fields = np.empty((len(words), per_word, words.shape[1]), np.uint8)
    for index in range(per_word):
        fields[:, index] = (words >> np.uint64(layout.bits * index)) & mask
    spare = words >> np.uint64(layout.bits * per_word) if layout.spare_bits else words[:0]
    return fields.reshape(-1, words.shape[1]), spare


def _take_apart_across(words: Words, layout: Layout) -> Fields:
    bits, width = layout.bits, layout.word_bits
    groups = words.reshape(-1, bits, words.shape[1])
    fields = np.empty((len(groups), width, words.shape[1]), np.uint8)
    for index in range(width):
        word, offset = divmod(bits * index, width)
        value = groups[:, word] >> np.uint64(offset)
        if offset + bits > width:
            value = value | groups[:, word + 1] << np.uint64(width - offset)
        fields[:, index] = value & np.uint64((1 << bits) - 1)
    return fields.reshape(-1, words.shape[1])


def put_together(fields: Fields, spare: Words, layout: Layout) -> Words:
    """Inverse of `take_apart`."""
    bits, width = layout.bits, layout.word_bits
    per_group = width if layout.across else width // bits
    groups = fields.reshape(-1, per_group, fields.shape[1])
    words = np.zeros((len(groups), bits if layout.across else 1, fields.shape[1]), np.uint64)
    mask = np.uint64((1 << width) - 1)
    for index in range(per_group):
        word, offset = divmod(bits * index, width)
        wide = groups[:, index].astype(np.uint64)
        words[:, word] |= (wide << np.uint64(offset)) & mask
        if offset + bits > width:
            words[:, word + 1] |= wide >> np.uint64(width - offset)
    flat: Words = words.reshape(-1, fields.shape[1])
    if layout.spare_bits:
        flat |= spare << np.uint64(width - layout.spare_bits)
    return flat


# Coding


def _code_fields(run: Pass, fields: Fields, layout: Layout, *, reading: bool) -> None:
    """Code [steps, lanes] in place, each code under the running mean of its lane or group."""
    top = (1 << layout.bits) - 1
    count = CARRIED
    sums = np.full(fields.shape[1], (top << 7) * count, np.int64)  # 8 fraction bits
    for step in range(len(fields)):
        restart = step % layout.group == 0 if layout.group else count == MEMORY
        if restart and count > CARRIED:
            kept = CARRIED if layout.group else MEMORY - 1
            sums, count = sums * kept // count, kept
        contexts: Contexts = (sums * (LEVELS - 1) // (top << 8) // count).astype(np.uint8)
        tokens: Tokens | None = None if reading else fields[step].astype(np.int32)
        got = run.code(tokens, contexts)
        if reading:
            fields[step] = got
        sums += got.astype(np.int64) << 8
        count += 1


def _prior(bits: int) -> Ints:
    return np.full((LEVELS, 1 << bits), COUNT_UNIT // 2, np.int64)


def _shaped(fields: Fields) -> Fields:
    """Narrow matrices (bitsandbytes stores [n, 1]) are folded so that lanes are long vectors."""
    steps, lanes = fields.shape
    while lanes < steps and steps % 2 == 0 and steps > 256:
        steps, lanes = steps // 2, lanes * 2
    return fields.reshape(lanes // fields.shape[1], steps, -1).transpose(1, 0, 2).reshape(steps, lanes)


def _steps_allowed(count: int, lanes: int) -> bool:
    """Whether codes fold into few enough steps, so that no forged shape can take for ever."""
    steps, lanes = _shaped(np.empty((count, lanes), np.uint8)).shape
    return bool(steps <= max(lanes, MAX_STEPS))


def _unshaped(fields: Fields, lanes: int) -> Fields:
    return fields.reshape(len(fields), -1, lanes).transpose(1, 0, 2).reshape(-1, lanes)


def encode_packed(tensor: torch.Tensor, shorter_than: int) -> bytes | None:
    """Code of an integer tensor as packed codes or sorted indices; None if that would not be shorter."""
    words = _words(tensor)
    if words is None:
        return None
    if tensor.ndim == 1:
        coded = _encode_differences(tensor)
    else:
        layout = _best_layout(words)
        coded = None if layout is None else _encode_layout(words, layout)
    return coded if coded is not None and len(coded) < shorter_than else None


def _words(tensor: torch.Tensor) -> Words | None:
    import torch

    if tensor.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64) or not tensor.numel():
        return None
    data = tensor_bytes(tensor)
    unsigned: Words = data.copy().view(f"<u{data.shape[1]}").astype(np.uint64)
    return unsigned.reshape(matrix_shape(tuple(tensor.shape)) if tensor.ndim > 1 else (1, -1))


def _encode_differences(tensor: torch.Tensor) -> bytes | None:
    values = tensor.detach().cpu().numpy().astype(np.int64)
    if np.abs(values).max() >= MAX_DIFFERENCE_VALUE:
        return None
    return bytes([_DIFFERENCES]) + encode_vector(np.diff(values, prepend=0))


def _oriented(words: Words, axis: int) -> Words:
    return words if axis == 0 else np.ascontiguousarray(words.T)


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
        fields, _ = take_apart(part, layout)
        size = entropy_bytes(fields.reshape(-1)) + part.size * layout.spare_bits / 8
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
    return words[:steps, :lanes]


def _encode_layout(words: Words, layout: Layout) -> bytes:
    oriented = _oriented(words, layout.axis)
    fields, spare = take_apart(oriented, layout)
    run = WritingPass(_prior(layout.bits))
    _code_fields(run, _shaped(fields), layout, reading=False)
    narrow = encode_general(spare.astype(np.uint8).reshape(-1)) if layout.spare_bits else b""
    return bytes([layout.to_byte(), layout.word_bits]) + block(narrow) + run.finish()


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
    layout = Layout.read(first, word_bits)
    rows, columns = matrix_shape(shape) if len(shape) > 1 else (0, 0)
    steps, lanes = (rows, columns)[:: -1 if layout.axis else 1]
    if (
        word_bits not in (8, 16, 32, 64)
        or word_bits > 8 * dtype.itemsize
        or not rows * columns
        or not layout.fits(steps)
    ):
        raise ArtifactError("artifact: a packed tensor has a layout that does not fit it")
    spare = _decode_spare(reader.block(), steps, lanes, layout)
    count = layout.count(steps)
    if not _steps_allowed(count, lanes):
        raise ArtifactError("artifact: a packed tensor runs along the long side of its matrix")
    fields = _shaped(np.zeros((count, lanes), np.uint8))
    run = ReadingPass(_prior(layout.bits), reader.take(reader.remaining))
    _code_fields(run, fields, layout, reading=True)
    words = _oriented(put_together(_unshaped(fields, lanes), spare, layout), layout.axis)
    return bytes_tensor(words.astype(f"<u{dtype.itemsize}").view(np.uint8), shape, dtype)


def _decode_spare(payload: memoryview, steps: int, lanes: int, layout: Layout) -> Words:
    if not layout.spare_bits:
        if len(payload):
            raise ArtifactError("artifact: a packed tensor has spare bits where its words have none")
        return np.zeros((0, lanes), np.uint64)
    spare = decode_general(payload, steps * lanes, "spare bits")
    if int(spare.max(initial=0)) >> layout.spare_bits:
        raise ArtifactError("artifact: spare bits of a packed tensor overflow")
    return spare.astype(np.uint64).reshape(steps, lanes)


def _decode_differences(reader: Reader, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    import torch

    if len(shape) != 1 or dtype == torch.bool:
        raise ArtifactError("artifact: only vectors of integers are coded as differences")
    values: NDArray[Any] = np.cumsum(decode_vector(reader.take(reader.remaining), shape[0]))
    return torch.from_numpy(values).to(dtype)


def packed_bytes(payload: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """The packed words as they are: what a general codec would be given."""
    return tensor_bytes(decode_packed(payload, shape, dtype)).tobytes()
