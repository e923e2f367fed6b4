"""Who signed a bundle: what a device that trusts some keys refuses, and before it reads on."""

import base64
import io
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from bundles import MODEL, RECIPE, Members, forged, make, pack, unpack

from edgewright import oms, signing
from edgewright.device import envelope, trust
from edgewright.device.envelope import MANIFEST_TYPE, Trust
from edgewright.device.verify import extract, verified, verify, walk
from edgewright.errors import BadInput, EnvironmentMissing, IntegrityError, UsageError

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

NAME = "manifest.dsse.json"
DAY = 86400


def seeded(k: int) -> signing.Signer:
    """A key that is the same in every run."""
    key = Ed25519PrivateKey.from_private_bytes(bytes([k]) * 32)
    return signing.Signer(key.public_key().public_bytes_raw(), key.sign)


A, B, C = seeded(1), seeded(2), seeded(3)


def trusting(*signers: signing.Signer, threshold: int = 1, now: int | None = None) -> Trust:
    return Trust({envelope.keyid(s.public): s.public for s in signers}, threshold, now)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def signed(plain, tmp_path) -> Path:
    """Signed by A and B."""
    return sign(plain.read_bytes(), tmp_path, A, B)


def sign(data: bytes, folder: Path, *signers: signing.Signer) -> Path:
    path = folder / "signed.bundle.tar"
    path.write_bytes(data)
    signing.sign_bundle(path, signers, any_verdict=True)
    return path


def enclosed(manifest: bytes, *signers: signing.Signer, kind: str = MANIFEST_TYPE) -> bytes:
    return envelope.write(kind, manifest, signing.signatures(kind, manifest, signers))


def with_envelope(path: Path, data: bytes, **facts) -> Members:
    """The members of a signed bundle with other bytes as its envelope."""
    members = unpack(path)
    assert members[1][0] == NAME
    return [members[0], (NAME, data, facts.get("mode", 0o644)), *members[2:]]


class Reader(io.BytesIO):
    """A stream that knows how far it was read."""

    furthest = 0

    def read(self, size=-1):
        data = super().read(size)
        self.furthest = max(self.furthest, self.tell())
        return data


def refuse(
    data: bytes | Members, folder: Path, whom: Trust | None, *, early: bool = True, limit=0
) -> str:
    """Refused with exit 5 and one line, nothing left; `early`: no payload was read before."""
    data = data if isinstance(data, bytes) else pack(data)
    place = folder / "refused"
    place.mkdir(exist_ok=True)
    path = place / "x.bundle.tar"
    path.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        extract(path, place / "unpacked", whom)
    text = str(caught.value)
    assert caught.value.exit_code == 5 and text.isprintable()
    assert [p.name for p in place.iterdir()] == [path.name]
    stream = Reader(data)
    with pytest.raises(IntegrityError):
        walk(stream, lambda path, mode: nullcontext(), whom)
    if early:
        assert stream.furthest <= (limit or head_size(data)), (
            "read on before the signature was checked"
        )
    return text


def head_size(data: bytes) -> int:
    """Bytes up to the end of the header behind manifest and envelope."""
    place = 0
    for _ in range(2):
        size = int(data[place + 124 : place + 135], 8)
        place += 512 + size + -size % 512
        if data[place : place + len(NAME)] != NAME.encode():
            break
    return place + 512


def test_signing_adds_one_member_and_changes_nothing_else(plain, signed):
    before, after = unpack(plain), unpack(signed)
    assert [after[0], *after[2:]] == before and after[1][0] == NAME
    found = verified(signed, trusting(A, B, threshold=2))
    assert found.signers == sorted(envelope.keyid(s.public) for s in (A, B))
    assert found.manifest == verify(plain)


def test_signing_twice_and_in_any_order_gives_the_same_bytes(plain, signed, tmp_path):
    (tmp_path / "b").mkdir()
    other = sign(plain.read_bytes(), tmp_path / "b", B)
    signing.sign_bundle(other, [A], any_verdict=True)
    signing.sign_bundle(other, [A, B], any_verdict=True)
    assert other.read_bytes() == signed.read_bytes()


