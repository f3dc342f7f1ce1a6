"""The functions of the compiled library: name -> (result, arguments). A test compares them with the C source."""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["ABI", "SIGNATURES"]

ABI = 1
"""Equals what `moestro_abi` in probe.c returns; both change when a function's arguments change."""

_POINTER = ctypes.c_void_p  # tensor.data_ptr(), or None
_SIZE = ctypes.c_int64
_INT = ctypes.c_int  # flags, threads
_FLOAT = ctypes.c_float
_DOUBLE = ctypes.c_double

SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "moestro_abi": (_INT, ()),
    "moestro_threads": (_INT, (_INT,)),
    "moestro_linears": (
        None,
        (_POINTER, _SIZE, _SIZE, *(_POINTER, _POINTER, _POINTER, _SIZE) * 3, _INT),
    ),
    "moestro_rms_norm": (None, (_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, _FLOAT)),
    "moestro_attend_one": (
        None,
        (
            *(_POINTER,) * 6,
            *(_SIZE,) * 7,
            *(_POINTER, _POINTER, _FLOAT),
            *(_POINTER, _SIZE, _FLOAT, _SIZE, _INT),
            *(_FLOAT, _POINTER, _INT),
        ),
    ),
    "moestro_few_f32": (_INT, (*(_POINTER,) * 6, *(_SIZE,) * 5, *(_INT,) * 3)),
    "moestro_read": (_DOUBLE, (_POINTER, _POINTER, _SIZE, _INT)),
    "moestro_packed_few": (_INT, (_INT, *(_POINTER,) * 8, *(_SIZE,) * 5, *(_INT,) * 3)),
    "moestro_packed_product": (_INT, (_INT, *(_POINTER,) * 4, *(_SIZE,) * 3, _INT)),
    "moestro_unpack": (_INT, (_INT, *(_POINTER,) * 3, *(_SIZE,) * 2, _INT)),
    "moestro_route": (_INT, (*(_POINTER,) * 7, *(_SIZE,) * 4, _INT, _INT, _FLOAT)),
    "moestro_ordered": (None, (_POINTER, _POINTER, _POINTER, _INT, _SIZE, _SIZE, _SIZE, _POINTER, _INT)),
    "moestro_ordered_scratch": (_SIZE, (_SIZE,)),
    "moestro_grouped_sizes": (None, (*(_SIZE,) * 4, _POINTER)),
    "moestro_grouped": (
        None,
        (*(_POINTER,) * 3, _INT, *(_POINTER,) * 2, *(_SIZE,) * 3, _POINTER, _SIZE, _POINTER, _INT),
    ),
    "moestro_grouped_outer": (None, (*(_POINTER,) * 4, *(_SIZE,) * 3, _POINTER, _SIZE, _POINTER, _INT)),
    "moestro_experts_problem": (_SIZE, ()),
    "moestro_experts_sizes": (None, (_POINTER, _INT, _POINTER)),
    "moestro_experts_forward": (None, (_POINTER,)),
    "moestro_experts_backward": (None, (_POINTER,)),
}
