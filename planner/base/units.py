"""Units: widths of elements in bytes, and how many bytes a MiB has."""

from __future__ import annotations

FP32 = 4
"""Bytes of an element in fp32."""
INT64 = 8
"""Bytes of an index."""
DTYPE_WIDTH = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of an element by dtype."""

MIB = 2**20