def test_the_envelope_is_dsse_as_its_specification_says(signed):
    """PAE spelt by hand; the signature checked by the library alone."""
    members = unpack(signed)
    value = json.loads(members[1][1])
    assert sorted(value) == ["payload", "payloadType", "signatures"]
    assert base64.b64decode(value["payload"]) == members[0][1]
    kind, body = value["payloadType"].encode(), members[0][1]
    assert kind == b"application/vnd.edgewright.manifest+json"
    pae = b"DSSEv1 %d " % len(kind) + kind + b" %d " % len(body) + body
    for row in value["signatures"]:
        key = next(s for s in (A, B) if envelope.keyid(s.public) == row["keyid"])
        assert base64.b64decode(row["sig"]) == key.sign(pae)


def test_securesystemslib_accepts_it(signed):
    dsse = pytest.importorskip("securesystemslib.dsse")
    from securesystemslib.signer import SSlibKey

    found = dsse.Envelope.from_dict(json.loads(unpack(signed)[1][1]))
    keys = [
        SSlibKey(envelope.keyid(s.public), "ed25519", "ed25519", {"public": s.public.hex()})
        for s in (A, B)
    ]
    assert sorted(found.verify(keys, 2)) == sorted(key.keyid for key in keys)
    with pytest.raises(Exception, match=r"threshold|valid|ccepted"):
        found.verify(
            [SSlibKey(envelope.keyid(C.public), "ed25519", "ed25519", {"public": C.public.hex()})],
            1,
        )


def test_the_keyid_is_what_openssl_and_sha256sum_give():
    """RFC 8032, 7.1, TEST 1: the public key, and the SHA-256 of its 32 bytes."""
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    assert Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw() == public
    name = "21fe31dfa154a261626bf854046fd2271b7bed4b6abe45aa58877ef47f9721b9"
    assert envelope.keyid(public) == name


# 90 to 95: flipped bytes, other keys, other payloads


def test_a_flipped_byte_anywhere_in_manifest_or_envelope(signed, tmp_path):
    data = signed.read_bytes()
    size = head_size(data) - 512
    for place in range(0, size, 97):
        changed = bytearray(data)
        changed[place] ^= 1
        refuse(bytes(changed), tmp_path, trusting(A, B, threshold=2), limit=size + 512)


def test_every_byte_of_an_envelope_counts(signed):
    members = unpack(signed)
    for place in range(0, len(members[1][1]), 5):
        changed = bytearray(members[1][1])
        changed[place] ^= 1
        with pytest.raises(IntegrityError):
            envelope.check(bytes(changed), members[0][1], trusting(A, B, threshold=2))


def test_a_flipped_byte_in_each_file_of_a_signed_bundle(signed, tmp_path):
    members = unpack(signed)
    for k, (name, content, mode) in enumerate(members[2:], 2):
        changed = bytes([content[0] ^ 1]) + content[1:]
        text = refuse(
            [*members[:k], (name, changed, mode), *members[k + 1 :]],
            tmp_path,
            trusting(A),
            early=False,
        )
        assert name in text


def test_wrong_key_and_no_signature(plain, signed, tmp_path):
    assert "0 (signed also by" in refuse(signed.read_bytes(), tmp_path, trusting(C))
    assert "found none" in refuse(plain.read_bytes(), tmp_path, trusting(A))
    assert "2 of the 2 keys" in refuse(signed.read_bytes(), tmp_path, trusting(A, C, threshold=2))
    verify(signed, trusting(A, C))


def test_a_signature_under_the_name_of_another_key(signed, tmp_path):
    """C's signature, said to be A's: however many others are right."""
    manifest = unpack(signed)[0][1]
    made = signing.signatures(MANIFEST_TYPE, manifest, [A, B, C])
    names = {k: envelope.keyid(s.public) for k, s in (("A", A), ("B", B), ("C", C))}
    forged = {names["A"]: made[names["C"]], names["B"]: made[names["B"]]}
    data = envelope.write(MANIFEST_TYPE, manifest, forged)
    assert names["A"] in refuse(with_envelope(signed, data), tmp_path, trusting(A, B))
    verify_only_b = trusting(B)
    (tmp_path / "ok.tar").write_bytes(pack(with_envelope(signed, data)))
    verify(tmp_path / "ok.tar", verify_only_b)


