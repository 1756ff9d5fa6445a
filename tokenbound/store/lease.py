"""One writer at a time, by agreement: a lease that ends by itself when its holder dies.

Stores without a conditional write cannot give a true lock, and nothing here needs one: commits and history entries
are written under names that their content decides, so that two writers who both believe they hold the lease write
the same things twice. The lease saves them the work.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from tokenbound.errors import IncompleteError, MismatchError
from tokenbound.store import filesystem as files
from tokenbound.store.run import RunDirectory

LEASE = "lease.json"
LEASE_S = 300.0
"""Seconds after which a lease that nobody renews is free."""


@contextmanager
def lease(home: RunDirectory, *, seconds: float = LEASE_S) -> Iterator[None]:
    """Hold the lease of a place, renewing it until the end.

    Raises:
        IncompleteError: another holds it.
    """
    holder = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
    _require_free(home, holder)
    _write(home, holder, seconds)
    _require_free(home, holder)  # of two who wrote at once, the last one stays
    done = threading.Event()
    renewing = threading.Thread(target=_renew, args=(home, holder, seconds, done), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        done.set()
        renewing.join()
        if _held(home).get("holder") == holder:
            files.delete(home.filesystem, home.path(LEASE))


def _renew(home: RunDirectory, holder: str, seconds: float, done: threading.Event) -> None:
    while not done.wait(seconds / 3):
        with suppress(OSError, IncompleteError):  # a store that fails once is asked again before the lease ends
            _write(home, holder, seconds)


def _require_free(home: RunDirectory, holder: str) -> None:
    found = _held(home)
    if found and found["holder"] != holder and float(found["expires"]) > time.time():
        until = datetime.fromtimestamp(float(found["expires"]), UTC).isoformat(timespec="seconds")
        raise IncompleteError(
            f"{home.uri}: {found['holder']} is at work here (its lease lasts until {until}); wait for it, or delete "
            f"{LEASE} if it is dead"
        )


def _held(home: RunDirectory) -> dict[str, str | float]:
    try:
        found = json.loads(files.read_bytes(home.filesystem, home.path(LEASE)))
        return {"holder": str(found["holder"]), "expires": float(found["expires"])}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise MismatchError(f"{home.place(LEASE)} is damaged; delete it") from None


def _write(home: RunDirectory, holder: str, seconds: float) -> None:
    home.write_json(LEASE, {"holder": holder, "expires": time.time() + seconds})
