"""bfloat16 convolutions on Intel's AMX, by products of tiles.

They differ from Winograd's in this: subnormal inputs count as zero, and subnormal results become zero, as AMX's instructions
have it. Taps outside the map are products with zero, so an infinite or NaN weight, or gradient, at the edge of
a map gives NaN there, as it does wherever padding is written out.
"""

from __future__ import annotations

from functools import cache

from fastconv.backends.native_conv3x3 import Conv3x3
from fastconv.backends.native_library import library
from fastconv.backends.native_library import unavailable as library_unavailable

KERNELS = Conv3x3("amx")


@cache
def unavailable() -> str | None:
    """Why the kernels cannot run in this process; None where they can."""
    missing = library_unavailable()
    if missing is not None:
        return missing
    if not library().build_info()["amx"]:
        return "the compiled library has no AMX kernels: its compiler does not know AMX"
    return None if library().has_amx() else "this process has no AMX"
