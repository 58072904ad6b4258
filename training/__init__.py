"""Builds the artifacts of the embedded moderator and of its independent judge from labelled data."""

import os

# Threaded sums differ in their last bits from run to run; a rebuild must not. Read when numpy is first imported.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
