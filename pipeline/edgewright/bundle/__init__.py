"""The device bundle: one deterministic archive that names, bounds and proves its content.

`manifest` and `tarball` are all a device needs to verify one; `assemble` makes one.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a device has no stages
    from edgewright.stage import Job, Report


def run(job: "Job") -> "Report":
    """Write `NAME-VERSION-TARGET.bundle.tar` into the job's folder; what it holds.

    Same model, recipe, profile, data, reports, runtime version and SOURCE_DATE_EPOCH: same
    bytes, on every machine whose CPU has the same kernel features (they decide the bits of
    golden outputs, so the manifest names them).
    """
    # Imported here: who verifies a bundle needs neither onnx nor a runtime.
    from edgewright.bundle import assemble

    return assemble.run(job)
