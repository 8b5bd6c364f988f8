"""Units: widths of elements in bytes, and how many bytes a MiB has."""

from __future__ import annotations

FP32 = 4
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

MIB = 2**20
