"""Benchmarking and cost analysis of mixture-of-experts (MoE) layers."""

__version__ = "0.1.0"
