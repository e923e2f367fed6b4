"""Which keys count: public key files, and trust files that name several and replace each other.

A trust file is a DSSE envelope around canonical JSON: a version that grows, the keys with the
days from and until which each is valid, and how many must have signed a bundle. A new one must
be signed by as many keys of the old one as the old one asks for, and by as many of its own, as
The Update Framework rotates its root (TUF 1.0, section 5.3). Only the standard library is used.
"""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewright.bundle import canonical
from edgewright.device import envelope
from edgewright.device.envelope import Trust
from edgewright.errors import BadInput, IntegrityError, UsageError
from edgewright.files import write_atomic

TYPE = "application/vnd.edgewright.trust+json"
SCHEMA = "edgewright-trust/1"
MAX_BYTES = 1 << 16
# The DER around the 32 bytes of an Ed25519 public key (RFC 8410, section 4).
DER = bytes.fromhex("302a300506032b6570032100")
PEM = re.compile(
    r"\s*-----BEGIN PUBLIC KEY-----\s+([A-Za-z0-9+/=\s]+?)\s*-----END PUBLIC KEY-----\s*"
)


@dataclass(frozen=True, kw_only=True)
class Key:
    """A trusted key; the days (seconds since 1970) between which it is valid, None: open."""

    public: bytes
    name: str = ""
    not_before: int | None = None
    not_after: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrustFile:
    """What a trust file says, its bytes, and the signatures on it by keyid."""

    version: int
    threshold: int
    keys: tuple[Key, ...]
    payload: bytes
    signatures: dict[str, bytes]

    def trust(self, now: int | None) -> Trust:
        """The keys that are valid at `now` (None: whatever their days), and the threshold."""
        if now is not None and any((k.not_before, k.not_after) != (None, None) for k in self.keys):
            envelope.check_clock(now)
        valid = [k for k in self.keys if now is None or is_valid(k, now)]
        return Trust({envelope.keyid(k.public): k.public for k in valid}, self.threshold, now)


def is_valid(key: Key, now: int) -> bool:
    return (key.not_before or 0) <= now and (key.not_after is None or now < key.not_after)


def public_key(path: Path) -> bytes:
    """The raw Ed25519 key (32 bytes) in a PEM file; BadInput for anything else."""
    return parse_public(read(path).decode("utf-8", "replace"), str(path))


def parse_public(text: str, where: str) -> bytes:
    """The raw key in PEM text."""
    if "PRIVATE KEY" in text:
        raise UsageError(
            f"{where} holds a private key",
            expected="the public key, which `edgewright keygen` writes beside it as NAME.pub",
        )
    found = PEM.fullmatch(text)
    try:
        der = base64.b64decode("".join(found[1].split()), validate=True) if found else b""
    except ValueError:
        der = b""
    if len(der) != len(DER) + 32 or not der.startswith(DER):
        raise BadInput(
            f"public key {where}",
            expected="one Ed25519 public key in PEM",
            found="another kind of key" if found else "something else",
            hint="make a key with: edgewright keygen -o NAME",
        )
    return der[len(DER) :]


def pem(public: bytes) -> str:
    """A raw Ed25519 key as PEM."""
    body = base64.b64encode(DER + public).decode()
    return f"-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n"


