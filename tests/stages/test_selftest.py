"""The self-test: the device proves the golden vectors, or says why it cannot."""

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgewright import bundle
from edgewright.bundle import golden, manifest, tarball
from edgewright.device.selftest import self_test
from edgewright.errors import BadInput, EnvironmentMissing, IntegrityError, UsageError
from edgewright.recipe import parse_recipe
from edgewright.runtime.launch import host_isa
from edgewright.stage import Job
from edgewright.target import Target, load_target, parse_target

MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
tiny (float[N, 4] x) => (float[N, 3] y, int64[N] best)
<float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
{ h = MatMul(x, w)  y = Relu(h)  best = ArgMax <axis = 1, keepdims = 0> (h) }
"""
OTHER_ARCH = "aarch64" if os.uname().machine == "x86_64" else "x86_64"
Files = dict[str, bytes]
Edit = Callable[[dict, Files], None]


def profile(arch: str = os.uname().machine) -> Target:
    return parse_target({"name": "here", "description": "d", "device": {"arch": arch}})


@pytest.fixture(scope="module", autouse=True)
def no_epoch():
    """Whatever SOURCE_DATE_EPOCH the tests run under, it is not theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SOURCE_DATE_EPOCH", raising=False)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    onnx.save(onnx.parser.parse_model(MODEL), folder / "model.onnx")
    rng = np.random.default_rng(1)
    np.savez(folder / "calibration.npz", x=rng.normal(size=(4, 4)).astype(np.float32))
    recipe = {
        "model": {"name": "tiny", "version": "1", "source": "model.onnx"},
        "data": {"calibration": "calibration.npz"},
    }
    (folder / "out").mkdir()
    job = Job(
        recipe=parse_recipe(recipe, folder),
        target=profile(),
        folder=folder / "out",
        model=folder / "model.onnx",
    )
    return folder / "out" / bundle.run(job)["bundle"]


def rebuilt(path: Path, folder: Path, edit: Edit) -> Path:
    """A bundle that is whole in itself but holds what `edit` makes of manifest and files."""
    with tarfile.open(path) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}
    content = manifest.check(files.pop("manifest.json"))
    edit(content, files)
    content["files"] = [
        {"path": n, "size": len(d), "sha256": hashlib.sha256(d).hexdigest(), "mode": "0644"}
        for n, d in sorted(files.items())
    ]
    model = files["model/model.onnx"]
    content["model"].update(sha256=hashlib.sha256(model).hexdigest(), bytes=len(model))
    files = {"manifest.json": manifest.dump(content), **dict(sorted(files.items()))}
    out = folder / "edited.bundle.tar"
    tarball.write(
        out,
        [
            (tarball.Member(n, len(d), 0o644, 0), d, hashlib.sha256(d).hexdigest())
            for n, d in files.items()
        ],
    )
    return out


def outputs_edit(change: Callable[[dict[str, np.ndarray]], None]) -> Edit:
    """An edit of the golden outputs."""

    def edit(_, files):
        arrays = dict(np.load(io.BytesIO(files["model/golden/out.npz"])))
        change(arrays)
        files["model/golden/out.npz"] = golden.write_npz(arrays)

    return edit


def test_the_same_bits_on_the_same_machine(whole, tmp_path):
    report = self_test(whole, folder=tmp_path)
    assert report["ok"] and report["vectors"] == 4
    assert report["exact"] and report["exact_expected"] and report["max_abs"] == 0
    assert report["runtime"]["arch"] == os.uname().machine
    assert report["memory"]["peak_bytes"] > 1 << 20
    assert not list(tmp_path.iterdir()), "the unpacked bundle must go away"


def test_through_a_profile(whole):
    assert self_test(whole, profile())["ok"]


