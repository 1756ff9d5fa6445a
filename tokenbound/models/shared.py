"""Weights that are decoded once per machine: the first replica decodes, the others map the same file into memory.

The file is in safetensors format, written tensor by tensor into the machine's local folder (`store.local_folder`) under
the digest of the artifact, and every process that maps it shares its pages. A replica that computes in the dtype of the
tensors uses the pages as they are; one that computes in another makes its own copy.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tokenbound.compression.artifact_file import ArtifactFile, as_artifact
from tokenbound.compression.dtypes import dtype_of
from tokenbound.models.safetensors_file import write_safetensors
from tokenbound.models.weights import Weights, decode_weights
from tokenbound.store.local_folder import (
    PARTIAL_SUFFIX,
    WEIGHTS_SUFFIX,
    alone_in,
    hold,
    make_room,
    open_folder,
)

logger = logging.getLogger(__name__)

SHARED_BYTES = 1 << 26
"""Decoded weights smaller than this are not worth a file: they are decoded in less than a second."""

MAX_WORKERS = 16
"""Processes that decode while the machine's other replicas wait; each holds a few tensors."""

_FORMAT = "1"
"""Part of the name: another layout of the file must have another."""

Decode = Callable[[ArtifactFile, int], Iterator[tuple[str, torch.Tensor]]]


def shared_weights(
    artifact: ArtifactFile | bytes,
    folder: str | Path | None = None,
    *,
    least_bytes: int = SHARED_BYTES,
    decode: Decode = ArtifactFile.decoded,
) -> Weights:
    """As `decode_weights` of a whole model; of the processes of a machine that ask at the same time one decodes.

    Small weights are not worth it. Where there is no room or no place of one's own each process decodes, and says so.

    Args:
        artifact: open, or its bytes.
        folder: where decoded weights are kept; default `store.local_folder.default_folder`.
        least_bytes: decoded weights smaller than this are not worth a file.
        decode: gives the tensors of an artifact, from a number of workers.

    Raises:
        InputError: the artifact is a delta on a base.
        ArtifactError: the bytes are no artifact.
    """
    opened = as_artifact(artifact)
    if opened.base is not None or opened.decoded_bytes < least_bytes:
        return decode_weights(opened)
    try:
        place = open_folder(folder)
        path = place / f"{opened.sha256}-{_FORMAT}{WEIGHTS_SUFFIX}"
        with alone_in(place):
            if not path.exists():
                make_room(place, opened.decoded_bytes)
                _write(path, opened, decode)
            hold(path)
            return _mapped(path)
    except OSError as error:
        logger.warning("decoded weights are not shared on this machine (%s); every replica decodes its own", error)
        return decode_weights(opened)


def _write(path: Path, artifact: ArtifactFile, decode: Decode) -> None:
    """Write under another name and rename, so that a file under its own name is whole."""
    headers = {item.name: (dtype_of(item.dtype), item.shape) for item in artifact.parsed.coded}
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    tensors = decode(artifact, min(os.cpu_count() or 1, MAX_WORKERS))
    try:
        write_safetensors(partial, headers, tensors, {"architecture": json.dumps(artifact.architecture)})
        partial.rename(path)
    except ValueError as error:
        raise OSError(f"{partial} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _mapped(path: Path) -> Weights:
    """The weights in the file's own pages; they stay there as long as this process lives."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        architecture = json.loads(file.metadata()["architecture"])
        tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Weights(architecture, tensors)
