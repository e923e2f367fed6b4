"""What this machine's CPU can do. The standard library only: devices ask, too."""

from pathlib import Path


def host_isa() -> frozenset[str]:
    """The CPU flags of this machine as the kernel names them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.lower().startswith(("flags", "features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()
