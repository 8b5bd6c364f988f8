from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.base.errors import FieldError, InputError, UnknownNameError
from planner.gpus.catalog import gpu_catalog
from planner.gpus.parse import (
    REFERENCE_CARDS,
    UnsupportedHardwareError,
    accepted_sizes,
    parse_gpu,
)


@pytest.mark.parametrize("text", ["16GB", "16 GB", "16gb", "16G", "16GiB", " 16gb ", "16.0GB"])
def test_a_plain_size_stands_for_a_named_card(text: str) -> None:
    request = parse_gpu(text)
    assert (request.gpus.id, request.count, request.reference) == ("rtx-5060-ti-16gb", 1, True)
    assert request.text == text


@pytest.mark.parametrize("size", REFERENCE_CARDS)
def test_a_reference_card_leaves_less_than_the_size_it_stands_for(size: int) -> None:
    card = parse_gpu(f"{size}GB").gpus
    assert 0.9 * size * 2**30 < card.memory_bytes <= 1.02 * size * 2**30
    assert card.usable_bytes < size * 2**30


@pytest.mark.parametrize(
    ("text", "id_", "count"),
    [
        ("rtx-4090", "rtx-4090", 1),
        ("RTX 4090", "rtx-4090", 1),
        ("rtx_4090", "rtx-4090", 1),
        ("4090", "rtx-4090", 1),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", 1),
        ("h100", "h100-80gb", 1),
        ("NVIDIA H100 80GB HBM3", "h100-80gb", 1),
        ("Tesla T4", "t4", 1),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", 1),
        ("2x24GB", "rtx-3090", 2),
        ("2x4090", "rtx-4090", 2),
        ("4xh100", "h100-80gb", 4),
        ("8 x a100-80gb", "a100-80gb", 8),
    ],
)
def test_names_and_counts(text: str, id_: str, count: int) -> None:
    request = parse_gpu(text)
    assert (request.gpus.id, request.count) == (id_, count)
    assert request.reference == ("24GB" in text)


@pytest.mark.parametrize(
    ("text", "id_", "others"),
    [
        ("a100", "a100-40gb", ("a100-80gb",)),
        ("5060ti", "rtx-5060-ti-8gb", ("rtx-5060-ti-16gb",)),
        ("v100", "v100-16gb", ("v100-32gb",)),
        ("4090", "rtx-4090", ()),
    ],
)
def test_a_name_of_two_sizes_means_the_smaller_and_names_the_other(
    text: str, id_: str, others: tuple[str, ...]
) -> None:
    request = parse_gpu(text)
    assert (request.gpus.id, request.alternatives) == (id_, others)


@pytest.mark.parametrize(
    "text", ["17GB", "0GB", "-5GB", "nanGB", "infGB", "1e9GB", "1e400GB", "15.5GB", "16.5 GiB"]
)
def test_a_size_without_a_card_lists_the_sizes_that_have_one(text: str) -> None:
    with pytest.raises(FieldError) as caught:
        parse_gpu(text)
    assert accepted_sizes() in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "16", "16GB16GB", "x24GB", "0x24GB", "2x", "20000x4090", "9" * 5000 + "x4090"),
        *("16TB", "4090x2", "24\nGB", "a" * 500, "2x2x24GB", "16384MB"),
    ],
)
def test_malformed_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(FieldError) as caught:
        parse_gpu(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "vendor"),
    [
        ("rx 7900", "AMD"),
        ("RX 7900 XTX", "AMD"),
        ("mi300x", "AMD"),
        ("Radeon Pro W7900", "AMD"),
        ("m1", "Apple"),
        ("M4 Max", "Apple"),
        ("mps", "Apple"),
        ("arc", "Intel"),
        ("Intel Arc A770", "Intel"),
        ("a770", "Intel"),
        ("cpu", "CPU"),
        ("tpu", "Google"),
        ("v5e", "Google"),
        ("2x mi250", "AMD"),
    ],
)
def test_other_vendors_are_named_and_refused(text: str, vendor: str) -> None:
    with pytest.raises(UnsupportedHardwareError, match=f"{vendor}.*NVIDIA"):
        parse_gpu(text)


def test_no_card_of_the_catalog_is_taken_for_another_vendors() -> None:
    for gpu in gpu_catalog():
        for name in (gpu.id, gpu.name, *gpu.aliases):
            assert gpu in (parse_gpu(name).gpus, *map(gpu_catalog().get, parse_gpu(name).alternatives))


@pytest.mark.parametrize(
    ("text", "suggested"), [("rtx-4900", "rtx-4090"), ("h10", "h100"), ("rtx4091", "rtx-4090")]
)
def test_a_typo_gets_a_suggestion(text: str, suggested: str) -> None:
    with pytest.raises(UnknownNameError, match=suggested):
        parse_gpu(text)


@settings(deadline=None)
@given(st.text(max_size=30) | st.from_regex(r"[0-9x]{0,4}[0-9.e+-]{0,6} ?(gb|g|GiB)?", fullmatch=True))
def test_any_text_gives_a_request_or_one_line(text: str) -> None:
    message = ""
    try:
        request = parse_gpu(text)
    except InputError as error:
        message = str(error)
    else:
        assert request.count >= 1
        assert request.gpus in tuple(gpu_catalog())
    assert not message or message.isprintable()
