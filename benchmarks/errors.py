"""The one error of the benchmarks: its message says what was seen and what to set."""


class BenchmarkError(Exception):
    """A benchmark cannot be run as asked."""
