"""What calibration needs in a process of its own: statistics, and a session that is watched.

Kept apart from `quantize`, whose imports would triple the memory of each helper process.
"""
