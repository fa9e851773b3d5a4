"""`python -m lmdserve` and the console command `lmdserve`."""

import sys

from lmdserve.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
