"""Coded tensors as a running model keeps them: codes in as few bits as they need, and back to the same values.

An artifact's codes are as short as they can be, and take time to read. Here the integers of a grid (`rtn`, `kfac`) and
of groups (`gptq`) lie in words of 1 to 8 bits, and a tensor's values are made from them in a few passes of torch, on
whatever device the words are. The operations are those of the codecs, each correctly rounded, so the values are the
same to the last bit.

    code      integer - low, in b bits; b = 4 + 2 + 1 bits lie in a plane for each of these widths
    plane     of w bits: byte j of a row holds columns j, j + n, j + 2n, ... of the row, n bytes each
    outliers  integers that do not fit: their places and values

A packed weight can be taken apart into named tensors and facts, and put together again, so that it may lie in a file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from tokenbound.compression.codecs import GROUPS, HALF, LATTICE, UNIFORM
from tokenbound.compression.codecs import lattice as lattice_codec
from tokenbound.compression.codecs.exact import decode_exact
from tokenbound.compression.codecs.groups import GroupForm
from tokenbound.compression.codecs.uniform import (
    SHRINK_UNIT,
    Grid,
    Steps,
    grid_values,
    integer_parts,
    matrix_shape,
    read_form,
    steps_of,
)
from tokenbound.compression.dtypes import bytes_tensor, dtype_code, dtype_of
from tokenbound.compression.matrices import matrix_parts
from tokenbound.compression.tensor import CodedTensor, decode_tensor

if TYPE_CHECKING:
    from tokenbound.compression.coder import Ints
    from tokenbound.compression.symbols import Cut

MAX_BITS = 8
"""Of a word; wider codes are kept as values."""
OUTLIER_BYTES = 12
"""Memory of an integer that does not fit its word: its place and its value."""
SMALL = 1 << 12
"""Tensors of fewer elements are kept as values."""
BLOCK_ELEMENTS = 1 << 20
"""Values made at once on a CPU: what stays in cache between the passes."""
DEVICE_BLOCK_ELEMENTS = 1 << 26
"""Values made at once on an accelerator: enough to fill it."""
PACKING_BITS = 1.0
"""Bits of a weight that words of whole bits take beyond an entropy code: 0.7 to 1.1, from 7 bits to 2."""
SAFE_EXPONENT = 200
"""Half octaves: steps up to this size, and their product with a power of two, neither overflow nor lose digits."""


class PackedWeight(ABC):
    """A tensor that is kept in few bits: a few tensors, and the facts by which values are made of them."""

    kind: ClassVar[str]
    """Its name in a file."""

    @property
    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What it keeps, by name."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """All else that defines it, as JSON data."""

    @classmethod
    @abstractmethod
    def restored(cls, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """Put it together again from its facts and tensors, which are not copied."""

    @abstractmethod
    def dense(self, device: torch.device) -> torch.Tensor:
        """Its values, in its own dtype and shape, on a device."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return self.restored(self.facts, {name: tensor.to(device) for name, tensor in self.tensors.items()})


