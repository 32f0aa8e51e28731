"""The smallest pipeline: texts → one of a few labels, with an encoder and a head of its own that do as a text says.

"out of range" breaks the graph while it runs, "unusable …" breaks `prepare`, `seconds` makes every text slow.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = ["mug", "lamp", "[red]chair[/red]"]

_PARTS = """
import time

import torch
from torch import nn


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding.from_pretrained(torch.randn(64, 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, ids):
        return self.rows(ids)[:, 0]


class Words:
    modality, dim = "text", 8

    def __init__(self, seconds=0.0):
        self.module, self.seconds = Table(), seconds

    def prepare(self, media):
        time.sleep(self.seconds)
        if media.startswith("unusable"):
            raise ValueError(media)
        return {"ids": torch.tensor([10**6 if media == "out of range" else sum(media.encode()) % 64])}


class Head(nn.Module):
    def __init__(self, dims, labels):
        super().__init__()
        weights_DL = torch.randn(8, len(labels), generator=torch.Generator().manual_seed(2))
        self.register_buffer("weights_DL", weights_DL)

    def forward(self, embeddings, presence_BM):
        return embeddings["text"] @ self.get_buffer("weights_DL")
"""


def config(folder: Path, *, seconds: float = 0.0, labels: Sequence[str] = LABELS, **sections: Any) -> Path:
    """A YAML in `folder`, with its parts beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "word_parts.py").write_text(_PARTS, encoding="utf-8")
    made = {
        "labels": list(labels),
        "encoders": {"text": {"model": "word_parts:Words", "options": {"seconds": seconds}}},
        "fusion": {"head": "word_parts:Head"},
        "runtime": {"batch_size": 8},
        "output": {"shard_rows": 16},
        **sections,
    }
    path = folder / "words.yaml"
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


def texts(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:05d}.txt").write_text(f"item {number}", encoding="utf-8")
    return folder


def mmpipe(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line, as a process of its own; no traceback, whatever it is given."""
    done = subprocess.run(
        [sys.executable, "-m", "mmpipe", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def started(*arguments: object, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """The same, left running; Ctrl-C reaches it also where this process ignores it."""
    return subprocess.Popen(
        [sys.executable, "-m", "mmpipe", *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )
