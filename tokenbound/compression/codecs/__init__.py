"""The wire forms: how each code of a tensor in an artifact is decoded.

The decoder is part of every hypothesis: a code length means something because the program that decodes was fixed before
the data. So this table is closed. A method of a plugin (see `methods`) chooses values and writes them in one of these
forms, and its artifacts decode, score and verify without the plugin. A new wire form is a change of this package: a
module here and a line in `CODECS`, whose number is never used again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenbound.compression import ngram_codec
from tokenbound.compression.codecs import exact, float16, ggml, groups, lattice, packed, uniform

if TYPE_CHECKING:
    import torch

EXACT, UNIFORM, GROUPS, LATTICE, HALF, PACKED, NGRAMS, GGML = range(8)
"""Wire numbers, one byte for each tensor of an artifact. Append only."""

Coded = tuple[int, bytes]
"""Wire number and payload of a tensor's code."""


@dataclass(frozen=True)
class Codec:
    """A wire form.

    Attributes:
        name: What `inspect` calls it.
        decode: (payload, shape, dtype) to the tensor; raises `ArtifactError` where the payload is not of this form.
        plain: (payload, shape, dtype) to the same information in plain bytes, for comparison with general codecs.
    """

    name: str
    decode: Callable[[memoryview, tuple[int, ...], torch.dtype], torch.Tensor]
    plain: Callable[[memoryview, tuple[int, ...], torch.dtype], bytes]


CODECS: dict[int, Codec] = {
    EXACT: Codec("exact", exact.decode_exact, exact.plain_bytes),
    UNIFORM: Codec("uniform", uniform.decode_tensor, uniform.plain_integers),
    GROUPS: Codec("groups", groups.decode_layer, groups.plain_codes),
    LATTICE: Codec("lattice", lattice.decode_layer, lattice.plain_codes),
    HALF: Codec("float16", float16.decode_half, float16.plain_halves),
    PACKED: Codec("packed", packed.decode_packed, packed.packed_bytes),
    NGRAMS: Codec("n-grams", ngram_codec.decode_tensor, ngram_codec.plain_numbers),
    GGML: Codec("ggml", ggml.decode_blocks, ggml.plain_blocks),
}
