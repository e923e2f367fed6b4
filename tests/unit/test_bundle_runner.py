"""The C runner inside a bundle: what it proves, how its executable bit travels, the same bytes.

Skipped where there is no C compiler.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import MODEL, RECIPE, forged, here, make, pack, unpack

from edgewright import keys
from edgewright.bundle import manifest, runner
from edgewright.device.install import Wish, install
from edgewright.device.verify import extract, verify
from edgewright.errors import BadInput, IntegrityError, UsageError
from edgewright.explain import explain, lines
from edgewright.pooling import pool_bundles
from edgewright.recipe import parse_recipe
from edgewright.runtime import emulator, toolchain
from edgewright.stage import Job
from edgewright.target import load_target

HERE = platform.machine()
PROGRAM, OPTIONS = "bin/edge-run", "bin/edge-run.options"
ASKED = {**RECIPE, "release": {"license": "MIT", "runner": True}}
ANYBODY = Wish(allow_unsigned=True)

pytestmark = pytest.mark.skipif(toolchain.compiler(HERE) is None, reason="no C compiler")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("runner"), recipe=ASKED)


def files(path: Path) -> dict[str, bytes]:
    return {name: data for name, data, _ in unpack(path)}


def proven(release: Path, options: str = OPTIONS) -> subprocess.CompletedProcess[str]:
    """What a user types on a device, with the library of this Python's wheel."""
    words = [PROGRAM, f"@{options}", "--library", str(toolchain.host_library())]
    return subprocess.run(words, cwd=release, capture_output=True, text=True, check=False)


def test_only_on_request(tmp_path):
    path = make(tmp_path)
    assert not {PROGRAM, OPTIONS} & set(files(path)) and "runner" not in verify(path)
    assert {row["mode"] for row in verify(path)["files"]} == {"0644"}


def test_an_installed_release_proves_itself_without_python(built, tmp_path):
    """The installer, tar, and the device's own Python self-test agree on one release."""
    install(built, tmp_path / "root", ANYBODY)
    current = tmp_path / "root" / "current"
    inside = [p for p in current.rglob("*") if p.is_file()]
    assert {p.relative_to(current).as_posix() for p in inside if os.access(p, os.X_OK)} == {PROGRAM}
    assert (current / PROGRAM).stat().st_mode & 0o7777 == 0o755
    ran = proven(current)
    assert ran.returncode == 0, ran.stderr
    checked = json.loads(ran.stdout)["checked"]
    assert (checked["outputs"], checked["faults"]) == (5, 0)
    (tmp_path / "tar").mkdir()
    subprocess.run(["tar", "xf", built], cwd=tmp_path / "tar", check=True)
    assert proven(tmp_path / "tar").returncode == 0
    # Another model in its place: 1 % more than the golden outputs, ten times what is allowed.
    golden = dict(np.load(current / "model/golden/out.npz"))
    (tmp_path / "tar/model/golden/out.npz").unlink()
    np.savez(tmp_path / "tar/model/golden/out.npz", **{k: v * 1.01 for k, v in golden.items()})
    assert proven(tmp_path / "tar").returncode == 1


