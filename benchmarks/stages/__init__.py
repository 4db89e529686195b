"""What gpu.py runs, each a process of its own: `python -m stages.NAME`, with benchmarks/ on the path."""
