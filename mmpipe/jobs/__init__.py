"""A folder in, committed shards out.

    job.py       the loop: knows what runs samples only through `Engine`
    output.py    who may write into the output folder     shards.py   predictions → Parquet
    tally.py     what a run adds up to                    terminal.py, report.py   telling it to people
    progress.py  telling it while it runs

Nothing is imported here: listing and showing need no torch.
"""
