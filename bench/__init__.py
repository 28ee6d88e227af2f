"""Benchmarks, one command per question: python -m bench.models, bench.pipeline, bench.pae, bench.refinement,
bench.gpu.

Each prints tables and writes them as JSON.
"""
