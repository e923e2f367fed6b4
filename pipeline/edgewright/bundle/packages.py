"""The Python packages that the golden vectors were made with, for a device to install the same.

What an installation knows of itself: version, wheel tags, licence, and the digests of all its
files (RECORD, as PEP 376 and the wheel format have it). The SHA-256 of the wheel file itself is
known only where this project downloaded it (emulated targets); elsewhere the lock says so, and a
device compares the digest over RECORD, which is the same for every installation of one wheel. A
device behind SSH tells these facts of itself, but no licence.
"""

import importlib.metadata
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgewright.runtime import guest
from edgewright.runtime.providers import own_build, plugin_package
from edgewright.runtime.ssh import link
from edgewright.runtime.ssh.wheels import record_digest, wheel_name
from edgewright.target import Target


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package; None or empty: not known here."""

    name: str
    version: str
    wheel: str = ""
    wheel_sha256: str | None = None
    record_sha256: str | None = None
    license: str = ""
    texts: dict[str, bytes] = field(default_factory=dict)


def packages(target: Target) -> list[Package]:
    """numpy, the runtime and its plug-in, as the target runs them."""
    wanted = {"numpy": ("numpy",), "onnxruntime": guest.ORT_PACKAGES}
    if target.run.how == "ssh":
        told = [link.package(link.facts(target), what) for what in wanted]
        return [Package(**one) for one in told if one is not None]
    site, hashes = None, {}
    if target.run.how == "emulate" and target.device.arch == "aarch64":
        folder = guest.guest_folder()
        site = folder / "site"
        hashes = json.loads((folder / "guest.json").read_text()).get("sha256", {})
    own = None
    if (build := own_build(target)) is not None:
        own = build / "site"
        hashes = json.loads((build / "build.json").read_text())["sha256"]
    if (plugin := plugin_package(target)) is not None:
        wanted[plugin] = (plugin,)
    found = []
    for what, names in wanted.items():
        place = own if own and what == "onnxruntime" else site
        package = next((p for name in names if (p := installed(name, place, hashes))), None)
        if package is not None:
            found.append(package)
    return found


def installed(name: str, site: Path | None, hashes: dict[str, str]) -> Package | None:
    """What the installation says; in the folder `site`, None: in this Python."""
    where = [str(site)] if site else sys.path
    dist = next(iter(importlib.metadata.distributions(name=name, path=where)), None)
    if dist is None:
        return None
    meta = dist.metadata
    wheel = wheel_name(meta["Name"], dist.version, dist.read_text("WHEEL") or "")
    return Package(
        name=name,
        version=dist.version,
        wheel=wheel,
        wheel_sha256=hashes.get(wheel),
        record_sha256=record_digest(dist.read_text("RECORD")),
        license=stated(meta, "License-Expression") or stated(meta, "License"),
        texts=license_texts(dist),
    )


def stated(meta: Any, key: str) -> str:
    """A licence's name, empty where the package states none; some put the whole text there."""
    return (meta[key] or "").strip().partition("\n")[0][:100] if key in meta else ""


def license_texts(dist: importlib.metadata.Distribution) -> dict[str, bytes]:
    """The package's own licence text, by the name it gets in the bundle."""
    files = [f for f in dist.files or [] if f.name.upper().startswith(("LICENSE", "COPYING"))]
    if not files:
        return {}
    first = min(files, key=lambda f: (len(f.parts), str(f)))
    return {f"{dist.metadata['Name']}.txt": Path(str(dist.locate_file(first))).read_bytes()}


def lock(found: Iterable[Package]) -> bytes:
    """The packages as pip reads them (`pip install -r`), what is known of each above its line."""
    lines = ["# What the golden outputs were made with."]
    for one in found:
        lines.append("#")
        lines.append(f"# wheel: {one.wheel or 'not known'}")
        if one.record_sha256:
            lines.append(f"# files of the wheel (RECORD): sha256:{one.record_sha256}")
        if one.wheel_sha256:
            lines.append(f"{one.name}=={one.version} --hash=sha256:{one.wheel_sha256}")
        else:
            lines.append("# sha256 of the wheel: not known, it was installed already")
            lines.append(f"{one.name}=={one.version}")
    return ("\n".join(lines) + "\n").encode()