def read(path: Path) -> bytes:
    """A small file; BadInput where it is missing or not small."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise BadInput(f"key or trust file not found: {path}", hint="check the path") from None
    if len(data) > MAX_BYTES:
        raise BadInput(f"{path}", expected="a key or a trust file", found="a long file")
    return data


def load(paths: Sequence[Path], threshold: int | None, now: int | None) -> Trust | None:
    """What the user trusts: public keys, or one trust file; None where nothing is named."""
    if not paths:
        if threshold is not None:
            raise UsageError("--threshold without --trust", hint="name the keys with --trust")
        return None
    others = [path for path in paths if not read(path).lstrip().startswith(b"-----")]
    if others and len(paths) > 1:
        raise BadInput(
            f"{others[0]} is no public key",
            expected="public keys in PEM, or one trust file alone",
            found=f"{len(paths)} files",
        )
    if others:
        file = parse(read(paths[0]), str(paths[0]))
        if threshold is not None and threshold < file.threshold:
            raise UsageError(
                f"--threshold {threshold}",
                expected=f"at least {file.threshold}, which {paths[0]} asks for",
            )
        trust = file.trust(now)
        return Trust(trust.keys, threshold or file.threshold, now)
    keys = {envelope.keyid(k): k for k in map(public_key, paths)}
    wanted = 1 if threshold is None else threshold
    if not 1 <= wanted <= len(keys):
        raise UsageError(
            f"--threshold {threshold}", expected=f"1 to {len(keys)}, as many keys as you trust"
        )
    return Trust(keys, wanted, now)


def content(version: int, threshold: int, keys: Sequence[Key]) -> bytes:
    """The signed part of a trust file; BadInput where it could never be met."""
    rows: list[dict[str, Any]] = [
        {
            "keyid": envelope.keyid(key.public),
            "public": base64.b64encode(key.public).decode(),
            "name": key.name,
            "not_before": key.not_before,
            "not_after": key.not_after,
        }
        for key in keys
    ]
    rows.sort(key=lambda row: str(row["keyid"]))
    value = {"schema": SCHEMA, "version": version, "threshold": threshold, "keys": rows}
    if fault := fault_of(value):
        raise BadInput("this trust file could not be used", found=fault)
    return canonical.dumps(value)


def parse(data: bytes, where: str) -> TrustFile:
    """A trust file whose form is right; who signed it is for `check_update` to say."""
    try:
        payload, signatures = envelope.read(data, TYPE)
        value = json.loads(payload)
        if canonical.dumps(value) != payload:
            raise ValueError("not in canonical form")
    except (IntegrityError, ValueError, RecursionError):
        raise IntegrityError(
            f"{where} is no trust file",
            expected="what `edgewright trust write` made, unchanged",
            found="something else",
            hint="fetch it again, from the source you trust",
        ) from None
    if fault := fault_of(value):
        raise IntegrityError(f"trust file {where}", expected=SCHEMA, found=fault)
    keys = tuple(
        Key(
            public=base64.b64decode(row["public"]),
            name=row["name"],
            not_before=row["not_before"],
            not_after=row["not_after"],
        )
        for row in value["keys"]
    )
    return TrustFile(
        version=value["version"],
        threshold=value["threshold"],
        keys=keys,
        payload=payload,
        signatures=signatures,
    )


def fault_of(value: Any) -> str:
    """What is wrong with the signed part of a trust file; empty where nothing is."""
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        return "another format"
    if set(value) != {"schema", "version", "threshold", "keys"}:
        return "other keys than schema, version, threshold and keys"
    version, threshold, keys = value["version"], value["threshold"], value["keys"]
    if not is_count(version) or version < 1:
        return "a version that is no whole number from 1 on"
    if not isinstance(keys, list) or not 1 <= len(keys) <= envelope.MAX_SIGNATURES:
        return f"not 1 to {envelope.MAX_SIGNATURES} keys"
    if not is_count(threshold) or not 1 <= threshold <= len(keys):
        return f"a threshold that is not 1 to {len(keys)}, the number of keys"
    for row in keys:
        if fault := row_fault(row):
            return fault
    names = [row["keyid"] for row in keys]
    return "" if names == sorted(set(names)) else "keys that are not sorted, or one key twice"


def row_fault(row: Any) -> str:
    """What is wrong with one key of a trust file."""
    fields = {"keyid", "public", "name", "not_before", "not_after"}
    if not isinstance(row, dict) or set(row) != fields:
        return f"a key without exactly {', '.join(sorted(fields))}"
    if not isinstance(row["name"], str) or not re.fullmatch(r"[ -~]{0,100}", row["name"]):
        return "a name that is no short plain text"
    for end in ("not_before", "not_after"):
        if row[end] is not None and not is_count(row[end]):
            return f"a {end} that is no time"
    try:
        public = base64.b64decode(row["public"], validate=True)
    except (ValueError, TypeError):
        return "a public key that is no base64"
    if len(public) != 32 or base64.b64encode(public).decode() != row["public"]:
        return "a public key that is not 32 bytes"
    return "" if envelope.keyid(public) == row["keyid"] else "a keyid of another key"


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def check_update(old: TrustFile, new: TrustFile, now: int | None) -> None:
    """IntegrityError unless `new` may take the place of `old`.

    Enough keys of the old file, valid now, must have signed it, enough of its own must have,
    and its version must be higher.
    """
    if new.version <= old.version:
        raise IntegrityError(
            "the new trust file is not newer",
            expected=f"above {old.version}",
            found=str(new.version),
        )
    for whose, keys in (("the old file's keys", old.trust(now)), ("its own keys", new.trust(now))):
        try:
            envelope.checked(TYPE, new.payload, new.signatures, keys)
        except IntegrityError as error:
            raise IntegrityError(f"the new trust file, by {whose}: {error}") from None


def update(old: Path, new: Path, now: int | None) -> TrustFile:
    """Put the trust file `new` in the place of `old`, all or nothing; what it says.

    IntegrityError, and `old` as it was, where it may not take that place.
    """
    data = read(new)
    follower = parse(data, str(new))
    check_update(parse(read(old), str(old)), follower, now)
    write_atomic(old, data)
    return follower
