"""Embeddings → decision: heads, gates, training. Knows torch, and nothing of the rest of mmpipe."""
