"""A disk that loses power: what a program did to a folder, and what may be left of it.

`Recorder` notes every change below a folder while a program runs, by comparing the folder with
itself before each call that changes names (audit events) and at each flush. So nothing escapes
that is there to be seen, whatever function made it.

`crashed` replays the first of these changes and then cuts the power. What was flushed is kept:
the bytes of a file by a flush of the file, names in a folder by a flush of the folder. All else is
up to chance, as POSIX leaves it and journalling file systems do it:

"free"     each change of a name is kept or lost on its own; of a rename, the old name may stay
           beside the new one, but the content is never lost with it
"journal"  changes of names are kept in their order up to a random one; any flush keeps all before

and bytes that were not flushed are all there, cut off, full of holes, or what was there before.
"""

import os
import random
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HOLE = 64  # bytes: a file system loses whole blocks; small ones make more different losses here
CHANGING = {"mkdir", "rename", "symlink", "link", "remove", "rmdir", "chmod", "truncate"}


@dataclass
class Node:
    """A file ("data"), a link ("data" is its target) or a folder ("names": name -> id)."""

    kind: str
    mode: int
    data: bytes = b""
    names: dict[str, int] = field(default_factory=dict)


Tree = dict[int, Node]  # by id; TOP is the folder itself
TOP = 0


@dataclass(frozen=True)
class Change:
    """One change: "name" (set or, node -1, removed), "move", "data", "mode" or "flush" of `node`.

    A move sets `name` in `folder` and removes `old_name` in `old_folder`.
    """

    what: str
    node: int = -1
    folder: int = -1
    name: str = ""
    old_folder: int = -1
    old_name: str = ""
    data: bytes = b""
    kind: str = ""
    mode: int = 0


class Recorder:
    """The changes below a folder, in order; `begin` is what was there, all of it on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids: dict[int, int] = {}  # by inode number; one may come again for another file
        self.count = 1
        self.begin = self.now = self.look()
        self.changes: list[Change] = []

    def look(self) -> Tree:
        """The folder as it is."""
        tree: Tree = {}
        alive: dict[int, int] = {}

        def visit(path: Path, node: int) -> None:
            facts = path.lstat()
            mode = stat.S_IMODE(facts.st_mode)
            if path.is_symlink():
                tree[node] = Node("link", mode, os.fsencode(path.readlink()))
            elif path.is_file():
                tree[node] = Node("file", mode, path.read_bytes())
            else:
                tree[node] = Node("folder", mode)
                for entry in sorted(path.iterdir()):
                    inode = entry.lstat().st_ino
                    if inode not in alive:
                        alive[inode] = self.ids.get(inode, self.count)
                        self.count += alive[inode] == self.count
                    tree[node].names[entry.name] = alive[inode]
                    visit(entry, alive[inode])

        visit(self.folder, TOP)
        self.ids = alive
        return tree

    def note(self) -> None:
        """Add what differs from the last look."""
        new = self.look()
        self.changes += differences(self.now, new)
        self.now = new

    def flush(self, descriptor: int) -> None:
        self.note()
        inode = os.fstat(descriptor).st_ino
        node = TOP if inode == self.folder.stat().st_ino else self.ids.get(inode, -1)
        if node >= 0:
            self.changes.append(Change("flush", node))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Record while the block runs; in this process only."""
        real, on, busy = os.fsync, [True], [False]

        def hook(event: str, args: tuple[object, ...]) -> None:
            if on[0] and not busy[0] and (event == "open" or event.split(".")[-1] in CHANGING):
                busy[0] = True
                self.note()
                busy[0] = False

        def fsync(descriptor: int) -> None:
            busy[0] = True
            self.flush(descriptor)
            busy[0] = False
            real(descriptor)

        sys.addaudithook(hook)
        os.fsync = fsync
        try:
            yield
        finally:
            os.fsync = real
            on[0] = False
            self.note()


def differences(old: Tree, new: Tree) -> list[Change]:
    """The changes from one tree to the next; between two looks there is little."""
    removed = {}  # by node: where it was
    changes: list[Change] = []
    for folder, node in old.items():
        for name, one in node.names.items():
            if folder not in new or new[folder].names.get(name) != one:
                removed[one] = (folder, name)
    for folder, node in new.items():
        known = old[folder].names if folder in old else {}
        for name, one in node.names.items():
            if known.get(name) == one:
                continue
            facts = new[one]
            if one in removed and one in old:
                source, source_name = removed.pop(one)
                changes.append(Change("move", one, folder, name, source, source_name))
            else:
                # The target of a link comes with it; bytes and folders' names come after.
                data = facts.data if facts.kind == "link" else b""
                kind, mode = facts.kind, facts.mode
                changes.append(Change("name", one, folder, name, data=data, kind=kind, mode=mode))
    replaced = {(c.folder, c.name) for c in changes}
    for folder, name in removed.values():
        if (folder, name) not in replaced:
            changes.append(Change("name", -1, folder, name))
    for one, facts in new.items():
        before = old.get(one)
        if facts.kind == "file" and facts.data != (before.data if before else b""):
            changes.append(Change("data", one, data=facts.data))
        if before and facts.mode != before.mode:
            changes.append(Change("mode", one, mode=facts.mode))
    return changes


