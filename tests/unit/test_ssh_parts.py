"""The parts of a link to a device that need no device: answers, facts, the lease, the profile."""

import copy
import errno
import fcntl
import io
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from conftest import tiny_model

from edgewright import deploy
from edgewright.bundle import packages
from edgewright.decision import settle
from edgewright.errors import BadInput, DeviceUnavailable, IntegrityError, from_wire, to_wire
from edgewright.gate.release import cold_start, latency
from edgewright.gate.speed import latency_ms, latency_ratio
from edgewright.measure import host
from edgewright.runtime import worker
from edgewright.runtime.local import open_local
from edgewright.runtime.session import Session
from edgewright.runtime.ssh import agent, answers, facts, lease, link, text
from edgewright.runtime.ssh.agent import MAGIC
from edgewright.target import load_target, parse_target

LOAD = {
    "inputs": [{"name": "x", "type": "tensor(float)", "shape": ["batch", 4]}],
    "outputs": [],
    "providers": ["CPUExecutionProvider"],
    "version": "1.31.1",
    "import_s": 0.2,
    "load_s": 0.1,
    "rss_before_load_kib": 5,
    "rss_after_load_kib": 6,
    "peak_after_load_kib": 7,
}


def test_our_own_answers_pass_and_keep_only_what_is_known():
    found = answers.check({**LOAD, "more": 1}, answers.WORKER["load"], "it")
    assert found == LOAD
    told = {**facts.facts(), "free_bytes": 1}
    assert answers.check(told, answers.FACTS, "it") == told


def test_every_answer_of_a_worker_passes_whole(tmp_path):
    """A key that the schemas do not name would be lost on its way from a device."""
    onnx.save(tiny_model(), tmp_path / "m.onnx")
    x = np.zeros((1, 1, 12, 12), np.float32)
    requests = [
        ({"op": "run", "outputs": None}, {"x": x}),
        ({"op": "feeds", "first": True}, {"x": x}),
        ({"op": "warm"}, {}),
        ({"op": "slice", "seconds": 0, "min_runs": 3}, {}),
        ({"op": "memory", "device": True}, {}),
        ({"op": "restart"}, {}),
        ({"op": "spin", "count": 10}, {}),
        ({"op": "profile", "runs": 2}, {}),
    ]
    with Session(tmp_path / "m.onnx", profile=str(tmp_path / "p")) as session:
        told = {"load": session.info}
        for request, arrays in requests:
            told[request["op"]] = session.ask(request, arrays)[0]
    assert set(told) == set(answers.WORKER) == set(worker.Server().handlers())
    for op, answer in told.items():
        answer = json.loads(json.dumps(answer))  # as it arrives
        answers.array_bytes(answer.pop("arrays"), "it")
        assert answers.check(answer, answers.WORKER[op], "it") == answer


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"version": None}, "version"),
        ({"load_s": -1.0}, "load_s"),
        ({"load_s": True}, "load_s"),
        ({"providers": ["x" * 5000]}, "providers"),
        ({"inputs": [{"name": "x"}]}, "inputs"),
        ({"rss_before_load_kib": 1.5}, "rss_before_load_kib"),
    ],
)
def test_odd_answers_are_refused_and_the_standard_agrees(change, place):
    odd = {**LOAD, **change}
    with pytest.raises(DeviceUnavailable, match=place):
        answers.check(odd, answers.WORKER["load"], "it")
    standard = jsonschema.Draft202012Validator(answers.WORKER["load"])
    assert not standard.is_valid(odd) and standard.is_valid(LOAD)


