"""CUDA's device functions on a CPU, thread by thread: see runner.py."""
