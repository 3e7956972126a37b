"""Samples with missing modalities: batches, missing patterns, the feature store and the readers that fill it."""

from modafill.data.batch import Batch
from modafill.data.labels import Labels
from modafill.data.patterns import all_patterns, missing_patterns, pattern_index, pattern_name, random_available
from modafill.data.splits import Split, make_splits
from modafill.data.standardize import Standardizer
from modafill.data.store import FeatureStore
from modafill.data.writer import StoreWriter

__all__ = [
    "Batch",
    "FeatureStore",
    "Labels",
    "Split",
    "Standardizer",
    "StoreWriter",
    "all_patterns",
    "make_splits",
    "missing_patterns",
    "pattern_index",
    "pattern_name",
    "random_available",
]
