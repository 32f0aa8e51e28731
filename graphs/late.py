"""A graph module whose Python is written when somebody wants it.

torch.fx writes the source of a graph whenever a module is made of it, and compiles it. Most of ours are only read: cut
into segments, lowered, packed. Their sources were a twentieth of the time that three large encoders take to start.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx


class LateModule(fx.GraphModule):
    """Calls, `code` and printing see the graph as it was at the last `recompile()` or after, as they come first."""

    def recompile(self) -> Any:
        type(self).forward = _written_first  # each module has a class of its own

    def write(self) -> None:
        """What `recompile` left undone."""
        if type(self).forward is _written_first:
            super().recompile()

    @property
    def code(self) -> str:
        self.write()
        return super().code

    def __str__(self) -> str:
        self.write()
        return super().__str__()

    def __reduce__(self) -> Any:
        return fx.GraphModule(self, copy.deepcopy(self.graph), type(self).__name__).__reduce__()


def _written_first(self: LateModule, *args: Any, **kwargs: Any) -> Any:
    self.write()
    return self(*args, **kwargs)
