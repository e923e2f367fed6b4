"""The device program as one file: the modules a device needs, in a zip that Python runs.

Only a device with Python's standard library is assumed; numpy and onnxruntime are for the
self-test. The same sources give the same bytes, stored as they are, so that anyone can read and
compare them: `unzip -p edgewright-device.pyz edgewright/device/install.py`.
"""

import io
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHEBANG = b"#!/usr/bin/env python3\n"
MAIN = "from edgewright.device.program import main\n\nmain()\n"
FILES = (
    "__init__.py",
    "errors.py",
    "files.py",
    "schema.py",
    "bundle/__init__.py",
    "bundle/canonical.py",
    "bundle/golden.py",
    "bundle/manifest.py",
    "bundle/schema/manifest.schema.json",
    "bundle/tarball.py",
    "bundle/transport.py",
    "device/__init__.py",
    "device/child.py",
    "device/delta.py",
    "device/ed25519.py",
    "device/envelope.py",
    "device/fit.py",
    "device/install.py",
    "device/program.py",
    "device/prove.py",
    "device/starts.py",
    "device/store.py",
    "device/trust.py",
    "device/verify.py",
    "runtime/__init__.py",
    "runtime/cpu.py",
    "runtime/session.py",
    "runtime/worker.py",
)


def program() -> bytes:
    """The whole program."""
    file = io.BytesIO(SHEBANG)
    file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        add(archive, "__main__.py", MAIN.encode())
        for name in FILES:
            add(archive, f"edgewright/{name}", (ROOT / name).read_bytes())
    return file.getvalue()


def add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """A member in one spelling: no time, no owner."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    archive.writestr(info, data)
