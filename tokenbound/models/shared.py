"""Weights that are decoded or packed once per machine: the first replica does it, the others map the same file.

Files are in safetensors format, written tensor by tensor into the machine's local folder (`store.local_folder`) under
the digest of the artifact, and every process that maps one shares its pages. A replica that computes in the dtype of
decoded tensors uses the pages as they are; one that computes in another makes its own copy. What lies there is scored
in place of the artifact, so nobody else may write into the folder, and whoever verifies a certificate uses neither.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from tokenbound.compression.artifact_file import ArtifactFile, as_artifact
from tokenbound.compression.dtypes import dtype_of
from tokenbound.compression.packed_weights import predicted_bytes
from tokenbound.models.packed_file import PackedFile, write_packed
from tokenbound.models.safetensors_file import write_safetensors
from tokenbound.models.weights import Weights, decode_weights
from tokenbound.store.local_folder import CURE, PACKED_SUFFIX, WEIGHTS_SUFFIX, is_in_memory, shared_file

logger = logging.getLogger(__name__)

SHARED_BYTES = 1 << 26
"""Decoded weights smaller than this are not worth a file: they are decoded in less than a second."""

MAX_WORKERS = 16
"""Processes that decode while the machine's other replicas wait; each holds a few tensors."""

PACKING_BYTES = 8
"""Memory that packing a weight takes on the way: its integer, its code and what compares them."""
PACKING_SHARE = 0.25
"""Of a machine's memory, what processes that pack may take together."""
_FORMAT, _PACKED_FORMAT = "1", "1"
"""Parts of the names: another layout of a file, or other words in it, must have another."""

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
    name = f"{opened.sha256}-{_FORMAT}{WEIGHTS_SUFFIX}"
    try:
        write = partial(_write, artifact=opened, decode=decode)
        return _mapped(shared_file(folder, name, opened.decoded_bytes, write))
    except OSError as error:
        logger.warning("decoded weights are not shared on this machine (%s); every replica decodes its own", error)
        return decode_weights(opened)


def _write(path: Path, artifact: ArtifactFile, decode: Decode) -> None:
    headers = {item.name: (dtype_of(item.dtype), item.shape) for item in artifact.parsed.coded}
    tensors = decode(artifact, min(os.cpu_count() or 1, MAX_WORKERS))
    try:
        write_safetensors(path, headers, tensors, {"architecture": json.dumps(artifact.architecture)})
    except ValueError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def _mapped(path: Path) -> Weights:
    """The weights in the file's own pages; they stay there as long as this process lives."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        architecture = json.loads(file.metadata()["architecture"])
        tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Weights(architecture, tensors)


def shared_packed_file(
    artifact: ArtifactFile,
    folder: str | Path | None = None,
    *,
    on_disk: bool,
    least_bytes: int = SHARED_BYTES,
) -> PackedFile | None:
    """The packed weights of a whole model; of the processes of a machine that ask at the same time one packs them.

    Args:
        artifact: open.
        folder: where the file is kept; default `store.local_folder.default_folder`.
        on_disk: whether the file must not take memory, as it does where the folder is in memory itself.
        least_bytes: of decoded weights: smaller ones are not worth a file.

    Returns:
        None where the model is small, or where there is no place of one's own or no room; the log then says so.

    Raises:
        ArtifactError: a payload is not what its codec writes.
    """
    if artifact.decoded_bytes < least_bytes:
        return None
    name = f"{artifact.sha256}-{_PACKED_FORMAT}{PACKED_SUFFIX}"
    num_bytes = sum(predicted_bytes(item) for item in artifact.parsed.coded)
    write = partial(write_packed, artifact=artifact, workers=_packing_workers(artifact))
    try:
        if on_disk and is_in_memory(folder):
            raise OSError(f"the local folder is in memory; {CURE}")
        return PackedFile(shared_file(folder, name, num_bytes, write))
    except OSError as error:
        logger.warning("packed weights are not shared on this machine (%s); every replica decodes its own", error)
        return None


def _packing_workers(artifact: ArtifactFile) -> int:
    """Processes that pack: as many as there are processors, and memory for the largest tensor in each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    largest = max((item.elements for item in artifact.parsed.coded), default=0)
    fitting = int(PACKING_SHARE * memory) // max(1, PACKING_BYTES * largest)
    return max(1, min(os.cpu_count() or 1, MAX_WORKERS, fitting))
