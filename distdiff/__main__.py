"""``python -m distdiff``: the command line."""

from distdiff.cli import main

if __name__ == "__main__":
    main()
