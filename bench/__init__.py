"""Benchmarks: development tools, not part of the package. Results are rows in JSON lines, and plots read rows only."""