def test_a_flipped_byte_and_every_other_mode_are_refused(built, tmp_path):
    members, bad = unpack(built), tmp_path / "bad.tar"

    def refused(data: bytes) -> str:
        bad.write_bytes(data)
        with pytest.raises(IntegrityError) as caught:
            install(bad, tmp_path / "root", ANYBODY)
        assert caught.value.exit_code == 5
        assert not (tmp_path / "root" / "current").exists()
        return str(caught.value)

    def packed(program: bytes = files(built)[PROGRAM], mode: int = 0o755) -> bytes:
        return pack([(n, program, mode) if n == PROGRAM else (n, d, m) for n, d, m in members])

    assert packed() == built.read_bytes()
    flipped = bytearray(files(built)[PROGRAM])
    flipped[len(flipped) // 2] ^= 1
    assert f"{PROGRAM} in the bundle is not what the manifest lists" in refused(
        packed(bytes(flipped))
    )
    for mode in (0o644, 0o4755, 0o775):
        assert "mode" in refused(packed(mode=mode))

    def with_mode(path: str, mode: str):
        def edit(content):
            next(row for row in content["files"] if row["path"] == path)["mode"] = mode

        return forged(built, edit)

    for path, mode in ((PROGRAM, "0644"), (OPTIONS, "0755"), ("model/model.onnx", "0755")):
        assert "mode 0755 is for the runner" in refused(with_mode(path, mode))
    more = {"path": PROGRAM, "options": [OPTIONS, "runtime/lock.txt"], "glibc": None}
    for row in (None, more, {**more, "options": []}, {**more, "options": ["model/model.onnx"]}):
        refused(forged(built, lambda content, row=row: content.update(runner=row)))


def test_same_compiler_same_bytes_whatever_the_surroundings(built, tmp_path, monkeypatch):
    place = tmp_path / "another folder"
    shutil.copytree(toolchain.SOURCES, place / "native")
    monkeypatch.setattr(toolchain, "SOURCES", place / "native")
    monkeypatch.setenv("EDGEWRIGHT_HOME", str(tmp_path / "home"))
    # What gcc and ld would take from a user's environment, and what must not matter.
    (place / "math.h").write_text("#error another user's header\n")
    for name in ("CPATH", "C_INCLUDE_PATH", "LD_RUN_PATH", "LIBRARY_PATH"):
        monkeypatch.setenv(name, str(place))
    for name, value in (("TZ", "Asia/Tokyo"), ("LC_ALL", "C.UTF-8"), ("USER", "else")):
        monkeypatch.setenv(name, value)
    umask = os.umask(0o077)
    try:
        toolchain.compile_runner(HERE, tmp_path / "made")
        again = make(tmp_path / "again", recipe=ASKED)
    finally:
        os.umask(umask)
    program = (tmp_path / "made").read_bytes()
    assert program == files(built)[PROGRAM] and again.read_bytes() == built.read_bytes()
    for text in (place, toolchain.SOURCES, tmp_path, Path.home()):
        assert str(text).encode() not in program
    assert not (tmp_path / "home").exists(), "nothing that was compiled before is shipped"


def test_another_compiler_is_another_key_and_is_named(built, tmp_path, monkeypatch):
    statement = json.loads(files(built)["provenance.intoto.json"])
    read = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    by_use = {row["annotations"]["use"]: row for row in read}
    gcc = Path(toolchain.compiler(HERE))
    said = subprocess.run([gcc, "--version"], capture_output=True, text=True, check=True).stdout
    assert by_use["compiler"]["name"] == said.splitlines()[0]
    assert by_use["compiler"]["digest"]["sha256"] == hashlib.sha256(gcc.read_bytes()).hexdigest()
    assert {"linker", "C library"} <= set(by_use)
    assert PROGRAM in [row["name"] for row in statement["subject"]]
    recipe = parse_recipe(ASKED, tmp_path)
    before = keys.FACTS["runner"](recipe, here())
    assert keys.FACTS["runner"](parse_recipe(RECIPE, tmp_path), here()) == ()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcc").write_text(f'#!/bin/sh\n# newer\nexec {gcc} "$@"\n')
    (tmp_path / "bin" / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    after = keys.FACTS["runner"](recipe, here())
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True]


def test_the_bill_of_materials_and_explain_name_it(built):
    inside = files(built)
    digest = hashlib.sha256(inside[PROGRAM]).hexdigest()
    found = json.loads(inside["sbom.cdx.json"])
    (part,) = [part for part in found["components"] if part["name"] == "edge-run"]
    assert part["hashes"] == [{"alg": "SHA-256", "content": digest}]
    needs = {row["ref"]: row["dependsOn"] for row in found["dependencies"]}
    assert [ref.partition("@")[0] for ref in needs[part["bom-ref"]]] == ["pkg:pypi/onnxruntime"]
    assert valid(inside["sbom.cdx.json"])
    shown = explain(built, None)
    assert shown["runner"] == verify(built)["runner"]
    text = dict(lines(shown))["runs without Python"]
    assert text.startswith(f"{PROGRAM} @{OPTIONS}: {len(inside[PROGRAM])} bytes")
    assert dict(lines(shown))["from compiler"].startswith(
        keys.runner_tools(parse_recipe(ASKED, Path()), here())[0][1]
    )


def valid(document: bytes) -> bool:
    """By CycloneDX's own validator, where it is installed."""
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    judge = validation.JsonStrictValidator(SchemaVersion.V1_6)
    return judge.validate_str(document.decode()) is None


def test_the_oldest_c_library():
    """As binutils reads the versions that the symbols ask for."""
    text = b"\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.4\0GLIBC_PRIVATE\0"
    assert runner.oldest_glibc(text) == "2.34"
    assert runner.oldest_glibc(b"\x7fELF, with another C library") is None


def test_what_it_cannot_prove_does_not_ship(built, tmp_path):
    facts = extract(built, tmp_path / "release")
    inside = {row["path"]: tmp_path / "release" / row["path"] for row in facts["files"]}
    job = Job(recipe=parse_recipe(ASKED, tmp_path), target=here(), folder=tmp_path / "out")
    job.folder.mkdir()
    assert runner.make(job, facts, inside).row == facts["runner"]
    golden = dict(np.load(inside[manifest.GOLDEN_OUTPUTS]))
    np.savez(tmp_path / "wrong.npz", **{k: v + np.float32(1) for k, v in golden.items()})
    with pytest.raises(BadInput, match=r"does not get the golden outputs.*found output 'y' of"):
        runner.make(job, facts, {**inside, manifest.GOLDEN_OUTPUTS: tmp_path / "wrong.npz"})
    assert not list(job.folder.iterdir())
    # Where it cannot be run, or has nothing to run with, that is said.
    (note,) = runner.make(replace(job, target=elsewhere(how="ssh")), facts, inside).notes
    assert "was not run" in note["text"]
    left = runner.make(replace(job, target=elsewhere(provider="CUDAExecutionProvider")), facts, {})
    assert left.row is None and "is left out: it has CPUExecution" in left.notes[0]["text"]


def elsewhere(how: str = "local", provider: str = "CPUExecutionProvider"):
    target = here()
    return replace(
        target,
        run=replace(target.run, how=how),
        runtime=replace(target.runtime, provider=provider),
    )


def test_the_command_hands_out_what_is_inside(built, edgewright, tmp_path):
    """Without a compiler, as nothing needs to be compiled."""
    empty = {"PATH": str(tmp_path), "EDGEWRIGHT_HOME": str(tmp_path / "home")}
    done = edgewright("device-runner", built, "-o", tmp_path / "bin", env=empty)
    assert done.code == 0, done.err
    names = [Path(path).name for path in (PROGRAM, OPTIONS)]
    assert [Path(line).name for line in done.out.split()] == names
    assert [(tmp_path / "bin" / n).read_bytes() for n in names] == [
        files(built)[path] for path in (PROGRAM, OPTIONS)
    ]
    assert os.access(tmp_path / "bin/edge-run", os.X_OK)


def pooled(tmp_path: Path, *bundles: Path) -> Path:
    out = tmp_path / "both.bundle.tar"
    pool_bundles(
        bundles, here(), out, name="both", version="1", sequence=None, watch=lambda event: None
    )
    return out


def named(folder: Path, name: str, text: str = MODEL, recipe: dict = ASKED) -> Path:
    model = {**recipe["model"], "name": name}
    return make(folder / name, text, recipe={**recipe, "model": model})


def test_a_pool_holds_it_once_with_options_for_each_model(tmp_path, monkeypatch):
    one = named(tmp_path, "one")
    two = named(tmp_path, "two", MODEL.replace("12}", "13}"), RECIPE)
    out = pooled(tmp_path, one, two)
    content = verify(out)
    assert content["runner"]["options"] == ["bin/one.options", "bin/two.options"]
    assert files(out)[PROGRAM] == files(one)[PROGRAM]
    assert valid(files(out)["sbom.cdx.json"])
    install(out, tmp_path / "root", ANYBODY)
    for options in content["runner"]["options"]:
        ran = proven(tmp_path / "root" / "current", options)
        assert ran.returncode == 0 and json.loads(ran.stdout)["checked"]["outputs"] == 5, ran.stderr
    monkeypatch.setattr(toolchain, "FLAGS", (*toolchain.FLAGS, "-O1"))
    three = named(tmp_path, "three")
    assert files(three)[PROGRAM] != files(one)[PROGRAM]
    with pytest.raises(UsageError, match="the same bin/edge-run"):
        pooled(tmp_path, one, three)


def test_for_arm_it_runs_in_the_emulator(tmp_path):
    target = load_target("arm")
    try:
        words = emulator.program(target)
        toolchain.tools("aarch64")
    except Exception as error:
        pytest.skip(str(error))
    out = make(tmp_path / "made", recipe=ASKED, target=target)
    release = tmp_path / "release"
    assert extract(out, release)["device"]["arch"] == "aarch64"
    program = (release / PROGRAM).read_bytes()
    assert int.from_bytes(program[18:20], "little") == 183  # EM_AARCH64 of the ELF header
    command = [*words, PROGRAM, f"@{OPTIONS}", "--library", str(emulator.library(target))]
    ran = subprocess.run(command, cwd=release, env={}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    checked = json.loads(ran.stdout)["checked"]
    assert (checked["outputs"], checked["faults"]) == (3, 0)
