"""The process between a session here and the worker on a device.

Started as `python -m edgewright.runtime.ssh.bridge PROFILE ADDRESS_SPACE`, with the profile's name
and its [run] table as JSON. On its pipes it speaks the worker's own protocol, so a session cannot
tell it from a worker; `load` pushes the model first. Two requests more are for whoever looks
after the device: `facts`, and `command` to run one there.

A link that drops is opened again, and what was lost is asked again where that gives the same
answer. Measurements do not: the process that was warm is gone. A link with a worker is opened at
the next request, one without at once: it is there to hold the device.
"""

import asyncio
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from edgewright.errors import (
    BadInput,
    DeviceUnavailable,
    EdgewrightError,
    EnvironmentMissing,
    to_wire,
)
from edgewright.runtime import worker
from edgewright.runtime.ssh import answers
from edgewright.runtime.ssh.agent import CHUNK
from edgewright.runtime.ssh.channel import Channel, Lost
from edgewright.sidecars import external_data
from edgewright.target import RunSettings

REPEATABLE = ("load", "run", "feeds", "warm", "profile", "spin", "facts")
OPTIMIZED_MORE = 64 << 20  # bytes that an optimised model may have beyond twice the model's
PAUSE_S, PAUSE_MAX_S = 0.5, 5.0  # before a dropped link is opened again: the first, the longest


