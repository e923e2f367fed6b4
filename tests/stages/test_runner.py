"""The C runner, compiled for this machine: what it computes, refuses, and says.

Skipped where there is no C compiler (`edgewright setup --target arm` installs one).
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import tiny_model
from onnx import TensorProto, helper

from edgewright.errors import EnvironmentMissing
from edgewright.runtime import toolchain
from edgewright.runtime.session import Launch, Session

Ran = subprocess.CompletedProcess[str]
DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "uint16": TensorProto.UINT16,
    "int32": TensorProto.INT32,
    "uint32": TensorProto.UINT32,
    "int64": TensorProto.INT64,
    "uint64": TensorProto.UINT64,
    "bool": TensorProto.BOOL,
}


@pytest.fixture(scope="module")
def run() -> Callable[..., Ran]:
    """Run the runner with this Python's own onnxruntime library."""
    try:
        program = toolchain.runner(platform.machine())
    except EnvironmentMissing as error:
        pytest.skip(str(error))

    def run(*words: object, said: str | None = None, library: object = None) -> Ran:
        library = library or toolchain.host_library()
        line = [program, "--library", library, *words]
        return subprocess.run(
            [str(word) for word in line], capture_output=True, text=True, input=said, check=False
        )

    return run


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a model, three inputs, and what Python's onnxruntime makes of them."""
    onnx.save(tiny_model(), tmp_path / "model.onnx")
    x = np.random.default_rng(0).normal(size=(3, 1, 1, 12, 12)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # as the runner's default
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    y = [session.run(None, {"x": v})[0] for v in x]
    np.savez(tmp_path / "in.npz", **{f"x__{k:03d}": v for k, v in enumerate(x)})
    np.savez(tmp_path / "out.npz", **{f"scores__{k:03d}": v for k, v in enumerate(y)})
    return tmp_path


def model_words(folder: Path) -> list[object]:
    return ["--model", folder / "model.onnx", "--inputs", folder / "in.npz"]


def test_same_bits_as_python_and_a_time_for_every_call(run, tiny):
    ran = run(*model_words(tiny), "--expect", tiny / "out.npz", "--runs", 7, "--warm-up", 2)
    status = json.loads(ran.stdout)
    assert ran.returncode == 0, ran.stderr
    assert status["runtime"] == onnxruntime.__version__
    assert status["checked"] == {"outputs": 3, "equal": 3, "faults": 0, "worst": 0, "first": ""}
    assert len(status["wall_ns"]) == len(status["cpu_ns"]) == 7
    # The model does 0.4 million multiplications: longer than 1 us, shorter than a second.
    assert all(1e3 < t < 1e9 for t in status["wall_ns"])
    assert status["peak_kib"] > status["rss_before_load_kib"] > 0


def test_outputs_are_written_as_numpy_reads_them(run, tiny):
    assert run(*model_words(tiny), "--outputs", tiny / "found.npz").returncode == 0
    found, golden = np.load(tiny / "found.npz"), np.load(tiny / "out.npz")
    assert sorted(found) == sorted(golden)
    for name in golden:
        np.testing.assert_array_equal(found[name], golden[name])


def test_outputs_that_differ_are_a_failure_with_the_first_of_them(run, tiny):
    golden = dict(np.load(tiny / "out.npz"))
    golden["scores__001"] = golden["scores__001"] + np.float32(0.5)
    np.savez(tiny / "out.npz", **golden)
    expect = [*model_words(tiny), "--expect", tiny / "out.npz", "--runs", 1]
    ran = run(*expect)
    assert ran.returncode == 1
    assert "output 'scores' of vector 1" in ran.stderr and "(1 of 3 outputs" in ran.stderr
    assert json.loads(ran.stdout)["exit"] == 1
    assert run(*expect, "--tolerance", "scores=0.51").returncode == 0
    assert run(*expect, "--tolerance", "scores=0.49").returncode == 1
    assert run(*expect, "--tolerance", "scores=0:0:0").returncode == 0  # no value need be near


def identity(folder: Path, names: list[str]) -> Path:
    """A model that hands every input on, one of each type."""

    def values(prefix: str) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(prefix + n, DTYPES[n], ["n", 2] if n != "bool" else [])
            for n in names
        ]

    nodes = [helper.make_node("Identity", [n], ["out_" + n]) for n in names]
    graph = helper.make_graph(nodes, "identity", values(""), values("out_"))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    return folder


