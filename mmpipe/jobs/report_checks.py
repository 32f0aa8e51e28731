"""The report's sections on what was looked at twice: unsure samples (deliberation), early answers (audit).

Both are told from run.json, and are empty where there was neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmpipe.jobs.markup import count, percent, seconds, table, tag
from mmpipe.jobs.report_sections import section

if TYPE_CHECKING:
    from mmpipe.jobs.tally import Tally


def deliberation(tally: Tally, run: Mapping[str, Any]) -> str:
    """How many samples were looked at again, and what came of it."""
    again = run.get("deliberated") or {}
    if not again.get("rows"):
        return ""
    rows, changed = again["rows"], again["changed"]
    words = (
        f"The last stage was unsure of {count(rows, 'sample')}, {percent(rows, tally.rows)} of all, and looked again "
        f"with more input. {changed:,} of them got another label ({percent(changed, rows)}). It took "
        f"{seconds(again['seconds'])}. Where labels hardly change, a second look is not worth its time."
    )
    return section("deliberation", "Looked at again", tag("p", words))


def audit(run: Mapping[str, Any]) -> str:
    """How often early answers differ from the full pipeline's, and whether that is what was promised."""
    found = run.get("audit")
    if not found:
        return ""
    low, high = found["interval"]
    promised = found["promised"]
    rows = [
        ["samples chosen, of all answered ones", f"{found['chosen']:,}"],
        ["of those, had left early and were computed in full", f"{found['audited']:,}"],
        ["of those, differ from the full pipeline", f"{found['disagreements']:,}"],
        [f"share of all samples, {found['certainty']:.0%} certain", f"{low:.2%} to {high:.2%}"],
        ["promised by the calibration", "nothing" if promised is None else f"at most {promised:.2%}"],
    ]
    banner = ""
    if found["broken"]:
        then = "They were turned off." if found["exits_disabled"] else "Calibrate on data as they are now."
        words = f"The exits disagree with the full pipeline more often than was promised. {then}"
        banner = tag("p", words, cls="banner", role="status")
    intro = "The interval holds however often it is looked at, over the whole run at once."
    return section("audit", "Audit of the exits", banner + table(["what", "#figure"], rows), intro)
