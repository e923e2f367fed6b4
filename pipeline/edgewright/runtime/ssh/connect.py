"""Opening a connection to a device: one key, one list of known hosts, no questions.

Nothing of the user's own SSH set-up takes part: no ~/.ssh/config, no agent, no other keys, no
passwords. A host whose key is not on the list is refused, and so is one whose key changed.
"""

from pathlib import Path
from typing import Any

import asyncssh

from edgewright.errors import DeviceUnavailable, EdgewrightError, IntegrityError
from edgewright.target import RunSettings

CONNECT_S = 15.0
LOGIN_S = 30.0
MISSES = 3  # unanswered signs of life before the link counts as lost


class Watcher(asyncssh.SSHClient):
    """Remembers the key of a host that was not trusted, for the message."""

    def __init__(self) -> None:
        self.fingerprint = "none"

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        self.fingerprint = key.get_fingerprint()
        return False


async def connect(run: RunSettings, name: str) -> asyncssh.SSHClientConnection:
    """A connection to the device of the profile `name`.

    IntegrityError (5) where the host has another key than the one on the list, DeviceUnavailable
    (6) for everything else.
    """
    watcher = Watcher()
    trusted = known_hosts(run, name)
    try:
        return await asyncssh.connect(
            run.host,
            run.port,
            config=None,
            username=run.user,
            client_keys=[private_key(run, name)],
            known_hosts=trusted,
            server_host_key_algs=host_key_algorithms(trusted, run),
            client_factory=lambda: watcher,
            agent_path=None,
            preferred_auth="publickey",
            password_auth=False,
            kbdint_auth=False,
            gss_auth=False,
            gss_kex=False,
            host_based_auth=False,
            x509_trusted_certs=None,
            connect_timeout=CONNECT_S,
            login_timeout=LOGIN_S,
            keepalive_interval=run.beat_s,
            keepalive_count_max=MISSES,
            encoding=None,
        )
    except (asyncssh.Error, OSError, TimeoutError, ValueError) as error:
        raise refusal(error, run, name, trusted, watcher.fingerprint) from None


def known_hosts(run: RunSettings, name: str) -> asyncssh.SSHKnownHosts:
    """The list of trusted hosts."""
    path = Path(run.known_hosts).expanduser()
    try:
        return asyncssh.read_known_hosts(str(path))
    except (OSError, ValueError) as error:
        raise DeviceUnavailable(
            f"target {name}: no list of trusted hosts",
            expected=f"the key of {run.host} in {path}",
            found=str(error),
            hint=f"ssh-keyscan -p {run.port} {run.host} >> {path}, after comparing the key with "
            "the one that the device itself shows",
        ) from None


def host_key_algorithms(trusted: asyncssh.SSHKnownHosts, run: RunSettings) -> str | tuple[()]:
    """Which of its keys the host shall show: one on the list, or else any, to be refused.

    Without the second, a host that has only keys of other kinds hangs up and nobody learns why.
    Empty, for what asyncssh asks for, where the list has no key of the host or has authorities.
    """
    found: Any = trusted.match(run.host, "", run.port)
    keys, authorities = found[:2]
    if not keys or authorities:
        return ()
    return ",".join([*(name.decode() for key in keys for name in key.sig_algorithms), "*"])


def private_key(run: RunSettings, name: str) -> asyncssh.SSHKey:
    """The key to log in with; one with a passphrase is refused, since nothing is ever asked."""
    path = Path(run.key).expanduser()
    try:
        return asyncssh.read_private_key(str(path))
    except (asyncssh.KeyImportError, OSError, ValueError) as error:
        raise DeviceUnavailable(
            f"target {name}: the key to log in with cannot be used",
            expected=f"a private key without a passphrase in {path}",
            found=str(error),
            hint=f"make one for this device: ssh-keygen -t ed25519 -N '' -f {path}",
        ) from None


def refusal(
    error: Exception,
    run: RunSettings,
    name: str,
    trusted: asyncssh.SSHKnownHosts,
    fingerprint: str,
) -> EdgewrightError:
    """Why there is no connection, as one of our errors."""
    where = f"{run.host} port {run.port}"
    # A failed key exchange has many reasons, most of them about algorithms.
    no_key = isinstance(error, asyncssh.KeyExchangeFailed) and "host key" in str(error)
    if no_key or isinstance(error, asyncssh.HostKeyNotVerifiable):
        keys = fingerprints(trusted, run)
        hint = (
            "if the device was set up anew, compare its key with the one the device itself shows, "
            f"then replace its line in {run.known_hosts}"
        )
        if keys:
            return IntegrityError(
                f"target {name}: the key of {where} is not the one on the list",
                expected=" or ".join(keys),
                found=fingerprint,
                hint=hint,
            )
        return DeviceUnavailable(
            f"target {name}: {where} is not on the list of trusted hosts",
            expected=f"its key in {run.known_hosts}",
            found=f"{fingerprint} at the host",
            hint="compare that with the key the device itself shows, then: "
            f"ssh-keyscan -p {run.port} {run.host} >> {run.known_hosts}",
        )
    if isinstance(error, asyncssh.PermissionDenied):
        return DeviceUnavailable(
            f"target {name}: {where} did not let user {run.user} in",
            expected=f"the key {run.key} among the user's authorized_keys",
            found=str(error) or "permission denied",
            hint=f"check run.user and run.key, then: ssh-copy-id -i {run.key} -p {run.port} "
            f"{run.user}@{run.host}",
        )
    return DeviceUnavailable(
        f"target {name}: no connection to {where}",
        found=" ".join(str(error).split()) or type(error).__name__,
        hint="check that the device is on and its SSH server listens there",
    )


def fingerprints(trusted: asyncssh.SSHKnownHosts, run: RunSettings) -> list[str]:
    """The fingerprints that the list has for the host."""
    keys: Any = trusted.match(run.host, "", run.port)[0]
    return sorted({key.get_fingerprint() for key in keys})
