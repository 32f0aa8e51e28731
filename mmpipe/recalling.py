"""The cache of one pipeline: opened when it is first needed, asked under what its encoders are now."""

from __future__ import annotations

from mmpipe.build import Built
from mmpipe.cache import Form, Layers, Recall, opened
from mmpipe.config import Config
from mmpipe.fingerprints import forms
from mmpipe.graphs.plan import Plan
from mmpipe.media import Limits
from mmpipe.resolved import Kind
from mmpipe.runners import Runners
from mmpipe.runtime.executor import Executor


class Recalling:
    """Not safe for several threads: the pipeline's lock is."""

    def __init__(self, config: Config, built: Built, limits: Limits, runners: Runners) -> None:
        self.config, self.built, self.limits, self.runners = config, built, limits, runners
        self._store: Layers | None = None
        self._forms: dict[Kind, tuple[Plan, dict[str, Form]]] = {}

    def of(self, kind: Kind, executor: Executor) -> Recall | None:
        """For one run; without the encoders that somebody observes, who'd see nothing. None: nothing to ask."""
        plan = executor.plan
        observed = {plan.segment(name).branch for name in executor.watches}
        if {*plan.restores} <= observed:
            return None
        if self._store is None:
            self._store = opened(self.config.runtime.cache_limit)
        known = self._of_plan(kind, plan)
        return Recall(self._store, {name: form for name, form in known.items() if name not in observed})

    def _of_plan(self, kind: Kind, plan: Plan) -> dict[str, Form]:
        """Hashed once for each plan: an edited graph has another."""
        if kind not in self._forms or self._forms[kind][0] is not plan:
            resolved, modules = self.runners.resolved(kind), self.runners.cut.modules
            self._forms[kind] = plan, forms(self.built, resolved, plan, modules, self.limits)
            self.runners.give_back_weights(kind)
        return self._forms[kind][1]

    def close(self) -> None:
        """What is known stays on disk; using it afterwards opens it again."""
        if self._store is not None:
            self._store.close()
            self._store = None
