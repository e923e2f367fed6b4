"""Installing: the layout, what is refused with nothing changed, and the way back."""

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import forged, make, pack, unpack

from edgewright.device import fit, program, starts, store
from edgewright.device import install as installs
from edgewright.device.install import Wish, install
from edgewright.errors import (
    BadInput,
    EdgewrightError,
    EnvironmentMissing,
    IntegrityError,
    UsageError,
)

QUICK = Wish(allow_unsigned=True, self_test=False)  # the stage tests run the golden vectors


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "root"


def edited(plain: Path, folder: Path, label: str = "x", **changes) -> Path:
    """The bundle with other values in its manifest."""

    def edit(content):
        for key, value in changes.items():
            place = content
            *path, last = key.split("__")
            for part in path:
                place = place[part]
            place[last] = value

    path = folder / f"{label}.bundle.tar"
    path.write_bytes(forged(plain, edit))
    return path


def release(plain: Path, folder: Path, sequence: int, **changes) -> Path:
    return edited(plain, folder, f"s{sequence}", sequence=sequence, **changes)


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: kinds, modes, link targets and content."""
    found = {}
    for place in sorted(folder.rglob("*")):
        facts = place.lstat()
        if place.is_symlink():
            what = str(place.readlink())
        else:
            what = hashlib.sha256(place.read_bytes()).hexdigest() if place.is_file() else "folder"
        found[str(place.relative_to(folder))] = f"{facts.st_mode:o} {what}"
    return found


def refuse(
    bundle: Path, root: Path, wish: Wish = QUICK, kind: type[EdgewrightError] = IntegrityError
) -> str:
    """Refused in one line, and nothing below the root or beside it has changed."""
    store.prepare(root)
    before = tree(root.parent)
    with pytest.raises(kind) as caught:
        install(bundle, root, wish)
    assert tree(root.parent) == before
    text = str(caught.value)
    assert text.isprintable()
    if kind is IntegrityError:
        assert caught.value.exit_code == 5
    return text


def test_layout(plain, root):
    report = install(plain, root, QUICK)
    digest = hashlib.sha256(unpack(plain)[0][1]).hexdigest()
    name = f"tiny-1.2.3-{digest[:16]}"
    assert (report["action"], report["release"], report["before"]) == ("installed", name, None)
    assert str((root / "current").readlink()) == f"releases/{name}"
    assert not (root / "previous").exists()
    inside = {
        p.relative_to(root / "current").as_posix(): p.read_bytes()
        for p in (root / "current").rglob("*")
        if p.is_file()
    }
    assert inside == {n: d for n, d, _ in unpack(plain)}
    modes = {p.stat().st_mode & 0o7777 for p in (root / "current").rglob("*") if p.is_file()}
    folders = {p.stat().st_mode & 0o7777 for p in (root / "current").rglob("*") if p.is_dir()}
    assert (modes, folders) == ({0o644}, {0o755})
    assert not list((root / "staging").iterdir())
    assert sorted(p.name for p in root.iterdir()) == [
        "current",
        "releases",
        "staging",
        "state.json",
    ]


def test_three_releases_keep_two(plain, tmp_path, root):
    names = []
    for k in (1, 2, 3):
        names.append(install(release(plain, tmp_path, k), root, QUICK)["release"])
    assert store.linked(root) == names[2] and store.linked(root, "previous") == names[1]
    assert sorted(p.name for p in (root / "releases").iterdir()) == sorted(names[1:])
    found = starts.status(root, check=True)
    assert found["current"]["sequence"] == found["sequence"] == 3
    assert found["current"]["whole"] and found["previous"]["id"] == names[1]
    json.dumps(found)


def test_the_same_again_changes_nothing(plain, tmp_path, root):
    path = release(plain, tmp_path, 1)
    install(path, root, QUICK)
    before = tree(root)
    report = install(path, root, QUICK)
    assert report["action"] == "already installed" and tree(root) == before


def test_a_damaged_current_release_is_installed_anew(plain, tmp_path, root):
    path = release(plain, tmp_path, 1)
    first = install(path, root, QUICK)["release"]
    (root / "current/model/model.onnx").write_bytes(b"bit rot")
    assert starts.status(root, check=True)["current"]["whole"] is False
    report = install(path, root, QUICK)
    assert report["release"] == f"{first}~2" and report["action"] == "installed"
    assert store.is_whole(root, store.linked(root))
    with pytest.raises(EnvironmentMissing, match="nothing to go back to"):
        starts.rollback(root)  # never to what is damaged
    assert store.linked(root) == f"{first}~2"


# Refused: the archive (90 to 102), the manifest, the device, the order of releases


def archives(plain: Path) -> dict[str, bytes]:
    """Bundles that are no bundles."""
    data, members = plain.read_bytes(), unpack(plain)
    files = {n: d for n, d, _ in members}
    with tarfile.open(plain) as archive:
        places = {m.name: m.offset for m in archive.getmembers()}

    def kind(letter: bytes) -> bytes:
        changed = bytearray(data)
        at = places["runtime/lock.txt"]
        changed[at + 156 : at + 157] = letter
        changed[at + 148 : at + 156] = b" " * 8
        changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
        return bytes(changed)

    flipped = bytearray(data)
    flipped[places["model/model.onnx"] + 600] ^= 1
    return {
        "flipped": bytes(flipped),
        "extra": pack([*members, ("zzz", b"x", 0o644)]),
        "missing": pack(members[:-1]),
        "twice": pack([*members, members[-1]]),
        "traversal": pack([members[0], ("x/../../../evil", b"x", 0o644), *members[1:]]),
        "absolute": pack([members[0], ("/evil", b"x", 0o644), *members[1:]]),
        "other case": pack([*members[:-1], ("RUNTIME/lock.txt", *members[-1][1:])]),
        "setuid": pack([(n, d, 0o4755) for n, d, _ in members]),
        "symlink": kind(b"2"),
        "hard link": kind(b"1"),
        "device": kind(b"3"),
        "fifo": kind(b"6"),
        "sparse": kind(b"S"),
        "pax": kind(b"x"),
        "long name": kind(b"L"),
        "truncated": data[: len(data) // 2],
        "no end": data[:-512],
        "trailing": data + b"x",
        "zeros behind": data + bytes(1 << 20),
        "manifest spelt otherwise": pack(
            [("manifest.json", json.dumps(json.loads(files["manifest.json"])).encode(), 0o644)]
            + members[1:]
        ),
        "deep nesting": pack([("manifest.json", b"[" * 100_000, 0o644), *members[1:]]),
    }


KINDS = ["flipped", "extra", "missing", "twice", "traversal", "absolute", "other case", "setuid"]
KINDS += ["symlink", "hard link", "device", "fifo", "sparse", "pax", "long name", "truncated"]
KINDS += ["no end", "trailing", "zeros behind", "manifest spelt otherwise", "deep nesting"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("over", [False, True], ids=["empty", "over a release"])
def test_archives_that_are_not_whole(plain, tmp_path, root, kind, over):
    if over:
        install(plain, root, QUICK)
    bad = archives(plain)
    assert sorted(bad) == sorted(KINDS)
    path = tmp_path / "bad.bundle.tar"
    path.write_bytes(bad[kind])
    refuse(path, root)


def test_a_size_that_lies_is_no_reason_to_fill_the_disk(plain, tmp_path, root):
    path = edited(plain, tmp_path, model__bytes=8589934591)
    assert "differs" in refuse(path, root)


def test_a_bundle_larger_than_the_disk(plain, tmp_path, root, monkeypatch):
    real = os.statvfs(tmp_path)
    small = os.statvfs_result((*real[:4], 3, *real[5:]))  # three free blocks
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    assert "free space" in refuse(plain, root, kind=EnvironmentMissing)


@pytest.mark.parametrize(
    "changes",
    [
        {"device__arch": "aarch64" if os.uname().machine == "x86_64" else "x86_64"},
        {"device__isa": ["no_such_flag"]},
        {"compatible": ["linux-riscv64"]},
        {"compatible": ["cpu:no_such_flag"]},
        {"compatible": ["board:acme-7"]},
        {"compatible": [f"linux-{os.uname().machine}-glibc99.0"]},
    ],
)
def test_another_device(plain, tmp_path, root, changes):
    assert "not for this device" in refuse(edited(plain, tmp_path, **changes), root)


def test_tags_are_the_owners_word(plain, tmp_path, root):
    path = edited(plain, tmp_path, compatible=["board:acme-7", "linux"])
    root.mkdir()
    (root / "tags").write_text("board:acme-7\n")
    assert install(path, root, QUICK)["action"] == "installed"


def test_glibc_tags():
    machine = f"linux-{os.uname().machine}"
    if not fit.glibc():
        pytest.skip("another C library")
    assert fit.has_tag(f"{machine}-glibc2.5", frozenset())
    assert not fit.has_tag("linux-mips-glibc2.5", frozenset())


@pytest.mark.parametrize("low", [True, False])
def test_a_runtime_out_of_range(plain, tmp_path, root, monkeypatch, low):
    monkeypatch.setattr(fit, "installed_runtime", lambda: "1.2.3" if low else "9.0.0")
    wish = Wish(allow_unsigned=True)
    assert "onnxruntime" in refuse(plain, root, wish, EnvironmentMissing)


def test_older_and_equal_releases(plain, tmp_path, root):
    five = release(plain, tmp_path, 5)
    install(five, root, QUICK)
    older = release(plain, tmp_path, 4)
    assert "sequence above 5" in refuse(older, root)
    assert "sequence above 5" in refuse(plain, root), "no sequence at all is the oldest"
    assert "sequence above 5" in refuse(release(plain, tmp_path, 5, version="9"), root)
    down = Wish(allow_unsigned=True, self_test=False, allow_downgrade=True)
    assert install(older, root, down)["sequence"] == 4
    assert starts.status(root)["sequence"] == 5, "the floor stays"
    assert "sequence above 5" in refuse(release(plain, tmp_path, 3), root)
    assert install(release(plain, tmp_path, 6), root, QUICK)["sequence"] == 6


def test_the_floor_outlives_rollback_and_a_lost_state(plain, tmp_path, root):
    one, two = release(plain, tmp_path, 1), release(plain, tmp_path, 2)
    install(one, root, QUICK)
    install(two, root, QUICK)
    (root / "state.json").unlink()
    assert "sequence above 2" in refuse(one, root)
    starts.rollback(root)
    with pytest.raises(IntegrityError, match="sequence above 2"):
        install(release(plain, tmp_path, 1, version="9"), root, QUICK)
    assert install(two, root, QUICK)["action"] == "installed", "a second try of the newest is fine"


def test_a_damaged_state_is_made_anew(plain, tmp_path, root):
    install(release(plain, tmp_path, 2), root, QUICK)
    for junk in (b"", b"{", b"[]", b'{"schema":"edgewright-device/1"}', b"\xff" * 100):
        (root / "state.json").write_bytes(junk)
        found = starts.status(root)
        assert found["sequence"] == 2 and found["events"][-1]["event"] == "state lost"


def test_another_model(plain, tmp_path, root):
    install(plain, root, QUICK)
    assert "another model" in refuse(edited(plain, tmp_path, name="other", sequence=9), root)
    assert "another model" in refuse(edited(plain, tmp_path, target="elsewhere", sequence=9), root)


DAY = 86400
NOW = 1_800_000_000


@pytest.mark.parametrize(
    ("clock", "expires", "word"),
    [
        (NOW, NOW, "expired"),
        (NOW, NOW - DAY, "expired"),
        (NOW, NOW + DAY, ""),
        (NOW, None, ""),
        (0, NOW + DAY, "clock"),  # 1970: nothing can be said, so nothing is installed
        (0, None, ""),
    ],
)
def test_dates(plain, tmp_path, root, monkeypatch, clock, expires, word):
    monkeypatch.setattr(installs.time, "time", lambda: float(clock))
    path = edited(plain, tmp_path, expires=expires)
    if word:
        assert word in refuse(path, root)
    else:
        assert install(path, root, QUICK)["action"] == "installed"


def timed(plain: Path, folder: Path, sequence: int, made: int, expires: int | None) -> Path:
    """A release with a time stamp, which all its members carry."""
    path = release(plain, folder, sequence, source_date_epoch=made, expires=expires)
    path.write_bytes(pack(unpack(path), mtime=made))
    return path


def test_a_clock_at_1970_is_held_up_by_what_was_signed(plain, tmp_path, root, monkeypatch):
    """The time stamp of an installed release has passed for certain; the clock may say less."""
    monkeypatch.setattr(installs.time, "time", lambda: float(NOW))
    install(timed(plain, tmp_path, 1, NOW - DAY, None), root, QUICK)
    assert starts.status(root)["time_floor"] == NOW - DAY
    monkeypatch.setattr(installs.time, "time", lambda: 0.0)
    assert "expired" in refuse(timed(plain, tmp_path, 2, NOW - 9 * DAY, NOW - 2 * DAY), root)
    without = Wish(allow_unsigned=True, self_test=False, clock=False)
    assert "expired" in refuse(
        timed(plain, tmp_path, 2, NOW - 9 * DAY, NOW - 2 * DAY), root, without
    )
    assert install(timed(plain, tmp_path, 3, NOW - DAY, NOW + DAY), root, QUICK)["sequence"] == 3
    assert "future" in refuse(timed(plain, tmp_path, 4, NOW, NOW + DAY), root)
    assert install(timed(plain, tmp_path, 4, NOW, NOW + DAY), root, without)["sequence"] == 4


def test_a_clock_far_ahead_does_not_lock_the_device(plain, tmp_path, root, monkeypatch):
    monkeypatch.setattr(installs.time, "time", lambda: 9e9)
    install(release(plain, tmp_path, 1), root, QUICK)
    monkeypatch.setattr(installs.time, "time", lambda: float(NOW))
    assert install(release(plain, tmp_path, 2, expires=NOW + DAY), root, QUICK)["sequence"] == 2


# Whom the device trusts


def test_nobody_is_trusted_by_default(plain, root):
    assert "nobody is trusted" in refuse(plain, root, Wish(self_test=False), UsageError)


def test_signatures(plain, tmp_path, root):
    pytest.importorskip("cryptography")
    from edgewright import signing

    signers = {}
    for name in ("ours", "theirs"):
        signing.keygen(tmp_path / name)
        signers[name] = signing.signer(str(tmp_path / name), {})
    root.mkdir()
    (root / "trust").mkdir()
    shutil.copy(tmp_path / "ours.pub", root / "trust")
    wish = Wish(self_test=False)
    path = release(plain, tmp_path, 1)
    assert "expected signatures of 1 trusted keys" in refuse(path, root, wish)
    signing.sign_bundle(path, [signers["theirs"]], any_verdict=True)
    assert "signatures of 1 of the 1 keys you trust" in refuse(path, root, wish)
    refuse(path, root, Wish(self_test=False, allow_unsigned=True), UsageError)
    signing.sign_bundle(path, [signers["ours"]], any_verdict=True)
    report = install(path, root, wish)
    assert len(report["signers"]) == 1
    assert (root / "current/manifest.dsse.json").is_file()
    # The envelope of one release in front of the manifest of another.
    members = {n: (n, d, m) for n, d, m in unpack(path)}
    mixed = unpack(release(plain, tmp_path, 2))
    forged_path = tmp_path / "mixed.bundle.tar"
    forged_path.write_bytes(pack([mixed[0], members["manifest.dsse.json"], *mixed[1:]]))
    assert "own manifest" in refuse(forged_path, root, wish)
    two = Wish(self_test=False, trust=[tmp_path / "ours.pub", tmp_path / "theirs.pub"], threshold=2)
    assert install(path, root, two)["action"] == "already installed"


# Places


def test_roots_that_others_can_change(plain, root):
    root.mkdir()
    (root / "releases").symlink_to(root.parent)
    refuse_root(plain, root, "link or file")
    (root / "releases").unlink()
    root.chmod(0o777)
    refuse_root(plain, root, "can be changed by others")
    root.chmod(0o755)
    (root / "staging").rmdir()
    (root / "staging").write_text("")
    refuse_root(plain, root, "link or file")


def refuse_root(plain: Path, root: Path, word: str) -> None:
    with pytest.raises(IntegrityError, match=word):
        install(plain, root, QUICK)
    assert not (root / "current").exists()


def test_a_planted_link_is_not_followed(plain, tmp_path, root):
    """`current` and leftovers in staging that point elsewhere: replaced, removed, not followed."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    store.prepare(root)
    (root / "staging" / "link").symlink_to(precious)
    (root / "releases" / "link").symlink_to(precious)
    (root / "current").symlink_to("../precious")
    install(plain, root, QUICK)
    assert (precious / "file").read_text() == "x"
    assert [p.name for p in (root / "releases").iterdir()] == [store.linked(root)]


