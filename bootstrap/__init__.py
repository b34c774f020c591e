"""The Nydus image format, RAFS v5 and v6: reading, checking, building and merging. No network, no mounts."""

import os

# numpy's linear algebra is not used; its threads would cost every process 40 ms of processor time at the first import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
