"""The signature beside a manifest: a DSSE envelope in one spelling, and who must have signed it.

DSSE v1 (github.com/secure-systems-lab/dsse): what is signed is PAE(type, payload), so a signature
over a manifest is never one over anything else. Only Ed25519 (RFC 8032) is known; a keyid is the
SHA-256 of the raw public key. Nothing but the standard library is needed: a device reads this.

An envelope is taken apart by one pattern and spelt again, so no JSON parser meets bytes that
nobody has vouched for.
"""

import base64
import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from edgewright.device import ed25519
from edgewright.errors import IntegrityError

MANIFEST_TYPE = "application/vnd.edgewright.manifest+json"
MAX_SIGNATURES = 16
FORMAT_BORN = 1767225600  # 2026-01-01: a clock before that stands still or was never set
MAX_BYTES = 2 << 20  # base64 of the longest manifest and all signatures
SIGNATURE = re.compile(rb'\{"keyid":"([0-9a-f]{64})","sig":"([A-Za-z0-9+/]{86}==)"\}')
ENVELOPE = re.compile(
    rb'\{"payload":"([A-Za-z0-9+/]*={0,2})","payloadType":"([a-z0-9./+-]{1,100})",'
    rb'"signatures":\[(' + SIGNATURE.pattern + rb"(?:," + SIGNATURE.pattern + rb")*)\]\}"
)


@dataclass(frozen=True)
class Trust:
    """The public keys whose signature counts (raw, by keyid), and how many must have signed.

    now: seconds since 1970 to judge dates by, None where no clock can be trusted.
    """

    keys: Mapping[str, bytes]
    threshold: int = 1
    now: int | None = None


def keyid(public: bytes) -> str:
    """The name of a raw public key (32 bytes)."""
    return hashlib.sha256(public).hexdigest()


def pae(kind: str, payload: bytes) -> bytes:
    """The bytes that are signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)


def write(kind: str, payload: bytes, signatures: Mapping[str, bytes]) -> bytes:
    """The envelope, canonical JSON (RFC 8785): no spaces, signatures sorted by keyid."""
    rows = b",".join(
        b'{"keyid":"%b","sig":"%b"}' % (name.encode(), base64.b64encode(signatures[name]))
        for name in sorted(signatures)
    )
    return b'{"payload":"%b","payloadType":"%b","signatures":[%b]}' % (
        base64.b64encode(payload),
        kind.encode(),
        rows,
    )


def read(data: bytes, kind: str) -> tuple[bytes, dict[str, bytes]]:
    """Payload and signatures by keyid; IntegrityError for anything that `write` does not make."""
    if len(data) > MAX_BYTES:
        refuse(f"at most {MAX_BYTES} bytes", str(len(data)))
    parts = ENVELOPE.fullmatch(data)
    if parts is None:
        refuse("a DSSE envelope in canonical form", "something else")
    if parts[2] != kind.encode():
        refuse(f"payload type {kind}", parts[2].decode())
    rows = SIGNATURE.findall(parts[3])
    if len(rows) > MAX_SIGNATURES:
        refuse(f"at most {MAX_SIGNATURES} signatures", str(len(rows)))
    signatures = {name.decode(): base64.b64decode(sig) for name, sig in rows}
    try:
        payload = base64.b64decode(parts[1], validate=True)
    except ValueError:
        refuse("base64", "something else")
    if write(kind, payload, signatures) != data:
        refuse("a DSSE envelope in canonical form", "another spelling, or one key twice")
    return payload, signatures


def check(data: bytes | None, manifest: bytes, trust: Trust | None) -> list[str]:
    """Who says to have signed the manifest; with `trust` who did, of the keys it names.

    `data`: the envelope, None where there is none. IntegrityError where it holds another
    payload, where fewer trusted keys signed than must, or where one's signature is wrong.
    """
    if data is None:
        if trust is not None:
            refuse(f"signatures of {trust.threshold} trusted keys", "none")
        return []
    payload, signatures = read(data, MANIFEST_TYPE)
    if payload != manifest:
        refuse("the bundle's own manifest in it", "another one")
    if trust is None:
        return sorted(signatures)
    return checked(MANIFEST_TYPE, payload, signatures, trust)


def checked(kind: str, payload: bytes, signatures: Mapping[str, bytes], trust: Trust) -> list[str]:
    """The trusted keys that signed the payload; IntegrityError where they are too few.

    Keys that are not trusted count for nothing; a wrong signature of a trusted one is an attack
    or damage, however many others are right.
    """
    message = pae(kind, payload)
    found = sorted(set(signatures) & set(trust.keys))
    for name in found:
        if not ed25519.verify(trust.keys[name], signatures[name], message):
            refuse(f"a signature of key {name} over this content", "another one")
    if len(found) < trust.threshold:
        others = ", ".join(sorted(set(signatures) - set(trust.keys))) or "no other key"
        refuse(
            f"signatures of {trust.threshold} of the {len(trust.keys)} keys you trust",
            f"{len(found)} (signed also by: {others})",
        )
    return found


def check_dates(made: int, expires: int | None, now: int | None) -> None:
    """IntegrityError outside the time from `made` to `expires`, by the clock `now` if any."""
    if now is None:
        return
    if expires is not None:
        check_clock(now)
    if now < made:
        raise IntegrityError(
            "the bundle is from the future",
            expected=f"a clock at {day(made)} or later",
            found=day(now),
            hint="set this machine's clock; --no-clock where it has none to trust",
        )
    if expires is not None and now >= expires:
        raise IntegrityError(
            "the bundle has expired",
            expected=f"a day before {day(expires)}",
            found=day(now),
            hint="install a later release",
        )


def check_clock(now: int) -> None:
    """IntegrityError where the clock shows a time before this format existed."""
    if now < FORMAT_BORN:
        raise IntegrityError(
            "dates cannot be judged by this machine's clock",
            expected=f"{day(FORMAT_BORN)} or later",
            found=day(now),
            hint="set the clock; --no-clock where there is none to trust",
        )


def day(seconds: int) -> str:
    """The day (UTC) of a time, as ISO 8601."""
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def refuse(expected: str, found: str) -> NoReturn:
    raise IntegrityError(
        "the signature is refused",
        expected=expected,
        found=found,
        hint="fetch it again, from the source you trust; do not use this one",
    )
