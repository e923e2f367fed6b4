"""Files are written whole, and only where a file can be."""

import os
from pathlib import Path

import pytest

from edgewright.errors import UsageError
from edgewright.files import check_writable, write_atomic


def test_a_file_takes_no_folders_and_no_devices_place(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # stands for /dev/null, which must not become a file either
    for name, found in (("", "a folder"), ("pipe", "a device, pipe or socket")):
        for write in (lambda p: write_atomic(p, b"x"), lambda p: check_writable(p, str(p))):
            with pytest.raises(UsageError, match=rf"expected the name of a file .* found {found}"):
                write(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written_is_known_before_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    check_writable(tmp_path / "file", "-o")  # an old result may be replaced
    check_writable(tmp_path / "new" / "deep" / "x.onnx", "-o")
    for path in (tmp_path / "file" / "x.onnx", Path("/proc/x.onnx")):
        with pytest.raises(UsageError, match=r"-o .*expected a file that can be written"):
            check_writable(path, f"-o {path}")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
