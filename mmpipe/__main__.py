"""`python -m mmpipe`."""

from mmpipe.cli import command

command()