def test_a_signature_over_another_payload_type(signed, tmp_path):
    """DSSE PAE: a signature made for something else is none here (93)."""
    manifest = unpack(signed)[0][1]
    other = enclosed(manifest, A, kind=trust.TYPE)
    assert "payload type" in refuse(with_envelope(signed, other), tmp_path, trusting(A))
    renamed = other.replace(trust.TYPE.encode(), MANIFEST_TYPE.encode())
    refuse(with_envelope(signed, renamed), tmp_path, trusting(A))
    bare = envelope.write(MANIFEST_TYPE, manifest, {envelope.keyid(A.public): A.sign(manifest)})
    refuse(with_envelope(signed, bare), tmp_path, trusting(A))


def test_mix_and_match(signed, tmp_path):
    other = make(tmp_path / "other", MODEL.replace("12}", "13}"))
    (tmp_path / "o").mkdir()
    theirs = unpack(sign(other.read_bytes(), tmp_path / "o", A))
    ours = unpack(signed)
    text = refuse([ours[0], theirs[1], *ours[2:]], tmp_path, trusting(A))
    assert "the bundle's own manifest" in text
    refuse([theirs[0], ours[1], *theirs[2:]], tmp_path, trusting(A))
    # Manifest and signature of one, files of the other: the digests tell.
    assert "SHA-256" in refuse([*ours[:2], *theirs[2:]], tmp_path, trusting(A), early=False)


def test_a_forged_manifest_with_the_old_signature(signed, tmp_path):
    data = forged(signed, lambda content: content.update(sequence=99))
    refuse(data, tmp_path, trusting(A))
    refuse(data, tmp_path, None)


def test_an_enemy_signs_what_he_likes_and_is_not_heard(plain, tmp_path):
    """Content that breaks the parser is refused for its signature, before any parsing."""
    for manifest in (b"[" * 100_000, b'{"a":' * 50_000, b"\xff" * 1000, b""):
        members: Members = [
            ("manifest.json", manifest, 0o644),
            (NAME, enclosed(manifest, C), 0o644),
        ]
        text = refuse([*members, *unpack(plain)[1:]], tmp_path, trusting(A))
        assert "the signature is refused" in text
        text = refuse([*members, *unpack(plain)[1:]], tmp_path, trusting(C))
        assert "manifest is refused" in text


# The envelope's own form


def test_envelopes_in_another_spelling(signed, tmp_path):
    manifest, good = (content for _, content, _ in unpack(signed)[:2])
    value = json.loads(good)
    rows = value["signatures"]
    empty = {**value, "signatures": []}
    swapped = {**value, "signatures": rows[::-1]}
    twice = {**value, "signatures": [rows[0], rows[0]]}
    noted = {**value, "note": 1}
    spellings = [json.dumps(value).encode(), good + b"\n", b"\xef\xbb\xbf" + good, b"", b"{}"]
    spellings += [
        json.dumps(v, separators=(",", ":"), sort_keys=True).encode()
        for v in (empty, swapped, twice, noted)
    ]
    sig = rows[0]["sig"]
    tail = chr(ord(sig[85]) + 1)  # the bits that base64 leaves over
    spellings += [
        good.replace(sig.encode(), (sig[:85] + tail + "==").encode()),
        good.replace(sig.encode(), base64.b64encode(bytes(63))),
        good.replace(sig.encode(), sig.encode()[:-2]),
        good.replace(b'"sig":', b'"sig":"","sig":'),
        good.replace(b'"payload":"', b'"payload":"===='),
        good.replace(b"[{", b"[" * 3000 + b"{"),
        b'{"payload":"' + b"A" * envelope.MAX_BYTES,
    ]
    for spelling in spellings:
        assert spelling != good
        for whom in (None, trusting(A, B)):
            refuse(with_envelope(signed, spelling), tmp_path, whom)
    refuse(with_envelope(signed, good, mode=0o755), tmp_path, None)
    assert manifest == base64.b64decode(value["payload"])


def test_more_signatures_than_anyone_needs(signed, tmp_path):
    manifest = unpack(signed)[0][1]
    many = [seeded(k) for k in range(1, envelope.MAX_SIGNATURES + 2)]
    text = refuse(with_envelope(signed, enclosed(manifest, *many)), tmp_path, trusting(A))
    assert "at most 16" in text


