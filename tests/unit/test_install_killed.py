"""kill -9 at every step and at any time (106): what runs is the old or the new release, whole.

For a power cut (see also test_power_cut) there is an order: everything a name leads to is on the
disk before the name is. That order is read off the calls of a real install.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import forged, make

from edgewright.device import starts, store
from edgewright.device.install import Wish, install

QUICK = Wish(allow_unsigned=True, self_test=False)

# Installs a bundle once for each death, each time on a copy of the root `begin` if there is one.
# A child of this small process is killed by itself at its n-th step ("step", n), or by its parent
# after a while ("time", seconds). A step is any call that changes files, names or locks, and each
# side of every flush.
DRIVER = """
import json, os, shutil, signal, sys, time
from pathlib import Path
from edgewright.device import store
from edgewright.device.install import Wish, install
from edgewright.errors import EdgewrightError

bundle, root, begin, deaths = json.load(sys.stdin)
WISH = Wish(allow_unsigned=True, self_test=False)
EVENTS = "mkdir rename symlink remove rmdir chmod truncate flock fsync".split()
WRITING = os.O_WRONLY | os.O_RDWR
left = 0

def step(event, args=()):
    global left
    writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
    if writes or event.split(".")[-1] in EVENTS:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def fsync(descriptor, real=os.fsync):
    step("fsync")
    real(descriptor)
    step("fsync")

def look(root):
    current = store.linked(Path(root))
    return [current, bool(current) and store.is_whole(Path(root), current)]

results = []
for how, when in deaths:
    if begin:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(begin, root, symlinks=True)
    pid = os.fork()
    if pid == 0:
        os.fsync = fsync
        if how == "step":
            left = int(when)
            sys.addaudithook(step)
        try:
            install(Path(bundle), Path(root), WISH)
        except BaseException as error:
            os.write(2, f"{error}\\n".encode())
            os._exit(1)
        os._exit(0)
    if how == "time":
        time.sleep(when)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    results.append([status, *look(root)])
print(json.dumps(results))
"""


@pytest.fixture
def tmp_path(tmp_path) -> Iterator[Path]:
    """In memory where that can be: hundreds of installs must not wait for a busy disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder).resolve()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("plain"))


def releases(plain: Path, folder: Path, count: int) -> list[Path]:
    """Releases with growing sequences."""
    paths = []
    for k in range(1, count + 1):
        path = folder / f"s{k}.bundle.tar"
        path.write_bytes(forged(plain, lambda c, k=k: c.update(sequence=k, version=f"1.{k}")))
        paths.append(path)
    return paths


