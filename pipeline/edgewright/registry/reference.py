"""Where an artifact is in a registry: HOST[:PORT]/NAME[:TAG][@sha256:DIGEST]."""

import ipaddress
import re
from dataclasses import dataclass

from edgewright.errors import UsageError

PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# The grammar of the OCI distribution specification 1.1; the host is always named.
REFERENCE = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::(?P<port>[0-9]{1,5}))?"
    rf"/(?P<name>{PART}(?:/{PART})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?"
    r"(?:@sha256:(?P<digest>[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class Reference:
    """`digest`: SHA-256 of the artifact's manifest in hex; `tag` and `digest` may be empty."""

    host: str
    port: int | None
    name: str
    tag: str
    digest: str

    def __str__(self) -> str:
        place = self.host if self.port is None else f"{self.host}:{self.port}"
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@sha256:{self.digest}" if self.digest else ""
        return f"{place}/{self.name}{tag}{digest}"


def parse(text: str) -> Reference:
    """UsageError for anything else."""
    found = REFERENCE.fullmatch(text)
    if found is None or len(found["name"]) > 255 or int(found["port"] or 0) > 65535:
        raise UsageError(
            f"{ascii(text)[:200]} names no artifact in a registry",
            expected="HOST[:PORT]/NAME[:TAG][@sha256:DIGEST], such as "
            "registry.example.com/models/keyword:1.4.0-arm",
        )
    port = int(found["port"]) if found["port"] else None
    return Reference(found["host"], port, found["name"], found["tag"] or "", found["digest"] or "")


def is_loopback(host: str) -> bool:
    """Whether what is sent there stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
