"""Emulated targets: what they compute, and how a set-up that is missing or broken shows.

The first half needs the emulator and the guest (`edgewright setup --target arm`) and is skipped
without them; it needs neither root nor network. The second half runs everywhere.
"""

import dataclasses
import json
import os
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgewright.errors import EnvironmentMissing, IntegrityError
from edgewright.runtime import doctor, emulator, guest, installing, toolchain
from edgewright.runtime.launch import host_isa, session_options
from edgewright.runtime.session import Launch, Session
from edgewright.target import load_target, target_names

CHANNELS, SIZE, OUT_SCALE = 16, 8, np.float32(0.25)
IN_SCALE, WEIGHT_SCALE = np.float32(1 / 255), np.float32(1 / 127)


def weights_in(low: int, high: int) -> np.ndarray:
    shape = (CHANNELS, CHANNELS, 3, 3)
    return np.random.default_rng(0).integers(low, high, shape).astype(np.int8)


SAFE = weights_in(-64, 64)  # two products of a pair fit 16 bits: 2 * 255 * 64 < 32768
HOT = weights_in(90, 128)  # they do not: 2 * 255 * 90 > 32767


def write_convs(path: Path, activations: str) -> Path:
    """Two 3x3 convolutions of one input in QDQ form, weights SAFE and HOT, outputs so named."""
    dtype, zero = (np.uint8, 0) if activations == "uint8" else (np.int8, -128)
    constants = {"s": IN_SCALE, "z": np.array(zero, dtype), "os": OUT_SCALE}
    constants |= {"ws": WEIGHT_SCALE, "wz": np.array(0, np.int8), "wsafe": SAFE, "whot": HOT}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
    ]
    for k in ("safe", "hot"):
        nodes += [
            helper.make_node("DequantizeLinear", [f"w{k}", "ws", "wz"], [f"d{k}"]),
            helper.make_node("Conv", ["xd", f"d{k}"], [f"c{k}"], pads=[1, 1, 1, 1]),
            helper.make_node("QuantizeLinear", [f"c{k}", "os", "z"], [f"q{k}"]),
            helper.make_node("DequantizeLinear", [f"q{k}", "os", "z"], [k]),
        ]
    shape = [1, CHANNELS, SIZE, SIZE]
    x, safe, hot = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name in ("x", "safe", "hot")
    )
    tensors = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "convs", [x], [safe, hot], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def exact_conv(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What a branch of `write_convs` computes with exact integer sums (float64 rescaling)."""
    codes = np.clip(np.rint(x / IN_SCALE), 0, 255).astype(np.int64)
    padded = np.pad(codes, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    sums = np.einsum("nchwij,ocij->nohw", windows, weights.astype(np.int64))
    real = sums * (float(IN_SCALE) * float(WEIGHT_SCALE))
    return np.clip(np.rint(real / OUT_SCALE), 0, 255) * OUT_SCALE


def launch_or_skip(name: str) -> Launch:
    """The launch of a shipped target; skips the test where the target is not set up."""
    try:
        return emulator.launch(load_target(name))
    except EnvironmentMissing as error:
        pytest.skip(str(error))


def run(model: Path, x: np.ndarray, launch: Launch | None = None) -> list[np.ndarray]:
    """The outputs [safe, hot], on the host or through a launch."""
    with Session(model, launch=launch, threads=1) as session:
        return session.run({"x": x})


@pytest.fixture
def x() -> np.ndarray:
    shape = (1, CHANNELS, SIZE, SIZE)
    return np.random.default_rng(1).random(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "activations"),
    [(name, kind) for name in ("arm", "arm-a53", "arm-i8mm") for kind in ("int8", "uint8")]
    + [("arm-n1", "int8")],  # the kernels of `arm`
)
def test_arm_int8_is_exact_and_equals_the_host(name, activations, x, tmp_path):
    launch = launch_or_skip(name)
    model = write_convs(tmp_path / "model.onnx", activations)
    safe, hot = run(model, x, launch)
    assert np.abs(safe - exact_conv(x, SAFE)).max() <= OUT_SCALE  # a rounding boundary
    assert np.abs(hot - exact_conv(x, HOT)).max() <= OUT_SCALE
    np.testing.assert_array_equal(safe, run(model, x)[0])


def test_avx2_saturates_large_weights_only(x, tmp_path):
    launch = launch_or_skip("cpu-avx2")
    model = write_convs(tmp_path / "model.onnx", "uint8")
    (safe, hot), (host_safe, host_hot) = run(model, x, launch), run(model, x)
    np.testing.assert_array_equal(safe, host_safe)
    wrong = hot - exact_conv(x, HOT)
    assert wrong.min() < -2 * OUT_SCALE
    assert wrong.max() <= OUT_SCALE  # saturation only loses
    if "avx512_vnni" in host_isa() or "avx_vnni" in host_isa():
        assert np.abs(host_hot - exact_conv(x, HOT)).max() <= OUT_SCALE


def test_arm_guest_is_the_host_version_on_the_profile_cpu(tmp_path):
    launch = launch_or_skip("arm")
    target = load_target("arm")
    model = write_convs(tmp_path / "model.onnx", "int8")
    with Session(model, launch=launch, **session_options(target)) as session:
        assert session.info["cores"] == target.run.cores
        assert session.info["version"] == guest.host_versions()[0]
        assert session.info["providers"] == ["CPUExecutionProvider"]


def test_wrong_identity_would_run_instructions_the_model_lacks(tmp_path, x):
    """Why `check_cpu` is strict: onnxruntime believes /proc/cpuinfo, here an A76 on an A53."""
    launch_or_skip("arm-a53")
    model = write_convs(tmp_path / "model.onnx", "int8")
    lying = dataclasses.replace(load_target("arm").run, cpu_model="cortex-a53")
    folder, qemu = guest.guest_folder(), emulator.find_qemu("aarch64")
    with pytest.raises(EnvironmentMissing, match="SIGILL"):
        run(model, x, guest.guest_launch(folder, qemu, lying))


def test_second_setup_returns_at_once(monkeypatch):
    for name in ("arm", "cpu-avx2"):
        launch_or_skip(name)
        emulator.setup(load_target(name), print)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("ran a command"))
    begin, told = time.perf_counter(), []
    for name in ("arm", "arm-a53", "arm-i8mm", "cpu-avx2"):
        emulator.setup(load_target(name), told.append)
    assert time.perf_counter() - begin < 1
    assert told == ["arm: ready", "arm-a53: ready", "arm-i8mm: ready", "cpu-avx2: ready"]


# From here on nothing needs to be set up.


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without the emulator and without a guest; returns its bin folder."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("EDGEWRIGHT_HOME", str(tmp_path / "home"))
    return tmp_path / "bin"


def add_tool(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


def refuse(target_name: str) -> EnvironmentMissing:
    with pytest.raises(EnvironmentMissing) as caught:
        emulator.launch(load_target(target_name))
    assert caught.value.exit_code == 6
    return caught.value


@pytest.mark.parametrize("name", ["arm", "arm-a53", "arm-i8mm", "cpu-avx2"])
def test_missing_emulator_says_what_to_type(name, bare, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    message = str(refuse(name))
    assert f"Next: edgewright setup --target {name}." in message
    assert "qemu-" in message and "is not installed" in message
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    message = str(refuse(name))
    assert "sudo apt-get install qemu-user" in message
    assert f"edgewright setup --target {name}" in message


def test_missing_guest_says_what_to_type(bare):
    add_tool(bare, "qemu-aarch64")
    message = str(refuse("arm"))
    assert "no aarch64 Python" in message
    assert "Next: edgewright setup --target arm." in message


def test_static_emulator_is_found(bare):
    add_tool(bare, "qemu-aarch64-static")
    assert emulator.find_qemu("aarch64") == str(bare / "qemu-aarch64-static")


def test_setup_without_root_or_emulator_says_what_to_type(bare, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(EnvironmentMissing, match="sudo apt-get install qemu-user"):
        emulator.setup(load_target("arm"), print)


def test_setup_without_package_tools_says_so(bare):
    add_tool(bare, "qemu-aarch64")
    with pytest.raises(EnvironmentMissing, match="no apt-get apt-cache dpkg-deb"):
        emulator.setup(load_target("arm"), print)
    assert not list((bare.parent / "home").glob(".new-*"))


def test_setup_of_a_native_target_does_nothing(bare):
    told = []
    emulator.setup(load_target("cpu"), told.append)
    assert told == ["cpu: runs without an emulator, nothing to set up"]
    assert not (bare.parent / "home").exists()


def test_doctor_reports_every_target(bare):
    entries = {entry["target"]: entry for entry in doctor.checks()}
    assert sorted(entries) == target_names()
    assert not entries["arm"]["ready"]
    assert "edgewright setup --target arm" in entries["arm"]["next"]
    for entry in entries.values():
        assert entry["reason"]
        assert bool(entry["next"]) is not entry["ready"]


def test_doctor_describes_the_host():
    host = json.loads(json.dumps(doctor.host()))
    assert host["cores"] >= 1
    assert host["memory_bytes"] > 1 << 20
    assert host["free_disk_bytes"] >= 0
    assert host["versions"]["onnxruntime"] == guest.host_versions()[0]
    assert doctor.package_version("no-such-package") is None


def fake_build(folder: Path) -> None:
    (folder / "root/usr/bin").mkdir(parents=True)
    (folder / "root/lib").mkdir()
    (folder / "site").mkdir()
    (folder / "guest.json").write_text('{"python": "python3.11"}')


def test_setup_cleans_what_an_interrupted_one_left(bare, monkeypatch):
    add_tool(bare, "qemu-aarch64")
    monkeypatch.setattr(toolchain, "setup", lambda arch, tell: None)
    folder = guest.guest_folder()
    leftover = folder.parent / f".new-{folder.name}-abc"
    leftover.mkdir(parents=True)
    (leftover / "half").touch()
    folder.mkdir()
    monkeypatch.setattr(guest, "build_guest", lambda folder, *_: fake_build(folder))
    emulator.setup(load_target("arm"), print)
    assert (folder / "guest.json").is_file()
    assert not list(folder.parent.glob(".new-*"))


def test_failing_setup_leaves_nothing(bare, monkeypatch):
    add_tool(bare, "qemu-aarch64")

    def fail(folder, run, qemu, tell):
        fake_build(folder)
        raise EnvironmentMissing("no network")

    monkeypatch.setattr(guest, "build_guest", fail)
    with pytest.raises(EnvironmentMissing, match="no network"):
        emulator.setup(load_target("arm"), print)
    folder = guest.guest_folder()
    assert [p.name for p in folder.parent.iterdir()] == [f".{folder.name}.lock"]


def test_setup_without_root_or_a_compiler_names_the_packages(bare, monkeypatch):
    add_tool(bare, "qemu-aarch64")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(guest, "build_guest", lambda folder, *_: fake_build(folder))
    message = "sudo apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
    with pytest.raises(EnvironmentMissing, match=message) as caught:
        emulator.setup(load_target("arm"), print)
    assert caught.value.exit_code == 6


def test_full_disk_is_an_environment_error(bare, monkeypatch):
    add_tool(bare, "qemu-aarch64")

    def fail(folder, run, qemu, tell):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(guest, "build_guest", fail)
    with pytest.raises(EnvironmentMissing, match="No space left on device"):
        emulator.setup(load_target("arm"), print)


def test_home_that_cannot_be_made_is_an_environment_error(bare, monkeypatch):
    add_tool(bare, "qemu-aarch64")
    (bare.parent / "file").touch()
    monkeypatch.setenv("EDGEWRIGHT_HOME", str(bare.parent / "file"))
    with pytest.raises(EnvironmentMissing, match="set EDGEWRIGHT_HOME"):
        emulator.setup(load_target("arm"), print)


def test_two_setups_at_once_build_one_guest(bare, monkeypatch):
    add_tool(bare, "qemu-aarch64")
    built, told = [], []

    def build(folder, run, qemu, tell):
        built.append(folder)
        time.sleep(0.2)
        fake_build(folder)

    monkeypatch.setattr(guest, "build_guest", build)
    monkeypatch.setattr(toolchain, "setup", lambda arch, tell: None)
    threads = [
        threading.Thread(target=emulator.setup, args=(load_target(name), told.append))
        for name in ("arm", "arm-a53")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert {"arm: ready", "arm-a53: ready"} < set(told)
    assert "another set-up is under way; waiting for it" in told


def test_cpu_prefix_describes_the_cpu_and_is_reused(tmp_path):
    fake_build(tmp_path)
    run = load_target("arm").run
    prefix = guest.cpu_prefix(tmp_path, run)
    text = (prefix / "proc/cpuinfo").read_text()
    assert text.count("CPU part\t: 0xd0b\n") == run.cores
    assert "CPU variant\t: 0x4\n" in text
    for part in ("possible", "present", "online"):
        assert (prefix / "sys/devices/system/cpu" / part).read_text() == "0-3\n"
    assert (prefix / "usr/bin").is_dir() and (prefix / "lib").is_dir()
    assert guest.cpu_prefix(tmp_path, run) == prefix
    assert guest.cpu_prefix(tmp_path, load_target("arm-a53").run) != prefix
    assert sorted(p.name[0] for p in (tmp_path / "cpus").iterdir()) != ["."]


def test_single_core_list():
    files = guest.cpu_files(dataclasses.replace(load_target("arm").run, cores=1))
    assert files["sys/devices/system/cpu/online"] == "0\n"


def test_guest_environment_is_free_of_the_host(tmp_path, monkeypatch):
    fake_build(tmp_path)
    monkeypatch.setenv("LD_PRELOAD", "/host.so")
    monkeypatch.setenv("PYTHONHOME", "/host")
    launch = guest.guest_launch(tmp_path, "qemu", load_target("arm").run)
    assert not {"LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONHOME"} & set(launch.env)
    assert launch.address_space == 0


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("EDGEWRIGHT_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert installing.home() == tmp_path / "edgewright"
    monkeypatch.setenv("XDG_DATA_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert installing.home() == tmp_path / ".local/share/edgewright"
    monkeypatch.setenv("EDGEWRIGHT_HOME", str(tmp_path / "here"))
    assert installing.home() == tmp_path / "here"


def test_apt_configuration_is_private(tmp_path, monkeypatch):
    monkeypatch.delenv(installing.SOURCES_VARIABLE, raising=False)
    text = installing.write_apt_config(tmp_path / "a").read_text()
    assert f'Dir::State::status "{tmp_path}/a/state/status";' in text
    assert "Dir::Etc" not in text  # sources, keys and credentials stay the host's
    monkeypatch.setenv(installing.SOURCES_VARIABLE, "/etc/ports.sources")
    text = installing.write_apt_config(tmp_path / "b").read_text()
    assert 'Dir::Etc::sourcelist "/etc/ports.sources";' in text


SHOWN = """Package: python3-minimal
Version: 3.13.5-1
Pre-Depends: python3.13-minimal (>= 3.13.5-1~)

Package: libc6
Version: 2.41-12+deb13u1
"""


def test_guest_versions_come_from_the_distribution(tmp_path, monkeypatch):
    monkeypatch.setattr(guest, "apt", lambda *a: SHOWN)
    assert guest.guest_versions(tmp_path, None) == ("python3.13", 41)


def test_failed_package_lists_are_blamed_when_something_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(guest, "apt", lambda *a: "")
    failure = EnvironmentMissing("lists failed")
    with pytest.raises(EnvironmentMissing, match="lists failed"):
        guest.guest_versions(tmp_path, failure)
    with pytest.raises(EnvironmentMissing, match=installing.SOURCES_VARIABLE):
        guest.guest_versions(tmp_path, None)


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", "a\\..\\out"])
def test_wheel_with_escaping_names_is_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr("fine.py", "")
        archive.writestr(name, "")
    with pytest.raises(IntegrityError, match="not safe") as caught:
        guest.unpack_wheel(tmp_path / "bad.whl", tmp_path / "site")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "site").exists()


def test_wheel_with_a_link_is_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(IntegrityError, match="not safe"):
        guest.unpack_wheel(tmp_path / "bad.whl", tmp_path / "site")


def test_damaged_wheel_is_refused(tmp_path):
    (tmp_path / "bad.whl").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(IntegrityError, match="damaged"):
        guest.unpack_wheel(tmp_path / "bad.whl", tmp_path / "site")


def test_failing_command_shows_the_end_of_what_it_said():
    with pytest.raises(EnvironmentMissing, match="status 3: the reason") as caught:
        installing.command(["sh", "-c", "echo the reason >&2; exit 3"], "trying", hint="do this")
    assert "trying failed" in str(caught.value)
    assert "Next: do this." in str(caught.value)


def test_hanging_command_is_stopped():
    with pytest.raises(EnvironmentMissing, match="took more than"):
        installing.command(["sleep", "60"], "waiting", timeout_s=0.2)
