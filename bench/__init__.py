"""Benchmarks, one command a question: python -m bench.models, bench.pipeline, bench.pae. Each prints a table and writes JSON."""