def crashed(begin: Tree, changes: list[Change], how: str, rng: random.Random) -> Tree:
    """What is left of `begin` and all of the changes after a power cut; `how`: see the top."""
    kept = {"free": free, "journal": journal}[how](changes, rng)
    tree = {one: Node(n.kind, n.mode, n.data, dict(n.names)) for one, n in begin.items()}
    safe = {one: n.data for one, n in begin.items()}
    latest: dict[int, bytes] = {}
    for k, change in enumerate(changes):
        if change.kind:
            tree[change.node] = Node(change.kind, change.mode, change.data)
        if change.what == "data":
            latest[change.node] = change.data
        if change.what == "flush" and change.node in latest:
            safe[change.node] = latest.pop(change.node)
        if change.what == "mode" and (k, "mode") in kept:
            tree[change.node].mode = change.mode
        if change.what in ("name", "move") and (k, "set") in kept:
            names = tree[change.folder].names
            if change.node < 0:
                names.pop(change.name, None)
            else:
                names[change.name] = change.node
        if change.what == "move" and (k, "remove") in kept:
            names = tree[change.old_folder].names
            if names.get(change.old_name) == change.node:
                del names[change.old_name]
    for one, node in tree.items():
        if node.kind == "file":
            before = safe.get(one, b"")
            node.data = torn(before, latest[one], rng) if one in latest else before
    return tree


def torn(before: bytes, after: bytes, rng: random.Random) -> bytes:
    """Bytes of which nobody knows how many came to the disk."""
    how = rng.choice(("before", "after", "cut", "holes"))
    if how == "before":
        return before
    if how == "cut":
        return after[: rng.randint(0, len(after))]
    if how == "holes":
        parts = [after[k : k + HOLE] for k in range(0, len(after), HOLE)]
        return b"".join(part if rng.random() < 0.5 else bytes(len(part)) for part in parts)
    return after


Kept = set[tuple[int, str]]


def halves(change: Change) -> list[tuple[str, int]]:
    """The parts of a change that can be lost, and the node whose flush keeps each."""
    if change.what == "mode":
        return [("mode", change.node)]
    if change.what == "name":
        return [("set", change.folder)]
    if change.what == "move":
        return [("set", change.folder), ("remove", change.old_folder)]
    return []


def free(changes: list[Change], rng: random.Random) -> Kept:
    """Every change of names on its own: flushed with its folder, or by chance."""
    chance = rng.choice((0.0, 0.2, 0.5, 0.8, 1.0))
    flushed: dict[int, int] = {}
    for k, change in enumerate(changes):
        if change.what == "flush":
            flushed[change.node] = k
    kept: Kept = set()
    for k, change in enumerate(changes):
        for part, node in halves(change):
            safe = flushed.get(node, -1) > k
            if part == "remove" and (k, "set") not in kept:
                if not safe:
                    continue
                kept.add((k, "set"))  # no file system loses what it moves
            if safe or rng.random() < chance:
                kept.add((k, part))
    return kept


def journal(changes: list[Change], rng: random.Random) -> Kept:
    """All up to a random change, which is no earlier than the last flush of anything."""
    last = max((k for k, change in enumerate(changes) if change.what == "flush"), default=0)
    end = rng.randint(last, len(changes))
    return {(k, part) for k in range(end) for part, _ in halves(changes[k])}


def write(tree: Tree, folder: Path, node: int = TOP) -> None:
    """The tree as a real folder."""
    folder.mkdir()
    for name, one in tree[node].names.items():
        facts, path = tree[one], folder / name
        if facts.kind == "folder":
            write(tree, path, one)
        elif facts.kind == "link":
            path.symlink_to(os.fsdecode(facts.data))
        else:
            path.write_bytes(facts.data)
            path.chmod(facts.mode)
    folder.chmod(tree[node].mode)


def record(folder: Path, act: Callable[[], object]) -> Recorder:
    """What `act` does to the folder."""
    recorder = Recorder(folder)
    with recorder.at_work():
        act()
    return recorder