def test_golden_mismatch(whole, tmp_path):
    def change(arrays):
        arrays["y__002"] = arrays["y__002"] + np.float32(50)

    path = rebuilt(whole, tmp_path, outputs_edit(change))
    with pytest.raises(IntegrityError, match=r"vector 3 of 4, output 'y': .* 50, allowed"):
        self_test(path, folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_model_that_computes_something_else(whole, tmp_path):
    def edit(_, files):
        model = onnx.load_from_string(files["model/model.onnx"])
        model.graph.node[1].op_type = "Neg"
        files["model/model.onnx"] = model.SerializeToString()

    with pytest.raises(IntegrityError, match="self-test"):
        self_test(rebuilt(whole, tmp_path, edit))


def nudge(arrays):
    arrays["y__000"] = np.nextafter(arrays["y__000"], np.float32(np.inf))


def test_last_bits_count_on_the_same_cpu_only(whole, tmp_path):
    with pytest.raises(IntegrityError, match="allowed none"):
        self_test(rebuilt(whole, tmp_path, outputs_edit(nudge)))

    def elsewhere(content, files):
        outputs_edit(nudge)(content, files)
        content["golden"]["made_with"]["isa"] = ["sse2"]

    report = self_test(rebuilt(whole, tmp_path, elsewhere))
    assert report["ok"] and not report["exact"] and not report["exact_expected"]
    assert 0 < report["max_abs"] < 1e-5


def test_class_numbers_may_not_all_differ(whole, tmp_path):
    def edit(content, files):
        content["golden"]["made_with"]["isa"] = ["sse2"]
        outputs_edit(lambda a: a.update(best__000=a["best__000"] + 1))(content, files)

    with pytest.raises(IntegrityError, match=r"0\.0% of the values agree"):
        self_test(rebuilt(whole, tmp_path, edit))


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (np.array([1.0, 2.0], np.float32), ""),
        (np.array([1.0, 2.05], np.float32), ""),
        (np.array([1.0, 2.2], np.float32), "allowed 0.1"),
        (np.array([1.0, np.nan], np.float32), "inf"),
        (np.array([1.0, np.inf], np.float32), "inf"),
        (np.array([[1.0, 2.0]], np.float32), "found float32 [1, 2]"),
        (np.array([1.0, 2.0], np.float64), "found float64"),
    ],
)
def test_compare(found, fault):
    tolerance = {"atol": 0.1, "rtol": 0, "min_equal": 1}
    difference = golden.compare(found, np.array([1.0, 2.0], np.float32), tolerance)
    assert bool(difference.fault) == bool(fault)
    assert fault in difference.fault


def test_infinite_golden_values_must_be_met():
    tolerance = {"atol": 0.1, "rtol": 0, "min_equal": 1}
    masks = np.array([-np.inf, 1.0], np.float32)
    assert golden.compare(masks + np.float32(0.01), masks, tolerance).fault == ""
    assert golden.compare(np.array([-1e30, 1.0], np.float32), masks, tolerance).fault


def put(value, *keys) -> Edit:
    def edit(content, _):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (put("NoSuchExecutionProvider", "runtime", "provider"), "NoSuchExecutionProvider"),
        (put("99.0", "runtime", "min"), "99.0"),
        (put("<1", "runtime", "max"), "<1"),
        (put(["no_such_flag"], "device", "isa"), "no_such_flag"),
        (put(1 << 20, "limits", "max_memory_bytes"), "memory"),
        (put(OTHER_ARCH, "device", "arch"), OTHER_ARCH),
    ],
)
def test_machines_that_do_not_fit(whole, tmp_path, edit, word):
    with pytest.raises(EnvironmentMissing, match=word) as caught:
        self_test(rebuilt(whole, tmp_path, edit))
    assert caught.value.exit_code == 6


def test_a_profile_of_another_architecture(whole):
    with pytest.raises(UsageError, match=OTHER_ARCH):
        self_test(whole, profile(OTHER_ARCH))


def test_a_model_that_never_ends(whole, tmp_path):
    loop = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 17]>
        endless (float[N, 4] x) => (float[N, 4] y, int64[N] best) {
          n = Constant <value = int64 {4611686018427387904}> ()
          go = Constant <value = bool {1}> ()
          y = Loop (n, go, x) <body = step (int64 i, bool c, float[N, 4] a) =>
            (bool d, float[N, 4] b) { d = Identity (c)  b = Neg (a) }>
          best = ArgMax <axis = 1, keepdims = 0> (y)
        }
        """
    )

    def edit(content, files):
        content["limits"]["timeout_s"] = 3
        files["model/model.onnx"] = loop.SerializeToString()

    with pytest.raises(BadInput, match="more than 3 s"):
        self_test(rebuilt(whole, tmp_path, edit))


def pickled() -> bytes:
    file = io.BytesIO()
    np.savez(file, **{f"x__{k:03d}": np.array([{}], dtype=object) for k in range(4)})
    return file.getvalue()


def deflated() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **{f"x__{k:03d}": np.zeros(4_000_000) for k in range(4)})
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [b"", b"no archive", pickled(), deflated(), golden.write_npz({"x__000": np.zeros((1, 4))})],
)
def test_golden_archives_are_not_trusted(whole, tmp_path, data):
    def edit(_, files):
        files["model/golden/in.npz"] = data

    with pytest.raises(IntegrityError, match="golden vectors") as caught:
        self_test(rebuilt(whole, tmp_path, edit))
    assert str(caught.value).isprintable()


def test_a_damaged_bundle_is_never_run(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("edgewright.device.prove.Session", lambda *_, **__: pytest.fail("run"))
    data = bytearray(whole.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(IntegrityError):
        self_test(tmp_path / "x.tar")


@pytest.mark.skipif("avx2" not in host_isa(), reason="needs an x86 machine with AVX2")
def test_an_emulated_profile(whole, tmp_path):
    target = load_target("cpu-avx2")
    try:
        report = self_test(whole, target)
    except EnvironmentMissing as error:
        pytest.skip(str(error))
    assert report["ok"] and report["runtime"]["emulated"] and report["memory"] is None
    assert not report["exact_expected"]
