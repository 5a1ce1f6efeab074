"""`python -m horq_tvm` is `horq-tvm`."""

import sys

from horq_tvm.cli import main

if __name__ == "__main__":
    sys.exit(main())
