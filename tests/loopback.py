"""A device behind SSH that is this machine: an sshd of our own on a port of 127.0.0.1.

It runs as whoever runs the tests, with keys, configuration and known hosts of its own; nothing of
the user's SSH set-up is read or written. Everything it starts carries a mark in its environment,
so that a test can tell what is left running.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgewright.target import Target, load_target

MARK = "EDGEWRIGHT_LOOPBACK"
CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AllowUsers {user}
PrintMotd no
SetEnv {mark}={folder}
"""


class Sshd:
    """The server, its keys, and profiles that lead to it."""

    def __init__(self, folder: Path) -> None:
        import asyncssh

        found = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if found is None:
            pytest.skip("no sshd here: apt-get install openssh-server")
        self.program, self.folder = found, folder
        self.user = pwd.getpwuid(os.getuid()).pw_name
        self.home = folder / "device"
        if os.geteuid() == 0:  # what the package's start script makes
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.new_host_key()
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(str(folder / "user_key"))
        (folder / "authorized_keys").write_bytes(key.export_public_key())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "sshd_config").write_text(
            CONFIG.format(port=self.port, folder=folder, user=self.user, mark=MARK)
        )
        self.trust()
        self.start()

    def new_host_key(self) -> None:
        """Give the device another identity, as one that was set up anew has."""
        import asyncssh

        self.host_key = asyncssh.generate_private_key("ssh-ed25519")
        path = self.folder / "host_key"
        path.unlink(missing_ok=True)
        path.touch(0o600)
        path.write_bytes(self.host_key.export_private_key("openssh"))

    def trust(self) -> None:
        """Write the host's key to the list of known hosts."""
        public = self.host_key.export_public_key().decode()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}")

    def start(self) -> None:
        """Start the server and wait until it listens."""
        self.log = (self.folder / "log").open("ab")
        self.server = subprocess.Popen(
            [self.program, "-D", "-e", "-f", str(self.folder / "sshd_config")],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        limit = time.monotonic() + 10
        while time.monotonic() < limit:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            if self.server.poll() is not None:
                break
            time.sleep(0.02)
        self.stop()
        pytest.skip(f"sshd does not start here: {(self.folder / 'log').read_text()[-300:]}")

    def stop(self) -> None:
        """End the server and cut its links."""
        self.cut()
        self.server.kill()
        self.server.wait()
        self.log.close()

    def cut(self) -> int:
        """Cut the links that are open, as a pulled plug does; how many processes that ended."""
        pids = children(self.server.pid)
        for pid in pids:  # a server may have an unprivileged half
            pids += [child for child in children(pid) if name_of(child).startswith("sshd")]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def profile(self, name: str = "loopback", text: str = "", **run: Any) -> Target:
        """A profile of this device; `run` changes its [run] table."""
        return load_target(str(self.write_profile(name, text, **run)))

    def write_profile(self, name: str = "loopback", text: str = "", **run: Any) -> Path:
        """The file of such a profile; `text`: its other tables."""
        table = {
            "how": "ssh",
            "host": "127.0.0.1",
            "port": self.port,
            "user": self.user,
            "key": str(self.folder / "user_key"),
            "known_hosts": str(self.folder / "known_hosts"),
            "python": sys.executable,
            "folder": str(self.home),
            "limit_s": 20,
            "beat_s": 1,
            "reconnect_s": 2,
            **run,
        }
        lines = [f'name = "{name}"', 'description = "This machine behind SSH"']
        lines += [text or f'[device]\narch = "{os.uname().machine}"', "[run]"]
        lines += [f"{k} = {toml(v)}" for k, v in table.items()]
        path = self.folder / f"{name}.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def running(self) -> list[str]:
        """The command lines of what runs on the device, its login shells among them."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.folder}".encode() in (folder / "environ").read_bytes():
                    words = (folder / "cmdline").read_bytes()
                    if words:  # not a dead one
                        found.append(words.replace(b"\0", b" ").decode(errors="replace")[:200])
        return found

    def left(self, seconds: float = 10.0) -> list[str]:
        """What is left on the device some time after a build has gone: nothing, one hopes."""
        limit = time.monotonic() + seconds
        while True:
            jobs = self.home / "jobs"
            left = [*self.running(), *(map(str, jobs.iterdir()) if jobs.is_dir() else ())]
            if not left or time.monotonic() > limit:
                return left
            time.sleep(0.05)


def children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return (
        repr(list(value))
        if isinstance(value, tuple)
        else f'"{value}"'
        if isinstance(value, str)
        else repr(value)
    )


@contextlib.contextmanager
def loopback(folder: Path) -> Iterator[Sshd]:
    """The device while the block runs."""
    pytest.importorskip("asyncssh")
    server = Sshd(folder)
    try:
        yield server
    finally:
        server.stop()
