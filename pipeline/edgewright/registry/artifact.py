"""A bundle as an OCI artifact: a blob for each member, so that releases share what is alike.

The artifact's manifest (OCI image specification 1.1) lists them in the bundle's order with the
little that a digest does not say: name, mode and time. So the bundle comes back bit for bit; and
it is verified as it comes, manifest and signature first, like any other.
"""

import hashlib
import http.client
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgewright.bundle import manifest, tarball
from edgewright.device.envelope import Trust
from edgewright.device.verify import Verified, open_bundle, verified, walk
from edgewright.errors import BadInput, EnvironmentMissing, IntegrityError, UsageError
from edgewright.files import replacing
from edgewright.registry.connection import Registry, parsed, shown, small

Json = dict[str, Any]
KIND = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT = "application/vnd.edgewright.bundle.v1"
LAYER = "application/vnd.edgewright.bundle.file.v1"
EMPTY = b"{}"
TITLE, VERSION = "org.opencontainers.image.title", "org.opencontainers.image.version"
MODE, TIME = "vnd.edgewright.mode", "vnd.edgewright.time"
MAX_LAYERS = 4098  # the files that a bundle's manifest may list, itself and its signature


@dataclass(frozen=True)
class Layer:
    """A member of the bundle and the SHA-256 (hex) of its content."""

    member: tarball.Member
    digest: str


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def push(bundle: Path, registry: Registry) -> Json:
    """Upload a bundle that is whole under the registry's tag; {"reference", "digest", "sent"}.

    What the repository has already is not sent again.
    """
    if not registry.place.tag or registry.place.digest:
        raise UsageError(
            f"push to {registry.place}",
            expected="a tag, and no digest: that is for the registry to say",
            hint=f"name it {registry.place.host}/{registry.place.name}:TAG",
        )
    found = verified(bundle)
    digests = {f["path"]: f["sha256"] for f in found.manifest["files"]}
    digests[manifest.PATH] = digest_of(found.manifest_bytes)
    if found.envelope is not None:
        digests[manifest.SIGNATURE] = digest_of(found.envelope)
    layers: list[Layer] = []
    sent = 0
    with open_bundle(bundle) as stream:
        while member := tarball.read_member(stream):
            layer = Layer(member, digests[member.path])
            layers.append(layer)
            content = tarball.read_content(stream, member)
            if not has(registry, layer.digest):
                upload(registry, layer.digest, member.size, content)
                sent += member.size
            for _ in content:
                pass  # what was not sent is passed over
    if not has(registry, digest_of(EMPTY)):
        upload(registry, digest_of(EMPTY), len(EMPTY), iter([EMPTY]))
    data = document(found, layers)
    tag = registry.place.tag
    registry.ask(
        "PUT", f"manifests/{tag}", {"Content-Type": KIND}, data, good=(200, 201, 202)
    ).close()
    digest = digest_of(data)
    return {
        "reference": f"{registry.place}@sha256:{digest}",
        "digest": f"sha256:{digest}",
        "bytes": sum(layer.member.size for layer in layers),
        "sent": sent,
    }


def document(found: Verified, layers: list[Layer]) -> bytes:
    """The artifact's manifest: the same bundle gives the same bytes."""
    facts = found.manifest
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": KIND,
            "artifactType": ARTIFACT,
            "config": descriptor("application/vnd.oci.empty.v1+json", digest_of(EMPTY), len(EMPTY)),
            "layers": [
                {
                    **descriptor(LAYER, layer.digest, layer.member.size),
                    "annotations": {TITLE: layer.member.path, MODE: f"{layer.member.mode:04o}"},
                }
                for layer in layers
            ],
            "annotations": {
                TITLE: f"{facts['name']} for {facts['target']}",
                VERSION: facts["version"],
                TIME: str(facts["source_date_epoch"]),
            },
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode()


def descriptor(kind: str, digest: str, size: int) -> Json:
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": size}


def has(registry: Registry, digest: str) -> bool:
    """Whether the repository has a blob."""
    answer = registry.ask("HEAD", f"blobs/sha256:{digest}", good=(200, 404))
    answer.close()
    return answer.status == 200


def upload(registry: Registry, digest: str, size: int, content: Iterator[bytes]) -> None:
    """Send a blob in one piece; the registry checks the digest."""
    begun = registry.ask("POST", "blobs/uploads/", {"Content-Length": "0"}, good=(202,))
    place = begun.headers.get("Location", "")
    begun.close()
    more = "&" if "?" in place else "?"
    registry.ask(
        "PUT",
        f"{place}{more}digest=sha256:{digest}",
        {"Content-Length": str(size), "Content-Type": "application/octet-stream"},
        content,
        good=(201,),
    ).close()


