"""`python -m veritune`."""

from .cli import main

main()