@pytest.mark.parametrize(
    "row",
    [
        {"name": "x", "dtype": "|O", "shape": []},
        {"name": "x", "dtype": "<f4,<f4", "shape": []},
        *(
            {"name": "x", "dtype": word, "shape": []}
            for word in ("<f3", "|b2", "|V9", ">f4", "<U3")
        ),
        {"name": "x", "dtype": "<f4", "shape": [0, 1 << 39, 1 << 39]},
        {"name": "x", "dtype": "<f4", "shape": [0, 1 << 31, 1 << 30]},
        {"name": "x", "dtype": "<f4", "shape": [1] * 33},
        {"name": "x", "dtype": "<f4", "shape": [-1]},
        {"name": "x", "dtype": "<f4", "shape": [True]},
        {"name": "x", "dtype": "<f4", "shape": [1.0]},
        {"name": "x", "dtype": "<f4"},
        {"name": "x", "dtype": "<f4", "shape": [1], "more": 1},
        "x",
    ],
)
def test_arrays_of_a_stranger_are_counted_before_they_are_read(row):
    with pytest.raises(DeviceUnavailable):
        answers.array_bytes([row], "it")


def test_sizes_of_arrays():
    rows = [
        {"name": "x", "dtype": "<f4", "shape": [2, 3]},
        {"name": "y", "dtype": "|b1", "shape": []},
        {"name": "z", "dtype": "<i8", "shape": [0, 1 << 39]},
    ]
    assert answers.array_bytes(rows, "it") == 2 * 3 * 4 + 1
    with pytest.raises(BadInput, match="at most"):
        answers.array_bytes([{"name": "x", "dtype": "<f8", "shape": [1 << 39]}], "it")


