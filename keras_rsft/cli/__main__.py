"""`python -m keras_rsft.cli`."""

import sys

from keras_rsft.cli import main

if __name__ == "__main__":
    sys.exit(main())
