"""Solutions that are kept for later runs, and the key of what each was solved for."""

from __future__ import annotations

from lora_da.cache.store import CacheEntry, cache_folder

__all__ = ["CacheEntry", "cache_folder"]
