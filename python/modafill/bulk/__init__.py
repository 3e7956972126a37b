"""Whole stores through a trained model, a part at a time."""

from modafill.bulk.stores import check_store, impute_store, recognise_store

__all__ = ["check_store", "impute_store", "recognise_store"]
