"""A whole build, and an install by the device program, on a device behind SSH whose CPU is ARM.

The device is this machine again (see loopback.py), but its Python is that of the emulated ARM
guest; so what comes back over SSH is what ARM code computed.
"""

import dataclasses
import json
import shlex
import tarfile

import numpy as np
import pytest
from conftest import write_tiny
from loopback import loopback

from edgewright.bundle import packages
from edgewright.errors import DeviceUnavailable, EnvironmentMissing
from edgewright.runtime import emulator, guest
from edgewright.runtime.launch import open_on_target
from edgewright.runtime.ssh import link
from edgewright.target import load_target

PROFILE = """\
[device]
arch = "aarch64"
isa = ["asimd", "asimddp"]
[int8]
activations = "int8"
"""


def interpreter(folder, launch):
    """A command that starts the guest's Python, as a device has one."""
    settings = {k: v for k, v in launch.env.items() if k.startswith("PYTHON")}
    words = ["env", *(f"{k}={v}" for k, v in settings.items()), *launch.python]
    folder.mkdir(exist_ok=True)
    path = folder / "python3"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    try:
        launch = emulator.launch(load_target("arm"))
    except EnvironmentMissing as error:
        pytest.skip(str(error))
    with loopback(folder) as server:
        python = interpreter(folder, launch)
        server.profiles = {"python": str(python), "emulated": True, "limit_s": 200}
        yield server


@pytest.fixture(scope="module")
def built(board, tmp_path_factory, edgewright):
    """The folder of a signed build on the board, and the public key."""
    folder = tmp_path_factory.mktemp("built")
    key = folder / "release"
    assert edgewright("keygen", "-o", key).code == 0
    profile = board.write_profile("board", PROFILE, **board.profiles)
    recipe = write_tiny(folder / "tiny")
    words = ("--target", profile, "--out", folder / "out", "--sign", key)
    ran = edgewright("build", recipe, *words, timeout=900)
    assert ran.code == 0, ran.err
    assert board.left() == []
    return folder / "out/board", f"{key}.pub", profile


def test_a_board_passes_the_whole_build(built):
    rows = json.loads((built[0] / "report.json").read_text())["stages"]
    stages = {row["stage"]: row["report"] for row in rows}
    assert stages["measure"]["emulated"] and stages["measure"]["host"]["arch"] == "aarch64"
    assert stages["measure"]["placement"]["nodes_by_kind"]["int8"] >= 4
    assert stages["validate"]["metric"]["shipped"]["retained"] >= 0.9


def test_the_lock_is_that_of_the_same_root_without_ssh(built):
    """All but the digests of the wheel files, which the device does not know."""
    (bundle,) = built[0].glob("*.bundle.tar")
    with tarfile.open(bundle) as archive:
        locked = archive.extractfile("runtime/lock.txt").read()
    here = packages.packages(load_target("arm"))
    assert [one.name for one in here] == ["numpy", "onnxruntime"]
    assert all("aarch64" in one.wheel and one.record_sha256 for one in here)
    unknown = [dataclasses.replace(one, wheel_sha256=None) for one in here]
    assert locked == packages.lock(unknown)


def test_the_facts_of_a_board_are_the_same_each_time(board):
    target = board.profile("board", PROFILE, **board.profiles)
    link.look(target)
    first = link.identity(target)
    link.look(target)
    assert link.identity(target) == first and len(first["packages"]) == 2


def test_the_device_program_installs_there_what_was_built(board, built, tmp_path, edgewright):
    folder, public, profile = built
    (bundle,) = folder.glob("*.bundle.tar")
    root = tmp_path / "root"
    words = ("--target", profile, "--root", root, "--trust", public, "--json")
    ran = edgewright("deploy", bundle, *words, timeout=900)
    assert ran.code == 0, ran.err
    assert ran.json["action"] == "installed" and ran.json["signers"]
    # The bits that the board gave the build are those that the installed model gives.
    assert ran.json["self_test"]["exact"] and ran.json["self_test"]["runtime"]["arch"] == "aarch64"
    assert (root / "current/model/model.onnx").is_file()
    assert board.left() == []


def test_one_owner_at_a_time_where_the_device_is_emulated(board, monkeypatch):
    """QEMU tells a process another time of its start than the kernel tells the next agent."""
    target = board.profile("held", PROFILE, **board.profiles)
    with link.held(target):
        monkeypatch.setenv(link.OWNER, "another build")
        with pytest.raises(DeviceUnavailable, match="leased"):
            link.look(target)
        monkeypatch.undo()
    assert board.left() == []


def test_an_instruction_that_the_cpu_lacks_is_a_sigill_there(board, built):
    """A Cortex-A53 that says it is an A76: onnxruntime believes it and runs what it has not."""
    lying = dataclasses.replace(load_target("arm").run, cpu_model="cortex-a53")
    launch = guest.guest_launch(guest.guest_folder(), emulator.find_qemu("aarch64"), lying)
    python = interpreter(board.folder / "lying", launch)
    run = {**board.profiles, "python": str(python)}
    target = board.profile("liar", PROFILE, **run)
    with (
        pytest.raises(EnvironmentMissing, match="died of SIGILL"),
        open_on_target(built[0] / "model.onnx", target) as session,
    ):
        session.run({"x": np.zeros((1, 1, 12, 12), np.float32)})
    assert board.left() == []
