"""What was certified, in sentences: for the terminal and for the report."""

from __future__ import annotations

from mmpipe.calibrating.certifying import Result
from mmpipe.jobs.markup import listed


def share(value: float) -> str:
    """0.01 → 1%; 0.0062 → 0.62%."""
    return f"{100 * value:.3g}%"


def verdict(result: Result) -> str:
    """The outcome in one sentence."""
    certified, count = result.certified, result.scores.count
    if result.calibration.promise is None:
        if certified.passed:
            at_best = float(certified.saving_K[: certified.passed].max())
            cost = f": the best of them takes {share(-at_best)} more time than none" if at_best < 0 else ""
            return f"The exits that can be certified with {count:,} items save nothing{cost}. They are left out."
        asked = f"at most {share(certified.max_disagreement)} disagreement with {share(certified.certainty)} certainty"
        more = (
            "the surest answers already differ too often, and more items would not help"
            if result.needed is None
            else f"about {max(result.needed, count + 1):,} are needed"
        )
        return f"No exit can be certified with {count:,} items ({asked}): {more}."
    early = sum(exit_.answered for exit_ in result.calibration.exits)
    return f"Exits that save {share(certified.saving)} of the time, and answer {share(early)} of the items early."


def promise(result: Result) -> str:
    """What a sceptic may rely on, and what not; "" where nothing was certified."""
    made = result.calibration.promise
    if made is None:
        return ""
    return (
        f"On {made.items_learn + made.items_test:,} items drawn at random from your data, the exits disagree with the "
        f"full pipeline on at most {share(made.max_disagreement)} of items, with {share(made.certainty)} certainty "
        "over the draw; it says nothing about whether the full pipeline is right, about one item or class, or about "
        "data that changed since."
    )


def accuracy(result: Result) -> str:
    """The loss of accuracy, where true labels were given."""
    loss = result.accuracy
    if loss is None:
        return ""
    return (
        f"Of {loss.items:,} test items with a true label, leaving early lost {loss.lost:,} and won {loss.won:,}. "
        f"Accuracy falls by at most {share(max(loss.bound, 0.0))} of items, with {share(loss.certainty)} certainty: a "
        "statement of its own, beside the promise."
    )


def second_look(result: Result) -> str:
    """Whether looking again pays, where that was tried."""
    tried = result.calibration.second_look
    return "" if tried is None else f"A second look: {tried.told()}."


def summary(result: Result) -> str:
    """A few lines for a terminal."""
    lines = [verdict(result)]
    calibration, certified = result.calibration, result.certified
    if result.scores.dropped:
        lines.append(f"{result.scores.dropped:,} more items could not be answered, and count nowhere.")
    if calibration.promise is not None:
        lines += ["", promise(result), ""]
        width = max(len(exit_.name) for exit_ in calibration.exits)
        for exit_ in calibration.exits:
            at = "nobody leaves" if exit_.threshold is None else f"threshold {exit_.threshold:.4f}"
            lines.append(
                f"  {exit_.name:<{width}}  {at}, temperature {exit_.temperature:.2f}, answers {share(exit_.answered)}"
            )
        tested = len(certified.split.test)
        lines.append(
            f"\nOn the {tested:,} items it was tested on, {share(certified.observed)} of the answers differed."
        )
    lines += [told for told in (accuracy(result), second_look(result)) if told]
    return "\n".join(lines)


def left(result: Result) -> str:
    """Where the test samples would leave, in a sentence."""
    told = [f"{one.left:,} at {one.name}" for one in result.exits if one.left]
    return listed(told) if told else "none early"
