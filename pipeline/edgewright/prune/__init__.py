"""Structured pruning of an ONNX graph: which units exist, which go, and the smaller graph."""
