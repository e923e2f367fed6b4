"""Graph passes: one idea per file, each a function that changes an `onnx_ir.Model` in place.

A pass returns how many changes it made and keeps what the model computes: names, order, types
and free dimensions of inputs and outputs, and the values of the outputs up to float rounding.
Passes act on nested graphs (If, Loop, Scan) too; `edit.py` holds the rules that make it safe.
Which passes run, and in which order, is one literal list in `simplify.py`.
"""
