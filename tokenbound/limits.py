"""How much is taken from files that nobody has vouched for yet: each limit with its reason.

What is over a limit is refused in one line before it is decoded. Limits are far above anything in use, and far below
what would exhaust a machine: no file may cost more than some 4 GB before it is trusted. JSON and YAML have limits of
their own beside their readers (`store/strict_json.py`, `store/strict_yaml.py`), archives of tensors in
`compression/container.py`.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from tokenbound.errors import InputError

MAX_DOCUMENT_BYTES: Final = 1 << 27
"""Of one document, unless `corpus.max_document_bytes` says otherwise: 128 MiB are 50 novels. A line of 1 GiB fits into
a compressed file of 1 MB, and takes seven times its size once it is text."""

MAX_SHARD_TOKENS: Final = 1 << 26
"""Scored tokens of one shard: 128 times what `auto` makes of the largest corpus. A Parquet file of 67 kB can claim
4e8, and every token takes some 30 bytes once it is decoded."""

MAX_LAYERS: Final = 4096
"""Of a model: the deepest language models have some 200. Each layer is built before its weights are looked for."""
MAX_EXPERTS: Final = 16384
"""Of a layer: the most in use are 512."""

MAX_HEADER_BYTES: Final = 1 << 24
"""Of a safetensors file: 100,000 tensors take some 12 MB. Reading the names of 400,000 takes minutes and 4 GB."""


LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
"""How every pointer of git-lfs begins."""


def require_regular(path: str | Path) -> None:
    """Refuse a local path at which no ordinary file stands; a missing one is the caller's to name.

    A pipe would be waited for, and a device may never end.

    Raises:
        InputError: it is a pipe, a socket or a device.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    kind = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}.get(stat.S_IFMT(mode), "a device")
    raise InputError(f"{os.fspath(path)} is {kind}, not a file; give a copy of what it should hold")


def require_content(path: str | Path) -> None:
    """Refuse the small file that git-lfs leaves in the place of one that was not fetched.

    Raises:
        InputError: it is such a pointer.
    """
    with Path(path).open("rb") as stream:
        head = stream.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise InputError(f"{os.fspath(path)} is a git-lfs pointer, not the file itself; run `git lfs pull` to fetch it")


def require_size(what: str, size: int, most: int, cure: str) -> None:
    """Refuse what is larger than a limit.

    Args:
        what: the thing and its unit, such as `shard 3: tokens`.
        size: how much there is.
        most: how much is taken.
        cure: what to do.

    Raises:
        InputError: there is more.

    >>> require_size("run: layers", 100_000, 4096, "correct the config")
    Traceback (most recent call last):
    tokenbound.errors.InputError: run: layers: 100,000, more than the 4,096 that are taken; correct the config
    """
    if size > most:
        raise InputError(f"{what}: {size:,}, more than the {most:,} that are taken; {cure}")
