"""Which wheel an installed package came from, as the texts in its dist-info folder tell.

Runs here and, as a part of the agent, on the device, so that a lock says the same of both.
"""

import csv
import hashlib

# Written by the installer, so no part of the wheel.
BY_INSTALLER = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_cache.json")


def wheel_name(name, version, text):
    """The name of the wheel file, from the tags in WHEEL (`text`); empty where there are none."""
    lines = (line[5:].strip() for line in text.splitlines() if line.startswith("Tag: "))
    tags = [tag.split("-") for tag in lines if tag.count("-") == 2]
    if not tags:
        return ""
    parts = [".".join(sorted({tag[k] for tag in tags})) for k in range(3)]
    return "-".join([name.replace("-", "_"), version, *parts]) + ".whl"


def record_digest(text):
    """SHA-256 over the sorted lines `path,hash,size` of what the wheel itself brought.

    `text`: of RECORD. None where there is none, or one that is no CSV.
    """
    if not text:
        return None
    try:
        rows = [row for row in csv.reader(text.splitlines()) if len(row) == 3 and row[1]]
    except csv.Error:
        return None
    return hashlib.sha256("".join(sorted(kept(rows))).encode()).hexdigest()


def kept(rows):
    """The lines of a RECORD that are the same wherever the wheel is installed."""
    for path, digest, size in rows:
        name = path.rpartition("/")[2]
        if path.startswith(("..", "/")) or name.endswith(".pyc"):
            continue  # scripts and compiled files, made by the installer
        if ".dist-info/" in path and name in BY_INSTALLER:
            continue
        yield f"{path},{digest},{size}\n"