def test_every_plain_type_passes_through(run, tmp_path):
    identity(tmp_path, list(DTYPES))
    feeds = {n: np.array([[0, 1], [2, 77], [3, 5]]).astype(n) for n in DTYPES if n != "bool"}
    feeds["int64"][0, 0] = -(2**62)
    feeds["float64"][1, 1] = np.inf
    feeds["bool"] = np.array(True)
    np.savez(tmp_path / "in.npz", **feeds)
    np.savez(tmp_path / "out.npz", **{f"out_{n}__000": a for n, a in feeds.items()})
    words = [*model_words(tmp_path), "--expect", tmp_path / "out.npz"]
    ran = run(*words, "--outputs", tmp_path / "found.npz")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["checked"]["equal"] == len(DTYPES)
    found = np.load(tmp_path / "found.npz")
    for name, array in feeds.items():
        assert found[f"out_{name}__000"].dtype == array.dtype
        np.testing.assert_array_equal(found[f"out_{name}__000"], array)


def test_tolerance_reads_half_precision(run, tmp_path):
    identity(tmp_path, ["float16"])
    values = np.array([[1.0, -2.5], [6e-8, 65504]], np.float16)
    np.savez(tmp_path / "in.npz", float16=values)
    np.savez(tmp_path / "out.npz", out_float16=values + np.float16([[0.5, 0], [0, 0]]))
    words = [*model_words(tmp_path), "--expect", tmp_path / "out.npz", "--runs", 1]
    assert json.loads(run(*words).stdout)["checked"]["worst"] == 0.5
    assert run(*words, "--tolerance", "out_float16=0.5").returncode == 0
    assert run(*words, "--tolerance", "out_float16=0.499").returncode == 1
    assert run(*words, "--tolerance", "out_float16=0:0:0.75").returncode == 0


def test_requests_are_answered_one_by_one(run, tiny):
    ran = run(*model_words(tiny), "--requests", said="3\n1\n")
    ready, first, second, done = map(json.loads, ran.stdout.splitlines())
    assert ready["ready"] and done["exit"] == 0
    assert [len(first["wall_ns"]), len(second["cpu_ns"])] == [3, 1]


def test_options_of_a_file_and_of_the_session(run, tiny):
    (tiny / "words.txt").write_text(f"--model\n{tiny}/model.onnx\n--runs\n2\n")
    words = [f"@{tiny}/words.txt", "--inputs", tiny / "in.npz", "--no-arena", "--level", "0"]
    ran = run(*words, "--config", "session.intra_op.allow_spinning=0", "--threads", "2")
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout)["wall_ns"]) == 2


