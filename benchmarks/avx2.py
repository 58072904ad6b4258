"""Makes this process compute as one on a processor that has AVX2 and no more: no bfloat16, no AVX-512.

For measuring on a newer processor what people on older ones get. Memory and clock stay the newer one's.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_SETTINGS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
# FBGEMM's own name of a function that torch exports, and AVX2 in its list.
_FORCE, _AVX2 = "_ZN6fbgemm14fbgemmForceIsaENS_10inst_set_tE", 1


def pretend() -> None:
    """To be called before torch is imported."""
    os.environ.update(_SETTINGS)
    from tta_middleware.engines.torch_import import import_torch

    torch = import_torch()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    library[_FORCE](_AVX2)
    # What the engine asks torch about this processor.
    for asked in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        setattr(torch.cpu, asked, lambda: False)
