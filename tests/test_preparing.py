"""What a user's own `prepare` raises is a reason in a row, which travels."""

from __future__ import annotations

from typing import NoReturn

import pytest

from mmpipe.build import Preparation
from mmpipe.errors import MediaError
from mmpipe.media import Limits
from mmpipe.preparing import prepared


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (FileNotFoundError(2, "No such file", "/home/me/models/words.txt"), "[Errno 2] No such file: 'words.txt'"),
        (ValueError("see https://a.b/c/d, ./e/f and a/b/c"), "see https://a.b/c/d, ./e/f and a/b/c"),
        (ValueError("/srv/one/x.bin and /srv/two/y.bin"), "x.bin and y.bin"),
    ],
)
def test_errors_hold_no_absolute_path(raised: Exception, told: str) -> None:
    def prepare(medium: object) -> NoReturn:
        raise raised

    with pytest.raises(MediaError) as caught:
        prepared("text", "a text", Preparation("text", 1, prepare, None, {}, ()), Limits())
    assert (caught.value.code, caught.value.text) == ("unusable", f"{type(raised).__name__}: {told}")
