"""Samples with missing modalities: batches, missing patterns, the feature store and the readers that fill it."""

from modafill.data.batch import Batch, valid_steps
from modafill.data.convert import convert, open_data
from modafill.data.demo import demo_path
from modafill.data.inspection import inspect_path, render_inspection
from modafill.data.labels import Labels
from modafill.data.mapping import NpzMapping, builtin_mappings, load_mapping
from modafill.data.missing import MissingRate
from modafill.data.patterns import all_patterns, missing_patterns, pattern_index, pattern_name, random_available
from modafill.data.splits import Split, make_splits
from modafill.data.standardize import Standardizer
from modafill.data.store import FeatureStore
from modafill.data.writer import StoreWriter

__all__ = [
    "Batch",
    "FeatureStore",
    "Labels",
    "MissingRate",
    "NpzMapping",
    "Split",
    "Standardizer",
    "StoreWriter",
    "all_patterns",
    "builtin_mappings",
    "convert",
    "demo_path",
    "inspect_path",
    "load_mapping",
    "make_splits",
    "missing_patterns",
    "open_data",
    "pattern_index",
    "pattern_name",
    "random_available",
    "render_inspection",
    "valid_steps",
]
