"""The parts of `gpu_check.py`, a file each; each runs in a process of its own."""
