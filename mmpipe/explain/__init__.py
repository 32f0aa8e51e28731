"""Why a pipeline is as fast as it is: one page of a real run.

page.py       the document: verdict, where the time went, segments; then the sections
sections.py   what it chose, what it could not do, what it holds
drawings.py   the run as a timeline, scratch as a memory map
"""
