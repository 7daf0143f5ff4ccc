"""What there is to find out on a real GPU, in stages of a few minutes each: `python -m benchmarks.gpu STAGE`."""
