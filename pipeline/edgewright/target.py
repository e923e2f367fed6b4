"""The target profile: facts about a device, read from `targets/NAME.toml`. Data, never code."""

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from edgewright.decision import Tolerances, check_tolerances
from edgewright.errors import BadInput, UsageError
from edgewright.settings import load_toml, parse, suggestion


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the device is: instruction set, libraries, what an install must find there."""

    arch: Literal["x86_64", "aarch64"]
    isa: tuple[str, ...] = ()
    compatible: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """ONNX Runtime on the device: provider with its options, threads, session options.

    `min_provider_share`: least share of the work (time; multiply-accumulates where the times
    are not those of the device) on the provider. `min_int8_share`: least share of the
    multiply-accumulates in int8. `io_binding`: while measuring, inputs and outputs stay on the
    provider's device.
    """

    provider: str = "CPUExecutionProvider"
    provider_options: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    session: dict[str, str] = field(default_factory=dict)
    min_provider_share: float = 1.0
    min_int8_share: float = 0.0
    io_binding: bool = False


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How code for the device runs from here: natively, emulated, or over SSH.

    For `ssh` (docs/ssh.md): where the device is, the one key to log in with, the list of hosts to
    trust; its Python and a folder there for pushed models; `pin`: the cores to use, empty for
    all; seconds: `limit_s` for one request, `beat_s` between signs of life, `reconnect_s` to keep
    trying to open a dropped link. `emulated`: its CPU is emulated, so its times do not count.

    For `emulate`: the QEMU CPU model and, for ARM, the identity written to the emulated
    /proc/cpuinfo. ONNX Runtime picks kernels from both, so they must describe one CPU
    (facts: a mismatch ends in SIGILL or in silently slower kernels).
    """

    how: Literal["local", "emulate", "ssh"] = "local"
    cpu_model: str = ""
    cpu_part: str = ""
    cpu_variant: str = ""
    cpu_features: str = ""
    cores: int = 1
    host: str = ""
    port: int = 22
    user: str = ""
    key: str = "~/.ssh/id_ed25519"
    known_hosts: str = "~/.ssh/known_hosts"
    python: str = "python3"
    folder: str = "~/.cache/edgewright"
    pin: tuple[int, ...] = ()
    emulated: bool = False
    limit_s: float = 600.0
    beat_s: float = 5.0
    reconnect_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Int8Scheme:
    """What the device's int8 kernels like.

    `style`: static = QDQ from calibration data; none = no int8 kernels worth using.
    `saturates`: 16-bit pair sums of U8S8 products saturate (x86 without VNNI), so weights
    must leave head-room. 16-bit activations are for accelerators: ONNX Runtime's CPU provider
    has no kernels for them and runs such layers in float between Q and DQ.
    """

    style: Literal["static", "none"] = "static"
    activations: Literal["uint8", "int8", "uint16", "int16"] = "uint8"
    weights: Literal["int8", "uint8"] = "int8"
    symmetric_activations: bool = False
    per_channel: bool = True
    saturates: bool = False
    dynamic: bool = True

    @property
    def steps(self) -> int:
        """Steps between the smallest and the largest code of an activation."""
        return 65535 if self.activations.endswith("16") else 255


@dataclass(frozen=True, kw_only=True)
class PruneFacts:
    """What widths the device's kernels like: `multiple` is what remains of channels and units.

    Channels off the blocks of a kernel cost as much as the next block, and on ONNX Runtime's CPU
    kernels leave the blocked layout, which is slower than not pruning at all.
    """

    multiple: int = 8


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits every model for this target must keep, whatever its recipe says."""

    max_size_bytes: int | None = None
    max_peak_memory_bytes: int | None = None
    max_latency_ms: float | None = None
    max_instructions: int | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target profile."""

    name: str
    description: str
    device: Device
    runtime: RuntimeSettings = RuntimeSettings()
    run: RunSettings = RunSettings()
    int8: Int8Scheme = Int8Scheme()
    prune: PruneFacts = PruneFacts()
    budget: Budget = Budget()
    tolerance: Tolerances = field(default_factory=Tolerances)
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def emulated(self) -> bool:
        """Whether the device's CPU is emulated, here or behind SSH: its times say nothing."""
        return self.run.how == "emulate" or self.run.emulated


def profiles_folder() -> Path:
    """The folder of the shipped profiles: inside the wheel, or `targets/` of the repository."""
    installed = Path(str(resources.files("edgewright"))) / "targets"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2] / "targets"


def target_names() -> list[str]:
    """The names of the shipped profiles, sorted."""
    return sorted(p.stem for p in profiles_folder().glob("*.toml"))


def load_target(name: str) -> Target:
    """A shipped profile by name, or a user's own by path (anything with a '/' or '.toml')."""
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
        where = f"target profile {name}"
    else:
        if name not in target_names():
            raise UsageError(
                f"unknown target '{name}'",
                hint=f"a profile of your own is named by path; {suggestion(name, target_names())}",
            )
        path = profiles_folder() / f"{name}.toml"
        where = f"target profile {name}"
    return parse_target(load_toml(path, "target profile"), where)


def check_ssh(run: RunSettings, where: str) -> None:
    """What a device over SSH needs."""
    for key, what in (("host", "the device's SSH host"), ("user", "the user to log in as")):
        value = getattr(run, key)
        if not value or value.startswith("-") or not value.isprintable():
            raise BadInput(f"{where}: run.{key}", expected=what, found=repr(value) or "nothing")
    for key in ("key", "known_hosts"):
        if not getattr(run, key).startswith(("/", "~")):
            raise BadInput(
                f"{where}: run.{key}",
                expected="an absolute path, or one that begins with ~",
                found=repr(getattr(run, key)),
            )
    if not 0 < run.port < 65536:
        raise BadInput(f"{where}: run.port", expected="1 to 65535", found=str(run.port))
    if not run.python.strip() or not run.folder.strip():
        raise BadInput(f"{where}: run.python and run.folder", expected="both", found="nothing")
    if min(run.limit_s, run.beat_s) <= 0 or run.reconnect_s < 0:
        raise BadInput(f"{where}: run.limit_s, run.beat_s", expected="more than 0 seconds")


def parse_target(raw: dict[str, Any], where: str = "target profile") -> Target:
    """Check the tables of a profile."""
    if "raw" in raw:
        raise BadInput(f"unknown key 'raw' in {where}")
    target = parse(Target, raw, where)
    if not target.name.replace("-", "").replace("_", "").isalnum():
        raise BadInput(f"{where}: name", expected="letters, digits, '-', '_'", found=target.name)
    if target.run.how == "emulate" and not target.run.cpu_model:
        raise BadInput(f"{where}: run.cpu_model", expected="a QEMU CPU model", found="nothing")
    if target.run.how == "ssh":
        check_ssh(target.run, where)
    for key in ("min_provider_share", "min_int8_share"):
        if not 0 <= getattr(target.runtime, key) <= 1:
            found = str(getattr(target.runtime, key))
            raise BadInput(f"{where}: runtime.{key}", expected="0 to 1", found=found)
    if target.prune.multiple < 1:
        raise BadInput(f"{where}: prune.multiple", expected="at least 1")
    if target.runtime.threads < 1:
        raise BadInput(f"{where}: runtime.threads", expected="at least 1")
    check_tolerances(target.tolerance, f"{where}: tolerance")
    return Target(**{**{f: getattr(target, f) for f in target.__dataclass_fields__}, "raw": raw})
