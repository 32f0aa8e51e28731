"""Weights mapped from files that have been packed into another form: their pages are given back.

The system would take them when memory is short, but until then they count as ours, beside the copy that is computed
with. Who reads such weights after all (the parity gate, an edited graph) has them read from the file again.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_LEAST_BYTES = 1 << 20  # of a storage that is worth a look
_ENTRY = np.dtype(np.uint64)  # of /proc/self/pagemap, one for each page
_PRESENT, _SWAPPED, _FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def give_back(tensors: Iterable[Tensor]) -> int:
    """Give back what lies in mapped files of the storages of `tensors`, as far as nobody has written there: such pages
    are the process's own. Returns bytes that are no longer in its memory [0 where the system does not tell which pages
    are whose].

    Nobody may be writing to the tensors meanwhile.
    """
    storages, given = dict(filter(None, map(_storage, tensors))), 0
    with contextlib.suppress(OSError, AttributeError), open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        libc = ctypes.CDLL(None, use_errno=True)
        for address, size in storages.items():
            first, last = -(-address // mmap.PAGESIZE), (address + size) // mmap.PAGESIZE
            pagemap.seek(first * _ENTRY.itemsize)
            pages = np.frombuffer(pagemap.read((last - first) * _ENTRY.itemsize), _ENTRY)
            for start, stop in _clean(pages):
                where = ctypes.c_void_p((first + start) * mmap.PAGESIZE)
                if libc.madvise(where, ctypes.c_size_t((stop - start) * mmap.PAGESIZE), mmap.MADV_DONTNEED) == 0:
                    given += int(np.count_nonzero(pages[start:stop] & _PRESENT)) * mmap.PAGESIZE
    return given


def _storage(tensor: Tensor) -> tuple[int, int] | None:
    """(address, bytes) of a storage in the host's memory that is worth a look."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()
        found = storage.data_ptr(), storage.nbytes()
    except (RuntimeError, ValueError, NotImplementedError):  # a tensor that stands for others, or is not made yet
        return None
    return found if found[1] >= _LEAST_BYTES else None


def _clean(pages: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of runs of pages without one of the process's own, of which any is there to be given back."""
    own = ((pages & _PRESENT != 0) & (pages & _FILE == 0)) | (pages & _SWAPPED != 0)
    edges = np.flatnonzero(np.diff(own, prepend=True, append=True)).tolist()
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [(start, stop) for start, stop in runs if (pages[start:stop] & _PRESENT != 0).any()]
