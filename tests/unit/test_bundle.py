"""The bundle: same inputs, same bytes; and a device that believes nothing it has not checked."""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import rfc8785
from bundles import MODEL, RECIPE, forged, here, make, pack, unpack
from jsonschema import Draft202012Validator

from edgewright import bundle
from edgewright.bundle import assemble, evidence, golden, manifest
from edgewright.device.verify import extract, verify
from edgewright.errors import (
    BadInput,
    EdgewrightError,
    EnvironmentMissing,
    IntegrityError,
    UsageError,
)
from edgewright.recipe import parse_recipe
from edgewright.stage import Job
from edgewright.target import load_target

BRANCH = """
<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>
branch (float[N, 4] x) => (float[N, 4] y) {
  s = ReduceSum <keepdims = 0> (x)
  z = Constant <value_float = 0.0> ()
  c = Greater (s, z)
  y = If (c) <then_branch = g1 () => (float[N, 4] a) { a = com.microsoft.Gelu (x) },
              else_branch = g2 () => (float[N, 4] b) { b = Neg (x) }>
}
"""


@pytest.fixture(scope="module", autouse=True)
def no_epoch():
    """Whatever SOURCE_DATE_EPOCH the tests run under, it is not theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SOURCE_DATE_EPOCH", raising=False)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another bundle with files of the same names and sizes."""
    return make(tmp_path_factory.mktemp("other"), MODEL.replace("12}", "13}"))


def refuse(data: bytes, folder: Path, kind: type[EdgewrightError] = IntegrityError) -> str:
    """Both ways in refuse with one line, and leave nothing behind."""
    place = folder / "refused"
    place.mkdir(exist_ok=True)
    path = place / "x.bundle.tar"
    path.write_bytes(data)
    texts = []
    for read in (verify, lambda bundle: extract(bundle, place / "unpacked")):
        with pytest.raises(kind) as caught:
            read(path)
        texts.append(str(caught.value))
        assert caught.value.exit_code == (5 if kind is IntegrityError else 3)
    assert texts[0] == texts[1]
    assert texts[0].isprintable() and texts[0].startswith(f"{path}: "), texts[0]
    assert [p.name for p in place.iterdir()] == ["x.bundle.tar"]
    return texts[0]


# What is in it


def test_layout(whole):
    names = [name for name, _, _ in unpack(whole)]
    assert whole.name == "tiny-1.2.3-here.bundle.tar"
    assert names[0] == "manifest.json"
    assert names[1:] == sorted(names[1:])
    assert set(names) >= {"model/model.onnx", "model/golden/in.npz", "model/golden/out.npz"}
    content = verify(whole)
    assert content["expires"] is None and content["gate"] is None
    assert [entry["path"] for entry in content["files"]] == names[1:]


def test_gate_report_goes_in(tmp_path):
    report = {"verdict": "PASS", "checks": [], "notes": []}
    path = make(tmp_path, reports={"gate": report})
    content = verify(path)
    assert content["gate"] == {"verdict": "PASS", "report": "report/gate.json"}
    inside = {name: data for name, data, _ in unpack(path)}["report/gate.json"]
    assert json.loads(inside) == evidence.public(report)


def test_golden_is_what_the_model_gives(whole):
    inside = {name: io.BytesIO(data) for name, data, _ in unpack(whole)}
    inputs, outputs = (np.load(inside[f"model/golden/{n}.npz"]) for n in ("in", "out"))
    assert sorted(inputs) == [f"x__{k:03d}" for k in range(5)]
    weights = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    for k in range(5):
        expected = np.maximum(inputs[f"x__{k:03d}"] @ weights, 0)
        np.testing.assert_allclose(outputs[f"y__{k:03d}"], expected, rtol=1e-5)
    facts = verify(whole)["golden"]
    top = max(np.abs(outputs[key]).max() for key in outputs)
    assert facts["tolerances"][0]["atol"] == pytest.approx(0.001 * top, rel=0.01)
    assert facts["made_with"]["exact"] is True


def test_few_samples_are_told(tmp_path):
    path = make(tmp_path, samples=2)
    assert verify(path)["golden"]["count"] == 2
    feeds = golden.choose([{"x": np.zeros(1 << 20, np.float32)}] * 9)
    assert len(feeds) == golden.MIN_VECTORS
    assert len(golden.choose([{"x": np.zeros(4)}] * 9)) == golden.MAX_VECTORS


