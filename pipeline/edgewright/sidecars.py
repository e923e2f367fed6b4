"""The files beside an ONNX model that hold its weights."""

import mmap
import re
from pathlib import Path

LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f]|[\x80-\xff][\x01-\x7f])")


def external_data(path: Path) -> list[Path]:
    """Files beside or below an ONNX file that it names as holding its weights.

    Found by the bytes of the protobuf field, so that nothing untrusted is parsed here; what
    the model may really read is decided where it is admitted.
    """
    if path.suffix != ".onnx" or not path.is_file() or path.stat().st_size == 0:
        return []
    found = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for match in LOCATION.finditer(data):
            size = match[1]
            length = size[0] if len(size) == 1 else (size[0] & 0x7F) | size[1] << 7
            name = Path(data[match.end() : match.end() + length].decode("utf-8", "replace"))
            inside = not name.is_absolute() and ".." not in name.parts and "\0" not in str(name)
            if inside and (path.parent / name).is_file():
                found.add(path.parent / name)
    return sorted(found)
