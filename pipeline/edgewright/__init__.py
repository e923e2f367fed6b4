"""Edgewright: a trained model in, a small, fast, proven device bundle out."""

__version__ = "0.1.0"