@pytest.mark.parametrize("dtype", answers.DTYPES)
def test_what_is_counted_can_be_read(dtype):
    """The host's numpy takes every array that passes, up to the last size and rank."""
    size = np.dtype(dtype).itemsize
    assert np.dtype(dtype).str == dtype
    shapes = [[], [0], [2, 3], [1] * 32, [0, 1 << 39], [0, (1 << 31) - 1, (1 << 32) // size]]
    rows = [{"name": str(k), "dtype": dtype, "shape": s} for k, s in enumerate(shapes)]
    words = json.dumps({"arrays": rows}).encode()
    count = answers.array_bytes(rows, "it")
    message = io.BytesIO(len(words).to_bytes(8, "big") + words + bytes(count))
    _, arrays = worker.receive(message)
    assert [list(a.shape) for a in arrays.values()] == shapes and not message.read()


def test_every_tensor_of_the_runtime_can_come_back():
    """What `onnxruntime` gives for each type that numpy has (no strings: those are objects)."""
    kinds = ["BOOL", "FLOAT16", "FLOAT", "DOUBLE", "FLOAT8E4M3FN"]
    kinds += [f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)]
    found = set()
    for kind in kinds:
        number = getattr(onnx.TensorProto, kind)
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Cast", ["x"], ["y"], to=number)],
            "cast",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])],
            [onnx.helper.make_tensor_value_info("y", number, [2])],
        )
        opsets = [onnx.helper.make_opsetid("", 21)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        found.add(open_local(model.SerializeToString()).run({"x": np.ones(2, np.float32)})[0].dtype)
    assert {dtype.str for dtype in found} == set(answers.DTYPES)


def test_nan_is_no_number():
    with pytest.raises(ValueError):
        json.loads('{"a": NaN}', parse_constant=answers.no_number)


def machine(folder, **files):
    """A /proc and /sys with these files; `__` stands for `/`."""
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return facts.facts(str(folder))


def test_facts_of_a_board(tmp_path):
    found = machine(
        tmp_path,
        proc__cpuinfo="processor : 0\nFeatures : fp asimd asimddp\nCPU implementer : 0x41\n"
        "CPU part : 0xd0b\n",
        proc__stat="cpu 1 2 3 4 5 6 7 8 9\n",
        proc__meminfo="MemTotal: 8000 kB\nMemFree: 10 kB\n",
        sys__devices__system__cpu__cpu0__cpufreq__scaling_governor="ondemand\n",
        sys__devices__system__cpu__cpu1__cpufreq__scaling_governor="performance\n",
        sys__class__thermal__thermal_zone0__temp="61234\n",
    )
    assert found["cpu"] == "ARM implementer 0x41 part 0xd0b"
    assert found["flags"] == ["asimd", "asimddp", "fp"]
    assert found["governors"] == {"cpu0": "ondemand", "cpu1": "performance"}
    assert found["temperatures_c"] == {"thermal_zone0": 61.234}
    assert found["steal_ticks"] == 8 and found["memory_kib"]["MemTotal"] == 8000
    assert host.state(found)["governor"] == "ondemand, performance"
    assert host.state(found)["hottest_c"] == 61.234


def test_what_makes_times_worthless(tmp_path):
    folder = "sys__devices__system__cpu__cpu0__"
    before = machine(
        tmp_path,
        **{
            folder + "cpufreq__scaling_governor": "performance",
            folder + "cpufreq__scaling_max_freq": "2400000",
            folder + "thermal_throttle__core_throttle_count": "3",
            "sys__class__thermal__thermal_zone0__temp": "50000",
        },
    )
    hotter = machine(tmp_path, sys__class__thermal__thermal_zone0__temp="60000")
    assert host.unsteady(before, before) is None
    assert host.unsteady(before, hotter) is None  # warm is not throttled
    for name, value, word in (
        ("cpufreq__scaling_governor", "powersave", "governor"),
        ("cpufreq__scaling_max_freq", "1500000", "frequency limit"),
        ("thermal_throttle__core_throttle_count", "4", "throttling"),
    ):
        other = machine(tmp_path / word, **{folder + name: value})
        after = {**before, **{k: {**before[k], **other[k]} for k in facts_that_change}}
        assert word in host.unsteady(before, after)
    firmware = {**before, "throttled": {**before["throttled"], "firmware": "50000"}}
    assert host.unsteady(firmware, firmware) is None  # it was throttled long ago
    firmware["throttled"]["firmware"] = "50004"
    assert "holds the CPU back" in host.unsteady(firmware, firmware)


facts_that_change = ("governors", "frequency_limits", "throttled")


def test_a_throttled_cpu_leaves_latency_open():
    sides = {"p90_ms": 1.0, "p90_low_ms": 0.9, "p90_high_ms": 1.1}
    ratios = {"ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6, "pairs": 50, "launches": 3}
    measured = {
        "latency": {**ratios, "candidate": sides},
        "cold_start": {"ratio": 0.5, "low": 0.4, "high": 0.6, "pairs": 30},
        "noise": {"quiet": True},
    }
    settled = settle(parse_target(PROFILE).tolerance, parse_target(PROFILE).tolerance)
    checks = (
        lambda report: latency_ratio(1.0, report),
        lambda report: latency_ms(5.0, report),
        lambda report: latency(settled, report),
        lambda report: cold_start(settled, report),
    )
    throttled = {**measured, "unsteady": "the CPU's governor changed"}
    assert checks[0](measured)["verdict"] == "PASS" == checks[1](measured)["verdict"]
    for check in checks:
        assert check(throttled)["verdict"] == "INCONCLUSIVE"
        assert check(throttled)["reason"].endswith("the CPU's governor changed")


PROFILE = {
    "name": "b",
    "description": "a board",
    "device": {"arch": "aarch64"},
    "run": {"how": "ssh", "host": "b.local", "user": "edge"},
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("host", "-oProxyCommand=x"),
        ("host", ""),
        ("user", "-l"),
        ("key", "keys/mine"),
        ("known_hosts", "hosts"),
        ("port", 0),
        ("limit_s", 0.0),
        ("python", " "),
    ],
)
def test_profiles_that_are_refused(key, value):
    raw = copy.deepcopy(PROFILE)
    raw["run"][key] = value
    with pytest.raises(BadInput, match=f"run.{key}|run.python and"):
        parse_target(raw)


def test_the_example_profile_is_one():
    path = Path(__file__).parents[2] / "examples/ssh/board.toml"
    assert load_target(str(path)).run.how == "ssh"


@pytest.mark.parametrize(
    ("provider", "emulated", "limited"),
    [
        ("CPUExecutionProvider", False, True),
        ("CPUExecutionProvider", True, False),
        ("CUDAExecutionProvider", False, False),
        ("TensorrtExecutionProvider", False, False),
    ],
)
def test_address_space_is_limited_where_the_provider_can_live_with_it(provider, emulated, limited):
    pytest.importorskip("asyncssh")
    run = {**PROFILE["run"], "emulated": emulated}
    target = parse_target({**PROFILE, "run": run, "runtime": {"provider": provider}})
    assert (link.launch(target).address_space > 0) == limited


def test_the_device_error_crosses_process_borders():
    error = from_wire(to_wire(DeviceUnavailable("gone")))
    assert type(error) is DeviceUnavailable and error.exit_code == 6


def test_only_the_runtimes_own_packages_tell_its_version():
    others = {key: {"version": "0.9"} for key in ("onnxruntime_genai", "numpy_quaternion")}
    assert link.package({"packages": others}, "onnxruntime") is None
    assert link.package({"packages": others}, "numpy") is None
    here = {**others, "onnxruntime_gpu": {"version": "1.23"}, "numpy": {"version": "2.1"}}
    gpu = {"name": "onnxruntime-gpu", "version": "1.23"}
    assert link.package({"packages": here}, "onnxruntime") == gpu
    assert link.package({"packages": here}, "numpy") == {"name": "numpy", "version": "2.1"}


def installed(folder, name, **texts):
    """Install a package of which only the texts in its dist-info folder exist."""
    path = folder / f"{name}.dist-info"
    path.mkdir(parents=True)
    for file, content in texts.items():
        (path / file).write_text(content)


def test_a_device_tells_the_wheels_of_its_packages(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    record = 'o/a.so,sha256=x,3\n"o/b,c.py",sha256=y,4\n../bin/o,sha256=z,5\no/b.pyc,,\n'
    tags = "Tag: cp38-cp38-manylinux_2_17_aarch64\nTag: cp38-cp38-manylinux2014_aarch64\n"
    wheel = "Wheel-Version: 1.0\n" + tags
    installed(first, "onnxruntime_gpu-1.19.2+jp6", WHEEL=wheel, RECORD=record)
    installed(second, "onnxruntime_gpu-1.18.0", RECORD=record)  # hidden by the first
    installed(second, "numpy-1.24.4")
    damaged = "o,sha256=x," + "9" * 200_000  # more than a field of the csv module may have
    installed(second, "onnxruntime_genai-1", WHEEL="Tag: any\n", RECORD=damaged)
    installed(second, "numpydoc-1.0", RECORD=record)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "none"), str(first), str(second)])
    told = facts.packages()
    assert told == {
        "onnxruntime_genai": {"version": "1", "wheel": "", "record_sha256": None},
        "onnxruntime_gpu": {
            "version": "1.19.2+jp6",
            "wheel": "onnxruntime_gpu-1.19.2+jp6-cp38-cp38-"
            "manylinux2014_aarch64.manylinux_2_17_aarch64.whl",
            "record_sha256": sha256(b"o/a.so,sha256=x,3\no/b,c.py,sha256=y,4\n").hexdigest(),
        },
        "numpy": {"version": "1.24.4", "wheel": "", "record_sha256": None},
    }
    answers.check({**facts.facts(), "free_bytes": 1}, answers.FACTS, "it")