class Bridge:
    """The worker on a device, through whatever link there is at the time."""

    def __init__(self, name: str, run: RunSettings, address_space: int) -> None:
        self.name, self.run, self.address_space = name, run, address_space
        self.device = f"device {name} ({run.host})"
        self.model = "the model"
        self.session: list[tuple[dict[str, Any], bytes]] = []  # load and feeds, to be told again
        self.outputs: list[str] = []  # of the model, by name
        self.link: Channel | None = None
        self.started = False  # the worker
        self.output = bytearray()  # of the worker, not yet looked at

    async def answer(self, header: dict[str, Any], arrays: bytes) -> tuple[dict[str, Any], bytes]:
        """The answer to a request, with its arrays as they are on the wire."""
        deadline, pause = 0.0, PAUSE_S
        while True:
            try:
                if self.link is None:
                    await self.open(retry=deadline > 0)
                answer = await self.perform(header, arrays)
            except Lost as why:
                self.drop()
                deadline = deadline or time.monotonic() + self.run.reconnect_s
                if header["op"] not in REPEATABLE or time.monotonic() + pause > deadline:
                    raise self.link_lost(header["op"], str(why)) from None
                await asyncio.sleep(pause)
                pause = min(2 * pause, PAUSE_MAX_S)
            except EdgewrightError:
                self.drop()  # nobody knows what is still on its way
                raise
            else:
                if "error" not in answer[0]:
                    self.remember(header, arrays)
                return answer

    async def open(self, retry: bool) -> None:
        """Open a link and bring the worker to where it was; what fails on a retry is Lost."""
        link = Channel(self.name, self.run)
        try:
            await link.open()
        except BaseException as error:  # also where nobody waits for it any more
            link.drop()
            if retry and isinstance(error, DeviceUnavailable):
                raise Lost(str(error)) from None
            raise
        self.link = link
        for earlier in self.session:
            answer, _ = await self.perform(*earlier)
            if "error" in answer:
                raise DeviceUnavailable(
                    f"{self.device} refused {self.model} after the link had dropped, not before",
                    found=f"{answer['error']['kind']}: {answer['error']['text']}",
                    hint="check the device's memory and disk, then start again; finished stages "
                    "of a build are kept",
                )

    async def hold(self) -> None:
        """Open the link again whenever it drops, since the lease went with it. Never ends."""
        pause = PAUSE_S
        while True:
            if self.link is not None:
                await self.link.closed()
                self.drop()
                pause = PAUSE_S
            await asyncio.sleep(pause)
            try:
                await self.open(retry=False)
            except (Lost, EdgewrightError):  # whoever needs the device next says why
                pause = min(2 * pause, PAUSE_MAX_S)

    def remember(self, header: dict[str, Any], arrays: bytes) -> None:
        """Keep what another process on the device must be told first."""
        if header["op"] == "load":
            again = {k: v for k, v in header.items() if k != "optimized"}
            self.session = [(again, arrays)]
        elif header["op"] == "feeds":
            kept = self.session[:1] if header.get("first") else self.session
            self.session = [*kept, (header, arrays)]

    def drop(self) -> None:
        """Cut the link; the next request opens another."""
        if self.link is not None:
            self.link.drop()
        self.link, self.started = None, False
        self.output.clear()

    async def perform(self, header: dict[str, Any], arrays: bytes) -> tuple[dict[str, Any], bytes]:
        """Do one request over the open link."""
        assert self.link is not None
        match header["op"]:
            case "facts":
                return {"facts": (await self.link.ask({"op": "facts"}))[0]}, b""
            case "command":
                return await self.command(self.link, header), b""
            case "load":
                return await self.load(self.link, header)
            case _:
                return await self.exchange(self.link, header, arrays)

    async def load(self, link: Channel, header: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Push the model, start the worker, let it load; fetch the optimised model if asked."""
        self.model = header.get("name", self.model)
        path = Path(header["model"])
        files = [path, *await asyncio.to_thread(external_data, path)]
        folder = await link.push({p.relative_to(path.parent).as_posix(): p for p in files})
        program = await link.push({"worker.py": Path(worker.__file__)})
        if not self.started:
            words = [*shlex.split(self.run.python), f"{program}/worker.py", str(self.address_space)]
            env = {
                "PYTHONHASHSEED": "0",
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            }
            await link.ask({"op": "start", "words": words, "env": env})
            self.started = True
        optimized = header.get("optimized")
        there = {**header, "model": f"{folder}/{path.name}"}
        there["cores"] = header.get("cores") or list(self.run.pin)
        for key in ("optimized", "profile"):
            if there.get(key):
                there[key] = Path(there[key]).name
        answer, none = await self.exchange(link, there, b"")
        if "error" in answer:
            return answer, none
        self.outputs = [value["name"] for value in answer["outputs"]]
        if optimized:
            most = 2 * path.stat().st_size + OPTIMIZED_MORE
            found, data = await link.ask({"op": "get", "name": Path(optimized).name, "most": most})
            if len(data) > most:
                raise answers.odd(link.device, f"an optimised model of {len(data)} bytes")
            if found["found"]:
                Path(optimized).write_bytes(data)
        return answer, none

    async def command(self, link: Channel, header: dict[str, Any]) -> dict[str, Any]:
        """Run a command on the device with files of ours; "@/NAME" in its words is such a file."""
        files = {name: Path(path) for name, path in header["files"].items()}
        folder = await link.push(files, stored=False) if files else ""
        words = [
            *shlex.split(self.run.python),
            *(f"{folder}{w[1:]}" if w.startswith("@/") else w for w in header["words"]),
        ]
        await link.ask({"op": "start", "words": words, "env": {}, "capture": True})
        found, out = await link.next_message()
        if found["op"] != "exit":
            raise answers.odd(link.device, f"'{found['op']}' in place of a command's end")
        if found["why"] == "late":
            raise self.death(found)
        said = answers.printable(found["said"])
        return {"status": found["status"], "out": out.decode("utf-8", "replace"), "said": said}

    async def exchange(
        self, link: Channel, header: dict[str, Any], arrays: bytes
    ) -> tuple[dict[str, Any], bytes]:
        """Pass a request on to the worker; its answer, checked."""
        if not self.started:
            raise DeviceUnavailable(f"{link.device} has no model loaded")
        words = json.dumps(header).encode()
        request = len(words).to_bytes(8, "big") + words + arrays
        for begin in range(0, len(request), CHUNK):
            await link.send({"op": "data"}, request[begin : begin + CHUNK])
        where = f"{link.device}, asked to {header['op']},"
        size = int.from_bytes(await self.from_worker(link, 8), "big")
        if size > answers.HEADER_MAX:
            raise answers.odd(where, f"an answer of {size} bytes")
        try:
            answer = json.loads(
                await self.from_worker(link, size), parse_constant=answers.no_number
            )
            rows = answer.pop("arrays", [])
        except (ValueError, AttributeError, TypeError):
            raise answers.odd(where, "no JSON object") from None
        count = answers.array_bytes(rows, where)
        expected: list[str] = []
        if header["op"] == "run" and "error" not in answer:
            expected = header.get("outputs") or self.outputs
        if [row["name"] for row in rows] != expected:
            raise answers.odd(where, f"{len(rows)} arrays, not the {len(expected)} asked for")
        data = await self.from_worker(link, count)
        await link.send({"op": "idle"})
        schema = answers.ERROR if "error" in answer else answers.WORKER[header["op"]]
        answer = answers.check(answer, schema, where)
        if "error" in answer:
            told = answers.check(answer["error"], schema["properties"]["error"], where)
            answer = {"error": {k: answers.printable(v) for k, v in told.items()}}
        return {**answer, "arrays": rows}, data

    async def from_worker(self, link: Channel, count: int) -> bytes:
        """The next bytes of the worker's output, waiting for them."""
        while len(self.output) < count:
            header, data = await link.next_message()
            if header["op"] == "exit":
                self.started = False
                raise self.death(header)
            if header["op"] != "data":
                raise answers.odd(link.device, f"'{header['op']}' in place of the worker's words")
            self.output += data
        found = bytes(self.output[:count])
        del self.output[:count]
        return found

    def link_lost(self, op: str, why: str) -> DeviceUnavailable:
        """The link dropped, for good or while something was under way that cannot be repeated."""
        when, hint = " during a measurement", "start again"
        if op == "command":
            when, hint = " before a command there had ended", "check the device, then start again"
        elif op in REPEATABLE:
            when, hint = "", "check the network and the device, then start again"
        return DeviceUnavailable(
            f"the link to {self.device} was lost{when}",
            found=why or "no reason given",
            hint=f"{hint}; finished stages of a build are kept",
        )

    def death(self, found: dict[str, Any]) -> EdgewrightError:
        """Why the process on the device no longer answers."""
        status, said = found["status"], answers.printable(found["said"])[-400:]
        what = f"the process running {self.model} on {self.device}"
        if found["why"] == "late":
            return DeviceUnavailable(
                f"{what} took more than {self.run.limit_s:g} s and was stopped",
                hint="check the model for loops that do not end, or raise run.limit_s",
            )
        number = -status if status < 0 else status - 128 if status > 128 else 0
        if number == signal.SIGKILL:
            return EnvironmentMissing(
                f"{what} was killed",
                found="SIGKILL, as the system does when memory runs out",
                hint="free memory there or use a smaller input",
            )
        if number in list(signal.Signals):
            return EnvironmentMissing(
                f"{what} died of {signal.Signals(number).name}",
                found=said or "no message",
                hint="the target profile may promise instructions that the CPU lacks; see "
                "`edgewright doctor --target`",
            )
        return EnvironmentMissing(
            f"{what} ended with status {status}",
            found=said or "no message",
            hint="see `edgewright doctor --target`",
        )


def receive(source: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """The session's next request, its arrays as they are on the wire; EOFError at the end.

    The session is no stranger: it may send whatever numpy has, and the worker says what it
    refuses. BadInput where that is too much, once it is read: the next request stands behind it.
    """
    size = int.from_bytes(worker.read_exact(source, 8), "big")
    header = json.loads(worker.read_exact(source, size))
    count = left = sum(itemsize(row["dtype"]) * math.prod(row["shape"]) for row in header["arrays"])
    if count <= answers.ARRAYS_MAX:
        return header, worker.read_exact(source, count)
    while left:
        left -= len(worker.read_exact(source, min(left, CHUNK)))
    raise BadInput(
        f"inputs of {count} bytes",
        expected=f"at most {answers.ARRAYS_MAX}",
        hint="use a smaller input",
    )


def itemsize(dtype: str) -> int:
    """Bytes of one value."""
    import numpy as np  # only a bridge with a worker gets arrays

    return np.dtype(dtype).itemsize


async def next_request(source: BinaryIO, bridge: Bridge) -> tuple[dict[str, Any], bytes]:
    """What `receive` returns; a bridge without a worker holds the device until then."""
    holds = bridge.link is not None and not bridge.session
    holding = asyncio.create_task(bridge.hold()) if holds else None
    try:
        # Waits in a thread of its own, so that signs of life go on meanwhile.
        return await asyncio.to_thread(receive, source)
    finally:
        if holding is not None:
            holding.cancel()
            await asyncio.wait({holding})


async def serve(source: BinaryIO, sink: BinaryIO, bridge: Bridge) -> None:
    """Answer the session's requests until it hangs up."""
    while True:
        try:
            header, arrays = await next_request(source, bridge)
            if header["op"] == "quit":
                break
            answer, data = await bridge.answer(header, arrays)
        except EOFError:
            break
        except EdgewrightError as error:
            answer, data = {"error": {**to_wire(error), "ours": True}}, b""
        words = json.dumps(answer).encode()
        sink.write(len(words).to_bytes(8, "big") + words + data)
        sink.flush()
    if bridge.link is not None:
        await bridge.link.close()


def main() -> None:
    """Serve a session on the standard pipes."""
    worker.die_with_parent()
    settings = json.loads(sys.argv[1])
    run = RunSettings(**{**settings["run"], "pin": tuple(settings["run"]["pin"])})
    bridge = Bridge(settings["name"], run, int(sys.argv[2]))
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    asyncio.run(serve(sys.stdin.buffer, sink, bridge))


if __name__ == "__main__":
    main()
