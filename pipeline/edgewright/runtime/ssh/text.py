"""The agent's modules as one line of text that a Python on the device runs from its input."""

from pathlib import Path

PARENTS = ("edgewright", "edgewright.runtime", "edgewright.runtime.ssh")
MODULES = ("wheels", "facts", "lease", "agent")
# Reads the one line byte by byte: what follows it belongs to the agent.
BOOTSTRAP = (
    "import os;exec(bytes.fromhex(b''.join(iter("
    "lambda:os.read(0,1)or os._exit(3),b'\\n')).decode()))"
)
LOADER = """\
import sys, types
for name in {parents!r}:
    sys.modules[name] = module = types.ModuleType(name)
    module.__path__ = []
for name, text in {sources!r}:
    sys.modules[name] = module = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
sys.modules[name].main()
"""


def line() -> bytes:
    """What is sent after `python3 -c BOOTSTRAP` was started."""
    folder = Path(__file__).parent
    sources = [(f"{PARENTS[-1]}.{m}", (folder / f"{m}.py").read_text("utf-8")) for m in MODULES]
    return LOADER.format(parents=PARENTS, sources=sources).encode().hex().encode() + b"\n"