def test_two_installs_at_once(plain, root):
    store.prepare(root)
    with store.installing(root):
        assert "another install" in refuse(plain, root, kind=EnvironmentMissing)
        with pytest.raises(EnvironmentMissing, match="another install"):
            starts.rollback(root)
    assert install(plain, root, QUICK)["action"] == "installed"


def test_no_root(tmp_path):
    acts: list[Callable] = [starts.status, starts.rollback, starts.start_check, starts.mark_good]
    for act in acts:
        with pytest.raises(UsageError, match="no device root"):
            act(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match="not found"):
        install(tmp_path / "none", tmp_path / "root", QUICK)
    assert program.run(["status", "--root", str(tmp_path / "root")]).startswith("model     none\n")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="expected a folder"):
        install(tmp_path / "none", tmp_path / "file", QUICK)
    with pytest.raises(BadInput, match="expected a file; found a folder"):
        install(tmp_path, tmp_path / "root", QUICK)


# The way back


@pytest.fixture
def two(plain, tmp_path, root) -> tuple[str, str]:
    """Two releases, the older one good."""
    one = install(release(plain, tmp_path, 1), root, QUICK)["release"]
    starts.mark_good(root)
    return one, install(release(plain, tmp_path, 2), root, QUICK)["release"]


def test_rollback(two, root):
    report = starts.rollback(root)
    assert (report["release"], report["from"]) == two
    assert store.linked(root) == two[0] and not (root / "previous").exists()
    with pytest.raises(EnvironmentMissing, match="nothing to go back to"):
        starts.rollback(root)


