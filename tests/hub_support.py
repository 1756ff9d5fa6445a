"""A server that speaks as much of the Hugging Face hub's protocol as reading the files of a dataset takes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATASET = "org/name"


@dataclass
class Hub:
    """The server, and what was asked of it."""

    address: str
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of each file that were sent."""
    asked: list[str] = field(default_factory=list)
    """Lines of the requests."""


@contextmanager
def dataset_hub(folder: Path) -> Iterator[Hub]:
    """Serve the files of a folder as the dataset `org/name`."""
    hub = Hub("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._respond(body=True)

        def do_HEAD(self) -> None:
            self._respond(body=False)

        def do_POST(self) -> None:
            hub.asked.append(f"POST {self.path}")
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            names = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
            self._json([entry(folder, folder / name) for name in names if (folder / name).exists()])

        def _respond(self, *, body: bool) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            path = unquote(urlsplit(self.path).path)
            api, tree = f"/api/datasets/{DATASET}", f"/api/datasets/{DATASET}/tree/"
            if path.startswith(tree):
                below = folder / path.removeprefix(tree).partition("/")[2]
                deep = "recursive=true" in self.path.lower()
                if not below.is_dir():
                    self._json({"error": "Entry not found"}, 404, "EntryNotFound")
                else:
                    self._json(
                        [entry(folder, found) for found in sorted(below.rglob("*") if deep else below.iterdir())]
                    )
            elif path == api or path.startswith(f"{api}/revision/"):
                self._json({"id": DATASET, "sha": COMMIT, "siblings": []})
            elif path.startswith(f"/datasets/{DATASET}/resolve/"):
                self._file(path.removeprefix(f"/datasets/{DATASET}/resolve/").partition("/")[2], body=body)
            else:
                self._json({"error": "Repository not found"}, 404, "RepoNotFound")

        def _file(self, name: str, *, body: bool) -> None:
            if not (folder / name).is_file():
                self._json({"error": "Entry not found"}, 404, "EntryNotFound")
                return
            whole = (folder / name).read_bytes()
            first, _, last = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
            data = whole[int(first) : int(last) + 1 if last else None]
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{len(whole)}")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{name.encode().hex()}"')
            self.end_headers()
            if body:
                hub.sent[name] += len(data)
                self.wfile.write(data)

        def _json(self, tree: Any, status: int = 200, code: str = "") -> None:
            body = json.dumps(tree).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()


def entry(folder: Path, path: Path) -> dict[str, Any]:
    """What a listing says of a file or folder."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0", "size": 0}
    return {"type": "file", "path": name, "oid": name.encode().hex(), "size": path.stat().st_size}
