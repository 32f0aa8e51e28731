"""`python -m mmpipe`."""

from mmpipe.cli import main

main()