def change(folder: Path, name: str, **arrays: np.ndarray) -> list[object]:
    np.savez(folder / name, **arrays)
    return ["--model", folder / "model.onnx", "--inputs", folder / name]


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("nothing", 2, "--model and --inputs are needed"),
        ("unknown option", 2, "unknown option --modle"),
        ("no number", 2, "--runs x: expected a whole number of at least 0"),
        ("no inputs file", 3, "cannot be read"),
        ("wrong dtype", 3, "expected: (tensor(float))"),
        ("wrong shape", 3, "invalid dimensions"),
        ("wrong name", 3, "has no array 'x__000'"),
        ("one too many", 3, "expected as many for each of the 1 inputs"),
        ("compressed", 3, "is compressed: write it with numpy.savez"),
        ("text", 3, "expected little-endian numbers"),
        ("big endian", 3, "expected little-endian numbers"),
        ("Fortran order", 3, "expected C order"),
        ("cut off", 3, "no .npz file"),
        ("no model", 3, "Protobuf parsing failed"),
        ("no library", 6, "cannot be loaded"),
        ("another library", 6, "has no OrtGetApiBase"),
        ("full folder", 6, "cannot be written"),
    ],
)
def test_faults_are_one_line_and_an_exit_code(fault, code, message, run, tiny):
    words = model_words(tiny)
    x = np.zeros((1, 1, 12, 12), np.float32)
    library = None
    match fault:
        case "nothing":
            words = []
        case "unknown option":
            words = ["--modle", "x"]
        case "no number":
            words += ["--runs", "x"]
        case "no inputs file":
            words[3] = tiny / "absent.npz"
        case "wrong dtype":
            words = change(tiny, "f.npz", x=x.astype(np.float64))
        case "wrong shape":
            words = change(tiny, "f.npz", x=x[:, :, :5])
        case "wrong name":
            words = change(tiny, "f.npz", y=x)
        case "one too many":
            words = change(tiny, "f.npz")
        case "compressed":
            np.savez_compressed(tiny / "in.npz", x=x)
        case "text":
            words = change(tiny, "f.npz", x=np.array(["a"]))
        case "big endian":
            words = change(tiny, "f.npz", x=x.astype(">f4"))
        case "Fortran order":
            words = change(tiny, "f.npz", x=np.asfortranarray(np.ones((3, 4), np.float32)))
        case "cut off":
            (tiny / "in.npz").write_bytes((tiny / "in.npz").read_bytes()[:-30])
        case "no model":
            words[1] = Path(__file__)
        case "no library":
            library = tiny / "absent.so"
        case "another library":
            command = ["gcc", "-shared", "-xc", "/dev/null", "-o", tiny / "other.so"]
            subprocess.run([str(w) for w in command], check=True)
            library = tiny / "other.so"
        case "full folder":
            words += ["--outputs", "/proc/self/found.npz"]
    ran = run(*words, "--status", tiny / "status.json", library=library)
    assert ran.returncode == code, ran.stderr
    assert ran.stderr.startswith("edge-run: ") and ran.stderr.count("\n") == 1
    assert message in ran.stderr
    assert json.loads(ran.stdout) == json.loads((tiny / "status.json").read_text())
    assert json.loads(ran.stdout)["exit"] == code


def test_damaged_arrays_never_crash_the_runner(run, tiny):
    """Every byte that says how large something is, made wrong in turn."""
    whole = (tiny / "in.npz").read_bytes()
    begin = whole.index(b"PK\x01\x02")  # the list of members
    places = [*range(0, 30, 3), *range(40, 170, 7), *range(begin, begin + 46, 3)]
    places += range(len(whole) - 22, len(whole), 3)
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        (tiny / "in.npz").write_bytes(bytes(broken))
        ran = run(*model_words(tiny), "--runs", 1)
        assert ran.returncode in (0, 3), (place, ran.returncode, ran.stderr)


def test_nothing_is_written_home_or_reported(run, tiny, monkeypatch):
    """onnxruntime 1.29 and later keep an identity and a queue of reports under the user's cache."""
    monkeypatch.setenv("HOME", str(tiny / "home"))
    for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI"):
        monkeypatch.delenv(name, raising=False)
    (tiny / "home").mkdir()
    assert run(*model_words(tiny)).returncode == 0
    environment = dict(os.environ)
    with Session(tiny / "model.onnx", launch=Launch(env=environment)) as session:
        session.run({"x": np.zeros((1, 1, 12, 12), np.float32)})
    code = "import edgewright, onnxruntime as o; o.InferenceSession('model.onnx')"
    subprocess.run([sys.executable, "-c", code], cwd=tiny, env=environment, check=True)
    assert not list((tiny / "home").rglob("*"))


def test_help_tells_the_exit_codes(run):
    ran = run("--help")
    assert ran.returncode == 0 and "Exit: 0 done" in ran.stdout


def test_no_compiler_is_an_environment_error_that_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("EDGEWRIGHT_HOME", str(tmp_path / "home"))
    with pytest.raises(EnvironmentMissing, match="gcc-aarch64-linux-gnu libc6-dev-arm64") as caught:
        toolchain.runner("aarch64")
    assert caught.value.exit_code == 6
    assert not (tmp_path / "home").exists()
