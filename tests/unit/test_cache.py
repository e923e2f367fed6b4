"""The cache of stages: whole entries or none, safe folders, a bound, no leftovers."""

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edgewright.cache import ENTRY, MAX_BYTES, Cache, cache_folder, open_cache
from edgewright.errors import EnvironmentMissing, UsageError

KEY, OTHER = "ab" + 62 * "0", "cd" + 62 * "0"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return open_cache({"EDGEWRIGHT_CACHE": str(tmp_path / "cache")})


def stage(folder: Path, size: int = 10) -> Path:
    """The files of a finished stage."""
    (folder / "deep").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(bytes(size))
    (folder / "report.json").write_text("{}")
    (folder / "deep" / "x").write_text("x")
    return folder


def no_note(text: str) -> None:
    raise AssertionError(text)


def test_what_is_stored_is_found(cache, tmp_path):
    assert cache.lookup(KEY, no_note) is None
    kept = cache.store(KEY, "export", stage(tmp_path / "made"))
    found = cache.lookup(KEY, no_note)
    assert found == kept
    assert sorted(found.digests) == ["deep/x", "model.onnx", "report.json"]
    for name in found.digests:
        assert (found.folder / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    assert cache.lookup(OTHER, no_note) is None


@pytest.mark.parametrize("name", ["files/model.onnx", "files/deep/x", ENTRY])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_noticed_and_removed(cache, tmp_path, name, damage):
    cache.store(KEY, "export", stage(tmp_path / "made"))
    path = cache.entry(KEY) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[0] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    notes: list[str] = []
    assert cache.lookup(KEY, notes.append) is None
    assert len(notes) == 1
    assert "damaged" in notes[0]
    assert not cache.entry(KEY).exists()
    cache.store(KEY, "export", tmp_path / "made")
    assert cache.lookup(KEY, no_note) is not None


def test_an_added_file_and_a_moved_entry_are_damage(cache, tmp_path):
    cache.store(KEY, "export", stage(tmp_path / "made"))
    (cache.entry(KEY) / "files" / "extra").write_text("")
    notes: list[str] = []
    assert cache.lookup(KEY, notes.append) is None
    cache.store(KEY, "export", tmp_path / "made")
    cache.entry(OTHER).parent.mkdir()
    cache.entry(KEY).rename(cache.entry(OTHER))
    assert cache.lookup(OTHER, notes.append) is None
    assert len(notes) == 2


def test_the_least_recently_used_entries_go_first(cache, tmp_path):
    keys = [f"{k:02x}" + 62 * "0" for k in range(4)]
    small = Cache(cache.folder, max_bytes=5000)
    for k, key in enumerate(keys[:3]):
        small.store(key, "export", stage(tmp_path / key, 1000))
        os.utime(small.entry(key) / ENTRY, (1000 + k, 1000 + k))
    assert small.lookup(keys[0], no_note) is not None  # used just now
    small.store(keys[3], "export", stage(tmp_path / "new", 1000))
    present = [small.entry(key).exists() for key in keys]
    assert present[0], "it was used last"
    assert not present[1], "it was not used for longest"
    assert present[3], "the newest stays whatever its size"


def test_an_entry_in_use_is_not_given_up(cache, tmp_path):
    cache.store(KEY, "export", stage(tmp_path / "made"))
    small = Cache(cache.folder, max_bytes=0)
    holder = hold(cache.folder / "locks" / KEY)
    small.shrink()
    assert cache.entry(KEY).exists()
    holder.communicate()
    small.shrink()
    assert not cache.entry(KEY).exists()


def hold(path: Path) -> subprocess.Popen[str]:
    """Another process that holds a lock file until its input is closed."""
    code = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT);"
        "fcntl.flock(fd, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(path)]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_lock_is_waited_for_and_leaves_nothing(cache):
    holder = hold(cache.folder / "locks" / KEY)
    told: list[str] = []

    def busy(owner: str) -> None:
        told.append(owner)
        holder.communicate()  # lets go

    with cache.locked(KEY, busy):
        assert len(told) == 1
        assert cache.in_use(KEY)
    assert not list((cache.folder / "locks").iterdir())


def test_leftovers_of_killed_builds_are_tidied_away(cache):
    dead = cache.folder / "tmp" / "dead"
    dead.mkdir()
    (dead / "half").write_text("x")
    (cache.folder / "locks" / KEY).write_text("4711\n")
    with cache.temporary() as alive:
        again = open_cache({"EDGEWRIGHT_CACHE": str(cache.folder)})
        assert alive.exists()
        assert [p.name for p in (again.folder / "tmp").iterdir()] == [alive.name]
        assert not list((again.folder / "locks").iterdir())
    assert not list((cache.folder / "tmp").iterdir())


def test_clear(cache, tmp_path):
    cache.store(KEY, "export", stage(tmp_path / "made"))
    count, size = cache.clear()
    assert count == 1
    assert size > 10
    assert cache.entries() == []


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({"EDGEWRIGHT_CACHE": "/a/b", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/edgewright"),
        ({"HOME": "/h"}, "/h/.cache/edgewright"),
    ],
)
def test_where_the_cache_is(env, folder):
    assert cache_folder(env) == Path(folder)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_others_may_write_to_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)
    with pytest.raises(EnvironmentMissing, match="not safe"):
        open_cache({"EDGEWRIGHT_CACHE": str(tmp_path)})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(EnvironmentMissing, match="12345"):
        open_cache({"EDGEWRIGHT_CACHE": str(folder)})


def test_a_new_folder_is_private_and_its_bound_is_read(tmp_path):
    folder = tmp_path / "new" / "cache"
    cache = open_cache({"EDGEWRIGHT_CACHE": str(folder), "EDGEWRIGHT_CACHE_MAX_BYTES": "5"})
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache.max_bytes == 5
    assert open_cache({"EDGEWRIGHT_CACHE": str(folder)}).max_bytes == MAX_BYTES
    with pytest.raises(UsageError, match="EDGEWRIGHT_CACHE_MAX_BYTES"):
        open_cache({"EDGEWRIGHT_CACHE": str(folder), "EDGEWRIGHT_CACHE_MAX_BYTES": "1 GB"})


def test_a_folder_that_cannot_be_made_is_the_environments_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentMissing, match="cannot be used"):
        open_cache({"EDGEWRIGHT_CACHE": str(tmp_path / "file" / "cache")})


def test_a_held_lock_names_its_owner(cache):
    with cache.locked(KEY, no_note):
        text = (cache.folder / "locks" / KEY).read_text()
        assert text == f"{os.getpid()}\n"
        with (cache.folder / "locks" / KEY).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
