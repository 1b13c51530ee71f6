"""Generators and measurements. Nothing here is a unit test except `test_*.py`; docs/benchmarks.md has the commands."""
