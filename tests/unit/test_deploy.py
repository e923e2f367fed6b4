"""deploy: a bundle on its way to a device behind SSH, which is this machine (see loopback.py)."""

from pathlib import Path

import pytest
from bundles import make
from loopback import loopback

from edgewright.deploy import Wish, deploy
from edgewright.errors import IntegrityError, UsageError
from edgewright.target import load_target

ANYBODY = Wish(allow_unsigned=True)


@pytest.fixture
def device(tmp_path):
    (tmp_path / "device").mkdir()
    with loopback(tmp_path / "device") as server:
        yield server


def test_a_bundle_is_installed_proven_and_refused_there(device, tmp_path):
    bundle, root, target = make(tmp_path / "made"), tmp_path / "root", device.profile()
    with pytest.raises(UsageError, match=r"device loopback .*nobody is trusted"):
        deploy(bundle, target, str(root), Wish())
    first = deploy(bundle, target, str(root), ANYBODY)
    assert first["action"] == "installed" and first["self_test"]["vectors"] == 5
    runs = (root / "current").readlink()
    again = deploy(bundle, target, str(root), ANYBODY)
    assert again["action"] == "already installed" and again["self_test"]["vectors"] == 5
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"device loopback .*"):
        deploy(tmp_path / "bad.tar", target, str(root), ANYBODY)
    assert (root / "current").readlink() == runs
    assert device.left() == []
    assert not list(device.home.glob("store/*"))  # nothing of it is kept beside the install


def test_what_is_no_device_or_no_place_is_refused_here(tmp_path):
    bundle = make(tmp_path / "made")
    with pytest.raises(UsageError, match="not a device behind SSH"):
        deploy(bundle, load_target("cpu"), "/opt/x", ANYBODY)
    board = load_target(str(Path(__file__).parents[2] / "examples/ssh/board.toml"))
    with pytest.raises(UsageError, match="an absolute path on the device"):
        deploy(bundle, board, "opt/x", ANYBODY)