def test_limits_are_the_lower_of_profile_and_recipe(tmp_path):
    path = make(tmp_path, target=here(max_size_bytes=4000, max_latency_ms=7.5))
    limits = verify(path)["limits"]
    assert (limits["max_model_bytes"], limits["max_latency_ms"]) == (4000, 7.5)
    assert limits["max_memory_bytes"] is None


def test_operators_of_nested_graphs_and_other_domains():
    model = onnx.parser.parse_model(BRANCH)
    expected = "ai.onnx;17;Constant,Greater,If,Neg,ReduceSum\ncom.microsoft;1;Gelu\n"
    assert assemble.operators_config(model).decode() == expected


def test_operators_of_functions():
    model = onnx.parser.parse_model(
        """
        <ir_version: 9, opset_import: ["" : 17, "own" : 1]>
        g (float[N] x) => (float[N] y) { y = own.twice (x) }
        <domain: "own", opset_import: ["" : 17]>
        twice (a) => (b) { b = Add (a, a) }
        """
    )
    assert assemble.operators(model) == {"ai.onnx:17": ["Add"]}


def test_quantized_models_get_the_wider_tolerance():
    text = MODEL.replace("y = Relu(h)", "y = Relu(h) q, s, z = DynamicQuantizeLinear(x)")
    assert assemble.is_quantized(onnx.parser.parse_model(text))
    assert not assemble.is_quantized(onnx.parser.parse_model(MODEL))
    vectors = [{"y": np.array([-8.0, 4.0], np.float32)}]
    wide, narrow = (golden.tolerances(vectors, quantized)[0] for quantized in (True, False))
    assert (wide["atol"], narrow["atol"]) == (0.16, 0.008)


def test_schema_is_valid_and_closed():
    Draft202012Validator.check_schema(manifest.SCHEMA)

    def objects(value):
        if isinstance(value, dict):
            if value.get("type") == "object" or "object" in value.get("type", ()):
                yield value
            for inner in value.values():
                yield from objects(inner)

    for part in objects(manifest.SCHEMA):
        assert "additionalProperties" in part, part


# What it refuses to make


