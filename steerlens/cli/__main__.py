"""`python -m steerlens.cli`."""

from steerlens.cli import main

main()
