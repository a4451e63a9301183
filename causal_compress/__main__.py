"""Lets `python -m causal_compress` be the command line."""

import sys

from causal_compress.cli import main

if __name__ == "__main__":
    sys.exit(main())
