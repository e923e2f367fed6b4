"""One hierarchy of errors, an exit code per kind.

Every message says what was expected, what was found and what to do next. The command line
catches `EdgewrightError` once and turns it into one message and one exit code.
"""

import errno


class EdgewrightError(Exception):
    """Base of all errors a user can meet; `exit_code` is what the command returns."""

    exit_code = 3

    def __init__(self, what: str, *, expected: str = "", found: str = "", hint: str = "") -> None:
        parts = [what.rstrip(".")]
        if expected:
            parts.append(f"expected {expected}")
        if found:
            parts.append(f"found {found}")
        text = "; ".join(parts) + "."
        if hint:
            text += f" Next: {hint.rstrip('.')}" + ("" if hint.endswith("?") else ".")
        super().__init__(text)


class UsageError(EdgewrightError):
    """The command line asks for something that cannot be."""

    exit_code = 2


class BadInput(EdgewrightError):
    """Model, data, recipe or profile is wrong."""

    exit_code = 3


class IntegrityError(EdgewrightError):
    """A hash or signature does not fit: the artefact is not what it claims to be."""

    exit_code = 5


class EnvironmentMissing(EdgewrightError):
    """This machine lacks a provider, tool, device or resource."""

    exit_code = 6


class DeviceUnavailable(EnvironmentMissing):
    """The device, or the link to it, failed: it says nothing about the model."""


KINDS = (
    EdgewrightError,
    UsageError,
    BadInput,
    IntegrityError,
    EnvironmentMissing,
    DeviceUnavailable,
)


def to_wire(error: EdgewrightError) -> dict[str, str]:
    """The error as JSON data, to cross a process border."""
    return {"kind": type(error).__name__, "text": str(error)}


def from_wire(data: dict[str, str]) -> EdgewrightError:
    """The error that `to_wire` described."""
    kind = next((k for k in KINDS if k.__name__ == data["kind"]), EdgewrightError)
    error = kind.__new__(kind)
    Exception.__init__(error, data["text"])
    return error


def from_os_error(error: OSError, doing: str) -> EdgewrightError:
    """The message for a failed file operation; a full disk is the environment's fault."""
    where = f" ({error.filename})" if error.filename else ""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return EnvironmentMissing(
            f"no space left while {doing}{where}",
            found=reason,
            hint="free some disk space and run the same command again; finished stages are kept",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return EnvironmentMissing(
            f"not allowed to write or read while {doing}{where}",
            found=reason,
            hint="check the permissions, or name another folder with --out",
        )
    return BadInput(f"file operation failed while {doing}{where}", found=reason)
