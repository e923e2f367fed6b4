"""The signature for OpenSSF model-signing: checked by hand, and by the tool where it is there."""

import base64
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from bundles import make

from edgewright import oms, signing
from edgewright.errors import BadInput, IntegrityError, UsageError

pytest.importorskip("cryptography")
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> Path:
    """A P-256 key with its public half beside it."""
    path = tmp_path_factory.mktemp("oms") / "key"
    private = ec.generate_private_key(ec.SECP256R1())
    pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(private.private_bytes(pem, kind, serialization.NoEncryption()))
    path.chmod(0o600)
    public = private.public_key()
    text = public.public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pub").write_bytes(text)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("bundle"))


def test_the_signature_is_ecdsa_over_a_statement_of_all_files(bundle, key):
    """DSSE's PAE spelt by hand, ECDSA by the library, digests by hashing what tar unpacks."""
    found = json.loads(oms.sign(bundle, key, any_verdict=True))
    parts = found["dsseEnvelope"]
    payload, kind = base64.b64decode(parts["payload"]), parts["payloadType"].encode()
    message = b"DSSEv1 %d " % len(kind) + kind + b" %d " % len(payload) + payload
    public = serialization.load_pem_public_key(key.with_suffix(".pub").read_bytes())
    signature = base64.b64decode(parts["signatures"][0]["sig"])
    public.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    with pytest.raises(InvalidSignature):
        public.verify(signature, payload, ec.ECDSA(hashes.SHA256()))
    stated = json.loads(payload)
    with tarfile.open(bundle) as archive:
        names = sorted(archive.getnames())
    assert [r["name"] for r in stated["predicate"]["resources"]] == names


def test_signing_again_gives_the_same_bytes(bundle, key, tmp_path):
    """RFC 6979; and a device's signature changes nothing, as the tool is told to leave it out."""
    first = oms.sign(bundle, key, any_verdict=True)
    signed = tmp_path / "x.bundle.tar"
    shutil.copy(bundle, signed)
    signing.keygen(tmp_path / "ed")
    signing.sign_bundle(signed, [signing.signer(str(tmp_path / "ed"), {})], any_verdict=True)
    assert (
        oms.sign(signed, key, any_verdict=True) == first == oms.sign(bundle, key, any_verdict=True)
    )


def test_keys_and_bundles_that_are_refused(bundle, key, tmp_path):
    with pytest.raises(UsageError, match="not for release"):
        oms.sign(bundle, key)
    signing.keygen(tmp_path / "ed")
    with pytest.raises(BadInput, match="P-256") as caught:
        oms.sign(bundle, tmp_path / "ed", any_verdict=True)
    assert "-out NEW" in str(caught.value), "what it advises overwrites no other key"
    shutil.copy(key, tmp_path / "open")
    (tmp_path / "open").chmod(0o644)
    with pytest.raises(IntegrityError, match="0644"):
        oms.sign(bundle, tmp_path / "open", any_verdict=True)


def test_the_tool_of_openssf_accepts_it_and_refuses_a_change(bundle, key, tmp_path):
    probe = [sys.executable, "-m", "model_signing", "--help"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs model-signing and pyopenssl (extra dev)")
    signed = tmp_path / "x.bundle.tar"
    shutil.copy(bundle, signed)
    signing.keygen(tmp_path / "ed")
    signing.sign_bundle(signed, [signing.signer(str(tmp_path / "ed"), {})], any_verdict=True)
    (tmp_path / "sig").write_bytes(oms.sign(signed, key, any_verdict=True))
    folder = tmp_path / "unpacked"
    with tarfile.open(signed) as archive:
        archive.extractall(folder, filter="data")

    def accepted() -> bool:
        words = ["-m", "model_signing", "verify", "key", folder, "--signature", tmp_path / "sig"]
        words += ["--public_key", key.with_suffix(".pub")]
        return subprocess.run([sys.executable, *words], capture_output=True).returncode == 0

    assert accepted()
    (folder / "extra").write_text("x")
    assert not accepted()
    (folder / "extra").unlink()
    assert accepted()
    with (folder / "model" / "model.onnx").open("r+b") as file:
        file.write(b"\x00")
    assert not accepted()
