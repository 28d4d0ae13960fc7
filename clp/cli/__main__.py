"""`python -m clp.cli`."""

from clp.cli import main

main()
