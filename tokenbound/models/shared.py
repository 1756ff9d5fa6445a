"""Weights that are decoded once per machine: the first replica decodes, the others map the same file into memory.

The file is in safetensors format, named by the digest of the artifact, and every process that maps it shares its pages.
A process holds a shared lock on it while it lives; files that nobody holds are removed before the next one is written,
so a machine keeps the weights of one artifact at most beside those in use. A replica that computes in the dtype of the
tensors uses the pages as they are; one that computes in another makes its own copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from tokenbound.compression.artifact import parse_artifact
from tokenbound.models.weights import Weights, decode_weights

logger = logging.getLogger(__name__)

SHARED_BYTES = 1 << 26
"""Decoded weights smaller than this are not worth a file: they are decoded in less than a second."""

MAX_WORKERS = 16
"""Processes that decode while the machine's other replicas wait; each holds a few tensors."""

_FORMAT = "1"
"""Part of the name: another layout of the file must have another."""

_held: list[int] = []
"""Locks on mapped files; the system gives them back when the process ends."""


def default_folder() -> Path:
    """A place on this machine that belongs to this user alone."""
    return Path(tempfile.gettempdir()) / f"tokenbound-weights-{os.getuid()}"


def shared_weights(
    data: bytes,
    folder: Path | None = None,
    *,
    least_bytes: int = SHARED_BYTES,
    decode: Callable[..., Weights] = decode_weights,
) -> Weights:
    """As `decode_weights` of a whole model; of the processes of a machine that ask at the same time one decodes.

    Small weights are not worth it. Where there is no room or no place of one's own each process decodes, and says so.

    Args:
        data: the artifact's bytes.
        folder: where decoded weights are kept; default `default_folder`.
        least_bytes: decoded weights smaller than this are not worth a file.
        decode: makes the weights from the artifact's bytes and a number of `workers`.

    Raises:
        InputError: the artifact is a delta on a base.
        ArtifactError: the bytes are no artifact.
    """
    parsed = parse_artifact(data)
    decoded_bytes = sum(item.decoded_bytes for item in parsed.coded)
    if parsed.base is not None or decoded_bytes < least_bytes:
        return decode(data)
    folder = folder or default_folder()
    path = folder / f"{hashlib.sha256(data).hexdigest()}-{_FORMAT}.safetensors"
    try:
        _own_folder(folder)
        with _alone(folder):
            if not path.exists():
                _remove_unused(folder)
                _write(path, decode(data, workers=min(os.cpu_count() or 1, MAX_WORKERS)))
            return _mapped(path)
    except OSError as error:
        logger.warning("decoded weights are not shared on this machine (%s); every replica decodes its own", error)
        return decode(data)


def release_weights() -> None:
    """Give up the files that this process has mapped: from now on others may remove them. Pages in use stay readable.

    Done by the system when a process ends.
    """
    while _held:
        os.close(_held.pop())


def _own_folder(folder: Path) -> None:
    """Make the folder, closed to other users: what lies in it is scored in place of the artifact.

    Raises:
        PermissionError: it belongs to somebody else, or others may write into it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or folder.is_symlink():
        raise PermissionError(f"{folder} can be written by other users")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of the machine at a time; the lock of one that dies is free."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_unused(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        descriptor = os.open(path, os.O_RDONLY)
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        os.close(descriptor)


def _write(path: Path, weights: Weights) -> None:
    """Write under another name and rename, so that a file under its own name is whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    needed = sum(tensor.numel() * tensor.element_size() for tensor in weights.tensors.values())
    place = os.statvfs(path.parent)
    if needed > place.f_bavail * place.f_frsize:
        raise OSError(f"{path.parent} has no room for {needed:,} bytes")
    partial = path.with_suffix(".safetensors.partial")
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    try:
        save_file(tensors, partial, metadata={"architecture": json.dumps(weights.architecture)})
    except SafetensorError as error:
        raise OSError(f"{partial} could not be written: {error}") from error
    partial.rename(path)


def _mapped(path: Path) -> Weights:
    """The weights in the file's own pages; they stay there as long as this process lives."""
    from safetensors import safe_open

    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    _held.append(descriptor)
    with safe_open(path, "pt") as file:
        architecture = json.loads(file.metadata()["architecture"])
        tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Weights(architecture, tensors)
