"""Whole stores through a trained model, a part at a time, by one process or many."""

from modafill.bulk.engines import ENGINES
from modafill.bulk.plan import MANIFEST_FILE, check_shards, clean_up, read_manifest
from modafill.bulk.rows import check_store
from modafill.bulk.stores import SHARD_ROWS, impute_store, recognise_store

__all__ = [
    "ENGINES",
    "MANIFEST_FILE",
    "SHARD_ROWS",
    "check_shards",
    "check_store",
    "clean_up",
    "impute_store",
    "read_manifest",
    "recognise_store",
]
