"""The process that will hold a bundle's model on the device: its limits.

Without numpy: it is started while the bundle is still being unpacked.
"""

import os
from collections.abc import Sequence

from edgewright.bundle.manifest import Manifest
from edgewright.runtime.session import ADDRESS_SPACE, NVIDIA, Launch

LIBRARIES = 4 << 30  # address space that Python, onnxruntime and its threads reserve, not use


def native(manifest: Manifest, python: Sequence[str] = ()) -> Launch:
    """How a process for the model starts on the device itself; `python`: not this interpreter.

    The address space is no measure of memory, so its limit is wide: it stops a runaway before
    the machine does. What counts is the peak that `prove.check_memory` reads.
    """
    limit = manifest["limits"]["max_memory_bytes"] or physical_memory()
    on_gpu = manifest["runtime"]["provider"] in NVIDIA
    space = 0 if on_gpu else min(ADDRESS_SPACE, limit + LIBRARIES)
    return Launch(python=tuple(python) or Launch.python, address_space=space)


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
