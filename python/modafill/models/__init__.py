"""Networks alone: no data loading, no training loop."""
