"""Algorithms that choose codes and scales from statistics of inputs: pure functions on arrays."""
