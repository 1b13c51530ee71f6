"""The files of a tvm engine."""

LIBRARY, WEIGHTS, INDEX = "engine.so", "weights.bin", "engine.json"
