"""`python -m veritune`."""

from .cli import main

if __name__ == "__main__":  # a sweep's workers import this file too
    main()