def pull(registry: Registry, out: Path, trust: Trust | None) -> tuple[Verified, str]:
    """Write the bundle at a reference to `out`, all or nothing; it, and the artifact's digest.

    Every blob is held against its digest, the whole against the bundle's own manifest and, with
    `trust`, its signature, before any blob behind these is fetched.
    """
    place = registry.place
    if not place.tag and not place.digest:
        raise UsageError(f"pull {place}", expected="a tag or a digest")
    name = f"sha256:{place.digest}" if place.digest else place.tag
    data = small(registry.ask("GET", f"manifests/{name}", {"Accept": KIND}))
    digest = digest_of(data)
    if place.digest and digest != place.digest:
        raise IntegrityError(f"{place}", expected=f"sha256:{place.digest}", found=digest)
    layers = listed(parsed(data, f"manifest of {place}"), str(place))
    with replacing(out) as temporary, temporary.open("xb") as file:
        # Raw reads end where a part does, so nothing is fetched before it is asked for.
        stream = io.BufferedReader(Parts(archive(registry, layers), file))
        found = walk(stream, lambda path, mode: nullcontext(), trust)
        file.flush()
        os.fsync(file.fileno())
    return found, f"sha256:{digest}"


def listed(value: Json, what: str) -> list[Layer]:
    """The members that an artifact's manifest speaks of.

    BadInput for an artifact of another type, IntegrityError for one of ours that is not sound.

    What it says is believed for no more than to write headers, which the bundle's own manifest
    then judges.
    """
    if (value.get("artifactType"), value.get("mediaType", KIND)) != (ARTIFACT, KIND):
        kind = value.get("artifactType") or value.get("mediaType")
        raise BadInput(
            f"{what} is no bundle",
            expected=f"an artifact of type {ARTIFACT}",
            found=shown(str(kind)),
        )
    try:
        mtime = number(value["annotations"][TIME])
        layers = [
            Layer(
                tarball.Member(
                    str(row["annotations"][TITLE]),
                    number(row["size"]),
                    number(row["annotations"][MODE], 8, 0o7777),
                    mtime,
                ),
                sha256(row["digest"]),
            )
            for row in value["layers"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{what} is no bundle", expected="names, sizes and digests", found=shown(repr(error))
        ) from None
    faults = [tarball.path_fault(one.member.path) for one in layers]
    if any(faults) or not 0 < len(layers) <= MAX_LAYERS:
        fault = next((fault for fault in faults if fault), f"{len(layers)} files")
        raise IntegrityError(f"{what} is no bundle", expected="safe paths", found=fault)
    return layers


def sha256(value: object) -> str:
    """The hex digits of a digest; ValueError for anything else, for it becomes part of a URL."""
    found = re.fullmatch(r"sha256:([0-9a-f]{64})", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"{value!r} is no SHA-256")
    return found[1]


def number(value: object, base: int = 10, most: int = tarball.MAX_NUMBER) -> int:
    """A number of a header; ValueError for anything else."""
    found = int(value, base) if isinstance(value, str) else value
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= most:
        raise ValueError(f"{value!r} is no number of a tar header")
    return found


def archive(registry: Registry, layers: list[Layer]) -> Iterator[bytes]:
    """The bundle's bytes, each blob fetched when its turn comes."""
    for layer in layers:
        yield tarball.header(layer.member)
        yield from blob(registry, layer)
        if fill := tarball.padding(layer.member.size):
            yield fill
    yield tarball.END


def blob(registry: Registry, layer: Layer) -> Iterator[bytes]:
    """The content of a blob; IntegrityError where it is not what the digest says."""
    answer = registry.ask("GET", f"blobs/sha256:{layer.digest}")
    whole, left = hashlib.sha256(), layer.member.size
    try:
        while left and (block := answer.read(min(left, tarball.READ))):
            whole.update(block)
            left -= len(block)
            yield block
        more = bool(answer.read(1))
    except (OSError, http.client.HTTPException) as error:
        raise EnvironmentMissing(
            "the registry broke off a blob", found=shown(str(error)), hint="pull again"
        ) from None
    finally:
        answer.close()
    if left or more or whole.hexdigest() != layer.digest:
        raise IntegrityError(
            f"{layer.member.path} from the registry is not what its digest says",
            expected=f"sha256:{layer.digest}",
            found=f"{'more' if more else 'fewer' if left else 'other'} bytes",
            hint="pull it again, from a registry you trust",
        )


class Parts(io.RawIOBase):
    """Pieces of bytes as a stream; what was read is written to a file, too."""

    def __init__(self, parts: Iterator[bytes], file: BinaryIO) -> None:
        self.parts = parts
        self.file = file
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Fill part of the buffer; 0 at the end."""
        while not self.ready:
            block = next(self.parts, None)
            if block is None:
                return 0
            self.file.write(block)
            self.ready = block
        part = self.ready[: len(buffer)]
        self.ready = self.ready[len(part) :]
        buffer[: len(part)] = part
        return len(part)