def drive(
    bundle: Path, root: Path, deaths: list[tuple[str, float]], begin: Path | None = None
) -> list[list]:
    """Run the driver; for each death the wait status, what is current and whether it is whole."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([str(bundle), str(root), str(begin or ""), deaths]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows: list[list] = json.loads(done.stdout)
    return rows


def is_killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def every_step(bundle: Path, root: Path, begin: Path) -> list[list]:
    """Kill an install on a copy of `begin` at each of its steps; what the driver says of each."""
    rows: list[list] = []
    while not rows or rows[-1][0] != 0:
        steps = range(len(rows) + 1, len(rows) + 21)
        rows += drive(bundle, root, [("step", k) for k in steps], begin)
        assert all(is_killed(row[0]) or row[0] == 0 for row in rows)
    return [row for row in rows if row[0] != 0]


def test_killed_at_every_step(plain, tmp_path):
    """From one release to the next, then from two to a third: the old one or the new one."""
    old, new, newer = releases(plain, tmp_path, 3)
    begin, root = tmp_path / "begin", tmp_path / "root"
    install(old, begin, QUICK)
    for bundle, version in ((new, "-1.2-"), (newer, "-1.3-")):
        before = store.linked(begin)
        rows = every_step(bundle, root, begin)
        assert len(rows) > 50, "an install has more steps than that"
        assert all(whole for _, _, whole in rows), "what runs must be whole"
        kinds = [current == before for _, current, _ in rows]
        assert kinds == sorted(kinds, reverse=True), "one step switches"
        assert False in kinds and all(version in row[1] for row in rows if row[1] != before)
        install(bundle, begin, QUICK)
        check_tidy(begin)


def test_killed_again_and_again(plain, tmp_path):
    """The leftovers of each death lie there when the next install begins."""
    old, new = releases(plain, tmp_path, 2)
    root = tmp_path / "root"
    install(old, root, QUICK)
    rows = drive(new, root, [("step", k) for k in range(1, 200, 5)])
    assert all(whole for _, _, whole in rows)
    install(new, root, QUICK)
    assert "-1.2-" in store.linked(root)
    check_tidy(root)


def test_killed_at_every_step_of_the_first_install(plain, tmp_path):
    (one,) = releases(plain, tmp_path, 1)
    begin, root = tmp_path / "begin", tmp_path / "root"
    begin.mkdir()
    rows = every_step(one, root, begin)
    assert all(whole or not current for _, current, whole in rows), "no release, or a whole one"
    assert {bool(current) for _, current, _ in rows} == {False, True}
    drive(one, root, [("step", len(rows) // 2)], begin)
    assert install(one, root, QUICK)["release"] == store.linked(root)


def test_killed_at_200_random_times(plain, tmp_path):
    """Releases in turn, each killed a few times before it gets through."""
    bundles = releases(plain, tmp_path, 12)
    root = tmp_path / "root"
    install(bundles[0], root, QUICK)
    rng = random.Random(1)
    begin = time.perf_counter()
    install(bundles[1], root, QUICK)
    span = 1.5 * (time.perf_counter() - begin)
    killed = 0
    for k in range(2, 12):
        times = [("time", rng.uniform(0, span)) for _ in range(20)]
        before = store.linked(root)
        for status, current, whole in drive(bundles[k], root, times):
            killed += is_killed(status)
            assert whole and current
            assert current == before or f"-1.{k + 1}-" in current
        install(bundles[k], root, QUICK)
        assert f"-1.{k + 1}-" in store.linked(root)
    assert killed > 50, "the deaths came too late to be deaths"
    check_tidy(root)


def check_tidy(root: Path) -> None:
    """Nothing is left of killed installs after one that went through."""
    assert not names(root / "staging")
    assert not [name for name in names(root) if name.startswith(".")]
    found = starts.status(root, check=True)
    kept = {found["current"]["id"], found["previous"]["id"]}
    assert names(root / "releases") == kept
    assert found["current"]["whole"] and found["previous"]["whole"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def name_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def recorded(monkeypatch, root: Path, act) -> list[tuple[str, str, str]]:
    """(what, path, other path) of each change below the root, in order, while `act` runs.

    "write": a file opened to be written. "flush": a file or folder, by the descriptor's own name.
    """
    events: list[tuple[str, str, str]] = []
    on = [True]
    here = str(root)

    def hook(event, args):
        if not on[0]:
            return
        if event in ("os.rename", "os.symlink", "os.link"):
            source, target = os.fsdecode(args[0]), os.fsdecode(args[1])
            if here in target:
                events.append((event, source, target))
        elif event in ("os.remove", "os.rmdir") and here in os.fsdecode(args[0]):
            events.append((event, os.fsdecode(args[0]), ""))

    real_open, real_fsync = os.open, os.fsync

    def opened(path, flags, mode=0o777, *, dir_fd=None):
        descriptor = real_open(path, flags, mode, dir_fd=dir_fd)
        if flags & (os.O_WRONLY | os.O_RDWR):
            events.append(("write", name_of(descriptor), ""))
        return descriptor

    def flushed(descriptor):
        events.append(("flush", name_of(descriptor), ""))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", flushed)
    sys.addaudithook(hook)
    try:
        act()
    finally:
        on[0] = False
        monkeypatch.undo()
    return events


def test_everything_is_on_the_disk_before_its_name(plain, tmp_path, monkeypatch):
    old, new = releases(plain, tmp_path, 2)
    root = (tmp_path / "root").resolve()
    install(old, root, QUICK)
    events = recorded(monkeypatch, root, lambda: install(new, root, QUICK))
    current = store.linked(root)
    moves = {(Path(t).name if e == "os.rename" else ""): k for k, (e, _, t) in enumerate(events)}
    named, stated, switched = moves[current], moves["state.json"], moves["current"]
    assert named < stated < switched, "the folder, then the state, then the link"
    staged = events[named][1]

    def flushes(path: str, begin: int = 0) -> list[int]:
        return [k for k, e in enumerate(events) if e[:2] == ("flush", path) and k >= begin]

    files = [p for p in (root / "current").resolve().rglob("*") if p.is_file()]
    assert len(files) == len(json.loads((root / "current/manifest.json").read_text())["files"]) + 1
    release = root / "releases" / current
    for path in files:
        before = f"{staged}/{path.relative_to(release)}"
        written = [k for k, e in enumerate(events) if e[:2] == ("write", before)]
        assert len(written) == 1, f"{before} is written once, by us"
        assert any(written[0] < k < named for k in flushes(before)), f"{before} is flushed"
        folder = str(Path(before).parent)
        assert any(written[0] < k < named for k in flushes(folder)), f"{folder} after its files"
    # The name of the release is on the disk before anything points to it.
    assert any(named < k < stated for k in flushes(str(root / "releases")))
    # The state: its content before its name, its name before the link.
    temporary = events[stated][1]
    assert flushes(temporary) and flushes(temporary)[0] < stated
    assert any(stated < k < switched for k in flushes(str(root)))
    # The link: on the disk before the install says that it is done.
    assert flushes(str(root), switched)
    # Nothing that the old release needs goes before that.
    removed = [k for k, e in enumerate(events) if e[0] in ("os.remove", "os.rmdir")]
    assert not [k for k in removed if k < switched and "releases/" in events[k][1]]


def test_killed_while_the_golden_vectors_run(plain, tmp_path):
    """The child with the model dies with its parent; the old release runs on."""
    old, new = releases(plain, tmp_path, 2)
    root = tmp_path / "root"
    before = install(old, root, QUICK)["release"]
    words = ["install", str(new), "--root", str(root), "--allow-unsigned"]
    code = "import sys; from edgewright.device.program import main; main(sys.argv[1:])"
    for pause in (0.4, 0.9, 1.5):
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
        time.sleep(pause)
        process.kill()
        process.wait()
        assert store.is_whole(root, store.linked(root))
    assert store.linked(root) in (before, install(new, root, QUICK)["release"])
