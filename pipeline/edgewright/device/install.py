"""Installing a bundle: verify, unpack, prove, switch. The old release runs until the switch.

The order is what makes it safe. Signature, dates, device, runtime, space and sequence are judged
by the manifest before any other byte is read. Files are written by this program alone, below a
staging folder that nobody else reads, hashed on the way and flushed to the disk. The golden
vectors are proven there, in a child with limits. Then the folder gets its name, the state says
so, and one rename makes it current; each step is on the disk before the next one begins.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgewright.bundle.manifest import Manifest
from edgewright.device import envelope, fit, store
from edgewright.device import trust as trusts
from edgewright.device.child import native
from edgewright.device.delta import open_delta
from edgewright.device.envelope import Trust
from edgewright.device.verify import Verified, extract, naming, new_file, open_bundle, walk
from edgewright.errors import EnvironmentMissing, IntegrityError, UsageError
from edgewright.files import flush
from edgewright.runtime.session import Child

Report = dict[str, Any]
TRUST = "trust"


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What an install may do. `trust`: key or trust files; none: those in ROOT/trust. `delta`: the
    file is one against the release that is installed. `python`: the command that starts the
    child of the self-test.
    """

    trust: Sequence[Path] = ()
    threshold: int | None = None
    clock: bool = True
    allow_unsigned: bool = False
    allow_downgrade: bool = False
    self_test: bool = True
    delta: bool = False
    python: Sequence[str] = ()


def install(bundle: Path, root: Path, wish: Wish) -> Report:
    """Install a bundle below `root` and let it be current; what was done.

    IntegrityError (exit 5) where bundle, signature, device, dates or sequence are not as they
    must be, or the golden vectors differ; EnvironmentMissing (exit 6) where this machine lacks
    something. After any error the release that ran before still runs.
    """
    store.prepare(root)
    with store.installing(root), ExitStack() as stack:
        removed = store.clean(root)
        staged = root / store.STAGING / secrets.token_hex(8)
        try:
            staged.mkdir(mode=0o700)
            found, child = unpack(bundle, root, staged, wish, stack)
            report = settle(root, staged, found, wish, child)
        finally:
            if staged.exists():
                store.remove(staged)
        store.clean(root)
    return {**report, "signers": found.signers, "removed": removed}


def unpack(
    bundle: Path, root: Path, staged: Path, wish: Wish, stack: ExitStack
) -> tuple[Verified, Child | None]:
    """Write a verified bundle's files into the empty folder `staged`, all on the disk.

    Meanwhile the child of the self-test starts, once the manifest is known to be good; it knows
    nothing of the bundle yet, and ends with `stack`.
    """
    child: list[Child] = []
    state = store.read_state(root)
    now = time_now(state, wish)
    trust = trusted(root, wish, now)

    def admit(found: Verified) -> None:
        content = found.manifest
        check_dates(content, state, now)
        check_identity(content, state)
        check_sequence(content, hashlib.sha256(found.manifest_bytes).hexdigest(), state, wish)
        fit.check_device(content, fit.own_tags(root))
        if wish.self_test:
            fit.check_runtime(content, fit.installed_runtime())
        fit.check_space(content, root)
        if wish.self_test:
            child.append(Child(native(content, wish.python), early=True))
            stack.callback(child[0].close)

    with opened(bundle, root, wish) as stream, naming(bundle):
        found = walk(stream, lambda path, mode: flushed_file(staged, path, mode), trust, admit)
    for folder in folders(staged):
        folder.chmod(0o755)
        flush(folder)
    return found, child[0] if child else None


def opened(bundle: Path, root: Path, wish: Wish) -> BinaryIO:
    """The bundle's bytes, made of a delta and the current release where that is wished."""
    if not wish.delta:
        return open_bundle(bundle)
    current = store.linked(root)
    if not current:
        raise UsageError(
            "a delta needs the release that it was made against",
            found=f"nothing installed below {root}",
            hint="install a whole bundle first",
        )
    return open_delta(bundle, root / store.RELEASES / current)


