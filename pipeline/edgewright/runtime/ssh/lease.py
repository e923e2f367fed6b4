"""Who may use a device: all links of one owner at a time. Runs on the device.

A holder is a running agent, known by process id, start time and boot. It counts while its job
folder was touched lately by the clock that no one can set, so neither a killed agent nor a
stopped one nor a reboot leaves a device locked.
"""

import fcntl
import json
import os
import signal
import time

from edgewright.runtime.ssh.facts import read_text


def born(pid):
    """When a process started, in ticks since boot; empty where there is none, or a dead one.

    As its first thread tells: in place of /proc/PID/stat QEMU gives an emulated process a text of
    its own, with a later start than all others see.
    """
    fields = read_text("/proc/%d/task/%d/stat" % (pid, pid)).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else ""


def boot():
    return read_text("/proc/sys/kernel/random/boot_id")


def write_text(path, text):
    with open(path, "w") as file:
        file.write(text)


class Lease:
    """The living holders of the device, under a lock; what is left in the list is written back."""

    def __init__(self, folder):
        self.path = os.path.join(folder, "lease.json")
        self.lock = os.path.join(folder, "lease.lock")

    def __enter__(self):
        self.handle = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.handle, fcntl.LOCK_EX)
        try:
            found = json.loads(read_text(self.path) or "[]")
            self.holders = [h for h in found if lives(h)]
        except (ValueError, KeyError, TypeError):
            self.holders = []
        return self.holders

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                write_text(self.path + ".new", json.dumps(self.holders))
                os.rename(self.path + ".new", self.path)
        finally:
            os.close(self.handle)


def lives(holder):
    """Whether a holder of the lease still is one: the same process, heard of lately."""
    if holder["boot"] != boot() or born(holder["pid"]) != holder["born"]:
        return False
    try:
        seen = os.stat(holder["job"]).st_mtime
    except OSError:
        return False
    if time.monotonic() - seen <= 2 * holder["patience_s"]:
        return True
    end_left(holder["job"])  # stopped or stuck: it would have ended by itself
    try:
        os.kill(holder["pid"], signal.SIGKILL)
    except OSError:
        pass
    return False


def end_left(job):
    """Kill the child that a dead agent left, if it is still that child."""
    try:
        pid, when = read_text(os.path.join(job, "child")).split()
    except ValueError:
        return
    if born(int(pid)) == when:
        kill_group(int(pid))


def kill_group(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass
