"""The power goes (106): whatever of an install came to the disk, the old or the new release runs.

A real install is recorded change by change; then the power is cut after every one of them and at
200 random ones, with all that was not flushed lost, torn or in another order (see `disk`). On
each of these disks the device program must find a release that is whole, start it, prove it, go
back from it and install over it.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from bundles import forged, make, unpack
from disk import Change, Node, Recorder, Tree, crashed, record, write

from edgewright.device import pack, program, starts, store
from edgewright.device.install import Wish, install

QUICK = Wish(allow_unsigned=True, self_test=False)
POINTS = 200


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder in memory: hundreds of disks are written."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        memory = tmp_path_factory.mktemp("disks")
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name).resolve()


@pytest.fixture(scope="module")
def releases(place) -> dict[str, Path]:
    """Three releases, by the version in their names."""
    plain = make(place / "made")
    found = {}
    for k in (1, 2, 3):
        path = place / f"s{k}.bundle.tar"
        path.write_bytes(forged(plain, lambda c, k=k: c.update(sequence=k, version=f"1.{k}")))
        found[f"1.{k}"] = path
    return found


def updated(place: Path, releases: dict[str, Path], name: str, *versions: str) -> Recorder:
    """The last of the versions is installed over the others, and that is recorded."""
    disk = place / name
    disk.mkdir()
    for version in versions[:-1]:
        install(releases[version], disk / "root", QUICK)
    return record(disk, lambda: install(releases[versions[-1]], disk / "root", QUICK))


@pytest.fixture(scope="module")
def second(place, releases) -> Recorder:
    return updated(place, releases, "second", "1.1", "1.2")


@pytest.fixture(scope="module")
def third(place, releases) -> Recorder:
    """One of two releases goes."""
    return updated(place, releases, "third", "1.1", "1.2", "1.3")


def device(root: Path, *words: str) -> dict:
    """What a command of the device program says on this root."""
    found: dict = json.loads(program.run([*words, "--root", str(root), "--json"]))
    return found


@cache
def members(bundle: Path) -> dict[str, bytes]:
    return {name: data for name, data, _ in unpack(bundle)}


def runs(root: Path, releases: dict[str, Path]) -> str:
    """The version that runs here, byte for byte that of its bundle, as all commands find it."""
    found = device(root, "status", "--check")
    assert found["current"] is not None and found["current"]["whole"], found
    version: str = found["current"]["version"]
    current = (root / "current").resolve()
    inside = {
        str(path.relative_to(current)): path.read_bytes()
        for path in current.rglob("*")
        if path.is_file()
    }
    assert inside == members(releases[version])
    started = device(root, "start-check")
    assert (started["action"], started["release"]) == ("start", found["current"]["id"])
    return version


def survives(
    tree: Tree, place: Path, releases: dict[str, Path], old: str, new: str, on: bool = True
) -> str:
    """Check a disk after a power cut; the version that ran on it. `on`: go on from there, too."""
    disk = place / "cut"
    write(tree, disk)
    root = disk / "root"
    try:
        version = runs(root, releases)
        assert version in (old, new)
        if not on:
            return version
        if version == new:
            assert old in device(root, "rollback")["release"]
            assert runs(root, releases) == old
        install(releases[new], root, QUICK)
        assert runs(root, releases) == new
        assert not list((root / "staging").iterdir()) and not list(root.glob(".*"))
        assert len(list((root / "releases").iterdir())) == 2
    finally:
        shutil.rmtree(disk)
    return version


def test_a_disk_forgets_what_was_not_flushed():
    """The disk itself, by hand: a file written, flushed or not, and renamed."""
    begin = {0: Node("folder", 0o755)}
    made = Change("name", 1, 0, ".x", kind="file", mode=0o644)
    data, move = Change("data", 1, data=b"all of it"), Change("move", 1, 0, "x", 0, ".x")
    whole = [made, data, Change("flush", 1), move, Change("flush", 0)]
    seen: dict[str, set] = {"whole": set(), "bytes": set(), "names": set()}
    for seed in range(300):
        rng = random.Random(seed)
        for how in ("free", "journal"):
            for name, changes in (
                ("whole", whole),
                ("bytes", [made, data, move, Change("flush", 0)]),
                ("names", [*whole[:4]]),
            ):
                tree = crashed(begin, changes, how, rng)
                names = tree[0].names
                seen[name].add((*sorted(names), tree[1].data if names else b""))
    assert seen["whole"] == {("x", b"all of it")}
    assert {("x", b""), ("x", b"all of it"), ("x", bytes(9)), ("x", b"all")} <= seen["bytes"]
    assert seen["names"] == {
        (b"",),
        (".x", b"all of it"),
        ("x", b"all of it"),
        (".x", "x", b"all of it"),
    }


def test_a_recorder_sees_every_change(place):
    """What is recorded, replayed without a loss, is what is there."""
    disk = place / "seen"
    (disk / "old").mkdir(parents=True)
    (disk / "old/file").write_text("1")

    def act() -> None:
        (disk / "new").mkdir()
        (disk / "new/a").write_text("a")
        (disk / "new/a").rename(disk / "old/file")
        (disk / "link").symlink_to("old/file")
        (disk / "old/file").chmod(0o600)
        (disk / "new").rmdir()
        descriptor = os.open(disk / "old/file", os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)

    seen = record(disk, act)
    assert [c.what for c in seen.changes] == [
        *("name", "name", "data", "move", "name", "mode", "name", "flush")
    ]
    keep = random.Random(0)
    keep.choice = lambda options: 1.0 if 1.0 in options else "after"  # type: ignore[method-assign]
    write(crashed(seen.begin, seen.changes, "free", keep), place / "again")
    assert (place / "again/old/file").read_text() == "a"
    assert (place / "again/old/file").stat().st_mode & 0o777 == 0o600
    assert str((place / "again/link").readlink()) == "old/file"
    assert sorted(p.name for p in (place / "again").iterdir()) == ["link", "old"]


def test_200_random_power_cuts(place, releases, second, third):
    rng = random.Random(106)
    found: dict[str, int] = {}
    for k in range(POINTS):
        seen, old, new = ((second, "1.1", "1.2"), (third, "1.2", "1.3"))[k % 2]
        end = rng.randint(0, len(seen.changes))
        how = rng.choice(("free", "journal"))
        tree = crashed(seen.begin, seen.changes[:end], how, rng)
        version = survives(tree, place, releases, old, new, k % 10 < 4)
        found[version] = found.get(version, 0) + 1
    assert sum(found.values()) == POINTS and min(found["1.1"], found["1.3"]) >= 10, found


@pytest.mark.parametrize("unflushed", ["files", "folders", "names of releases"])
def test_each_flush_is_needed(place, third, unflushed):
    """Where an install did not flush one of these, these very cuts would find a broken release."""
    kinds: dict[str, set[int]] = {"files": set(), "folders": set(), "names of releases": set()}
    root = third.begin[0].names["root"]
    releases = third.begin[root].names["releases"]
    for change in third.changes:
        if change.kind in ("file", "folder") and change.folder != root:
            kinds[f"{change.kind}s"].add(change.node)
        if change.what == "flush" and change.node == releases:
            kinds["names of releases"].add(releases)
    assert all(kinds.values())
    changes = [c for c in third.changes if c.what != "flush" or c.node not in kinds[unflushed]]
    rng = random.Random(4)
    broken = 0
    for _ in range(40):
        write(crashed(third.begin, changes, "free", rng), disk := place / "weak")
        current = store.linked(disk / "root")
        broken += not (current and store.is_whole(disk / "root", current))
        shutil.rmtree(disk)
    assert broken


def test_after_every_change(place, releases, second):
    """What nobody flushed is lost, all of it: the least that can be left."""
    rng = random.Random(0)
    rng.choice = lambda options: options[0]  # type: ignore[method-assign]
    versions = []
    for end in range(len(second.changes) + 1):
        tree = crashed(second.begin, second.changes[:end], "free", rng)
        versions.append(survives(tree, place, releases, "1.1", "1.2", end % 5 == 0))
    assert versions == sorted(versions), "one change switches"
    assert versions[-1] == "1.2", "an install that has ended stays"


def test_the_first_install(place, releases):
    """Nothing, or a release that is whole; once the install has ended, the release."""
    seen = updated(place, releases, "first", "1.1")
    rng = random.Random(1)
    ends = [*rng.choices(range(len(seen.changes)), k=20), *[len(seen.changes)] * 20]
    for k, end in enumerate(ends):
        how = ("free", "journal")[k % 2]
        write(crashed(seen.begin, seen.changes[:end], how, rng), disk := place / "cut")
        root = disk / "root"
        if store.linked(root):
            assert runs(root, releases) == "1.1"
        else:
            assert end < len(seen.changes), "an install that has ended stays"
        install(releases["1.1"], root, QUICK)
        assert runs(root, releases) == "1.1"
        shutil.rmtree(disk)


def test_a_rollback(place, releases):
    """Both ways of going back, by hand and by starts that fail."""
    rng = random.Random(2)
    for name, act in (
        ("by hand", lambda root: starts.rollback(root)),
        ("by starts", lambda root: starts.start_check(root, 1)),
    ):
        disk = place / name
        disk.mkdir()
        for version in ("1.1", "1.2"):
            install(releases[version], disk / "root", QUICK)
        starts.start_check(disk / "root")
        seen = record(disk, lambda root=disk / "root", act=act: act(root))
        for end in rng.choices(range(len(seen.changes) + 1), k=30):
            how = rng.choice(("free", "journal"))
            write(crashed(seen.begin, seen.changes[:end], how, rng), cut := place / "cut")
            found = device(cut / "root", "status", "--check")["current"]
            assert found["whole"] and found["version"] in ("1.1", "1.2")
            assert found["version"] == "1.1" or end < len(seen.changes)
            assert device(cut / "root", "start-check")["release"]
            assert store.is_whole(cut / "root", store.linked(cut / "root"))
            shutil.rmtree(cut)


def test_the_device_program_proves_what_is_left(place, releases, third):
    """On a few of these disks the single file itself, with golden vectors."""
    (place / "device.pyz").write_bytes(pack.program())
    rng = random.Random(3)
    for end in (len(third.changes) // 2, len(third.changes)):
        tree = crashed(third.begin, third.changes[:end], "free", rng)
        write(tree, disk := place / "proven")
        for words in (("status", "--check"), ("start-check",), ("self-test",)):
            done = subprocess.run(
                [sys.executable, str(place / "device.pyz"), *words, "--root", str(disk / "root")],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
        shutil.rmtree(disk)
