"""`python -m rayx` is `rayx`."""

from rayx.cli import main

if __name__ == "__main__":
    main()