def test_another_build_of_a_version_is_another_device(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    installed(tmp_path, "onnxruntime-1.19.2", RECORD="o/a.so,sha256=x,3\n")
    found = []
    for record in ("o/a.so,sha256=x,3\no/a.pyc,,\n", "o/a.so,sha256=y,3\n"):
        monkeypatch.setitem(link.known, "b", facts.facts())
        found.append(link.identity(parse_target(PROFILE)))
        (tmp_path / "onnxruntime-1.19.2.dist-info/RECORD").write_text(record)
    monkeypatch.setitem(link.known, "b", facts.facts())
    found.append(link.identity(parse_target(PROFILE)))
    assert found[0] == found[1] != found[2]  # what an installer compiles is no part of a build


@pytest.mark.parametrize(
    "change",
    [
        {"version": "1.0\n--index-url http://elsewhere"},
        {"version": "1.0\n"},
        {"version": "1.0 # x"},
        {"version": ""},
        {"version": None},
        {"wheel": "n-1-py3-none-any.whl\nevil==1"},
        {"wheel": "w" * 256},
        {"record_sha256": "ab" * 32 + "\n"},
        {"record_sha256": "AB" * 32},
        {"record_sha256": "ab" * 31},
        {"record_sha256": 5},
        {"more": "x"},
    ],
)
def test_what_could_forge_a_line_of_a_lock_is_refused(change):
    good = {"version": "1.0", "wheel": "", "record_sha256": "ab" * 32}
    told = {**facts.facts(), "free_bytes": 1, "packages": {"numpy": good}}
    assert answers.check(told, answers.FACTS, "it") == told
    told["packages"] = {"numpy": {**good, **change}}
    with pytest.raises(DeviceUnavailable, match="packages"):
        answers.check(told, answers.FACTS, "it")
    told["packages"] = {"numpy": {"version": "1.0"}}
    with pytest.raises(DeviceUnavailable, match="lacks"):
        answers.check(told, answers.FACTS, "it")
    told["packages"] = {f"onnxruntime_{k}": good for k in range(65)}
    with pytest.raises(DeviceUnavailable, match="at most 64"):
        answers.check(told, answers.FACTS, "it")


def test_the_lock_of_a_device_is_that_of_a_host_with_the_same_packages(monkeypatch):
    """The agent reads folders, the host asks importlib: two ways to the same lock."""
    monkeypatch.setitem(link.known, "b", facts.facts())
    there = packages.lock(packages.packages(parse_target(PROFILE)))
    assert there == packages.lock(packages.packages(load_target("cpu")))
    assert there.count(b"# files of the wheel (RECORD): sha256:") == 2
    assert there.count(b"# sha256 of the wheel: not known, it was installed already") == 2


def test_a_refusal_on_the_device_keeps_its_exit_code():
    said = "noise edgewright: error: bundle b: signature is wrong. Next: x."
    target = parse_target(PROFILE)
    with pytest.raises(IntegrityError, match=r"b\.local.*signature is wrong"):
        deploy.told(target, {"status": 5, "said": said, "out": ""}, answers.INSTALLED)
    with pytest.raises(DeviceUnavailable, match="makes no sense"):
        deploy.told(target, {"status": 0, "said": "", "out": "hello"}, answers.INSTALLED)


class Agent:
    """An agent as a child of this test, without SSH."""

    def __init__(self, folder, owner="me", patience_s=20.0):
        self.process = subprocess.Popen(
            [sys.executable, "-c", text.BOOTSTRAP], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.process.stdin.write(text.line())
        self.process.stdin.flush()
        assert self.process.stdout.read(len(MAGIC)) == MAGIC
        self.told = self.ask(
            "begin",
            folder=str(folder),
            owner=owner,
            who=f"{owner}, process 1",
            patience_s=patience_s,
            limit_s=5,
        )

    def ask(self, op, data=b"", **more):
        header = json.dumps({"op": op, "bytes": len(data), **more}).encode()
        self.process.stdin.write(len(header).to_bytes(8, "big") + header + data)
        self.process.stdin.flush()
        return self.hear()

    def hear(self):
        size = int.from_bytes(self.process.stdout.read(8), "big")
        header = json.loads(self.process.stdout.read(size))
        self.data = self.process.stdout.read(header["bytes"])
        return header

    def end(self):
        self.process.stdin.close()
        assert self.process.wait(10) == 0
        self.process.stdout.close()


def test_an_agent_tells_how_a_command_ended(tmp_path):
    agent = Agent(tmp_path / "device")
    words = ["sh", "-c", "echo out; echo err >&2; exit 7"]
    assert agent.ask("start", words=words, capture=True)["pid"]
    ended = agent.hear()
    assert (ended["status"], ended["said"], agent.data) == (7, "err\n", b"out\n")
    agent.ask("start", words=["sh", "-c", "echo more; kill -ILL $$"], capture=True)
    assert agent.hear()["status"] == -4 and agent.data == b"more\n"
    agent.ask("start", words=["there-is-no-such-program"], capture=True)
    assert agent.hear()["status"] == 127
    agent.end()
    assert list((tmp_path / "device/jobs").iterdir()) == []


def test_pushed_bytes_must_be_those_announced(tmp_path):
    agent = Agent(tmp_path / "device")
    files = {"m.onnx": {"size": 3, "sha256": "0" * 64}}
    assert agent.ask("have", key="k", files=files)["have"] is False
    agent.ask("put", b"abc", name="m.onnx")
    assert agent.ask("keep", key="k", files=files)["error"]["kind"] == "damaged"
    assert not (tmp_path / "device/store/k").exists()
    files["m.onnx"]["size"] = 1 << 60
    assert agent.ask("have", key="k", files=files)["error"]["kind"] == "full"
    agent.end()


def test_an_agent_that_hears_nothing_ends(tmp_path):
    agent = Agent(tmp_path / "device", patience_s=0.3)
    agent.ask("start", words=["sleep", "60"])
    assert agent.process.wait(10) == 1
    assert list((tmp_path / "device/jobs").iterdir()) == []
    agent.process.stdin.close()
    agent.process.stdout.close()


def test_a_lease_is_no_ones_after_a_reboot_or_for_another_process(tmp_path):
    folder = tmp_path / "device"
    agent = Agent(folder)
    other = Agent(folder, owner="you")
    assert other.told["error"] == {"kind": "leased", "text": "me, process 1"}
    other.end()
    with lease.Lease(str(folder)) as holders:
        assert len(holders) == 1
    path = folder / "lease.json"
    for key, value in (("boot", "another"), ("born", "1"), ("job", str(tmp_path / "none"))):
        (place,) = json.loads(path.read_text())
        path.write_text(json.dumps([{**place, key: value}]))
        with lease.Lease(str(folder)) as holders:
            assert holders == []
        path.write_text(json.dumps([place]))
    path.write_text("no JSON")
    Agent(folder, owner="you").end()
    agent.end()


def test_what_is_tidied_up_is_of_the_dead(tmp_path, monkeypatch):
    """An agent that began between the look at the lease and the tidying would lose its folder."""
    dead = tmp_path / "device/jobs/1-2"
    dead.mkdir(parents=True)
    tidy, seen = agent.Agent.tidy, []

    def while_nobody_can_begin(self):
        with (tmp_path / "device/lease.lock").open() as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(dead.exists())
        tidy(self)

    monkeypatch.setattr(agent.Agent, "tidy", while_nobody_can_begin)
    me = {"owner": "me", "who": "me", "patience_s": 600.0, "limit_s": 5}
    one = agent.Agent()
    try:
        one.begin({"folder": str(tmp_path / "device"), **me}, b"")
        assert seen == [True] and not dead.exists() and Path(one.job).is_dir()
        two = Agent(tmp_path / "device")  # not alone, so it removes nothing
        assert Path(one.job).is_dir()
        two.end()
    finally:
        one.leave()


def test_full_disks_have_one_name(tmp_path):
    agent = Agent(tmp_path / "device")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    job = next((tmp_path / "device/jobs").iterdir())
    (job / "new").mkdir()
    (job / "new/m").symlink_to("/dev/full")
    told = agent.ask("put", b"abc", name="m")
    assert told["error"]["kind"] == "full" and os.strerror(errno.ENOSPC) in told["error"]["text"]
    agent.end()
