"""A folder in, committed shards out. Knows what runs samples only through `Engine`."""

from mmpipe.jobs.job import Engine, JobSettings, Summary, run_job
from mmpipe.jobs.progress import Progress

__all__ = ["Engine", "JobSettings", "Progress", "Summary", "run_job"]
