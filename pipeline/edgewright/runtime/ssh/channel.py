"""One open link: an SSH connection with the agent at its far end, and its messages."""

import asyncio
import hashlib
import json
import os
import shlex
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import asyncssh

from edgewright.errors import DeviceUnavailable, EdgewrightError
from edgewright.files import sha256_of
from edgewright.runtime.ssh import answers, text
from edgewright.runtime.ssh.agent import CHUNK, MAGIC
from edgewright.runtime.ssh.connect import MISSES, connect
from edgewright.runtime.ssh.link import OWNER
from edgewright.target import RunSettings

T = TypeVar("T")
START_S = 120.0  # for the device's Python to start; an emulated one on a busy machine takes 10
GREETING_MAX = 1 << 16  # bytes that a login shell may print before the agent speaks
SAID_MAX = 1 << 14


class Lost(Exception):
    """The link is gone."""


class Channel:
    """The link to one device. Opened by `open`, good for nothing after `drop` or Lost."""

    def __init__(self, name: str, run: RunSettings) -> None:
        self.run, self.name = run, name
        self.device = f"device {name} ({run.host})"
        self.connection: asyncssh.SSHClientConnection | None = None
        self.process: Any = None
        self.errors = bytearray()  # what the device said on standard error
        self.tasks: list[asyncio.Task[None]] = []

    async def push(self, files: dict[str, Path], stored: bool = True) -> str:
        """Bring files to the device unless it has them; the folder there that holds them.

        stored: for later links, too. Else they are gone with this one.
        """
        listed = await asyncio.to_thread(sizes_and_digests, files)  # while signs of life go on
        whole = json.dumps(listed, sort_keys=True).encode()
        key = hashlib.sha256(whole).hexdigest() if stored else ""
        found, _ = await self.ask({"op": "have", "key": key, "files": listed})
        if found["have"] and "folder" in found:
            return str(found["folder"])
        for name, path in files.items():
            with path.open("rb") as file:
                while part := file.read(CHUNK):
                    await self.ask({"op": "put", "name": name}, part)
        kept, _ = await self.ask({"op": "keep", "key": key, "files": listed})
        return str(kept["folder"])

    async def open(self) -> None:
        """Connect, start the agent, take the lease."""
        self.connection = await connect(self.run, self.name)
        bootstrap = shlex.join([*shlex.split(self.run.python), "-c", text.BOOTSTRAP])
        try:
            self.process = await self.connection.create_process(bootstrap, encoding=None)
            self.errors.clear()
            self.tasks = [asyncio.create_task(self.listen())]
            self.process.stdin.write(text.line())
            await self.in_time(self.greeting(), START_S)
        except (asyncssh.Error, OSError, TimeoutError) as error:
            raise Lost(str(error)) from None
        self.tasks.append(asyncio.create_task(self.beat()))
        begin = {
            "op": "begin",
            "folder": self.run.folder,
            "patience_s": self.patience(),
            "limit_s": self.run.limit_s,
            **owner(),
        }
        await self.ask(begin)

    def patience(self) -> float:
        """Seconds without a sign of life after which the other end counts as gone."""
        return (MISSES + 1) * self.run.beat_s

    async def greeting(self) -> None:
        """Wait for the agent's first word; skip what a login shell prints."""
        got = b""
        while MAGIC not in got:
            part = await self.process.stdout.read(4096)
            if not part or len(got) > GREETING_MAX:
                status = self.process.exit_status
                await asyncio.sleep(0.1)  # for the last of its words on stderr
                said = answers.printable((got + bytes(self.errors)).decode(errors="replace"))
                raise DeviceUnavailable(
                    f"{self.device}: `{self.run.python}` does not start there",
                    found=said[-400:] or f"status {status}",
                    hint="set run.python to the device's Python 3.8 or later that has onnxruntime",
                )
            got += part
        if not got.endswith(MAGIC):  # an agent speaks when it is asked
            raise answers.odd(self.device, "words that nobody asked for")

    async def listen(self) -> None:
        """Keep the last of what the device says on standard error."""
        while part := await self.process.stderr.read(4096):
            self.errors += part
            del self.errors[:-SAID_MAX]

    async def beat(self) -> None:
        """Tell the agent again and again that this side lives."""
        while True:
            await asyncio.sleep(self.run.beat_s)
            await self.send({"op": "beat"})

    async def send(self, header: dict[str, Any], data: bytes = b"") -> None:
        words = json.dumps({**header, "bytes": len(data)}).encode()
        try:
            self.process.stdin.write(len(words).to_bytes(8, "big") + words + data)
            await self.process.stdin.drain()
        except (asyncssh.Error, OSError) as error:
            raise Lost(str(error)) from None

    async def message(self) -> tuple[dict[str, Any], bytes]:
        """The agent's next message."""
        try:
            size = int.from_bytes(await self.process.stdout.readexactly(8), "big")
            if size > answers.HEADER_MAX:
                raise answers.odd(self.device, f"a message of {size} bytes")
            header = json.loads(
                await self.process.stdout.readexactly(size), parse_constant=answers.no_number
            )
            op = header["op"] if isinstance(header, dict) and "op" in header else ""
            if op != "data" and op not in answers.AGENT:
                raise answers.odd(self.device, "a message of no known kind")
            count = header.get("bytes", 0)
            if type(count) is not int or not 0 <= count <= answers.FRAME_MAX:
                raise answers.odd(self.device, "a message of impossible length")
            data = await self.process.stdout.readexactly(count)
        except (asyncio.IncompleteReadError, asyncssh.Error, OSError) as error:
            raise Lost(self.why_lost(error)) from None
        except ValueError:
            raise answers.odd(self.device, "a message that is no JSON") from None
        if op == "data":
            return {"op": "data"}, data
        return {**answers.check(header, answers.AGENT[op], self.device), "op": op}, data

    def why_lost(self, error: Exception) -> str:
        said = answers.printable(bytes(self.errors).decode(errors="replace"))[-300:]
        ended = isinstance(error, asyncio.IncompleteReadError)
        return said or ("the agent on the device ended" if ended else str(error))

    async def ask(self, header: dict[str, Any], data: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """One request to the agent and its answer."""
        await self.send(header, data)
        found, payload = await self.next_message()
        if found["op"] == "error":
            raise self.refused(found["error"])
        if found["op"] != header["op"]:
            raise answers.odd(self.device, f"'{found['op']}' in answer to '{header['op']}'")
        return {k: v for k, v in found.items() if k != "op"}, payload

    async def next_message(self) -> tuple[dict[str, Any], bytes]:
        """The agent's next message; no worker may take longer, the agent sees to that."""
        return await self.in_time(self.message(), self.run.limit_s + self.patience())

    async def in_time(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """Wait for the device; DeviceUnavailable where it takes too long."""
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError:
            raise DeviceUnavailable(
                f"{self.device} did not answer within {seconds:.0f} s",
                hint="check the device, and run.limit_s in the profile",
            ) from None

    async def closed(self) -> None:
        """Wait until the link has dropped or the agent has ended."""
        await self.process.wait_closed()

    def drop(self) -> None:
        """Cut the link; the agent ends by itself."""
        for task in self.tasks:
            task.cancel()
        if self.connection is not None:
            self.connection.abort()

    async def close(self) -> None:
        """End the agent and wait until it has tidied up, for a moment."""
        try:
            await self.send({"op": "end"})
            await asyncio.wait_for(self.process.wait_closed(), 5.0)
        except (Lost, TimeoutError):
            pass
        self.drop()

    def refused(self, error: dict[str, str]) -> EdgewrightError:
        """The agent's refusal as one of our errors."""
        kind, said = error["kind"], answers.printable(error["text"])
        if kind == "leased":
            return DeviceUnavailable(
                f"{self.device} is in use",
                found=f"leased by {said}",
                hint="wait until that build has ended; the lease of one that died ends by itself",
            )
        if kind == "full":
            return DeviceUnavailable(
                f"no space left on {self.device}",
                found=said,
                hint=f"free some space below {self.run.folder} there, or set run.folder to a "
                "larger disk",
            )
        return DeviceUnavailable(f"{self.device} refused a request", found=f"{kind}: {said}")


def sizes_and_digests(files: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """{name: {"size": bytes, "sha256"}} of files."""
    return {
        name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in sorted(files.items())
    }


def owner() -> dict[str, str]:
    """Who takes the lease: those of one build share an owner, by default of one process."""
    user = os.environ.get("USER") or str(os.getuid())
    who = f"{user}@{socket.gethostname()}, process {os.getppid()}"
    return {"owner": os.environ.get(OWNER) or f"{who} {os.getppid()}", "who": who}