def restored_weight(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
    """A packed weight from what `described` and its `tensors` say of it.

    Args:
        facts: Its own, and its kind.
        tensors: By their names in it.

    Example:
        >>> weight = PlainWeight(torch.ones(2, dtype=torch.float16), torch.float32)
        >>> restored_weight(described(weight), weight.tensors).dense(torch.device("cpu"))
        tensor([1., 1.])
    """
    kinds: tuple[type[PackedWeight], ...] = (PlainWeight, PackedLattice, PackedGrid, PackedGroups)
    return next(kind for kind in kinds if kind.kind == facts["kind"]).restored(facts, tensors)


def described(weight: PackedWeight) -> dict[str, Any]:
    """The facts of a weight and its kind, as JSON data.

    Example:
        >>> described(PlainWeight(torch.ones(2, dtype=torch.float16), torch.float32))
        {'dtype': 0, 'kind': 'plain'}
    """
    return {**weight.facts, "kind": weight.kind}


def pack_weight(coded: CodedTensor) -> PackedWeight:
    """Read a tensor's code once and keep it in few bits.

    Args:
        coded: from an artifact.

    Returns:
        What gives the values of `decode_tensor`, bit for bit. Integers that other tools packed are already as narrow as
        they get; tensors of codecs without few bits, and small ones, are kept as values.

    Raises:
        ArtifactError: its payload is not what its codec writes.
    """
    if coded.codec == UNIFORM and len(coded.shape) > 1 and coded.elements >= SMALL:
        return _packed_grid(coded)
    if coded.codec == GROUPS and coded.elements >= SMALL:
        return _packed_groups(coded)
    if coded.codec == LATTICE:
        return _packed_lattice(coded)
    if coded.codec == HALF:
        half = decode_exact(memoryview(coded.payload), coded.shape, torch.float16)
        return PlainWeight(half, dtype_of(coded.dtype))
    tensor = decode_tensor(coded)
    return PlainWeight(tensor, tensor.dtype)


def predicted_bytes(coded: CodedTensor) -> int:
    """Memory that `pack_weight` will take, estimated from the length of the code, which is not read."""
    if coded.codec == HALF:
        return 2 * coded.elements
    if coded.codec in (UNIFORM, GROUPS, LATTICE) and len(coded.shape) > 1:
        extra = 0 if coded.codec == LATTICE else PACKING_BITS
        return min(coded.decoded_bytes, len(coded.payload) + int(extra * coded.elements / 8))
    return coded.decoded_bytes


def _form(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Shape and dtype as JSON data."""
    return {"shape": list(shape), "dtype": dtype_code(dtype, "packed")}


def _form_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `_form`, as arguments."""
    return {"shape": tuple(facts["shape"]), "dtype": dtype_of(facts["dtype"])}


@dataclass(frozen=True)
class PlainWeight(PackedWeight):
    """Values in a dtype that is as narrow as they allow, and the dtype that they are given in."""

    kind = "plain"

    tensor: torch.Tensor
    dtype: torch.dtype

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The values."""
        return {"values": self.tensor}

    @property
    def facts(self) -> dict[str, Any]:
        """The dtype."""
        return {"dtype": dtype_code(self.dtype, "packed")}

    @classmethod
    def restored(cls, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """See the base."""
        return cls(tensors["values"], dtype_of(facts["dtype"]))

    def dense(self, device: torch.device) -> torch.Tensor:
        """The values on a device; the very tensor where it is there and has the dtype."""
        return self.tensor.to(device).to(self.dtype)


@dataclass(frozen=True)
class PackedLattice(PackedWeight):
    """Planes of E8 codes: as many bits a weight as the method has. Values are made on the host."""

    kind = "lattice"

    planes: tuple[torch.Tensor, ...]
    """uint8, of bits."""
    scale: float
    """A float32, exactly."""
    bits: int
    transposed: bool
    matrix: tuple[int, int]
    """Rows and columns as they are coded."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The planes."""
        return {f"plane{place}": plane for place, plane in enumerate(self.planes)}

    @property
    def facts(self) -> dict[str, Any]:
        """Scale, bits, and how the matrix lies in the tensor."""
        matrix = {"scale": self.scale, "bits": self.bits, "transposed": self.transposed, "matrix": list(self.matrix)}
        return {**matrix, **_form(self.shape, self.dtype)}

    @classmethod
    def restored(cls, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """See the base."""
        rows, columns = facts["matrix"]
        return cls(
            planes=tuple(tensors[f"plane{place}"] for place in range(len(tensors))),
            scale=facts["scale"],
            bits=facts["bits"],
            transposed=facts["transposed"],
            matrix=(rows, columns),
            **_form_of(facts),
        )

    def to(self, device: torch.device) -> Self:
        """Itself: the planes stay on the host."""
        return self

    def dense(self, device: torch.device) -> torch.Tensor:
        """The values on a device."""
        planes = [plane.numpy() for plane in self.planes]
        codes = lattice_codec.LatticeCodes(planes, np.float32(self.scale), self.bits)
        return lattice_codec.dense_layer(codes, self.transposed, self.matrix, self.shape, self.dtype).to(device)


def _packed_lattice(coded: CodedTensor) -> PackedLattice:
    codes, transposed, matrix = lattice_codec.decode_lattice(memoryview(coded.payload), coded.shape)
    planes = tuple(bytes_tensor(plane, plane.shape, torch.uint8) for plane in codes.planes)
    dtype = dtype_of(coded.dtype)
    return PackedLattice(planes, float(codes.scale), codes.bits, transposed, matrix, coded.shape, dtype)


# --- Integers -----------------------------------------------------------------------------------------------------


_PLANE = "plane"


@dataclass(frozen=True)
class PackedIntegers:
    """Integers [rows, columns] in few bits; see the module.

    Attributes:
        planes: uint8 [rows, bytes of a row] by the width of their bits, most significant first.
        low: The integer whose code is 0.
        columns: Of the matrix.
    """

    planes: tuple[tuple[int, torch.Tensor], ...]
    low: int
    columns: int

    @property
    def rows(self) -> int:
        """Of the matrix."""
        return len(self.planes[0][1])

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The words, by the width of their bits."""
        return {f"{_PLANE}{width}": plane for width, plane in self.planes}

    @property
    def facts(self) -> dict[str, Any]:
        """What the words mean."""
        return {"low": self.low, "columns": self.columns}

    @classmethod
    def restored(cls, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """From their facts and words; other facts and tensors are passed over."""
        widths = sorted((int(name.removeprefix(_PLANE)) for name in tensors if name.startswith(_PLANE)), reverse=True)
        return cls(tuple((width, tensors[f"{_PLANE}{width}"]) for width in widths), facts["low"], facts["columns"])

    def floats(self, rows: slice) -> torch.Tensor:
        """The integers of some rows as float32, which holds them exactly."""
        codes: torch.Tensor | None = None
        for width, plane in self.planes:
            part = plane[rows]
            pieces = [part >> shift for shift in range(0, 8, width)]
            digits = torch.cat(pieces, dim=1).bitwise_and_((1 << width) - 1) if width < 8 else part
            codes = digits if codes is None else codes.bitwise_left_shift_(width).bitwise_or_(digits)
        assert codes is not None, "there is at least one plane"
        return codes[:, : self.columns].to(torch.float32).add_(self.low)


def pack_integers(integers: NDArray[np.signedinteger], bits: int, low: int) -> PackedIntegers:
    """Pack a matrix of integers; of those outside [low, low + 2^bits) anything may be kept.

    Args:
        integers: [rows, columns].
        bits: of a word, 1 to 8.
        low: the least integer that fits.

    Example:
        >>> packed = pack_integers(np.arange(-3, 5).reshape(1, 8), 3, -3)
        >>> [(width, tuple(plane.shape)) for width, plane in packed.planes]
        [(2, (1, 2)), (1, (1, 1))]
        >>> packed.floats(slice(0, 1)).tolist()
        [[-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0]]
    """
    rows, columns = integers.shape
    widths = [width for width in (8, 4, 2, 1) if bits & width]
    planes = [np.empty((rows, -(-columns // 8) * width), np.uint8) for width in widths]
    for part in _row_blocks(rows, columns, BLOCK_ELEMENTS):
        codes = np.zeros((part.stop - part.start, -(-columns // 8) * 8), np.uint8)
        codes[:, :columns] = np.clip(integers[part].astype(np.int64) - low, 0, (1 << bits) - 1)
        left = bits
        for width, plane in zip(widths, planes, strict=True):
            left -= width
            digits = ((codes >> left) & ((1 << width) - 1)).reshape(len(codes), 8 // width, -1)
            words = digits[:, 0]
            for place in range(1, 8 // width):
                words = words | digits[:, place] << place * width
            plane[part] = words
    packed = tuple((width, torch.from_numpy(plane)) for width, plane in zip(widths, planes, strict=True))
    return PackedIntegers(packed, low, columns)


def choose_bits(counts: NDArray[np.int64], least: int) -> tuple[int, int] | None:
    """The word that takes least memory, outliers included.

    Args:
        counts: how often each integer from `least` on occurs.
        least: the integer that the first count belongs to.

    Returns:
        Bits of a word and the least integer that fits; None where values in two bytes take no more.

    Example:
        >>> choose_bits(np.array([1, 0, 0, 0, 900, 1000, 900, 800]), -4)
        (2, 0)
    """
    total, before = int(counts.sum()), np.concatenate([[0], np.cumsum(counts)])
    best: tuple[float, int, int] | None = None
    for bits in range(1, MAX_BITS + 1):
        width = min(1 << bits, len(counts))
        inside = before[width:] - before[:-width]
        start = int(inside.argmax())
        size = total * bits / 8 + OUTLIER_BYTES * (total - int(inside[start]))
        if best is None or size < best[0]:
            best = (size, bits, least + start)
    return None if best is None or best[0] >= 2 * total else best[1:]


def _row_blocks(rows: int, columns: int, elements: int) -> Iterator[slice]:
    height = max(1, elements // max(1, columns))
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def _gathered(parts: Iterable[tuple[Cut, Ints]], shape: tuple[int, int]) -> NDArray[np.int32] | NDArray[np.int16]:
    """Integers of a matrix in 16 bits, or in 32 where one needs them."""
    found: NDArray[np.int16] | NDArray[np.int32] = np.empty(shape, np.int16)
    for cut, part in parts:
        if found.itemsize == 2 and part.size and (part.max() > 32767 or part.min() < -32768):
            found = found.astype(np.int32)
        found[cut] = part
    return found


def _counted(integers: NDArray[np.signedinteger]) -> tuple[NDArray[np.int64], int]:
    """How often integers near zero occur, those far away counted at the ends."""
    reach = 1 << MAX_BITS
    counts = np.zeros(2 * reach + 1, np.int64)
    rows, columns = integers.shape
    for part in _row_blocks(rows, columns, BLOCK_ELEMENTS):
        near = np.clip(integers[part], -reach, reach).astype(np.int64) + reach
        counts += np.bincount(near.reshape(-1), minlength=len(counts))
    return counts, -reach


@dataclass(frozen=True)
class _Outliers:
    """Values that are put in their places at the end."""

    places: torch.Tensor
    values: torch.Tensor

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {"places": self.places, "values": self.values}

    @classmethod
    def restored(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        return cls(tensors["places"], tensors["values"])


def _split(
    integers: NDArray[np.signedinteger], values: Callable[[NDArray[np.intp], NDArray[np.intp]], torch.Tensor]
) -> tuple[PackedIntegers, _Outliers] | None:
    """Integers in words and the others as values; None where that takes no less than values in two bytes."""
    chosen = choose_bits(*_counted(integers))
    if chosen is None:
        return None
    bits, low = chosen
    places = np.flatnonzero((integers < low) | (integers >= low + (1 << bits)))
    found = values(*np.divmod(places, integers.shape[1]))
    return pack_integers(integers, bits, low), _Outliers(torch.from_numpy(places), found)


# --- Grids --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedGrid(PackedWeight):
    """Integers times known steps: see `codecs.uniform`.

    A step is steps[p, column] * scales[row], p the parity of the row's exponent: what is left of it is a power of two,
    whose product is exact.
    """

    kind = "grid"

    integers: PackedIntegers
    outliers: _Outliers
    shrink: int
    steps: torch.Tensor
    """float32 [2, columns] or [2, 1]."""
    parity: torch.Tensor | None
    """int64 [rows]; None where all rows have one exponent."""
    scales: torch.Tensor | None
    """float32 [rows, 1], powers of two."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Words, outliers and steps."""
        steps = {"steps": self.steps, "parity": self.parity, "scales": self.scales}
        present = {name: tensor for name, tensor in steps.items() if tensor is not None}
        return {**self.integers.tensors, **self.outliers.tensors, **present}

    @property
    def facts(self) -> dict[str, Any]:
        """What words and steps mean."""
        return {**self.integers.facts, "shrink": self.shrink, **_form(self.shape, self.dtype)}

    @classmethod
    def restored(cls, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """See the base."""
        return cls(
            integers=PackedIntegers.restored(facts, tensors),
            outliers=_Outliers.restored(tensors),
            shrink=facts["shrink"],
            steps=tensors["steps"],
            parity=tensors.get("parity"),
            scales=tensors.get("scales"),
            **_form_of(facts),
        )

    def dense(self, device: torch.device) -> torch.Tensor:
        """The values on a device."""

        def values(rows: slice) -> torch.Tensor:
            floats = self.integers.floats(rows)
            if self.shrink:
                signs = floats.sign()
                floats.mul_(SHRINK_UNIT).sub_(signs.mul_(self.shrink))
            else:
                floats.mul_(SHRINK_UNIT)
            if self.parity is None or self.scales is None:
                return floats.mul_(self.steps[0])
            return floats.mul_(self.steps.index_select(0, self.parity[rows])).mul_(self.scales[rows])

        return _made(self.integers, self.outliers, values, self.dtype).reshape(self.shape).to(device)


def _made(
    integers: PackedIntegers, outliers: _Outliers, values: Callable[[slice], torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """A matrix [rows, columns], made in blocks of rows where its integers are."""
    device = integers.planes[0][1].device
    out = torch.empty(integers.rows, integers.columns, dtype=dtype, device=device)
    block_elements = BLOCK_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    for rows in _row_blocks(integers.rows, integers.columns, block_elements):
        out[rows] = values(rows).to(dtype)
    if len(outliers.places):
        out.view(-1).index_put_((outliers.places,), outliers.values)
    return out


def _packed_grid(coded: CodedTensor) -> PackedWeight:
    dtype, (rows, columns) = dtype_of(coded.dtype), matrix_shape(coded.shape)
    form, payload = read_form(memoryview(coded.payload), coded.shape)
    factors = _factors(form, rows) if dtype.is_floating_point else None
    if factors is None:
        return PlainWeight(decode_tensor(coded), dtype)
    integers = _gathered(integer_parts(payload, coded.shape, form), (rows, columns))

    def values(row: NDArray[np.intp], column: NDArray[np.intp]) -> torch.Tensor:
        # One row of a grid for each: as many as there are outliers, which are few.
        exponents = np.full(len(row), form.base, np.int64)
        exponents += 0 if form.rows is None else form.rows[row]
        exponents += 0 if form.columns is None else form.columns[column]
        grid = Grid(integers[row, column].astype(np.int32)[:, None], 0, exponents, None, form.shrink)
        return torch.from_numpy(grid_values(grid)[:, 0]).to(dtype)

    found = _split(integers, values)
    if found is None:
        return PlainWeight(decode_tensor(coded), dtype)
    (packed, outliers), (steps, parity, scales) = found, factors
    return PackedGrid(packed, outliers, form.shrink, steps, parity, scales, coded.shape, dtype)


def _factors(form: Steps, rows: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
    """Steps, parities and scales of a grid; None where their products would not be exact."""
    unit = 2 * SHRINK_UNIT.bit_length() - 2  # half octaves of the unit in which integers are multiplied
    columns = np.zeros(1, np.int64) if form.columns is None else np.asarray(form.columns, np.int64)
    exponents = form.base - unit + columns
    if not len(exponents):
        return None
    if form.rows is None:
        return torch.from_numpy(steps_of(np.stack([exponents, exponents]))), None, None
    parity = np.asarray(form.rows, np.int64) & 1
    octaves = (form.rows - parity) >> 1
    if max(int(np.abs(exponents).max()) + 1, 2 * int(np.abs(octaves).max(initial=0))) > SAFE_EXPONENT:
        return None
    scales = np.ldexp(np.float32(1), octaves.astype(np.int32)).astype(np.float32)
    steps = torch.from_numpy(steps_of(np.stack([exponents, exponents + 1])))
    return steps, torch.from_numpy(parity), torch.from_numpy(scales)[:, None]


# --- Groups -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedGroups(PackedWeight):
    """Integers times the float16 scale of their group: see `codecs.groups`."""

    kind = "groups"

    integers: PackedIntegers
    outliers: _Outliers
    scales: torch.Tensor
    """float16 [rows, groups]."""
    group: int
    transposed: bool
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Words, outliers and scales."""
        return {**self.integers.tensors, **self.outliers.tensors, "scales": self.scales}

    @property
    def facts(self) -> dict[str, Any]:
        """What words and scales mean."""
        groups = {"group": self.group, "transposed": self.transposed}
        return {**self.integers.facts, **groups, **_form(self.shape, self.dtype)}

    @classmethod
    def restored(cls, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """See the base."""
        return cls(
            integers=PackedIntegers.restored(facts, tensors),
            outliers=_Outliers.restored(tensors),
            scales=tensors["scales"],
            group=facts["group"],
            transposed=facts["transposed"],
            **_form_of(facts),
        )

    def dense(self, device: torch.device) -> torch.Tensor:
        """The values on a device."""

        def values(rows: slice) -> torch.Tensor:
            owned = self.scales[rows].float().repeat_interleave(self.group, dim=1)
            return self.integers.floats(rows).mul_(owned[:, : self.integers.columns])

        matrix = _made(self.integers, self.outliers, values, self.dtype)
        return (matrix.T.contiguous() if self.transposed else matrix).reshape(self.shape).to(device)


def _packed_groups(coded: CodedTensor) -> PackedWeight:
    dtype, form = dtype_of(coded.dtype), GroupForm.read(memoryview(coded.payload), coded.shape)
    integers = _gathered(matrix_parts(form.codes, form.shape), form.shape)

    def values(row: NDArray[np.intp], column: NDArray[np.intp]) -> torch.Tensor:
        scales = form.scales[row, column // form.group].astype(np.float32)
        return torch.from_numpy(integers[row, column].astype(np.float32) * scales).to(dtype)

    found = _split(integers, values)
    if found is None or dtype.itemsize < 2:
        return PlainWeight(decode_tensor(coded), dtype)
    scales = torch.from_numpy(form.scales)
    packed, outliers = found
    return PackedGroups(packed, outliers, scales, form.group, form.transposed, coded.shape, dtype)
