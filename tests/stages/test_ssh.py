"""Devices behind SSH, tested against an sshd of our own on 127.0.0.1 (see loopback.py).

Each way to fail gives its message and exit code, and leaves nothing running on the device.
"""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import tiny_model
from loopback import loopback
from onnx import TensorProto, helper

from edgewright import measure, pool
from edgewright.errors import DeviceUnavailable, EnvironmentMissing, IntegrityError
from edgewright.runtime import doctor
from edgewright.runtime.launch import open_on_target
from edgewright.runtime.session import Session
from edgewright.runtime.ssh import lease, link
from edgewright.stage import say_nothing

LIAR = r"""
import os, sys
os.write(1, b'\0edgewright-agent-1\n' + b'\xff' * 99)
sys.stdin.read()
"""
X = np.random.default_rng(5).normal(size=(1, 1, 12, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    with loopback(tmp_path_factory.mktemp("device")) as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(tiny_model(), path)
    return path


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that runs for hours: a loop that adds one."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    body = helper.make_graph(
        [
            helper.make_node("Add", ["v", "one"], ["w"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, []),
        ],
        [one],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["count", "", "x"], ["y"], body=body)],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        [helper.make_tensor("count", TensorProto.INT64, [], [1 << 60])],
    )
    path = tmp_path_factory.mktemp("endless") / "endless.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def pids(device, word):
    """Process ids on the device whose command line holds a word."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = str(device.folder).encode() in (folder / "environ").read_bytes()
            if marked and word.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass
    return found


def later(seconds, what):
    timer = threading.Timer(seconds, what)
    timer.start()
    return timer


def test_a_session_there_gives_what_one_here_gives_on_the_core_it_was_given(device, model):
    core = max(os.sched_getaffinity(0))
    launch = link.launch(device.profile())
    with Session(model) as here, Session(model, launch=launch, cores=frozenset({core})) as there:
        assert np.array_equal(here.run({"x": X})[0], there.run({"x": X})[0])
        assert there.info["inputs"] == here.info["inputs"]
        (worker,) = pids(device, "worker.py")
        assert os.sched_getaffinity(worker) == {core}
        assert 0 < there.ready_s < 60
    assert device.left() == []


def test_a_model_is_pushed_once_and_a_damaged_copy_again(device, model):
    target = device.profile()

    def run():
        with open_on_target(model, target) as session:
            return session.run({"x": X})[0]

    expected = run()
    (stored,) = device.home.glob("store/*/model.onnx")
    before = stored.stat().st_ino
    run()
    assert stored.stat().st_ino == before
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 1
    stored.write_bytes(data)
    assert np.array_equal(run(), expected)
    assert stored.read_bytes() == model.read_bytes()


def test_weights_beside_the_model_go_with_it(device, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(tiny_model(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    with Session(path) as here, open_on_target(path, device.profile()) as there:
        expected = here.run({"x": X})[0]
        assert np.array_equal(expected, there.run({"x": X})[0])
    # Of several models that share them, the worker there takes them from the file itself.
    shared = pool.places(onnx.load(path, load_external_data=False))
    assert {place[0] for place in shared.values()} == {"float32"} and len(shared) > 3
    target = device.profile()
    with Session(path, launch=link.launch(target), weights="w.bin", places=shared) as borrowing:
        assert np.allclose(expected, borrowing.run({"x": X})[0], rtol=1e-4, atol=1e-5)


def test_times_are_those_of_the_device(device, model):
    report = measure.compare(
        model, model, [{"x": X}], device.profile(), say_nothing, launches=1, seconds=0.4
    )
    assert report["emulated"] is False and report["unsteady"] is None
    assert report["latency"]["primary"] == "cpu"
    assert 0.5 < report["latency"]["ratio"] < 2
    # A cold start counts from the start of the process there, not of the connection.
    start = report["raw"]["heats"][0]["start"]["candidate"]
    assert start["import_s"] + start["load_s"] < start["ready_s"]
    assert report["host"]["after"]["load_average"]
    assert report["placement"]["ok"]


def test_doctor_asks_the_device(device):
    found = doctor.check(device.profile())
    assert found["ready"], found
    assert "over SSH" in found["reason"] and "GiB free" in found["reason"]
    other = "aarch64" if os.uname().machine != "aarch64" else "x86_64"
    found = doctor.check(device.profile(text=f'[device]\narch = "{other}"'))
    assert not found["ready"] and f"expected {other}" in found["reason"]
    found = doctor.check(device.profile(python="python-that-is-not-there"))
    assert "does not start there" in found["reason"] and "not found" in found["reason"]


def refused(device, kind, code, **run):
    """The message of opening the device, of one kind and exit code."""
    with pytest.raises(kind) as caught:
        link.look(device.profile(**run))
    assert type(caught.value) is kind and caught.value.exit_code == code
    return str(caught.value)


def test_an_unknown_host_is_refused(device, tmp_path):
    (tmp_path / "hosts").write_text("")
    text = refused(device, DeviceUnavailable, 6, known_hosts=str(tmp_path / "hosts"))
    assert "not on the list" in text and device.host_key.get_fingerprint() in text
    text = refused(device, DeviceUnavailable, 6, known_hosts=str(tmp_path / "none"))
    assert "ssh-keyscan" in text


def test_a_changed_host_key_is_an_integrity_error(device, edgewright):
    old = device.host_key.get_fingerprint()
    device.stop()
    device.new_host_key()
    device.start()
    try:
        text = refused(device, IntegrityError, 5)
        assert old in text and device.host_key.get_fingerprint() in text
        ran = edgewright("doctor", "--target", device.write_profile())
        assert ran.code == 5 and "not the one on the list" in ran.err
    finally:
        device.trust()
    assert device.left() == []


def test_a_host_key_of_another_kind_is_a_changed_key_and_a_second_one_is_not(device):
    import asyncssh

    old = device.host_key.get_fingerprint()
    config = device.folder / "sshd_config"
    before = config.read_text()
    both = before + f"HostKey {device.folder}/second_key\n"
    (device.folder / "second_key").touch(0o600)
    ecdsa = asyncssh.generate_private_key("ecdsa-sha2-nistp256")
    (device.folder / "second_key").write_bytes(ecdsa.export_private_key("openssh"))
    try:
        device.stop()
        config.write_text(before.replace("/host_key\n", "/second_key\n"))
        device.start()
        text = refused(device, IntegrityError, 5)
        assert old in text and ecdsa.get_fingerprint() in text
        # A host may have more keys than the list; it shows the one that is on it.
        device.stop()
        config.write_text(both)
        device.start()
        assert link.look(device.profile())["cores"] >= 1
        listed = device.folder / "known_hosts"
        listed.write_text(f"[127.0.0.1]:{device.port} {ecdsa.export_public_key().decode()}")
        assert link.look(device.profile())["cores"] >= 1
    finally:
        device.stop()
        config.write_text(before)
        device.trust()
        device.start()


def test_a_host_without_a_common_cipher_is_no_changed_key(device):
    config = device.folder / "sshd_config"
    before = config.read_text()
    device.stop()
    config.write_text(before + "Ciphers 3des-cbc\n")
    device.start()
    try:
        text = refused(device, DeviceUnavailable, 6)
        # What it goes on to say depends on which side hangs up first.
        assert "no connection" in text and "the key of" not in text
    finally:
        device.stop()
        config.write_text(before)
        device.start()


def test_wrong_user_wrong_key_and_no_server(device, tmp_path):
    import asyncssh

    text = refused(device, DeviceUnavailable, 6, user="nobody")
    assert "did not let user nobody in" in text
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(str(tmp_path / "other"))
    assert "did not let" in refused(device, DeviceUnavailable, 6, key=str(tmp_path / "other"))
    key.write_private_key(str(tmp_path / "locked"), "pkcs8-pem", passphrase="x")
    text = refused(device, DeviceUnavailable, 6, key=str(tmp_path / "locked"))
    assert "without a passphrase" in text
    assert "no connection" in refused(device, DeviceUnavailable, 6, port=1)
    assert device.left() == []


def test_a_dropped_link_is_opened_again_and_the_request_repeated(device, model):
    with open_on_target(model, device.profile(reconnect_s=20)) as session:
        before = session.run({"x": X})[0]
        assert device.cut()
        assert np.array_equal(session.run({"x": X})[0], before)
        session.keep_feeds([{"x": X}])
        timer = later(0.5, device.cut)
        with pytest.raises(DeviceUnavailable, match="during a measurement"):
            session.ask({"op": "slice", "seconds": 3.0})
        timer.join()
    assert device.left() == []


def test_a_link_that_stays_down_ends_in_one_message(device, model):
    with open_on_target(model, device.profile(reconnect_s=1)) as session:
        device.stop()
        try:
            with pytest.raises(DeviceUnavailable, match="was lost") as caught:
                session.run({"x": X})
        finally:
            device.start()
    assert caught.value.exit_code == 6
    assert device.left() == []


def test_a_crash_there_is_told_by_its_signal(device, model):
    with open_on_target(model, device.profile()) as session:
        session.keep_feeds([{"x": X}])
        (worker,) = pids(device, "worker.py")
        timer = later(0.3, lambda: os.kill(worker, signal.SIGILL))
        with pytest.raises(EnvironmentMissing, match="died of SIGILL") as caught:
            session.ask({"op": "slice", "seconds": 5.0})
        timer.join()
    assert caught.value.exit_code == 6
    assert device.left() == []


def test_a_model_that_hangs_there_is_stopped_there(device, endless):
    begin = time.monotonic()
    with (
        open_on_target(endless, device.profile(limit_s=1.5)) as session,
        pytest.raises(DeviceUnavailable, match=r"more than 1\.5 s") as caught,
    ):
        session.run({"x": np.float32(0)})
    assert caught.value.exit_code == 6 and time.monotonic() - begin < 60
    assert device.left() == []


def test_a_device_that_stops_answering_is_given_up_and_taken_back(device, model):
    target = device.profile(limit_s=1, beat_s=0.2)
    with open_on_target(model, target) as session:
        (agent,) = pids(device, "fromhex")
        os.kill(agent, signal.SIGSTOP)
        with pytest.raises(DeviceUnavailable, match="did not answer"):
            session.run({"x": X})
    # A stopped process cannot tidy up. The next to come sees that it is not alive, and does.
    time.sleep(2 * 4 * 0.2)
    os.environ[link.OWNER] = "another"
    try:
        link.look(target)
    finally:
        del os.environ[link.OWNER]
    assert device.left() == []


def test_kill_9_here_leaves_nothing_there(device, endless):
    session = open_on_target(endless, device.profile())
    ended = []

    def run():
        with pytest.raises(EnvironmentMissing):
            session.run({"x": np.float32(0)})
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.3)
    assert pids(device, "worker.py")
    os.killpg(session.process.pid, signal.SIGKILL)
    thread.join(20)
    assert ended and device.left() == []
    session.close()


def test_one_owner_at_a_time(device, model, monkeypatch):
    target = device.profile()
    with open_on_target(model, target) as mine, open_on_target(model, target) as too:
        mine.run({"x": X})
        too.run({"x": X})
        monkeypatch.setenv(link.OWNER, "another build")
        with pytest.raises(DeviceUnavailable, match=r"leased by .*process") as caught:
            open_on_target(model, target)
        assert caught.value.exit_code == 6
        monkeypatch.delenv(link.OWNER)
    assert device.left() == []
    with link.held(target):  # a whole build
        inside = os.environ[link.OWNER]
        monkeypatch.setenv(link.OWNER, "another build")
        with pytest.raises(DeviceUnavailable, match="leased"):
            link.look(target)
        monkeypatch.setenv(link.OWNER, inside)
    assert device.left() == []


def holder(device):
    """The process id of the agent that holds the lease, None where nobody does."""
    with lease.Lease(str(device.home)) as holders:
        return holders[0]["pid"] if holders else None


@pytest.mark.parametrize("how", ["the link is cut", "the agent is killed"])
def test_a_build_takes_the_device_again_after_a_dropped_link(device, monkeypatch, how):
    """Without a request: between two stages nobody asks the device anything."""
    target = device.profile()
    with link.held(target):
        first = holder(device)
        if how == "the link is cut":
            assert device.cut()
        else:
            os.kill(first, signal.SIGKILL)
        limit = time.monotonic() + 20
        while holder(device) in (first, None) and time.monotonic() < limit:
            time.sleep(0.05)
        monkeypatch.setenv(link.OWNER, "another build")
        with pytest.raises(DeviceUnavailable, match="leased"):
            link.look(target)
        monkeypatch.undo()
    assert device.left() == []


def test_a_lease_ends_with_its_holder(device, model, monkeypatch):
    target = device.profile()
    with open_on_target(model, target):
        for pid in (*pids(device, "fromhex"), *pids(device, "worker.py")):
            os.kill(pid, signal.SIGKILL)
        monkeypatch.setenv(link.OWNER, "another build")
        link.look(target)  # takes the lease, and removes what the dead one left
        assert list((device.home / "jobs").iterdir()) == []
    assert device.left() == []


def test_a_full_disk_is_told(device, model, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip(f"no small disk can be made here: {done.stderr.strip()}")
    try:
        with pytest.raises(DeviceUnavailable, match="no space left on device") as caught:
            open_on_target(model, device.profile(folder=str(folder)))
        assert caught.value.exit_code == 6
        assert device.left() == []
        assert not [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 4096]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_shell_that_talks_is_no_trouble_and_a_liar_is_caught(device, model, tmp_path):
    talks = tmp_path / "talks"
    talks.write_text('#!/bin/sh\n[ "$1" = -c ] && echo "Welcome to the board"\nexec "$REAL" "$@"\n')
    talks.chmod(0o755)
    real = device.profile().run.python
    with open_on_target(model, device.profile(python=f"env REAL={real} {talks}")) as session:
        session.run({"x": X})
    lies = tmp_path / "lies"
    lies.write_text(f"#!{real}\n{LIAR}\n")
    lies.chmod(0o755)
    with pytest.raises(DeviceUnavailable, match="makes no sense"):
        link.look(device.profile(python=str(lies)))
    assert device.left() == []
