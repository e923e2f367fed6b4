"""A helper process of calibration: one observer, fed over standard input.

Messages as in `runtime.worker`. First the model's file and what to watch, then samples; each
gets an answer, an error as data with it. Then the statistics. End of input, or of the parent,
ends it.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgewright.calibration.observe import Observer, Sample
from edgewright.calibration.statistics import to_arrays
from edgewright.errors import BadInput, EdgewrightError, to_wire
from edgewright.runtime import worker

Answer = tuple[dict[str, Any], dict[str, np.ndarray]]


class Helper:
    """The observer, once the model has come."""

    observer: Observer

    def answer(self, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Answer:
        """Do what one message asks for."""
        if header["op"] == "watch":
            self.observer = Observer(Path(header["model"]), header["tensors"])
            self.observer.groups = header["groups"]
        elif header["op"] == "sample":
            # Arrays from a pipe are read-only views; the runtime only reads them.
            self.observer.observe(Sample(header["index"], header["name"], arrays))
        else:
            return {}, to_arrays(list(self.observer.statistics.values()))
        return {}, {}


def main() -> None:
    """Answer messages until there are no more."""
    worker.die_with_parent()
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the messages
    helper = Helper()
    while True:
        try:
            header, arrays = worker.receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer, values = helper.answer(header, arrays)
        except EdgewrightError as error:
            answer, values = {"error": to_wire(error)}, {}
        except Exception as error:
            ours = BadInput("calibration failed", found=f"{type(error).__name__}: {error}"[:600])
            answer, values = {"error": to_wire(ours)}, {}
        worker.send(sink, answer, list(values.items()))


if __name__ == "__main__":
    main()
