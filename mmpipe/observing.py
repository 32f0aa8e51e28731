"""Observers: who looks at which place of the graph, and what they are handed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.fx import GraphModule

from mmpipe.errors import InputError
from mmpipe.graphs.cut import Cut
from mmpipe.graphs.fuse import FusedGraph
from mmpipe.graphs.plan import GraphError
from mmpipe.graphs.watch import find, with_outputs
from mmpipe.runtime.lanes import Watch


@dataclass(frozen=True)
class Observation:
    """What passed a place of the graph: `values[name]` [rows, …] belong to the samples `ids`, in this order."""

    where: str
    ids: Sequence[str]
    values: Mapping[str, Tensor]

    @property
    def tensor(self) -> Tensor:
        """The value of a place that has one: a layer, an embedding."""
        (only,) = self.values.values()
        return only


Observer = Callable[[Observation], None]


class Observers:
    """The open observations of a pipeline."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[str, Observer]] = {}
        self._numbers = itertools.count()

    def add(self, graph: FusedGraph, made: Cut, where: str, callback: Observer) -> int:
        """Returns what `remove` takes. InputError where the graph has no such place."""
        try:
            find(graph, made, where)
        except GraphError as error:
            raise InputError(str(error)) from error
        number = next(self._numbers)
        self._open[number] = where, callback
        return number

    def remove(self, number: int) -> None:
        del self._open[number]

    def any(self) -> bool:
        return bool(self._open)

    def watches(self, graph: FusedGraph, made: Cut) -> tuple[dict[str, Watch], Mapping[str, GraphModule]]:
        """(watches of segments, the segments' modules): those that somebody looks at return what is looked at."""
        places = {number: find(graph, made, where) for number, (where, _) in self._open.items()}
        watches, modules = {}, dict(made.modules)
        for name in dict.fromkeys(place.segment for found in places.values() for place in found):
            here = {number: [p for p in found if p.segment == name] for number, found in places.items()}
            extra = tuple(dict.fromkeys(p.node for found in here.values() for p in found if not p.written))
            if extra:
                modules[name] = with_outputs(made.modules[name], extra)
            wanted = {number: [p.node for p in found] for number, found in here.items() if found}
            watches[name] = Watch(extra, partial(self._tell, wanted))
        return watches, modules

    def _tell(self, wanted: Mapping[int, Sequence[str]], ids: Sequence[str], values: Mapping[str, Tensor]) -> None:
        for number, names in wanted.items():
            where, callback = self._open[number]
            copies = {name: values[name].detach().clone().cpu() for name in names}
            callback(Observation(where, ids, copies))
