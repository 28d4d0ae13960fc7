"""Speed against plain PyTorch: `python -m bench --help`. Results: bench/RESULTS.md."""
