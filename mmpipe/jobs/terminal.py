"""What a person reads on the terminal when a job is done, or when a folder is checked.

Everything fits 80 columns. Text of users (ids, labels, titles, file names) goes through `visible`, and never through
rich's markup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NoReturn

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mmpipe import media
from mmpipe.errors import MediaError
from mmpipe.jobs.progress import visible
from mmpipe.types import Prediction, Sample

if TYPE_CHECKING:
    from mmpipe.jobs.job import Summary
    from mmpipe.jobs.tally import Shown, Step

_FAILURES = 8  # lines; the report has more
_OTHERS = 50  # files that are neither media nor hidden: lines of `check`
_HIDDEN = 5  # hidden files: lines of `check`
_ITEMS = 5  # that `check` shows
_TITLE_CHARACTERS = 400  # of a text, before it is cut to the line
_NARROW = 62  # columns of a story's line without its bar, borders included

_TITLES = {
    "first": "The first look was enough",
    "decided": "A second modality decided",
    "settled": "They disagreed, and the last one settled it",
}


class Output(Console):
    """Standard output: plain where it is no terminal; a reader that goes away is the caller's BrokenPipeError."""

    def __init__(self, file: IO[str] | None = None, width: int | None = None) -> None:
        super().__init__(file=file, width=width, highlight=False, markup=False, emoji=False)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def show_summary(summary: Summary, *, packaged: str | None = None, console: Output | None = None) -> None:
    """Where samples left, three stories from the run's own trace, what failed and why, where the results are."""
    out = console or Output()
    tally, run = summary.tally, summary.run
    out.print(_exits_table(summary))
    out.print(_opened(summary) + "\n")
    for kind in _TITLES:
        if kind in tally.stories:
            out.print(_story(kind, tally.stories[kind].shown, summary.limits, min(out.width, 80)))
    for told in _checks(run):
        out.print(told + "\n")
    if tally.failures:
        out.print(_failures(tally.failures, tally.status["failed"], tally.status["partial"]))
    seconds = run["seconds"]
    out.print(
        f"{run['rows']:,} items in {seconds['total']:.1f} s ({run['items_per_second']:.1f} a second), "
        f"after {seconds['fuse']:.1f} s of loading"
    )
    for name, path in (("predictions", "predictions"), ("report", "report.html")):
        line = Text.assemble((f"{name:<13}", "bold"), visible(str(summary.folder / path)))
        out.print(line, soft_wrap=True)  # a path that is cut in two can't be copied
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
    return table


def _opened(summary: Summary) -> str:
    tally = summary.tally
    opened = [
        f"{tally.files_opened[name]:,} of {tally.present[name]:,} {name}"
        for name in tally.modalities
        if tally.present[name]
    ]
    known = [f"{tally.recalled[name]:,} {name}" for name in tally.modalities if tally.recalled[name]]
    return "files opened: " + (", ".join(opened) or "none") + (f"; known: {', '.join(known)}" if known else "")


def _checks(run: Mapping[str, Any]) -> Iterator[str]:
    """What exits brought, what a second look changed, what the audit found; nothing where there was none."""
    exits, again, audit = run.get("exits"), run.get("deliberated") or {}, run.get("audit")
    if exits:
        yield exits["told"]
    if again.get("rows"):
        yield f"looked again at {again['rows']:,}: {again['changed']:,} got another label, {again['seconds']:.1f} s"
    if audit and audit["chosen"]:
        low, high = audit["interval"]
        broken = f", MORE THAN PROMISED ({audit['promised']:.2%})" if audit["broken"] else ""
        yield (
            f"audit: {audit['disagreements']:,} of {audit['chosen']:,} differ from the full pipeline: "
            f"{low:.2%} to {high:.2%} of all{broken}"
        )


def _story(kind: str, shown: Shown, limits: media.Limits, width: int) -> Panel:
    inner = width - 4  # borders and padding
    lines: list[Text] = []
    title = _title(shown, limits)
    if title:
        lines.append(_cut(f"“{title}”", inner, style="italic"))
    for step, following in zip(shown.steps, [*shown.steps[1:], None], strict=True):
        lines.append(_step(step, following is None, bar_columns=max(0, min(20, width - _NARROW))))
    if shown.prediction.skipped:
        lines.append(Text(f"never opened: {', '.join(shown.prediction.skipped)}", style="dim"))
    return Panel(
        Group(*lines),
        title=_cut(f"{_TITLES[kind]}: {visible(shown.sample.id)}", inner - 2),
        title_align="left",
        box=box.ROUNDED,
        expand=False,
        padding=(0, 1),
    )


