"""Paths as text: local ones, and URIs such as ``s3://bucket/run?region=eu-west-1`` whose options follow the path.

Every path of the package is joined and split here, because what is put behind a URI as a whole lands in its options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import parse_qsl, quote, unquote

from tokenbound.errors import InputError

URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?]*)([^?]*)(.*)", re.DOTALL)
"""Scheme, authority (a bucket), path and options of a URI."""
_SECRET = re.compile(r"secret|token|passw|signature|credential$|(access|account)_?key", re.IGNORECASE)
_LITERAL = "hf://"
"""How URIs begin that are paths as they are: nothing in them is percent-encoded, and no options follow."""
_BUCKETS = ("s3", "s3a", "gs", "gcs")
"""Schemes whose authority is a bucket, which has no port."""


def is_uri(path: str) -> bool:
    """Whether ``path`` names a filesystem other than by a plain local path.

    >>> is_uri("s3://bucket/key"), is_uri("data/a.jsonl")
    (True, False)
    """
    return "://" in path


def _is_encoded(place: str) -> bool:
    """Whether names in a place are percent-encoded, and options may follow it."""
    return is_uri(place) and not place.startswith(_LITERAL)


def reroot(uri: str, path: str) -> str:
    """The URI of another path inside the filesystem of a URI, with the same options; a local path is itself.

    >>> reroot("s3://bucket/run?region=eu-west-1", "bucket/a b")
    's3://bucket/a%20b?region=eu-west-1'
    >>> reroot("gs://anonymous@bucket/run", "bucket/b")
    'gs://anonymous@bucket/b'
    >>> reroot("hf://datasets/org/name@main/*.jsonl", "datasets/org/name@main/a b.jsonl")
    'hf://datasets/org/name@main/a b.jsonl'
    """
    if not is_uri(uri):
        return path
    if uri.startswith(_LITERAL):
        return _LITERAL + path
    match = URI.fullmatch(uri)
    assert match is not None
    scheme, authority, _, options = match.groups()
    user, at, _ = authority.rpartition("@")
    return f"{scheme}://{user + at if scheme in _BUCKETS else ''}{quote(path)}{options}"


def join(place: str, *names: str) -> str:
    """A path below a place; names are plain text, percent-encoded where the place is a URI.

    >>> join("runs/a/", "losses", "0.parquet"), join("s3://bucket/run?scheme=http", "a b.json")
    ('runs/a/losses/0.parquet', 's3://bucket/run/a%20b.json?scheme=http')
    """
    head, question, options = place.partition("?") if _is_encoded(place) else (place, "", "")
    tail = "/".join(quote(name) if _is_encoded(place) else name for name in names)
    return f"{head.rstrip('/')}/{tail}{question}{options}"


def split(path: str) -> tuple[str, str]:
    """Folder and file name: the inverse of `join` with one name.

    >>> split("s3://bucket/run/a%20b.json?scheme=http"), split("a.json"), split("/a.json")
    (('s3://bucket/run?scheme=http', 'a b.json'), ('.', 'a.json'), ('/', 'a.json'))

    Raises:
        InputError: the path names no file.
    """
    head, question, options = path.partition("?") if _is_encoded(path) else (path, "", "")
    folder, _, name = head.rstrip("/").rpartition("/")
    if not name or folder.endswith(":/"):
        raise InputError(f"{path!r} names no file")
    if _is_encoded(path):
        return f"{folder}{question}{options}", unquote(name)
    return folder or ("/" if path.startswith("/") else "."), name


def base_name(path: str) -> str:
    """The last part of a path, for people to read; of a URI without its options.

    >>> base_name("s3://bucket/models/step-1/?region=eu-west-1"), base_name("a/b.jsonl"), base_name("demo")
    ('step-1', 'b.jsonl', 'demo')
    """
    head = unquote(path.partition("?")[0]) if _is_encoded(path) else path
    return head.rstrip("/").rpartition("/")[2]


def refuse_credentials(text: str, *, where: str = "a path") -> None:
    """Refuse a URI with a password, key or token in it, without repeating any part of it.

    Configs, plans, logs and certificates hold paths; what is secret stays in the environment.

    Raises:
        InputError: the URI holds credentials.
    """
    match = URI.fullmatch(text)
    if match is None:
        return
    scheme, authority, _, options = match.groups()
    scheme = scheme.lower()
    if _has_password(scheme, authority) or any(
        _SECRET.search(name) or "@" in value for name, value in parse_qsl(options[1:], keep_blank_values=True)
    ):
        raise InputError(
            f"{where} is a URI ({scheme}://...) that holds credentials, which would reach logs and certificates; take "
            "them out of it and give them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "GOOGLE_APPLICATION_CREDENTIALS)"
        )


def _has_password(scheme: str, authority: str) -> bool:
    user, at, host = authority.rpartition("@")
    if scheme in _BUCKETS:
        # A slash in a key ends the authority early: what is left has a colon, which no bucket has.
        return ":" in host or (bool(at) and (scheme in ("s3", "s3a") or user != "anonymous"))
    return ":" in user


def refuse_credentials_in(tree: object, where: str = "") -> None:
    """Refuse credentials anywhere in plain data; the message names the field.

    Raises:
        InputError: a text is a URI that holds credentials.
    """
    for place, text in texts_in(tree, where):
        refuse_credentials(text, where=place or "a path")


def texts_in(tree: object, where: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain data, with the dotted name of its place.

    >>> list(texts_in({"a": {"b": ["x"]}}))
    [('a.b[0]', 'x')]
    """
    if isinstance(tree, str):
        yield where, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from texts_in(value, f"{where}.{key}" if where else str(key))
    elif isinstance(tree, Sequence):
        for index, value in enumerate(tree):
            yield from texts_in(value, f"{where}[{index}]")
