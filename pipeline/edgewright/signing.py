"""Making keys and signatures, on the machine that builds. Needs `cryptography` (extra `sign`).

A key is named by one word: the path of a PEM file, `env:NAME` for an environment variable that
holds such a path or the PEM itself, or `command:PROGRAM ARGS` for a program that keeps the key
(an agent, a PKCS#11 token): called with `public` it prints the public key as PEM, called with
`sign` it gets the bytes to sign on standard input and prints the signature (64 bytes, raw or in
base64). What it prints is verified before it is used.
"""

import base64
import os
import shlex
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgewright.bundle import manifest, tarball, transport
from edgewright.device import ed25519, envelope, trust
from edgewright.device.verify import Verified, open_bundle, verified
from edgewright.errors import BadInput, EnvironmentMissing, IntegrityError, UsageError
from edgewright.files import replacing, write_atomic
from edgewright.recipe import expiry

VARIABLE = "EDGEWRIGHT_SIGNING_KEY"
COMMAND_TIMEOUT_S = 120  # a person may have to touch a token
MAX_KEY_BYTES = 1 << 16


@dataclass(frozen=True)
class Signer:
    """A key that signs: its raw public half, and what makes a signature of a message."""

    public: bytes
    sign: Callable[[bytes], bytes]


@contextmanager
def needs_cryptography() -> Iterator[None]:
    """Around an import of the library: EnvironmentMissing where it is absent."""
    try:
        yield
    except ImportError:
        raise EnvironmentMissing(
            "signing needs the package cryptography",
            hint="python -m pip install 'edgewright[sign]'",
        ) from None


def ed25519_library() -> Any:
    """The library's module for Ed25519; EnvironmentMissing without it."""
    with needs_cryptography():
        from cryptography.hazmat.primitives.asymmetric import ed25519 as module
    return module


def keygen(path: Path) -> tuple[Path, str]:
    """Write a new private key (mode 0600) and its public half beside it; that path, the keyid.

    UsageError where either file exists: a lost key cannot be had again.
    """
    library = ed25519_library()
    from cryptography.hazmat.primitives import serialization

    public_path = path.with_name(path.name + ".pub")
    for one in (path, public_path):
        if one.exists() or one.is_symlink():
            raise UsageError(f"{one} exists", hint="name another file with -o; keys are kept")
    key = library.Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes_raw()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # whatever the umask
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    write_atomic(public_path, trust.pem(public).encode())
    return public_path, envelope.keyid(public)


def signer(name: str, environment: Mapping[str, str]) -> Signer:
    """The key that `name` speaks of; see the top of this file."""
    if name.startswith("command:"):
        return by_command(name.removeprefix("command:"))
    if not name.startswith("env:"):
        return from_pem(private_bytes(Path(name)), name)
    variable = name.removeprefix("env:")
    value = environment.get(variable, "").strip()
    if not value:
        raise UsageError(
            f"environment variable {variable}",
            expected="the path of a private key, or the key itself as PEM",
            found="nothing",
        )
    if value.startswith("-----BEGIN"):
        return from_pem(value.encode(), variable)
    return from_pem(private_bytes(Path(value)), value)


