"""A device that runs a release, and bundles as an enemy would send them: signed all the same."""

import hashlib
import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import rfc8785
from bundles import Members, pack

from edgewright import signing
from edgewright.device import envelope
from edgewright.device.envelope import MANIFEST_TYPE

NAME = "manifest.dsse.json"
DAY = 86400
NOW = 1_800_000_000  # what the device's clock says, in 2027
Build = Callable[["Lab"], bytes]


@dataclass
class Lab:
    """A device that runs a release, the key it trusts, another key, and the next release."""

    folder: Path
    key: signing.Signer
    stranger: signing.Signer
    members: Members  # of the next release, not signed
    other: Members  # of another model of the same size, signed by the same key
    words: list[str] = field(default_factory=list)  # options of the install
    now: list[float] = field(default_factory=list)  # the device's clock

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def may_write(self, path: str) -> bool:
        """Locks, and what the self-test's child prints: into a file without a name."""
        temporary = tempfile.gettempdir()
        locks = (f"{self.root}/lock", f"{self.root}/state.lock", "/dev/null", temporary)
        return path in locks or path.startswith(f"{temporary}/#")

    def signed(
        self,
        manifest: bytes | None = None,
        *signers: signing.Signer,
        files: Members | None = None,
        mtime: int = 0,
    ) -> bytes:
        """An archive of manifest, envelope and files; by default the good next release."""
        text = self.members[0][1] if manifest is None else manifest
        sign = signing.signatures(MANIFEST_TYPE, text, signers or (self.key,))
        head = [
            (self.members[0][0], text, 0o644),
            (NAME, envelope.write(MANIFEST_TYPE, text, sign), 0o644),
        ]
        return pack([*head, *(self.members[1:] if files is None else files)], mtime)

    def edited(self, edit: Callable[[dict], None], **more) -> bytes:
        """The next release with another manifest, its digest and signature made right."""
        return self.signed(respelt(self.members[0][1], edit), **more)

    def listed(self, path: str) -> bytes:
        """A release whose signed manifest and archive name the last file otherwise."""

        def edit(content):
            content["files"][-1]["path"] = path

        return self.edited(edit)

    def with_file(self, name: str, data: bytes) -> bytes:
        """A release with other content in a file, which the signed manifest tells."""

        def edit(content):
            digest = hashlib.sha256(data).hexdigest()
            for entry in content["files"]:
                if entry["path"] == name:
                    entry.update(size=len(data), sha256=digest)
            if name == content["model"]["path"]:
                content["model"].update(bytes=len(data), sha256=digest)

        files = [(n, data if n == name else d, m) for n, d, m in self.members[1:]]
        return self.edited(edit, files=files)


def respelt(text: bytes, edit: Callable[[dict], None]) -> bytes:
    """A manifest after an edit, canonical and with a right digest."""
    content = json.loads(text)
    edit(content)
    content.pop("digest", None)
    content["digest"] = hashlib.sha256(rfc8785.dumps(content)).hexdigest()
    return rfc8785.dumps(content)


def put(value, *keys) -> Callable[[dict], None]:
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


def flipped(name: str, place: int, header: bool = False) -> Build:
    """One bit of a member's content, or of its header, is another."""

    def build(lab: Lab) -> bytes:
        data = bytearray(lab.signed())
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            found = archive.getmember(name)
        data[(found.offset if header else found.offset_data) + place] ^= 1
        return bytes(data)

    return build


def flipped_header(place: int) -> Build:
    return flipped("model/model.onnx", place, header=True)


def enveloped(lab: Lab, data: bytes) -> bytes:
    """The good release with these bytes for its envelope."""
    return pack([lab.members[0], (NAME, data, 0o644), *lab.members[1:]])


def other_type(lab: Lab, renamed: bool) -> bytes:
    """The trusted key's signature over the manifest, made for a trust file."""
    kind, text = "application/vnd.edgewright.trust+json", lab.members[0][1]
    data = envelope.write(kind, text, signing.signatures(kind, text, [lab.key]))
    return enveloped(lab, data.replace(b"edgewright.trust", b"edgewright.manifest", renamed))


def without_pae(lab: Lab) -> bytes:
    """The trusted key's signature over the bare bytes."""
    text = lab.members[0][1]
    name = envelope.keyid(lab.key.public)
    return enveloped(lab, envelope.write(MANIFEST_TYPE, text, {name: lab.key.sign(text)}))


