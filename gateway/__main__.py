"""`python -m gateway` is the `outrider` command."""

from gateway.cli import main

main()
