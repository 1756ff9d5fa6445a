"""Detached Ed25519 signatures of certificates: who vouches for a file, to the byte.

    certificate.json      the file that is signed
    certificate.json.sig  base64 of the 64 bytes of its signature, one line

Keys are PEM files, as `openssl genpkey -algorithm ed25519` makes them. A signature says that the holder of a key signed
these bytes. That the numbers follow from losses and artifact is what verification recomputes.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from tokenbound.errors import IncompleteError, InputError, MismatchError
from tokenbound.store.run import RunDirectory
from tokenbound.store.uri import split

SUFFIX = ".sig"


def sign(certificate: str, key: str | Path) -> str:
    """Write the signature of a certificate beside it.

    Args:
        certificate: path or URI of the file.
        key: PEM file of an Ed25519 private key, not encrypted.

    Returns:
        Path or URI of the signature.

    Raises:
        IncompleteError: there is no such certificate.
        InputError: the key cannot be used, or the package `cryptography` is missing.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    private = _loaded(partial(load_pem_private_key, password=None), key)
    if not isinstance(private, Ed25519PrivateKey):
        raise InputError(f"key {key}: an Ed25519 private key is needed; make one with {_MAKE}")
    folder, name = split(certificate)
    run = RunDirectory(folder)
    run.write(name + SUFFIX, base64.b64encode(private.sign(run.read(name))) + b"\n")
    return run.place(name + SUFFIX)


def check_signature(certificate: str, key: str | Path) -> None:
    """Check that the holder of a key signed a certificate.

    Args:
        certificate: path or URI of the file; its signature is the file beside it.
        key: PEM file of an Ed25519 public key.

    Raises:
        IncompleteError: certificate or signature are not there.
        InputError: the key cannot be used, or the package `cryptography` is missing.
        MismatchError: the signature is not one of these bytes by this key.
    """
    _require_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    public = _loaded(load_pem_public_key, key)
    if not isinstance(public, Ed25519PublicKey):
        raise InputError(f"key {key}: an Ed25519 public key is needed; `openssl pkey -in KEY -pubout` prints it")
    folder, name = split(certificate)
    run = RunDirectory(folder)
    data = run.read(name)
    if not run.exists(name + SUFFIX):
        raise IncompleteError(f"{run.place(name + SUFFIX)} does not exist; sign the certificate with `tokenbound sign`")
    try:
        public.verify(base64.b64decode(run.read(name + SUFFIX).strip(), validate=True), data)
    except (binascii.Error, InvalidSignature):
        raise MismatchError(
            f"{run.place(name + SUFFIX)} is not a signature of this certificate by the key {key}; the certificate "
            "changed after it was signed, or somebody else signed it"
        ) from None


_MAKE = "`openssl genpkey -algorithm ed25519 -out key.pem`"


def _require_cryptography() -> None:
    if find_spec("cryptography") is None:
        raise InputError("signatures need the package `cryptography`; pip install 'tokenbound[sign]'")


def _loaded(load: Callable[[bytes], object], path: str | Path) -> object:
    try:
        return load(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"key {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:  # not PEM, or encrypted
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"key {path} is not a PEM file of a plain key ({reason}); make one with {_MAKE}") from None
