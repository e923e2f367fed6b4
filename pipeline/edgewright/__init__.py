"""Edgewright: a trained model in, a small, fast, proven device bundle out."""

import os

# onnxruntime 1.29 and later report names and hashes of models to their maker, from a thread of
# their own that also disturbs measurements. Read when onnxruntime is loaded; children inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
