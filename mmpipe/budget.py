"""What a plan takes of memory, and the largest that `memory_limit` allows; the rest is refused with figures."""

from __future__ import annotations

from dataclasses import replace

from mmpipe.config import Config
from mmpipe.graphs import cost
from mmpipe.graphs.cut import Cut
from mmpipe.resolved import Resolved, placed
from mmpipe.runtime.pool import PoolSizes
from mmpipe.workers import OWN_BYTES

_SMALLER = (32, 16, 8, 4, 1)
_SLOTS = 64  # how finely slots are counted
_DECODING = 1 << 30  # bytes at most for media while they are decoded; less where memory_limit is small


class Budget:
    """What a plan takes of memory, and the largest that `memory_limit` allows."""

    def __init__(self, config: Config, made: Cut, weights: int) -> None:
        self.config, self.made, self.weights = config, made, weights

    def needs(self, resolved: Resolved) -> dict[str, int]:
        """Bytes by what they are for."""
        plan = placed(self.made.plan, resolved)
        sizes = PoolSizes(plan)
        streams: dict[str, int] = {}
        for stage_plan in plan.stage_plans:
            for step in stage_plan.steps:
                if step.does == "run":
                    inside = cost.workspace_bytes(self.made.modules[step.segment], stage_plan.rows)
                    streams[step.stream] = max(streams.get(step.stream, 0), inside)
        count = resolved.processes
        own = {} if count == 1 else {"processes": count * OWN_BYTES}
        return {
            "weights": self.weights,  # forked processes have them without a copy
            "slots": count * sizes.slots,
            "media": count * sizes.media,
            "scratch": count * sizes.lanes * sizes.scratch,
            "host": count * sizes.lanes * sizes.host,
            "workspaces": count * sum(streams.values()) * (plan.lanes if plan.own_streams else 1),
            **own,
            "decoding": decoding_bytes(resolved.memory_limit),
        }

    def largest(self, wanted: Resolved, *, shrink: bool, batches: bool) -> Resolved:
        """`wanted` with the most rows that fit (where they may be fewer), then lanes, then slots up to a shard's."""
        smaller = [count for count in _SMALLER if shrink and count < wanted.batch_size]
        shard, least, reasons = self.config.output.shard_rows, {"": 0}, dict(wanted.reasons)
        limit = wanted.memory_limit
        for count in (wanted.batch_size, *smaller):
            for lanes in dict.fromkeys((wanted.lanes, 1)):
                fewest = count * lanes
                tried = replace(wanted, batch_size=count, lanes=lanes, slots=fewest)
                least = self.needs(tried)
                if sum(least.values()) > limit:
                    continue
                more = self.needs(replace(tried, slots=fewest + _SLOTS))
                step = sum(more.values()) - sum(least.values())
                room = fewest + (limit - sum(least.values())) // step * _SLOTS if step > 0 else shard
                slots = max(fewest, min(shard, room)) if batches else fewest
                if count < wanted.batch_size:
                    reasons["batch_size"] = f"{wanted.batch_size} rows do not fit runtime.memory_limit ({shown(limit)})"
                if lanes < wanted.lanes:
                    reasons["lanes"] = "more do not fit runtime.memory_limit"
                fitting = replace(tried, slots=slots, reasons=reasons)
                return replace(fitting, memory=self.needs(fitting))
        parts = ", ".join(f"{name} {shown(value)}" for name, value in least.items())
        needed = f"{count} {'row' if count == 1 else 'rows'} a bucket need {shown(sum(least.values()))} ({parts})"
        raise self.config.error(
            "runtime.memory_limit",
            f"{shown(limit)} are not enough: {needed}",
            f"give more, or a smaller runtime.batch_size, or smaller models{_elsewhere(wanted)}",
        )


def _elsewhere(wanted: Resolved) -> str:
    return "" if wanted.device == "cpu" else ", or runtime.device: cpu"


def decoding_bytes(limit: int) -> int:
    """What media may take while they are decoded, of `memory_limit`."""
    return min(_DECODING, limit // 4)


def shown(size: int) -> str:
    """Bytes for people: 1.3 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
