"""Signatures: the holder of the key, these bytes, and nobody else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tokenbound.certificate.signature import check_signature, sign
from tokenbound.demo import demo_certificate
from tokenbound.errors import IncompleteError, InputError, MismatchError


def pem(key: Ed25519PrivateKey | X25519PrivateKey, folder: Path, name: str) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    """A signed certificate, and the public key."""
    private, public = pem(Ed25519PrivateKey.generate(), tmp_path, "own")
    certificate = tmp_path / "certificate.json"
    certificate.write_text(demo_certificate().model_dump_json())
    assert sign(str(certificate), private) == f"{certificate}.sig"
    return certificate, public


def test_a_signature_is_of_these_bytes_by_this_key(signed: tuple[Path, Path], tmp_path: Path) -> None:
    certificate, public = signed
    check_signature(str(certificate), public)
    _, other = pem(Ed25519PrivateKey.generate(), tmp_path, "other")
    with pytest.raises(MismatchError, match="is not a signature of this certificate"):
        check_signature(str(certificate), other)
    certificate.write_text(certificate.read_text() + "\n")
    with pytest.raises(MismatchError, match="changed after it was signed"):
        check_signature(str(certificate), public)


@pytest.mark.parametrize("damage", [b"", b"not base64!", b"QUJD"])
def test_damaged_signatures_are_mismatches(signed: tuple[Path, Path], damage: bytes) -> None:
    certificate, public = signed
    Path(f"{certificate}.sig").write_bytes(damage)
    with pytest.raises(MismatchError):
        check_signature(str(certificate), public)


def test_a_missing_signature_is_incomplete(signed: tuple[Path, Path]) -> None:
    certificate, public = signed
    Path(f"{certificate}.sig").unlink()
    with pytest.raises(IncompleteError, match="tokenbound sign"):
        check_signature(str(certificate), public)


def test_keys_of_other_kinds_are_refused(signed: tuple[Path, Path], tmp_path: Path) -> None:
    certificate, _ = signed
    private, public = pem(X25519PrivateKey.generate(), tmp_path, "exchange")
    with pytest.raises(InputError, match="an Ed25519 private key is needed"):
        sign(str(certificate), private)
    with pytest.raises(InputError, match="an Ed25519 public key is needed"):
        check_signature(str(certificate), public)
    with pytest.raises(InputError, match="is not a PEM file"):
        sign(str(certificate), certificate)
    with pytest.raises(InputError, match="cannot be read"):
        sign(str(certificate), tmp_path / "missing.pem")


def test_keys_of_openssl_work(signed: tuple[Path, Path], tmp_path: Path) -> None:
    certificate, _ = signed
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    sign(str(certificate), private)
    check_signature(str(certificate), public)
