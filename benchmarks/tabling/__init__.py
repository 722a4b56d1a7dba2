"""The tables of the pages, made from ``benchmarks/results``."""
