"""Keys that query heads share reach torch's sdpa as a kernel of the card takes them."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations import sdpa_attention

from launcher.training.build import repeat_shared_keys


class FourHeadsOnTwo(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


@pytest.mark.parametrize(
    ("capability", "dtype", "repeated"),
    [
        ((7, 5), "float16", True),
        ((7, 0), "float16", True),
        ((8, 6), "float16", False),
        ((9, 0), "bfloat16", False),
    ],
)
def test_keys_are_repeated_where_no_kernel_would_take_them_shared(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str, repeated: bool
) -> None:
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    seen: list[tuple[int, bool]] = []
    whole = torch.nn.functional.scaled_dot_product_attention

    def looked_at(query: torch.Tensor, key: torch.Tensor, *rest: object, **knobs: object) -> torch.Tensor:
        seen.append((key.shape[1], bool(knobs.get("enable_gqa"))))
        return whole(query, key, *rest, **knobs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", looked_at)
    query, key, value = torch.randn(1, 4, 8, 16), *torch.randn(2, 1, 2, 8, 16)
    expected, _ = sdpa_attention.sdpa_attention_forward(FourHeadsOnTwo(), query, key, value, None)
    repeat_shared_keys(capability=capability, dtype=dtype)
    found, _ = sdpa_attention.sdpa_attention_forward(FourHeadsOnTwo(), query, key, value, None)
    assert seen == [(2, True), (4, False) if repeated else (2, True)]
    torch.testing.assert_close(found, expected)
