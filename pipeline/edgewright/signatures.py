"""The signatures on bundles that lie where a build will write: kept, or their loss is told."""

from dataclasses import dataclass
from pathlib import Path

from edgewright.device.verify import verified
from edgewright.errors import EdgewrightError


@dataclass(frozen=True)
class Signed:
    """What was signed (a manifest's bytes), and the keyids of who says to have done it."""

    manifest: bytes
    signers: list[str]


def signed_in(paths: list[Path]) -> dict[str, Signed]:
    """By name, those of the bundles that are whole and signed."""
    found = {}
    for path in paths:
        try:
            one = verified(path)
        except EdgewrightError:
            continue  # nothing of it could be kept
        if one.signers:
            found[path.name] = Signed(one.manifest_bytes, one.signers)
    return found


def is_still(path: Path, before: Signed | None, source: Path) -> bool:
    """Whether `path` is the bundle in `source` with the signatures that it had before."""
    if before is None or not path.exists():
        return False
    return verified(source).manifest_bytes == before.manifest


def farewell(name: str, before: Signed) -> str:
    """What a person must know who had signed the bundle that a new one replaces."""
    who = ", ".join(before.signers)
    return (
        f"{name} was signed by {who}; what it is built from has changed, so the new one is without "
        "that signature: sign it with --sign or `edgewright sign`"
    )
