"""What a person reads on the terminal when a job is done, or when a folder is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mmpipe.types import Prediction, Sample

if TYPE_CHECKING:
    from mmpipe.jobs.job import Summary
    from mmpipe.jobs.tally import Shown, Step
    from mmpipe.media import Listing

_FAILURES = 8  # lines; the report has more
_UNMATCHED = 200  # lines of `check`
_ITEMS = 5  # that `check` shows

_TITLES = {
    "first": "The first look was enough",
    "decided": "A second modality decided",
    "settled": "They disagreed, and the last one settled it",
}


def show_summary(summary: Summary, *, packaged: str | None = None, console: Console | None = None) -> None:
    """Where samples left, three stories from the run's own trace, what failed and why, where the results are."""
    out = console or Console(highlight=False, soft_wrap=False)
    tally, run = summary.tally, summary.run
    out.print(_exits_table(summary))
    for kind in _TITLES:
        if kind in tally.stories:
            out.print(_story(kind, tally.stories[kind].shown))
    if tally.failures:
        out.print(_failures(tally.failures, tally.status["failed"], tally.status["partial"]))
    seconds = run["seconds"]
    out.print(
        Text.assemble(
            f"{run['rows']:,} items in {seconds['total']:.1f} s ({run['items_per_second']:.1f} a second), "
            f"after {seconds['fuse']:.1f} s of loading\n",
            ("predictions  ", "bold"),
            f"{summary.folder / 'predictions'}\n",
            ("report       ", "bold"),
            f"{summary.folder / 'report.html'}",
        )
    )
    if packaged == "quickstart":
        out.print(
            Text.assemble(
                "\nThese are demo models, trained for ten kinds of product. For your own media:\n",
                ("  mmpipe init FOLDER", "bold"),
                "        writes a configuration for a folder as it is\n",
                ("  mmpipe pull clip_clap", "bold"),
                "     fetches general models (CLIP, MiniLM, CLAP)\n",
                ("  mmpipe run clip_clap --input FOLDER", "bold"),
            )
        )


def _exits_table(summary: Summary) -> Table:
    """One row per exit: how many left there, and how many files were opened for it."""
    tally = summary.tally
    table = Table(box=box.SIMPLE_HEAD, title="Where samples were answered", title_justify="left", title_style="bold")
    for name, justify in (("answered by", "left"), ("samples", "right"), ("share", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in tally.exits:
        count = tally.answered_by[name]
        share = count / tally.rows if tally.rows else 0.0
        table.add_row(name, f"{count:,}", f"{share:.0%}", "█" * round(share * 30))
    failed = tally.status["failed"]
    if failed:
        table.add_row("failed", f"{failed:,}", f"{failed / tally.rows:.0%}", "", style="red")
    opened = [
        f"{tally.files_opened[name]:,} of {tally.present[name]:,} {name}"
        for name in tally.modalities
        if tally.present[name]
    ]
    table.caption = "opened: " + ", ".join(opened)
    table.caption_justify = "left"
    return table


def _story(kind: str, shown: Shown) -> Panel:
    prediction = shown.prediction
    lines: list[Text] = []
    title = shown.sample.media.get("text")
    if "text" in prediction.used and isinstance(title, str):
        lines.append(Text(f"“{title[:100]}”", style="italic"))
    for step, following in zip(shown.steps, [*shown.steps[1:], None], strict=True):
        lines.append(_step(step, following is None))
    if prediction.skipped:
        lines.append(Text(f"never opened: {', '.join(prediction.skipped)}", style="dim"))
    return Panel(
        Group(*lines),
        title=Text(f"{_TITLES[kind]}: {shown.sample.id}"),
        title_align="left",
        box=box.ROUNDED,
        expand=False,
        padding=(0, 1),
    )


def _step(step: Step, last: bool) -> Text:
    bar = "█" * round(step.confidence * 20)
    return Text.assemble(
        (f"{' + '.join(step.opened):<22}", "cyan"),
        f"{step.label:<14}",
        (f"{bar:<20}", "green" if last else "yellow"),
        f" {step.confidence:.2f}  ",
        ("sure: answered" if last else "not sure enough, look further", "bold" if last else "dim"),
    )


def _failures(rows: Sequence[Prediction], failed: int, partial: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{failed} failed, {partial} answered without a broken part",
        title_justify="left",
        title_style="bold red" if failed else "bold yellow",
    )
    for name in ("item", "status", "reason"):
        table.add_column(name, overflow="fold")
    for row in rows[:_FAILURES]:
        table.add_row(Text(row.id), row.status, Text(row.error or ""))
    if len(rows) > _FAILURES:
        table.caption = f"and {failed + partial - _FAILURES} more, in the report"
    return table


def show_listing(listing: Listing, modalities: Sequence[str], console: Console | None = None) -> None:
    """How a folder pairs up: counts, five items, every file that belongs to none."""
    out = console or Console(highlight=False)
    total = len(listing.samples)
    counts = ", ".join(f"{listing.counts.get(modality, 0):,} with {modality}" for modality in modalities)
    out.print(f"{total:,} items: {counts}", markup=False)
    for combination, count in sorted(listing.combinations.items(), key=lambda item: -item[1]):
        out.print(f"  {count:>9,}  {combination or 'nothing at all'}", markup=False)
    table = Table(box=box.SIMPLE_HEAD, title=f"the first {min(_ITEMS, total)}", title_justify="left")
    for name in ("id", *modalities):
        table.add_column(name, overflow="fold")
    for position in range(min(_ITEMS, total)):
        sample = listing.samples[position]
        table.add_row(Text(sample.id), *(Text(_cell(sample, modality)) for modality in modalities))
    out.print(table)
    if listing.unmatched:
        out.print(f"{len(listing.unmatched):,} files belong to no item:", markup=False)
        for path, reason in listing.unmatched[:_UNMATCHED]:
            out.print(f"  {path}: {reason}", markup=False)
        if len(listing.unmatched) > _UNMATCHED:
            out.print(f"  and {len(listing.unmatched) - _UNMATCHED:,} more")
    else:
        out.print("every file belongs to an item")


def _cell(sample: Sample, modality: str) -> str:
    value = sample.media.get(modality)
    if value is None:
        return "—"
    return f"“{value[:60]}”" if isinstance(value, str) else value.name
