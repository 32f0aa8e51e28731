"""Embeddings that are kept between runs: memory over disk, and what one run asks of them."""

from mmpipe.cache.disk import Disk, let_go
from mmpipe.cache.recall import Form, Recall
from mmpipe.cache.store import Layers, Memory, Store, folder, opened

__all__ = ["Disk", "Form", "Layers", "Memory", "Recall", "Store", "folder", "let_go", "opened"]
