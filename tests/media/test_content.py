"""What a medium is, as a hash: what is decoded differently has another."""

from __future__ import annotations

import numpy as np
import torch

from mmpipe.media import content_of


def test_an_array_and_a_tensor_of_the_same_numbers_are_different_pictures() -> None:
    """Of three rows that lie first: an array's are rows, a tensor's channels."""
    pixels = np.arange(3 * 40 * 3, dtype=np.uint8).reshape(3, 40, 3)
    array, tensor = content_of("image", pixels), content_of("image", torch.from_numpy(pixels))
    assert array is not None
    assert tensor is not None
    assert array.digest != tensor.digest
    assert content_of("image", pixels.copy()) == array
    turned = np.ascontiguousarray(pixels.transpose(2, 1, 0)).transpose(2, 1, 0)
    assert content_of("image", turned) == array  # the same numbers, wherever they lie


def test_what_is_large_is_not_read() -> None:
    """Of a tensor as large as this there is one number."""
    for large in (np.broadcast_to(np.uint8(1), (9000, 9000)), torch.zeros(1, dtype=torch.uint8).expand(9000, 9000)):
        assert content_of("image", large) is None
