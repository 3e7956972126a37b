"""Metrics, per-pattern evaluation and tables."""