def private_bytes(path: Path) -> bytes:
    """A key file's content; IntegrityError where others than its owner may read it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadInput(
            f"private key not found: {path}", hint="make one with: edgewright keygen -o NAME"
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise BadInput(f"private key {path}", expected="a file", found="something else")
        data = file.read(MAX_KEY_BYTES)
        if b"PUBLIC KEY" in data:
            raise UsageError(
                f"{path} holds a public key",
                expected="the private one; `edgewright keygen` writes it without .pub",
            )
        if facts.st_mode & 0o077:
            raise IntegrityError(
                f"private key {path} is open to others than its owner",
                expected="mode 0600 or 0400",
                found=f"{stat.S_IMODE(facts.st_mode):04o}",
                hint=f"make a new key, as this one may be known; else: chmod 600 {path}",
            )
        return data


def from_pem(text: bytes, where: str) -> Signer:
    """The Ed25519 key in PEM text."""
    module = ed25519_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(text, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None  # the library's text could quote the key
    if not isinstance(key, module.Ed25519PrivateKey):
        raise BadInput(
            f"private key {where}",
            expected="an Ed25519 private key in PEM (PKCS #8), not encrypted",
            found="another kind of key" if key else "something else",
            hint="make one with: edgewright keygen -o NAME",
        )
    return Signer(key.public_key().public_bytes_raw(), key.sign)


def by_command(line: str) -> Signer:
    """A key that a program keeps."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"key command:{line}", found=str(error)) from None
    if not words:
        raise UsageError("key command:", expected="a program after it")

    def ask(what: str, message: bytes) -> bytes:
        try:
            ran = subprocess.run(
                [*words, what], input=message, capture_output=True, timeout=COMMAND_TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EnvironmentMissing(
                f"the key command {words[0]} {what}", found=" ".join(str(error).split())[:200]
            ) from None
        if ran.returncode != 0:
            text = " ".join(ran.stderr.decode("utf-8", "replace").split())[:200]
            raise EnvironmentMissing(
                f"the key command {words[0]} {what}",
                expected="exit status 0",
                found=f"{ran.returncode}" + (f" ({text})" if text else ""),
            )
        return ran.stdout

    def sign(message: bytes) -> bytes:
        found = ask("sign", message)
        if len(found) == 64:
            return found
        try:
            return base64.b64decode(b"".join(found.split()), validate=True)
        except ValueError:
            return b""

    text = ask("public", b"").decode("utf-8", "replace")
    return Signer(trust.parse_public(text, f"printed by {words[0]}"), sign)


def signatures(kind: str, payload: bytes, signers: Sequence[Signer]) -> dict[str, bytes]:
    """A signature by each signer, verified, by keyid."""
    message = envelope.pae(kind, payload)
    made = {}
    for one in signers:
        found = one.sign(message)
        name = envelope.keyid(one.public)
        if len(found) != 64 or not ed25519.verify(one.public, found, message):
            raise IntegrityError(
                f"what signs for key {name} gave no valid signature",
                hint="check that the command signs its standard input as it is, with Ed25519",
            )
        made[name] = found
    return made


def trust_file(
    names: Sequence[str], threshold: int, version: int, signers: Sequence[Signer]
) -> bytes:
    """A trust file of keys that are named as `PUB[=FROM..UNTIL]`, signed.

    UsageError where too few of its own keys sign it: nobody could have used it.
    """
    content = trust.content(version, threshold, [trusted_key(name) for name in names])
    made = signatures(trust.TYPE, content, signers)
    data = envelope.write(trust.TYPE, content, made)
    own = trust.parse(data, "the new trust file").trust(None)
    if len(set(made) & set(own.keys)) < threshold:
        raise UsageError(
            "too few keys of the trust file sign it",
            expected=f"--sign of {threshold} of them",
            found=str(len(set(made) & set(own.keys))),
        )
    return data


def trusted_key(name: str) -> trust.Key:
    """A public key and the days between which it is valid."""
    path, _, days = name.partition("=")
    begin, dots, end = days.partition("..")
    if days and not dots:
        raise UsageError(f"--key {name}", expected="PUB=FROM..UNTIL, days such as 2027-01-31")
    return trust.Key(
        public=trust.public_key(Path(path)),
        name=Path(path).name.removesuffix(".pub"),
        not_before=expiry(begin, f"--key {name}") if begin else None,
        not_after=expiry(end, f"--key {name}") if end else None,
    )


def releasable(bundle: Path, any_verdict: bool) -> Verified:
    """The verified bundle; UsageError where its gate did not say PASS, unless `any_verdict`."""
    found = verified(bundle)
    gate = found.manifest["gate"]
    if not any_verdict and (gate is None or gate["verdict"] != "PASS"):
        raise UsageError(
            f"{bundle} is not for release",
            expected="a gate that said PASS",
            found=gate["verdict"] if gate else "no gate",
            hint="--any-verdict signs it all the same",
        )
    return found


def sign_bundle(bundle: Path, signers: Sequence[Signer], *, any_verdict: bool = False) -> Verified:
    """Add signatures to a bundle in its place, all or nothing; what it then is.

    The bundle is verified first: nobody signs what is not whole. One whose gate did not say
    PASS is refused unless `any_verdict`. Signatures of other keys stay.
    """
    with transport.open_file(bundle, "bundle") as file:
        if file.read(len(transport.MAGIC)) == transport.MAGIC:
            raise UsageError(
                f"{bundle} is compressed",
                expected="the archive itself (.bundle.tar)",
                hint="unpack it with: xz -d, sign it, compress it again with: xz",
            )
    before = releasable(bundle, any_verdict)
    old = envelope.read(before.envelope, envelope.MANIFEST_TYPE)[1] if before.envelope else {}
    new = signatures(envelope.MANIFEST_TYPE, before.manifest_bytes, signers)
    data = envelope.write(envelope.MANIFEST_TYPE, before.manifest_bytes, {**old, **new})
    envelope.read(data, envelope.MANIFEST_TYPE)  # too many signatures, for one
    with open_bundle(bundle) as source, replacing(bundle) as temporary:
        with temporary.open("xb") as file:
            splice(source, file, before, data)
            file.flush()
            os.fsync(file.fileno())
        return verified(temporary)


def splice(source: BinaryIO, out: BinaryIO, before: Verified, data: bytes) -> None:
    """Copy a verified bundle with `data` as its envelope."""
    time_stamp = before.manifest["source_date_epoch"]

    def block(path: str, part: bytes) -> bytes:
        head = tarball.header(tarball.Member(path, len(part), 0o644, time_stamp))
        return head + part + tarball.padding(len(part))

    skipped = len(block(manifest.PATH, before.manifest_bytes))
    if before.envelope is not None:
        skipped += len(block(manifest.SIGNATURE, before.envelope))
    source.seek(skipped)
    out.write(block(manifest.PATH, before.manifest_bytes))
    out.write(block(manifest.SIGNATURE, data))
    while part := source.read(tarball.READ):
        out.write(part)