@contextmanager
def flushed_file(folder: Path, path: str, mode: int) -> Iterator[BinaryIO]:
    """A new file below `folder` whose content is on the disk when the block ends."""
    with new_file(folder, path, mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def folders(top: Path) -> list[Path]:
    """A folder and all below it, the deepest first."""
    return [Path(place) for place, _, _ in os.walk(top, topdown=False)]


def settle(root: Path, staged: Path, found: Verified, wish: Wish, child: Child | None) -> Report:
    """Prove the unpacked files and let them be what runs."""
    content = found.manifest
    digest = hashlib.sha256(found.manifest_bytes).hexdigest()
    release = f"{content['name']}-{content['version']}-{digest[:16]}"
    report = {"release": release, "version": content["version"], "sequence": content["sequence"]}
    current = store.linked(root)
    if current.split("~")[0] == release and store.is_whole(root, current):
        return {**report, "action": "already installed", "self_test": None, "before": current}
    proof = None
    if wish.self_test:
        proof = self_test(content, staged, wish.python, child)
    release = free_name(root, release)
    os.rename(staged, root / store.RELEASES / release)  # noqa: PTH104 - beside the flushes
    flush(root / store.RELEASES)
    before = store.activate(root, release, content, digest)
    return {
        **report,
        "release": release,
        "action": "installed",
        "self_test": proof,
        "before": before or None,
    }


def free_name(root: Path, release: str) -> str:
    """The release's name, with a number where a folder of that name is there (a damaged one)."""
    name, k = release, 2
    while (root / store.RELEASES / name).exists():
        name, k = f"{release}~{k}", k + 1
    return name


def self_test(
    content: Manifest, folder: Path, python: Sequence[str] = (), child: Child | None = None
) -> Report:
    """Prove the golden vectors of an unpacked bundle on this machine; `child`: started before."""
    launch = child.launch if child else native(content, python)
    try:
        from edgewright.device import prove
    except ImportError as error:
        raise EnvironmentMissing(
            "the self-test needs numpy and onnxruntime",
            found=" ".join(str(error).split()),
            hint="install what the bundle's runtime/lock.txt names; `install --no-self-test` where "
            "something else runs the model",
        ) from None
    return prove.prove(content, folder, launch, child=child)


def self_test_bundle(bundle: Path, python: Sequence[str] = ()) -> Report:
    """Verify a bundle, unpack it aside and prove it on this machine; what `prove` returns."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="edgewright-selftest-") as parent:
        folder = Path(parent) / "bundle"
        content = extract(bundle, folder)
        fit.check_device(content)
        Path(parent).chmod(0o711)  # the child may be another user
        for inner in folders(folder):
            inner.chmod(0o755)
        return self_test(content, folder, python)


def time_now(state: store.State, wish: Wish) -> int | None:
    """The time to judge dates by: the clock, but never before what has passed for certain.

    None where the clock is not to be trusted.
    """
    return max(int(time.time()), state.time_floor) if wish.clock else None


def check_dates(content: Manifest, state: store.State, now: int | None) -> None:
    """IntegrityError for a bundle out of its time; the floor counts even without a clock."""
    made, expires = content["source_date_epoch"], content["expires"]
    if now is None and expires is not None and state.time_floor >= expires:
        now = max(state.time_floor, made)
    envelope.check_dates(made, expires, now)


def check_identity(content: Manifest, state: store.State) -> None:
    """IntegrityError for another model or target: one root holds the releases of one."""
    held = (state.name, state.target)
    if state.name and held != (content["name"], content["target"]):
        raise IntegrityError(
            "the bundle is of another model or target than what is installed here",
            expected=f"{held[0]} for {held[1]}",
            found=f"{content['name']} for {content['target']}",
            hint="install it below a root of its own",
        )


def check_sequence(content: Manifest, digest: str, state: store.State, wish: Wish) -> None:
    """IntegrityError for a release older than what ran here (or as old, but another)."""
    found, floor = content["sequence"], state.sequence
    if wish.allow_downgrade or found > floor or found == floor == 0 or digest == state.newest:
        return
    raise IntegrityError(
        "the bundle is older than what ran on this device",
        expected=f"a sequence above {floor}",
        found=str(found),
        hint="install a later release; --allow-downgrade if you mean it",
    )


def trusted(root: Path, wish: Wish, now: int | None) -> Trust | None:
    """Whose signatures count: the files named, else those in ROOT/trust; None: anybody's."""
    paths = list(wish.trust) or own_trust(root)
    if not paths and not wish.allow_unsigned:
        raise UsageError(
            "nobody is trusted on this device",
            expected=f"public keys or a trust file in {root / TRUST}, or named with --trust",
            hint=f"copy release.pub to {root / TRUST}/; --allow-unsigned takes anybody's bundle",
        )
    if paths and wish.allow_unsigned:
        raise UsageError("--allow-unsigned on a device that trusts certain keys only")
    return trusts.load(paths, wish.threshold, now)


def own_trust(root: Path) -> list[Path]:
    """The key and trust files of the device: the file ROOT/trust, or what is in that folder."""
    place = root / TRUST
    if place.is_dir():
        return sorted(path for path in place.iterdir() if not path.name.startswith("."))
    return [place] if place.exists() else []
