"""``python -m lmcompress``: the command line."""

from lmcompress.cli import main

if __name__ == "__main__":
    main()
