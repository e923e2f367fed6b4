"""Ed25519 in Python alone: the RFC's vectors, forgeries by spelling, and other implementations."""

import hashlib
import random
import shutil
import subprocess

import pytest

from edgewright.device import ed25519
from edgewright.device.ed25519 import ORDER, P, verify

# RFC 8032, 7.1: public key, message, signature.
VECTORS = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]
KEY, MESSAGE, SIGNATURE = (bytes.fromhex(part) for part in VECTORS[2])


def number(value: int) -> bytes:
    return value.to_bytes(32, "little")


@pytest.mark.parametrize(("key", "message", "signature"), VECTORS)
def test_vectors_of_the_rfc(key, message, signature):
    assert verify(*(bytes.fromhex(part) for part in (key, signature, message)))


def test_any_flipped_bit():
    rng = random.Random(1)
    for place in range(0, 512, 5):
        signature = bytearray(SIGNATURE)
        signature[place // 8] ^= 1 << place % 8
        assert not verify(KEY, bytes(signature), MESSAGE)
    for place in rng.sample(range(256), 40):
        key = bytearray(KEY)
        key[place // 8] ^= 1 << place % 8
        assert not verify(bytes(key), SIGNATURE, MESSAGE)
    assert not verify(KEY, SIGNATURE, MESSAGE + b"\0")


def test_a_signature_has_one_spelling():
    s = int.from_bytes(SIGNATURE[32:], "little")
    for k in range(1, 16):
        if s + k * ORDER < 1 << 256:
            assert not verify(KEY, SIGNATURE[:32] + number(s + k * ORDER), MESSAGE)
    assert not verify(KEY, SIGNATURE[:32] + number(ORDER), MESSAGE)
    for wrong in (b"", SIGNATURE[:63], SIGNATURE + b"\0", SIGNATURE * 2):
        assert not verify(KEY, wrong, MESSAGE)
    for wrong in (b"", KEY[:31], KEY + b"\0"):
        assert not verify(wrong, SIGNATURE, MESSAGE)


def small_order() -> list[bytes]:
    """All eight points whose order divides 8, and every other spelling of their coordinates."""
    root = ed25519.ROOT_OF_MINUS_ONE
    spelt = [number(y | sign << 255) for y in (0, 1, P - 1, P, P + 1) for sign in (0, 1)]
    # Order 8: multiply any point by the group's order, what remains has small order.
    for y in range(2, 60):
        point = ed25519.decode(number(y))
        if point is not None:
            rest = ed25519.double_multiply(ORDER - 1, point, 1, point)
            z = pow(rest[2], -1, P)
            x, v = rest[0] * z % P, rest[1] * z % P
            spelt.append(number(v | (x & 1) << 255))
    assert root * root % P == P - 1
    return sorted(set(spelt))


def test_keys_under_which_anything_is_signed():
    """With A of small order and R = A's kind, S = 0 passes a naive check for many messages."""
    points = small_order()
    assert len(points) >= 12
    for key in points:
        for r in points:
            for message in (b"", b"a", b"b"):
                assert not verify(key, r + bytes(32), message)


def test_coordinates_that_are_not_canonical():
    for y in range(P, 1 << 255):
        for sign in (0, 1):
            assert ed25519.decode(number(y | sign << 255)) is None
    assert ed25519.decode(number(1 | 1 << 255)) is None, "x = 0 has no sign"
    assert ed25519.decode(number(2)) is None, "no such point"


def test_points_add_up():
    """[ORDER]B = 0, and adding in steps is multiplying."""
    base = ed25519.BASE
    assert ed25519.equal(ed25519.double_multiply(ORDER, base, 0, base), ed25519.ZERO)
    nine = ed25519.double_multiply(4, base, 5, base)
    step = ed25519.ZERO
    for _ in range(9):
        step = ed25519.add(step, base)
    assert ed25519.equal(nine, step)
    assert ed25519.equal(ed25519.double(base), ed25519.add(base, base))


def test_against_cryptography():
    keys = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    for k in range(20):
        private = keys.Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"%d" % k).digest())
        public = private.public_key().public_bytes_raw()
        message = b"m" * (k * 37)
        signature = private.sign(message)
        assert verify(public, signature, message)
        assert not verify(public, signature, message + b"x")


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl here")
def test_against_openssl(tmp_path):
    def openssl(*words):
        done = subprocess.run(["openssl", *words], cwd=tmp_path, capture_output=True)
        if done.returncode:
            pytest.skip(f"this openssl has no Ed25519: {done.stderr.decode()[:100]}")
        return done.stdout

    openssl("genpkey", "-algorithm", "ed25519", "-out", "key.pem")
    public = openssl("pkey", "-in", "key.pem", "-pubout", "-outform", "DER")[-32:]
    for size in (1, 1000):  # its one-shot call takes no empty message
        message = bytes(range(256)) * 4
        (tmp_path / "m").write_bytes(message[:size])
        openssl("pkeyutl", "-sign", "-inkey", "key.pem", "-rawin", "-in", "m", "-out", "s")
        signature = (tmp_path / "s").read_bytes()
        assert verify(public, signature, message[:size])
        assert not verify(public, signature, message[:size] + b"x")
