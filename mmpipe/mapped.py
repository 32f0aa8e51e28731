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
    are the process's own. Returns bytes [0 where the system does not tell which pages those are].

    Nobody may be writing to the tensors meanwhile.
    """
    storages = {}
    for tensor in tensors:
        plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
        if plain and (storage := tensor.untyped_storage()).nbytes() >= _LEAST_BYTES:
            storages[storage.data_ptr()] = storage.nbytes()
    given = 0
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            for address, size in storages.items():
                first, last = -(-address // mmap.PAGESIZE), (address + size) // mmap.PAGESIZE
                pagemap.seek(first * _ENTRY.itemsize)
                pages = np.frombuffer(pagemap.read((last - first) * _ENTRY.itemsize), _ENTRY)
                for start, stop in _clean(pages):
                    where = ctypes.c_void_p((first + start) * mmap.PAGESIZE)
                    if libc.madvise(where, ctypes.c_size_t((stop - start) * mmap.PAGESIZE), mmap.MADV_DONTNEED) == 0:
                        given += int(np.count_nonzero(pages[start:stop] & _PRESENT)) * mmap.PAGESIZE
    return given


def _clean(pages: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of runs of pages without one of the process's own, of which any is there to be given back."""
    own = ((pages & _PRESENT != 0) & (pages & _FILE == 0)) | (pages & _SWAPPED != 0)
    edges = np.flatnonzero(np.diff(own, prepend=True, append=True)).tolist()
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [(start, stop) for start, stop in runs if (pages[start:stop] & _PRESENT != 0).any()]
