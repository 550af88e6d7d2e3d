"""The parts of bench_methods.py."""
