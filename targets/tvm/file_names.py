"""The files of a tvm engine."""

LIBRARY, WEIGHTS, INDEX = "engine.so", "weights.bin", "engine.json"
TUNING = "tuning.json"
"""Present in engines whose kernels were tuned."""