def test_two_envelopes_and_envelopes_elsewhere(plain, signed, tmp_path):
    members = unpack(signed)
    double = [members[0], members[1], members[1], *members[2:]]
    assert "does not list" in refuse(double, tmp_path, trusting(A), early=False)
    assert "does not list" in refuse([*members, members[1]], tmp_path, None, early=False)
    last = [members[0], *members[2:], members[1]]
    refuse(last, tmp_path, trusting(A))
    refuse(last, tmp_path, None, early=False)
    refuse([members[1], members[0], *members[2:]], tmp_path, trusting(A))
    case = [members[0], ("Manifest.dsse.json", *members[1][1:]), *members[2:]]
    refuse(case, tmp_path, trusting(A))


# 104: dates


def test_expiry_and_clock(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1800000000")  # 2027-01-15
    recipe = {**RECIPE, "release": {"sequence": 7, "expires": "2027-06-30"}}
    path = sign(make(tmp_path / "x", recipe=recipe).read_bytes(), tmp_path, A)
    content = verify(path)
    assert content["sequence"] == 7
    assert time.strftime("%F", time.gmtime(content["expires"])) == "2027-06-30"
    end = content["expires"]
    verify(path, trusting(A, now=1_800_000_000))
    verify(path, trusting(A, now=end - 1))
    verify(path, trusting(A, now=None))
    data = path.read_bytes()
    assert "expired" in refuse(data, tmp_path, trusting(A, now=end))
    assert "future" in refuse(data, tmp_path, trusting(A, now=1_799_999_999))
    assert "1970-01-01" in refuse(data, tmp_path, trusting(A, now=0))


@pytest.mark.parametrize(
    "release",
    [{"sequence": -1}, {"sequence": 2**53}, {"expires": "2027-02-30"}, {"expires": "1999-01-01"}]
    + [{"expires": "tomorrow"}, {"expires": "2027-6-3"}, {"license": "a\nb"}, {"seqence": 1}],
)
def test_releases_that_cannot_be(tmp_path, release):
    with pytest.raises(BadInput, match=r"release|seqence"):
        make(tmp_path, recipe={**RECIPE, "release": release})


# 110: private keys


def test_keygen_and_what_it_refuses(tmp_path):
    old = os.umask(0)
    try:
        public, name = signing.keygen(tmp_path / "release")
    finally:
        os.umask(old)
    assert (tmp_path / "release").stat().st_mode & 0o777 == 0o600
    raw = trust.public_key(public)
    assert envelope.keyid(raw) == name
    key = signing.signer(str(tmp_path / "release"), {})
    assert key.public == raw
    text = (tmp_path / "release").read_bytes()
    for _ in range(2):
        with pytest.raises(UsageError, match="exists"):
            signing.keygen(tmp_path / "release")
        (tmp_path / "release.pub").unlink(missing_ok=True)
    assert (tmp_path / "release").read_bytes() == text
    with pytest.raises(UsageError, match="private key"):
        trust.public_key(tmp_path / "release")
    public.write_text(trust.pem(raw))
    with pytest.raises(UsageError, match="holds a public key"):
        signing.signer(str(public), {})
    for mode in (0o640, 0o604, 0o610, 0o666):
        (tmp_path / "release").chmod(mode)
        with pytest.raises(IntegrityError, match=f"{mode:04o}") as caught:
            signing.signer(str(tmp_path / "release"), {})
        assert "PRIVATE" not in str(caught.value)


def test_keys_from_the_environment(tmp_path):
    signing.keygen(tmp_path / "release")
    path = str(tmp_path / "release")
    text = (tmp_path / "release").read_text()
    keys = [signing.signer("env:KEY", {"KEY": value}).public for value in (path, text)]
    assert keys[0] == keys[1] == signing.signer(path, {}).public
    with pytest.raises(UsageError, match="KEY"):
        signing.signer("env:KEY", {})
    with pytest.raises(BadInput, match="not found"):
        signing.signer("env:KEY", {"KEY": str(tmp_path / "none")})


def test_keys_of_other_kinds(tmp_path):
    other = generate_private_key(SECP256R1())
    texts = [
        other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        b"",
        bytes(range(256)),
    ]
    for k, text in enumerate(texts):
        path = tmp_path / str(k)
        path.write_bytes(text)
        path.chmod(0o600)
        with pytest.raises(BadInput, match="Ed25519"):
            signing.signer(str(path), {})


def test_without_the_library_one_message_says_what_to_install(tmp_path, monkeypatch):
    signing.keygen(tmp_path / "key")
    for name in [n for n in sys.modules if n.split(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    for work in (
        lambda: signing.keygen(tmp_path / "other"),
        lambda: signing.signer(str(tmp_path / "key"), {}),
        lambda: oms.sign(tmp_path / "none", tmp_path / "key"),
    ):
        with pytest.raises(EnvironmentMissing, match=r"edgewright\[sign\]"):
            work()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key", "key.pub"]


def test_checking_a_signature_needs_no_library(signed, tmp_path):
    """Verified in a Python where importing cryptography fails."""
    (tmp_path / "a.pub").write_text(trust.pem(A.public))
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from pathlib import Path\n"
        "from edgewright.device import trust, verify\n"
        "keys = trust.load([Path(sys.argv[2])], None, None)\n"
        "print(verify.verified(Path(sys.argv[1]), keys).signers)\n"
    )
    words = [sys.executable, "-c", code, str(signed), str(tmp_path / "a.pub")]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == str([envelope.keyid(A.public)]), ran.stderr


AGENT = """#!/bin/sh
# A stand-in for a token: openssl keeps the key, this program speaks for it.
case "$2" in
public) openssl pkey -in "$1" -pubout ;;
sign) cat > "$1.message"; openssl pkeyutl -sign -rawin -inkey "$1" -in "$1.message"{tail} ;;
esac
"""


@pytest.mark.parametrize("tail", ["", " | base64"])
def test_a_command_keeps_the_key(plain, tmp_path, tail):
    """The signature of OpenSSL, an independent implementation, is the one we make ourselves."""
    signing.keygen(tmp_path / "key")
    agent = tmp_path / "agent"
    agent.write_text(AGENT.format(tail=tail))
    agent.chmod(0o755)
    by_agent = signing.signer(f"command:{agent} '{tmp_path / 'key'}'", {})
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    ours = signing.signer(str(tmp_path / "key"), {})
    one = sign(plain.read_bytes(), tmp_path / "1", by_agent)
    two = sign(plain.read_bytes(), tmp_path / "2", ours)
    assert one.read_bytes() == two.read_bytes()


def test_commands_that_fail(plain, tmp_path):
    with pytest.raises(EnvironmentMissing, match="no-such"):
        signing.signer("command:/no-such-program", {})
    with pytest.raises(EnvironmentMissing, match="exit status"):
        signing.signer("command:false", {})
    with pytest.raises(UsageError):
        signing.signer("command:", {})
    before = plain.read_bytes()
    for lie in (b"", bytes(64), b"not base64 at all!"):
        with pytest.raises(IntegrityError, match="no valid signature"):
            signing.sign_bundle(
                plain, [signing.Signer(A.public, lambda m, s=lie: s)], any_verdict=True
            )
    assert plain.read_bytes() == before
    assert [p.name for p in plain.parent.iterdir()] == [plain.name]


# What may be signed


def test_only_what_the_gate_passed_is_signed(tmp_path):
    for k, verdict in enumerate(("FAIL", "INCONCLUSIVE", None, "PASS")):
        reports = {"gate": {"verdict": verdict, "checks": [], "notes": []}} if verdict else {}
        path = make(tmp_path / str(k), reports=reports)
        if verdict == "PASS":
            signing.sign_bundle(path, [A])
            verify(path, trusting(A))
        else:
            with pytest.raises(UsageError, match="not for release"):
                signing.sign_bundle(path, [A])
            assert verified(path).signers == []


def test_what_is_not_whole_is_not_signed(plain, tmp_path):
    path = tmp_path / "x.bundle.tar"
    path.write_bytes(plain.read_bytes()[:-1])
    with pytest.raises(IntegrityError):
        signing.sign_bundle(path, [A], any_verdict=True)
    path.write_bytes(b"\xfd7zXZ\x00" + bytes(100))
    with pytest.raises(UsageError, match="compressed"):
        signing.sign_bundle(path, [A], any_verdict=True)
    with pytest.raises(BadInput, match="bundle not found"):
        signing.sign_bundle(tmp_path / "none.bundle.tar", [A])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# Trust files


def trust_file(folder: Path, name: str, version: int, threshold: int, keys, signers) -> Path:
    payload = trust.content(version, threshold, keys)
    path = folder / name
    path.write_bytes(enclosed(payload, *signers, kind=trust.TYPE))
    return path


def test_keys_rotate(signed, tmp_path):
    """A and B hand over to B and C: signed by both old ones and both new ones."""
    a, b, c = (trust.Key(public=s.public) for s in (A, B, C))
    old = trust_file(tmp_path, "1", 1, 2, [a, b], [A, B])
    new = trust_file(tmp_path, "2", 2, 2, [b, c], [A, B, C])
    verify(signed, trust.load([old], None, None))
    refuse(signed.read_bytes(), tmp_path, trust.load([new], None, None))
    first = trust.parse(old.read_bytes(), "old")
    trust.check_update(first, trust.parse(new.read_bytes(), "new"), None)
    faults = {
        "not newer": (1, 2, [b, c], [A, B, C]),
        "old file's keys.* 2 of the 2 keys": (2, 2, [b, c], [B, C]),  # A did not agree
        "its own keys.* signatures of 2": (2, 2, [b, c], [A, B]),  # C never showed its key
        "signatures of 1": (2, 1, [c], [A, B]),
    }
    for text, facts in faults.items():
        path = trust_file(tmp_path, "3", *facts)
        with pytest.raises(IntegrityError, match=text):
            trust.check_update(first, trust.parse(path.read_bytes(), "x"), None)


def test_keys_have_their_days(signed, tmp_path):
    now = 1_800_000_000
    a = trust.Key(public=A.public, not_before=now - DAY, not_after=now + DAY)
    path = trust_file(tmp_path, "1", 1, 1, [a], [A])
    verify(signed, trust.load([path], None, now))
    verify(signed, trust.load([path], None, None))
    for other in (now - DAY - 1, now + DAY):
        refuse(signed.read_bytes(), tmp_path, trust.load([path], None, other))
    with pytest.raises(IntegrityError, match="1970"):
        trust.load([path], None, 0)


def test_trust_files_that_are_wrong(tmp_path):
    a = trust.Key(public=A.public)
    good = trust.content(1, 1, [a])
    edits = [
        (b'"threshold":1', b'"threshold":0'),
        (b'"threshold":1', b'"threshold":2'),
        (b'"threshold":1', b'"threshold":true'),
        (b'"version":1', b'"version":0'),
        (b'"version":1', b'"version":1.0'),
        (b'"version":1', b'"version": 1'),
        (b'"name":""', b'"name":"\\u001b"'),
        (b'"not_after":null', b'"not_after":-1'),
        (b'"keyid":"', b'"keyid":"0'),
        (b"edgewright-trust/1", b"edgewright-trust/2"),
        (good, b"[" * 50_000),
        (good, b"null"),
    ]
    for old, new in edits:
        payload = good.replace(old, new)
        assert payload != good
        with pytest.raises(IntegrityError, match="trust file"):
            trust.parse(enclosed(payload, A, kind=trust.TYPE), "it")
    with pytest.raises(IntegrityError):
        trust.parse(enclosed(good, A), "it")
    with pytest.raises(BadInput):
        trust.content(1, 2, [a])
    with pytest.raises(BadInput):
        trust.content(1, 1, [a, a])
    (tmp_path / "t").write_bytes(enclosed(trust.content(1, 1, [a]), A, kind=trust.TYPE))
    (tmp_path / "a.pub").write_text(trust.pem(A.public))
    with pytest.raises(BadInput, match="one trust file alone"):
        trust.load([tmp_path / "t", tmp_path / "a.pub"], None, None)
    for name in ("t", "a.pub"):
        with pytest.raises(UsageError):
            trust.load([tmp_path / name], 0, None)
    with pytest.raises(UsageError):
        trust.load([tmp_path / "a.pub"], 2, None)
    with pytest.raises(UsageError):
        trust.load([], 2, None)