@pytest.mark.parametrize("text", ["-1", "1e9", "now", " 1", "1\n", "99999999999", "٣"])
def test_source_date_epoch_that_is_none(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        make(tmp_path)
    assert not list((tmp_path / "out").iterdir())


def test_source_date_epoch(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    path = make(tmp_path)
    assert verify(path)["source_date_epoch"] == 1_700_000_000
    with tarfile.open(path) as archive:
        assert {m.mtime for m in archive.getmembers()} == {1_700_000_000}


def test_a_name_that_could_steer_a_terminal(tmp_path):
    model = onnx.parser.parse_model(MODEL)
    model.graph.output[0].name = model.graph.node[1].output[0] = "y\x1b[31m"
    text = "control character"
    with pytest.raises(BadInput, match=text) as caught:
        source = tmp_path / "m.onnx"
        onnx.save(model, source)
        np.savez(tmp_path / "calibration.npz", x=np.zeros((3, 4), np.float32))
        out = tmp_path / "out"
        out.mkdir()
        recipe = parse_recipe(RECIPE, tmp_path)
        bundle.run(Job(recipe=recipe, target=here(), folder=out, model=source))
    assert str(caught.value).isprintable()
    assert not list(out.iterdir())


def test_a_random_model(tmp_path):
    text = MODEL.replace("y = Relu(h)", "r = RandomNormalLike(h) y = Add(h, r)")
    with pytest.raises(BadInput, match="run to run"):
        make(tmp_path, text)


def test_an_output_that_is_not_a_number(tmp_path):
    text = MODEL.replace("y = Relu(h)", "n = Abs(h) m = Neg(n) y = Log(m)")
    with pytest.raises(BadInput, match="NaN"):
        make(tmp_path, text)


def test_weights_in_other_files(tmp_path):
    model = onnx.parser.parse_model(MODEL)
    weights = onnx.numpy_helper.from_array(np.zeros((4, 3), np.float32), "w")
    model.graph.initializer[0].CopyFrom(weights)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="w.bin")
    with pytest.raises(BadInput, match="other files"):
        assemble.load(path)


# Same inputs, same bytes

CHILD = """
import sys, os
from pathlib import Path
os.umask(int(sys.argv[3], 8))
from edgewright import bundle
from edgewright.recipe import parse_recipe
from edgewright.stage import Job
from edgewright.target import parse_target
import json
facts = json.loads(sys.argv[1])
source = Path(sys.argv[2])
out = source / "out"
out.mkdir()
job = Job(recipe=parse_recipe(facts["recipe"], source), target=parse_target(facts["target"]),
          folder=out, model=source / "model.onnx")
print(bundle.run(job)["sha256"])
"""


def test_same_bytes_whatever_the_circumstances(tmp_path, whole):
    target = here()
    facts = json.dumps({"recipe": RECIPE, "target": target.raw})
    circumstances = [
        ("a", {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "1"}, "022"),
        ("b ü/deep", {"TZ": "America/New_York", "LC_ALL": "C.UTF-8"}, "077"),
    ]
    digests = {hashlib.sha256(whole.read_bytes()).hexdigest()}
    for name, variables, umask in circumstances:
        source = tmp_path / name
        source.mkdir(parents=True)
        for file in ("model.onnx", "calibration.npz"):
            shutil.copy(whole.parents[1] / "source" / file, source / file)
            os.utime(source / file, (1, 1))
        environment = {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
        run = subprocess.run(
            [sys.executable, "-c", CHILD, facts, str(source), umask],
            cwd=source,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(run.stdout.strip())
    assert len(digests) == 1


def test_npz_has_one_spelling():
    arrays = {"b": np.arange(6.0).reshape(2, 3).T, "a": np.array(3, np.int64)}
    first = golden.write_npz(arrays)
    assert first == golden.write_npz(dict(reversed(arrays.items())))
    loaded = np.load(io.BytesIO(first))
    assert all((loaded[name] == array).all() for name, array in arrays.items())


def test_no_trace_of_the_machine(whole):
    data = whole.read_bytes()
    for trace in (str(whole.parents[1]), os.uname().nodename, str(Path.home())):
        if len(trace) > 3:
            assert trace.encode() not in data


# Round trip


def test_extract(whole, tmp_path):
    old = os.umask(0o077)
    try:
        content = extract(whole, tmp_path / "x")
    finally:
        os.umask(old)
    found = {p.relative_to(tmp_path / "x").as_posix(): p for p in (tmp_path / "x").rglob("*")}
    expected = {name: data for name, data, _ in unpack(whole)}
    assert {n: p.read_bytes() for n, p in found.items() if p.is_file()} == expected
    assert {p.stat().st_mode & 0o7777 for p in found.values() if p.is_file()} == {0o644}
    assert content == verify(whole)


def test_extract_only_into_a_new_folder(whole, tmp_path):
    kept = tmp_path / "there"
    kept.mkdir()
    (kept / "precious").write_text("x")
    (tmp_path / "link").symlink_to(kept)
    for folder in (kept, tmp_path / "link", kept / "precious"):
        with pytest.raises(UsageError, match="exists"):
            extract(whole, folder)
    assert [p.name for p in kept.iterdir()] == ["precious"]


def test_places_that_are_no_bundle(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(BadInput) as caught:
            verify(path)
        assert caught.value.exit_code == 3
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(IntegrityError, match="never ends"):
            verify(path)


def test_a_disk_that_fills_up(whole, tmp_path, monkeypatch):
    def full(folder, path, mode):
        if path.startswith("model/golden"):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return io.BytesIO()

    monkeypatch.setattr("edgewright.device.verify.new_file", full)
    with pytest.raises(EnvironmentMissing, match="no space left"):
        extract(whole, tmp_path / "x")
    assert not list(tmp_path.iterdir())


# 90: one byte


def test_a_flipped_byte_in_each_file(whole, tmp_path):
    data = whole.read_bytes()
    with tarfile.open(whole) as archive:
        members = archive.getmembers()
    for member in members:
        for place in {member.offset_data, member.offset_data + member.size - 1}:
            changed = bytearray(data)
            changed[place] ^= 1
            assert member.name in refuse(bytes(changed), tmp_path) or member is members[0]
        for place in (member.offset, member.offset + 124, member.offset + 150):
            changed = bytearray(data)
            changed[place] ^= 1
            refuse(bytes(changed), tmp_path)


def test_a_flipped_byte_anywhere_in_the_manifest(whole):
    text = unpack(whole)[0][1]
    for place in range(0, len(text), 3):
        changed = bytearray(text)
        changed[place] ^= 2
        with pytest.raises(IntegrityError):
            manifest.check(bytes(changed))


# 95 to 102: other members


def test_model_of_another_bundle(whole, other, tmp_path):
    theirs = {name: data for name, data, _ in unpack(other)}["model/model.onnx"]
    mixed = [(n, theirs if n == "model/model.onnx" else d, m) for n, d, m in unpack(whole)]
    assert [len(d) for _, d, _ in mixed] == [len(d) for _, d, _ in unpack(whole)]
    assert "SHA-256" in refuse(pack(mixed), tmp_path)


def test_extra_missing_and_moved_members(whole, tmp_path):
    members = unpack(whole)
    extra = ("zzz", b"x", 0o644)
    assert "'zzz'" in refuse(pack([*members, extra]), tmp_path)
    assert "'zzz'" in refuse(pack([members[0], extra, *members[1:]]), tmp_path)
    assert "lacks" in refuse(pack(members[:-1]), tmp_path)
    refuse(pack(members[1:]), tmp_path)
    refuse(pack([]), tmp_path)
    refuse(pack([members[0], members[2], members[1], *members[3:]]), tmp_path)
    refuse(pack([members[0], members[1], *members[1:]]), tmp_path)
    refuse(pack([members[0], *members]), tmp_path)
    signature = ("manifest.dsse.json", b"{}", 0o644)
    refuse(pack([members[0], signature, *members[1:]]), tmp_path)


def listed(path: str) -> Callable[[dict], None]:
    """An edit that gives the last file of the manifest another path."""

    def edit(content):
        content["files"][-1]["path"] = path

    return edit


@pytest.mark.parametrize(
    "path",
    ["../evil", "/etc/evil", "..\\evil", "runtime/\0", "runtime/x.", "runtime/x ", "zz/CON"]
    + ["manifest.json", "manifest.dsse.json", "Model/model.onnx", "model/model.onnx/x"]
    + ["zé", "z" + unicodedata.normalize("NFD", "é"), "runtime/lock.txt", "z\u202etxt", "z" * 101],
)
def test_paths_in_the_manifest(whole, tmp_path, path):
    refuse(forged(whole, listed(path)), tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_a_listed_file_that_is_a_link_or_device(whole, tmp_path, kind):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data, mode in unpack(whole):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            if name == "runtime/lock.txt":
                info.type, info.linkname, info.size = kind, "/etc/passwd", 0
            archive.addfile(info, io.BytesIO(data))
    data = bytearray(file.getvalue())
    refuse(bytes(data), tmp_path)


def test_sizes_that_lie(whole, tmp_path):
    def edit(content):
        content["files"][-1]["size"] += 1

    refuse(forged(whole, edit), tmp_path)

    def huge(content):
        content["files"][-1]["size"] = 2**53 - 1

    refuse(forged(whole, huge), tmp_path)


def test_truncated_and_too_long(whole, tmp_path):
    data = whole.read_bytes()
    for size in (0, 1, 511, 512, 600, len(data) // 2, len(data) - 1024, len(data) - 1):
        refuse(data[:size], tmp_path)
    for tail in (b"\n", bytes(512), b"evil" * 200):
        refuse(data + tail, tmp_path)


def test_a_sparse_file_of_ten_gigabytes(whole, tmp_path):
    path = tmp_path / "big.tar"
    path.write_bytes(whole.read_bytes())
    os.truncate(path, 10 << 30)
    with pytest.raises(IntegrityError, match="after its end"):
        verify(path)


# 103, 108, 111: the manifest


def with_manifest(path: Path, text: bytes) -> bytes:
    (name, _, mode), *rest = unpack(path)
    return pack([(name, text, mode), *rest])


def test_manifest_in_another_spelling(whole, tmp_path):
    text = unpack(whole)[0][1]
    content = json.loads(text)
    spellings = [
        json.dumps(content).encode(),
        json.dumps(content, indent=1).encode(),
        text + b"\n",
        b"\xef\xbb\xbf" + text,
        text.decode().encode("utf-16"),
        text.replace(b'"sequence":0', b'"sequence":0.0'),
        text.replace(b'"sequence":0', b'"sequence":-0'),
        text.replace(b'"sequence":0', b'"sequence":NaN'),
        text.replace(b'"sequence":0', b'"sequence":1e999'),
        text.replace(b'"sequence":0', b'"sequence":' + b"9" * 5000),
        text.replace(b'"sequence":0', b'"sequence":0,"sequence":0'),
        text.replace(b'"tiny"', b'"\\ud800"'),
        text.replace(b'"tiny"', b'"t\\u0069ny"'),
        text.replace(b'"tiny"', b'"\xff"'),
        text.replace(b'"tiny"', b"[" * 5000 + b"]" * 5000),
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'"' + b'\\"' * 500_000,
        b"[]",
        b"null",
        b"",
        b"x" * (manifest.MAX_BYTES + 1),
    ]
    for spelling in spellings:
        refuse(with_manifest(whole, spelling), tmp_path)


def drop(*keys: str) -> Callable[[dict], None]:
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edit


def put(value, *keys) -> Callable[[dict], None]:
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        put([], "files"),
        put({}, "files"),
        put(1, "extra"),
        put(1, "model", "extra"),
        drop("files"),
        drop("golden", "made_with"),
        put("4755", "files", 0, "mode"),
        put("0755", "files", 0, "mode"),
        put("0" * 64, "files", 0, "sha256"),
        put("0" * 64, "model", "sha256"),
        put(1, "model", "bytes"),
        put("model/other.onnx", "model", "path"),
        put("model/golden/in.npz", "golden", "outputs"),
        put([], "golden", "tolerances"),
        put(-0.5, "golden", "tolerances", 0, "atol"),
        put("z", "golden", "tolerances", 0, "output"),
        put(0, "golden", "count"),
        put({"verdict": "PASS", "report": "report/none.json"}, "gate"),
        put({"verdict": "YES", "report": "runtime/lock.txt"}, "gate"),
        put(True, "sequence"),
        put(-1, "sequence"),
        put(-1, "source_date_epoch"),
        put(5, "source_date_epoch"),
        put(9, "runtime", "threads"),
        put("../../../etc", "name"),
        put("tiny\n", "name"),
        put("x/../y.toml", "target"),
        put("\x1b[2J", "compatible", 0),
        put(None, "signature"),
        put("edgewright-bundle/one", "schema"),
    ],
)
def test_manifests_that_are_well_spelt_but_wrong(whole, tmp_path, edit):
    refuse(forged(whole, edit), tmp_path)


def test_a_manifest_without_its_digest(whole, tmp_path):
    content = json.loads(unpack(whole)[0][1])
    del content["digest"]
    refuse(with_manifest(whole, rfc8785.dumps(content)), tmp_path)


def test_another_major_format(whole, tmp_path):
    data = forged(whole, put("edgewright-bundle/2", "schema"))
    assert "another format" in refuse(data, tmp_path)


def test_bits_the_manifest_does_not_grant(whole, tmp_path):
    for mode in (0o755, 0o4755, 0o666):
        members = [(n, d, mode if n == "runtime/lock.txt" else m) for n, d, m in unpack(whole)]
        assert "mode" in refuse(pack(members), tmp_path)
    members = [(n, d, 0o755 if n == "manifest.json" else m) for n, d, m in unpack(whole)]
    refuse(pack(members), tmp_path)


def test_time_stamps_are_one(whole, tmp_path):
    refuse(pack(unpack(whole), mtime=1), tmp_path)


def test_the_model_is_never_parsed(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "load", lambda *_: pytest.fail("parsed"))
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_: pytest.fail("parsed"))
    verify(whole)
    extract(whole, tmp_path / "x")


def test_verifying_needs_neither_onnx_nor_a_runtime():
    code = (
        "import sys; import edgewright.device.verify; "
        "print([m for m in ('onnx', 'onnxruntime', 'torch') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_shipped_profiles_fit_the_format(tmp_path):
    """Names and lists of every profile pass the schema, also where they cannot run here."""
    for name in ("cpu", "arm"):
        target = load_target(name)
        part = {"arch": target.device.arch, "isa": list(target.device.isa)}
        schema = {**manifest.SCHEMA["properties"]["device"], "$defs": manifest.SCHEMA["$defs"]}
        Draft202012Validator(schema).validate(part)
