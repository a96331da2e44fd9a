"""Benchmarks: what the design promises, measured. `make bench` runs them; docs/results/ keeps the figures."""