def _title(shown: Shown, limits: media.Limits) -> str:
    """The sample's text, where the pipeline has read it; in one line."""
    if "text" not in shown.prediction.used:
        return ""
    try:
        text: str = media.load("text", shown.sample.media["text"], limits=limits)
    except MediaError:  # gone since
        return ""
    return visible(" ".join(text[:_TITLE_CHARACTERS].split()))


def _step(step: Step, last: bool, *, bar_columns: int) -> Text:
    line = _cut(" + ".join(step.opened), 21, pad=True, style="cyan")
    line.append_text(_cut(visible(step.label), 16, pad=True))
    line.append(f"{'█' * round(step.confidence * bar_columns):<{bar_columns}}", "green" if last else "yellow")
    line.append(f" {step.confidence:.3f} ")  # three digits: a threshold may lie between two that look alike
    line.append("answered" if last else "unsure: go on", "bold" if last else "dim")
    return line


def _cut(text: str, columns: int, *, pad: bool = False, style: str = "") -> Text:
    """Text of at most so many columns on the screen (an ideogram takes two), ending in … where it was longer."""
    cut = Text(text, style=style, no_wrap=True)
    cut.truncate(columns - pad, overflow="ellipsis")
    if pad:
        cut.pad_right(columns - cut.cell_len)
    return cut


def _failures(rows: Sequence[Prediction], failed: int, partial: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{failed:,} failed, {partial:,} answered without a broken part",
        title_justify="left",
        title_style="bold red" if failed else "bold yellow",
    )
    for name in ("item", "status", "reason"):
        table.add_column(name, overflow="fold")
    for row in rows[:_FAILURES]:
        table.add_row(visible(row.id), row.status, visible(row.error or ""))
    if failed + partial > _FAILURES:
        table.caption = f"and {failed + partial - _FAILURES:,} more, in the report"
        table.caption_justify = "left"
    return table


def show_listing(listing: media.Listing, modalities: Sequence[str], console: Output | None = None) -> None:
    """How a folder pairs up: counts, five items, every file that belongs to none."""
    out = console or Output()
    total = len(listing.samples)
    counts = ", ".join(f"{listing.counts.get(modality, 0):,} with {modality}" for modality in modalities)
    out.print(f"{total:,} {'item' if total == 1 else 'items'}: {counts}")
    for combination, count in sorted(listing.combinations.items(), key=lambda item: -item[1]):
        out.print(f"  {count:>9,}  {combination or 'nothing at all'}")
    table = Table(box=box.SIMPLE_HEAD, title=f"the first {min(_ITEMS, total)}", title_justify="left")
    for name in ("id", *modalities):
        table.add_column(name, overflow="fold")
    for position in range(min(_ITEMS, total)):
        sample = listing.samples[position]
        table.add_row(visible(sample.id), *(_cell(sample, modality) for modality in modalities))
    out.print(table)
    if not listing.unmatched:
        out.print("every file belongs to an item")
        return
    many = len(listing.unmatched)
    out.print("1 file belongs to no item:" if many == 1 else f"{many:,} files belong to no item:")
    for line in _unmatched(listing.unmatched, brief=out.is_terminal):
        out.print(f"  {line}", soft_wrap=True)


def _unmatched(files: Sequence[tuple[str, str]], *, brief: bool) -> list[str]:
    """A line for each file. `brief`: of many hidden ones, and of many that are no media, the first and then counts."""
    if not brief:
        return [f"{visible(path)}: {visible(reason)}" for path, reason in files]
    known = {suffix for suffixes in media.SUFFIXES.values() for suffix in suffixes}
    hidden = [path for path, reason in files if reason == "hidden"]
    others = [path for path, reason in files if reason != "hidden" and PurePosixPath(path).suffix.lower() not in known]
    shown = {*hidden[:_HIDDEN], *others[:_OTHERS]}
    counted = {*hidden[_HIDDEN:], *others[_OTHERS:]}
    lines = [f"{visible(path)}: {visible(reason)}" for path, reason in files if path in shown or path not in counted]
    kinds_left = False
    for rest, kind in ((hidden[_HIDDEN:], "hidden"), (others[_OTHERS:], "that are no media")):
        if rest:
            names = Counter(_kind(path, by_name=kind == "hidden") for path in rest).most_common(5)
            lines.append(
                f"and {len(rest):,} more {kind}: " + ", ".join(f"{count:,} {visible(name)}" for name, count in names)
            )
            kinds_left = True
    return [*lines, "all of them where this is no terminal: check … | less"] if kinds_left else lines


def _kind(path: str, *, by_name: bool) -> str:
    pure = PurePosixPath(path)
    return pure.name if by_name else pure.suffix.lower() or "without suffix"


def _cell(sample: Sample, modality: str) -> str:
    value = sample.media.get(modality)
    if value is None:
        return "—"
    return f"“{visible(value[:60])}”" if isinstance(value, str) else visible(Path(value).name)
