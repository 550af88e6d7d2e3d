"""The parts of bench_labeller.py."""