def test_starts_that_fail(two, root):
    found = [starts.start_check(root) for _ in range(starts.STARTS)]
    assert [row["action"] for row in found] == ["start"] * starts.STARTS
    assert {row["release"] for row in found} == {two[1]}
    after = starts.start_check(root)
    assert (after["action"], after["release"]) == ("rolled back", two[0])
    for _ in range(5):
        assert starts.start_check(root)["release"] == two[0], "what is good stays"
    assert starts.status(root)["releases"][0]["failed"].startswith("started 3 times")


def test_a_start_that_works(two, root):
    starts.start_check(root)
    starts.mark_good(root)
    for _ in range(9):
        assert starts.start_check(root)["release"] == two[1]
    assert starts.status(root)["current"]["good"]


def test_a_release_whose_files_are_gone(two, root):
    shutil.rmtree(root / "releases" / two[1])
    assert starts.start_check(root)["release"] == two[0]


def test_a_lost_link(two, root):
    (root / "current").unlink()
    assert starts.start_check(root)["release"] in two
    assert (root / "current/manifest.json").is_file()


def test_nothing_to_go_back_to(plain, root):
    name = install(plain, root, QUICK)["release"]
    found = [starts.start_check(root, 2) for _ in range(6)]
    assert {row["release"] for row in found} == {name}
    assert "no other" in found[-1]["action"]


