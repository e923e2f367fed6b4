"""What a device is and how it is doing, from its own /proc and /sys. Runs on the device."""

import os
import sys

from edgewright.runtime.ssh.wheels import record_digest, wheel_name

DIST_INFO = ".dist-info"


def read_text(path, most=1 << 20):
    """The stripped text of a file, `most` characters of it; empty where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(most).strip("\0\n ")
    except OSError:
        return ""


def names_in(folder):
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def facts(root="/"):
    """What belongs to a number measured here, and what a build must know before it begins.

    `root`: where /proc and /sys are looked for.
    """

    def told(path):
        return read_text(os.path.join(root, path))

    cpu, flags, parts = "", [], {}
    for line in told("proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        parts.setdefault(key.strip(), value.strip())
    for key in ("model name", "Model"):
        cpu = cpu or parts.get(key, "")
    if not cpu and "CPU part" in parts:
        cpu = "ARM implementer %s part %s" % (parts.get("CPU implementer", "?"), parts["CPU part"])
    flags = (parts.get("flags") or parts.get("Features") or "").split()
    devices = os.path.join(root, "sys/devices/system/cpu")
    governors, limits, throttled = {}, {}, {}
    for name in names_in(devices):
        if not name[3:].isdigit():
            continue
        for table, path in (
            (governors, "cpufreq/scaling_governor"),
            (limits, "cpufreq/scaling_max_freq"),
            (throttled, "thermal_throttle/core_throttle_count"),
        ):
            text = read_text(os.path.join(devices, name, path))
            if text:
                table[name] = text
    firmware = told("sys/devices/platform/soc/soc:firmware/get_throttled")
    if firmware:
        throttled["firmware"] = firmware
    temperatures = {}
    zones = os.path.join(root, "sys/class/thermal")
    for name in names_in(zones):
        value = read_text(os.path.join(zones, name, "temp"))
        if name.startswith("thermal_zone") and value.lstrip("-").isdigit():
            temperatures[name] = int(value) / 1000.0
    memory = [line.split() for line in told("proc/meminfo").splitlines()[:3]]
    steal = told("proc/stat").split("\n", 1)[0].split()
    return {
        "machine": os.uname().machine,
        "bits": 64 if sys.maxsize > 1 << 32 else 32,
        "system": os.uname().sysname,
        "kernel": os.uname().release,
        "python": "%d.%d.%d" % sys.version_info[:3],
        "board": told("proc/device-tree/model"),
        "cpu": cpu,
        "flags": sorted(set(flags)),
        "cores": os.cpu_count() or 1,
        "allowed_cores": sorted(os.sched_getaffinity(0)),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "memory_kib": {row[0].rstrip(":"): int(row[1]) for row in memory if len(row) > 1},
        "steal_ticks": int(steal[8]) if len(steal) > 8 else 0,
        "governors": governors,
        "frequency_limits": limits,
        "temperatures_c": temperatures,
        "throttled": throttled,
        "packages": packages(),
    }


def packages():
    """numpy and onnxruntime, whatever its variant, as their folders tell, by name.

    {"version", "wheel", "record_sha256"}; "" and None: not known, see `wheels`.
    """
    found = {}
    for folder in sys.path:
        for name in names_in(folder or "."):
            package, _, rest = name.partition("-")
            known = package == "numpy" or package.startswith("onnxruntime")
            if not known or not rest.endswith(DIST_INFO) or package in found:
                continue
            path, version = os.path.join(folder, name), rest[: -len(DIST_INFO)]
            found[package] = {
                "version": version,
                "wheel": wheel_name(package, version, read_text(os.path.join(path, "WHEEL"))),
                "record_sha256": record_digest(read_text(os.path.join(path, "RECORD"), -1)),
            }
    return found
