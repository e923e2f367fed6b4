"""The device's end of a link: holds the lease, keeps pushed files, runs the worker, tidies up.

The bridge sends the text of this module and of the others that `text` lists over SSH to the
device's own Python, so nothing has to be installed there beside what the worker needs. Standard
library only, nothing newer than Python 3.8.

A message is an 8-byte big-endian length, a JSON header of that length, then as many raw bytes as
the header's "bytes" says. After MAGIC the agent answers each request once, in order, with {"op"}
or {"error": {"kind", "text"}}. On its own it sends "data" (the child's output) and "exit".

The agent ends, its child with it, when its input ends (the link was cut), when nothing at all came
for `patience` seconds (the link is dead but nobody noticed), or on a signal. It then removes its
job folder and its place in the lease. What an agent killed by force leaves, the next one removes.
"""

import errno
import hashlib
import json
import os
import select
import shutil
import signal
import time

from edgewright.runtime.ssh.facts import facts, names_in
from edgewright.runtime.ssh.lease import Lease, boot, born, end_left, kill_group, write_text

MAGIC = b"\0edgewright-agent-1\n"
CHUNK = 1 << 20  # bytes of a message's raw part at most, towards the agent
KEEP_BYTES = 512 << 20  # of pushed files; what was not used for longest goes first
KEEP_S = 3600.0  # what was used since is not removed: a build may be at work with it
SAID = 4000  # bytes of a child's standard error that are told
OUT_MAX = 1 << 20  # bytes of a command's standard output that are told
END_S = 2.0  # for a child to end after its input has ended


class Refused(Exception):
    """A request that cannot be granted: `kind` for the program, the text for people."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind


class Agent:
    """One link: a job folder, a place in the lease, at most one child at a time."""

    def __init__(self):
        self.folder = self.job = self.store = ""
        self.patience = 60.0
        self.limit = 600.0
        self.child = None
        self.to_child = self.from_child = -1
        self.waiting = bytearray()  # for the child to read
        self.since = 0.0  # of silence: when the child last got or said something
        self.owes = False  # whether the child owes an answer
        self.capture = False

    # What the bridge asks for. Every request gets one answer.

    def begin(self, header, _):
        """Make the folders, take a place in the lease, remove what dead agents left."""
        self.patience, self.limit = float(header["patience_s"]), float(header["limit_s"])
        self.alive()
        folder = os.path.expanduser(header["folder"])
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self.folder = os.path.abspath(folder)
        self.store = os.path.join(self.folder, "store")
        os.makedirs(self.store, exist_ok=True)
        os.makedirs(os.path.join(self.folder, "jobs"), exist_ok=True)
        job = os.path.join(self.folder, "jobs", "%d-%s" % (os.getpid(), born(os.getpid())))
        place = {
            "pid": os.getpid(),
            "born": born(os.getpid()),
            "boot": boot(),
            "owner": header["owner"],
            "who": header["who"],
            "job": job,
            "patience_s": self.patience,
        }
        with Lease(self.folder) as holders:
            others = [h for h in holders if h["owner"] != header["owner"]]
            if others:
                raise Refused("leased", others[0]["who"])
            os.makedirs(job, mode=0o700)
            self.job = job
            holders.append(place)
            if len(holders) == 1:
                self.tidy()  # before anybody else can begin: what is found is of the dead
        self.alive()
        return self.tell_facts(header, b"")

    def have(self, header, _):
        """Whether the store holds these files, whole; {"files": {name: {"size", "sha256"}}}.

        Without a key they are for the job folder, which goes with the link.
        """
        folder = self.place(header["key"])
        if not header["key"] or not os.path.isdir(folder):
            need = sum(item["size"] for item in header["files"].values())
            room = os.statvfs(self.folder)
            if need > room.f_bavail * room.f_frsize:
                text = "%d bytes needed, %d free" % (need, room.f_bavail * room.f_frsize)
                raise Refused("full", text)
            return {"have": False}, b""
        for name, item in header["files"].items():
            if self.digest(os.path.join(folder, name)) != item["sha256"]:
                shutil.rmtree(folder, ignore_errors=True)
                return {"have": False}, b""
        os.utime(folder)
        return {"have": True, "folder": folder}, b""

    def place(self, key):
        return os.path.join(self.store, key) if key else os.path.join(self.job, "files")

    def put(self, header, data):
        """Append bytes to a file that is being pushed."""
        path = os.path.join(self.job, "new", header["name"])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "ab") as file:
            file.write(data)
        return {}, b""

    def keep(self, header, _):
        """Check what was pushed and give it its place."""
        new, folder = os.path.join(self.job, "new"), self.place(header["key"])
        for name, item in header["files"].items():
            path = os.path.join(new, name)
            if not item["size"]:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                open(path, "ab").close()
            if self.digest(path) != item["sha256"]:
                shutil.rmtree(new, ignore_errors=True)
                raise Refused("damaged", "%s arrived with other bytes" % name)
        if not header["key"]:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier command
        try:
            os.rename(new, folder)
        except OSError:
            if not os.path.isdir(folder):  # else another agent pushed the same
                raise
            shutil.rmtree(new, ignore_errors=True)
        return {"folder": folder}, b""

    def start(self, header, _):
        """Start the child; with "capture" its output is kept for "exit", else sent as "data"."""
        self.capture = bool(header.get("capture"))
        reader, writer = os.pipe()
        out, into = os.pipe()
        for name in ("said", "out"):  # without what an earlier child said
            open(os.path.join(self.job, name), "wb").close()
        environment = dict(os.environ)
        environment.update(header.get("env", {}))
        environment["EDGEWRIGHT_STARTED"] = repr(time.monotonic())
        self.child = os.fork()
        if not self.child:
            self.become(header["words"], environment, reader, into)
        os.close(reader)
        os.close(into)
        self.to_child, self.from_child = writer, out
        os.set_blocking(writer, False)
        write_text(os.path.join(self.job, "child"), "%d %s" % (self.child, born(self.child)))
        self.since, self.owes = time.monotonic(), self.capture
        if self.capture:
            os.close(self.to_child)
            self.to_child = -1
        return {"pid": self.child}, b""

    def become(self, words, environment, reader, into):
        """In the forked child: become the command, in a process group of its own."""
        try:
            os.setsid()
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            said = os.open(os.path.join(self.job, "said"), os.O_WRONLY | os.O_APPEND)
            os.chdir(self.job)
            for old, new in ((reader, 0), (into, 1), (said, 2)):
                os.dup2(old, new)
            os.execvpe(words[0], words, environment)
        except OSError as error:
            os.write(2, ("%s: %s\n" % (words[0], error.strerror)).encode())
        finally:
            os._exit(127)

    def data(self, _, data):
        """Bytes for the child's input. Has no answer: the child gives it."""
        self.waiting += data
        self.since, self.owes = time.monotonic(), True

    def get(self, header, _):
        """The bytes of a file that the child wrote into the job folder; none where it did not."""
        path = os.path.join(self.job, os.path.basename(header["name"]))
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > header["most"]:
                    raise Refused("large", "%d bytes" % size)
                data = file.read()
            os.unlink(path)
        except FileNotFoundError:
            return {"found": False}, b""
        return {"found": True}, data

    def tell_facts(self, _, __):
        """What `facts` says, and the room on the device's disk."""
        room = os.statvfs(self.folder)
        return {**facts(), "free_bytes": room.f_bavail * room.f_frsize}, b""

    def end(self, _, __):
        raise SystemExit(0)

    def tidy(self):
        """Remove what dead agents left, then the pushed files that nobody used for longest."""
        jobs = os.path.join(self.folder, "jobs")
        for name in names_in(jobs):
            path = os.path.join(jobs, name)
            if path != self.job:
                end_left(path)
                shutil.rmtree(path, ignore_errors=True)
        paths = [os.path.join(self.store, name) for name in names_in(self.store)]
        held, now = 0, time.time()
        for path in sorted(paths, key=os.path.getmtime, reverse=True):
            held += sum(os.path.getsize(os.path.join(path, name)) for name in names_in(path))
            if held > KEEP_BYTES and now - os.path.getmtime(path) > KEEP_S:
                shutil.rmtree(path, ignore_errors=True)

    def digest(self, path):
        """SHA-256 of a file, empty where there is none."""
        whole = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while True:
                    part = file.read(CHUNK)
                    if not part:
                        return whole.hexdigest()
                    whole.update(part)
                    self.alive()
        except OSError:
            return ""

    # The loop.

    def alive(self):
        """The link lives: put off the end, and say so to other agents.

        The time of the job folder is that of the clock that no one can set.
        """
        signal.setitimer(signal.ITIMER_REAL, self.patience)
        if self.job:
            now = time.monotonic()
            os.utime(self.job, (now, now))

    def serve(self):
        """Answer until the input ends."""
        got = bytearray()
        while True:
            poll = select.poll()
            poll.register(0, select.POLLIN)
            if self.from_child >= 0:
                poll.register(self.from_child, select.POLLIN)
            if self.waiting and self.to_child >= 0:
                poll.register(self.to_child, select.POLLOUT)
            left = self.since + self.limit - time.monotonic()
            ready = dict(poll.poll(max(1.0, 1000 * left) if self.owes else None))
            if 0 in ready:
                part = os.read(0, 1 << 16)
                if not part:
                    return
                got += part
                self.alive()
                while self.answer_one(got):
                    pass
            if self.to_child in ready and self.waiting:
                self.feed()
            if self.from_child in ready:
                self.pass_on()
            if self.child and self.owes and time.monotonic() - self.since > self.limit:
                self.end_child()
                self.tell_exit("late")

    def answer_one(self, got):
        """Take one whole message from the bytes and answer it; False where there is none."""
        if len(got) < 8:
            return False
        size = int.from_bytes(got[:8], "big")
        if len(got) < 8 + size:
            return False
        header = json.loads(got[8 : 8 + size].decode())
        count = header.get("bytes", 0)
        if len(got) < 8 + size + count:
            return False
        data = bytes(got[8 + size : 8 + size + count])
        del got[: 8 + size + count]
        if header["op"] in ("beat", "idle"):  # idle: the child's answer has arrived, whole
            self.owes = self.owes and header["op"] == "beat"
            return True
        if header["op"] == "data":
            self.data(header, data)
            return True
        handlers = {
            "begin": self.begin,
            "have": self.have,
            "put": self.put,
            "keep": self.keep,
            "start": self.start,
            "get": self.get,
            "facts": self.tell_facts,
            "end": self.end,
        }
        try:
            answer, data = handlers[header["op"]](header, data)
            self.send({"op": header["op"], **answer}, data)
        except Refused as error:
            self.refuse(error.kind, str(error))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            text = "%s (%s)" % (error.strerror, error.filename or header["op"])
            self.refuse("full" if full else "system", text)
        return True

    def refuse(self, kind, text):
        if self.job:
            shutil.rmtree(os.path.join(self.job, "new"), ignore_errors=True)
        self.send({"op": "error", "error": {"kind": kind, "text": text[:500]}})

    def send(self, header, data=b""):
        text = json.dumps({**header, "bytes": len(data)}).encode()
        for part in (len(text).to_bytes(8, "big") + text, data):
            view = memoryview(part)
            while view:
                view = view[os.write(1, view[: 1 << 16]) :]
                if data:
                    self.alive()

    def feed(self):
        try:
            del self.waiting[: os.write(self.to_child, self.waiting[: 1 << 16])]
            self.since = time.monotonic()
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it is dying; its output ends in a moment
            self.waiting.clear()

    def pass_on(self):
        """Send on what the child says; at the end of its output, how it ended."""
        part = os.read(self.from_child, 1 << 16)
        if part and self.capture:
            with open(os.path.join(self.job, "out"), "ab") as file:
                file.write(part)
        elif part:
            self.since = time.monotonic()
            self.send({"op": "data"}, part)
        else:
            self.tell_exit("")

    def tell_exit(self, why):
        """Wait for the child, tell its status: the number, or minus the signal's."""
        status = self.reap()
        said = self.tail("said", SAID)
        out = self.tail("out", OUT_MAX) if self.capture else b""
        self.owes = False
        answer = {
            "op": "exit",
            "why": why,
            "status": status,
            "said": said.decode("utf-8", "replace"),
        }
        self.send(answer, out)

    def tail(self, name, most):
        try:
            with open(os.path.join(self.job, name), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - most))
                return file.read()
        except OSError:
            return b""

    def reap(self):
        """Wait a moment for the child to end by itself, then end it; its status."""
        limit = time.monotonic() + END_S
        found, status = os.waitpid(self.child, os.WNOHANG)
        while not found and time.monotonic() < limit:
            time.sleep(0.01)
            found, status = os.waitpid(self.child, os.WNOHANG)
        self.end_child()
        if not found:
            _, status = os.waitpid(self.child, 0)
        self.child = None
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def end_child(self):
        """Kill the child's process group and close what leads to it."""
        if self.child:
            kill_group(self.child)
        for number in (self.to_child, self.from_child):
            if number >= 0:
                os.close(number)
        self.to_child = self.from_child = -1
        self.waiting.clear()

    def leave(self):
        """End the child, give the lease back, remove the job folder."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self.child:
            self.end_child()
            os.waitpid(self.child, 0)
        if self.job:
            shutil.rmtree(self.job, ignore_errors=True)
            try:
                with Lease(self.folder) as holders:
                    holders[:] = [h for h in holders if h["job"] != self.job]
            except OSError:
                pass  # a full disk; who is not alive holds nothing anyway


def stop(number, frame):
    raise SystemExit(1)


def main():
    agent = Agent()
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.umask(0o077)
    try:
        agent.alive()
        os.write(1, MAGIC)
        agent.serve()
    except BrokenPipeError:
        pass  # the link was cut while something was told
    finally:
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        agent.leave()


if __name__ == "__main__":
    main()
