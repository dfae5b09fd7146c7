"""The dtype of the models under test, and tolerances that depend on it.

    QMD_TEST_DTYPE=bfloat16 bash tests/run.sh

runs the suite, and the commands that it starts, in bfloat16, the dtype of a Mac's GPU. The default is
float32 on every machine (conftest.py).
"""

import mlx.core as mx
import pytest

from expander.model import compute_dtype

BFLOAT16 = compute_dtype() == mx.bfloat16
# For results that are exact only without bfloat16's rounding, at any tolerance worth testing.
float32_only = pytest.mark.skipif(BFLOAT16, reason="exact in float32 only")


def tolerance(float32: float, bfloat16: float) -> float:
    """The bound of the dtype under test; bfloat16 keeps 8 bits, a relative error of 2^-9."""
    return bfloat16 if BFLOAT16 else float32