def test_no_start_at_all_is_no_count(plain, root):
    """Such a limit would let every new release fail before it ever ran."""
    install(plain, root, QUICK)
    for most in (0, -1):
        with pytest.raises(UsageError, match="1 or more"):
            starts.start_check(root, most)
    assert not starts.status(root)["current"]["failed"]


def test_after_a_rollback_the_failed_release_goes_with_the_next_install(two, plain, tmp_path, root):
    starts.rollback(root)
    three = install(release(plain, tmp_path, 3), root, QUICK)["release"]
    assert sorted(p.name for p in (root / "releases").iterdir()) == sorted([two[0], three])
    assert starts.status(root)["previous"]["id"] == two[0]


def test_what_killed_installs_left_goes(plain, tmp_path, root):
    install(plain, root, QUICK)
    (root / "staging/abc/model").mkdir(parents=True)
    (root / "staging/abc/model/part").write_text("x")
    (root / "releases/tiny-9-abc").mkdir()
    (root / ".current.1.tmp").symlink_to("x")
    (root / ".state.json.1.tmp").write_text("{")
    report = install(release(plain, tmp_path, 2), root, QUICK)
    assert sorted(report["removed"]) == [
        ".current.1.tmp",
        ".state.json.1.tmp",
        "releases/tiny-9-abc",
        "staging/abc",
    ]
    assert not list(root.glob(".*"))