def confused(lab: Lab) -> bytes:
    """The stranger's signature under the trusted key's name."""
    text = lab.members[0][1]
    made = signing.signatures(MANIFEST_TYPE, text, [lab.stranger])
    name = envelope.keyid(lab.key.public)
    return enveloped(
        lab, envelope.write(MANIFEST_TYPE, text, dict.fromkeys([name], *made.values()))
    )


def unpacked(data: bytes) -> Members:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [(m.name, archive.extractfile(m).read(), m.mode) for m in archive.getmembers()]


def typed(lab: Lab, letter: bytes) -> bytes:
    """The good release, one header with another type flag and a right checksum."""
    data = bytearray(lab.signed())
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        at = archive.getmember("runtime/lock.txt").offset
    data[at + 156 : at + 157] = letter
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def sized(lab: Lab, size: int) -> bytes:
    """Manifest and header say that the last file has this size; its bytes are what they were."""
    name, data, _ = lab.members[-1]

    def edit(content):
        content["files"][-1]["size"] = size

    archive = bytearray(lab.edited(edit))
    at = archive.rindex(name.encode().ljust(100, b"\0"))
    archive[at + 124 : at + 136] = b"%011o\0" % size
    archive[at + 148 : at + 156] = b" " * 8
    archive[at + 148 : at + 156] = b"%06o\0 " % sum(archive[at : at + 512])
    assert size != len(data)
    return bytes(archive)


def endless(lab: Lab) -> bytes:
    """A small xz file that unpacks to the good release and 256 MiB of zeros behind it."""
    packer = lzma.LZMACompressor(preset=0)
    parts = [packer.compress(lab.signed())]
    parts += [packer.compress(bytes(1 << 20)) for _ in range(256)]
    return b"".join([*parts, packer.flush()])


def dated(made: int, expires: int | None) -> Build:
    def edit(content):
        content.update(source_date_epoch=made, expires=expires)

    return lambda lab: lab.edited(edit, mtime=made)


def at_1970(lab: Lab) -> bytes:
    lab.now[0] = 0.0
    return dated(0, NOW + DAY)(lab)


def weaker(lab: Lab) -> bytes:
    """A signed release whose model computes something else than its golden outputs."""
    lab.words = []  # with the self-test
    model = onnx.load_from_string({n: d for n, d, _ in lab.members}["model/model.onnx"])
    model.graph.node[1].op_type = "Neg"
    return lab.with_file("model/model.onnx", model.SerializeToString())


def mode(bits: int) -> Build:
    """A listed file has other permission bits."""
    return holds(
        lambda files: [(n, d, bits if n == "runtime/lock.txt" else m) for n, d, m in files]
    )


def cut(share: float) -> Build:
    """The good release, of which only the first part came."""

    def build(lab: Lab) -> bytes:
        data = lab.signed()
        return data[: int(share * len(data))]

    return build


def says(value, *keys) -> Build:
    """The signed manifest says this."""
    return lambda lab: lab.edited(put(value, *keys))


def lists(path: str) -> Build:
    """Manifest and archive name the last file so."""
    return lambda lab: lab.listed(path)


def holds(change: Callable[[Members], Members]) -> Build:
    """The archive holds other files than the signed manifest lists."""
    return lambda lab: lab.signed(files=change(lab.members[1:]))


def swapped(kind: bytes, layout: int = tarfile.USTAR_FORMAT, **facts) -> Build:
    """The good release, one listed file replaced by a member that Python's tarfile writes."""

    def build(lab: Lab) -> bytes:
        data = lab.signed()
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            old = archive.getmember("runtime/lock.txt")
        info = tarfile.TarInfo(old.name)
        info.size, info.mode, info.type = 0, 0o644, kind
        for key, value in facts.items():
            setattr(info, key, value)
        end = old.offset_data + old.size + -old.size % 512
        return data[: old.offset] + info.tobuf(layout) + data[end:]

    return build


def signs(change: Callable[[bytes], bytes]) -> Build:
    """The trusted key signs other bytes for a manifest."""
    return lambda lab: lab.signed(change(lab.members[0][1]))


def spells(old: bytes, new: bytes) -> Build:
    """The trusted key signs a manifest in another spelling."""
    return signs(lambda text: text.replace(old, new))
