"""The integers of an artifact taken out, and other ones put in their place: what training on the grid works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tokenbound.compression.artifact import join_artifact, parse_artifact
from tokenbound.compression.codecs import UNIFORM
from tokenbound.compression.codecs.uniform import Grid, decode_grid, encode_grid
from tokenbound.compression.tensor import CodedTensor


def artifact_grids(data: bytes) -> dict[str, Grid]:
    """Integers and steps of every tensor that an artifact holds in uniform quantization.

    Raises:
        ArtifactError: not an artifact, or damaged.
    """
    coded = parse_artifact(data).coded
    return {item.name: decode_grid(memoryview(item.payload), item.shape) for item in coded if item.codec == UNIFORM}


def widened(grids: Mapping[str, Grid], coarser: Mapping[str, int]) -> dict[str, Grid]:
    """Grids with wider steps; their integers are as they were.

    Args:
        grids: By name.
        coarser: Half octaves by a text in names; of several that a name contains the longest counts.
    """

    def half_octaves(name: str) -> int:
        return coarser[max((text for text in coarser if text in name), key=len)]

    concerned = {name for name in grids if any(text in name for text in coarser)}
    return {
        name: replace(grid, base=grid.base + half_octaves(name)) if name in concerned else grid
        for name, grid in grids.items()
    }


def replace_grids(data: bytes, grids: Mapping[str, Grid]) -> bytes:
    """The same artifact with other integers and steps in some of its tensors.

    Args:
        data: An artifact.
        grids: By name; tensors that are not named keep their code.

    Raises:
        ArtifactError: not an artifact, or damaged.
    """

    def recoded(item: CodedTensor) -> CodedTensor:
        return replace(item, payload=encode_grid(grids[item.name])) if item.name in grids else item

    parsed = parse_artifact(data)
    return join_artifact(
        parsed.architecture,
        map(recoded, parsed.coded),
        parsed.settings,
        tokenizer=parsed.tokenizer,
        base=parsed.base,
    )
