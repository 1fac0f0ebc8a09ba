"""For all tests: where there is no NVIDIA card, Triton's kernels run in its interpreter, on the CPU."""

import os
from pathlib import Path

# Triton reads it once, when it is imported first; torch and transformers import it on their own.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
