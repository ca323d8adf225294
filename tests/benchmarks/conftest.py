"""Timed only where that is asked for: in an ordinary test run each case is checked and called once."""

import pytest


@pytest.fixture
def benchmark(benchmark, request):
    """pytest-benchmark's own, disabled without --benchmark-only or --benchmark-enable."""
    asked = ("benchmark_only", "benchmark_enable")
    benchmark.disabled = benchmark.disabled or not any(request.config.getoption(name) for name in asked)
    return benchmark
