"""A test for many things names all that fail (tests/each.py)."""

from __future__ import annotations

import pytest

from tests.each import for_each


def test_every_failure_is_named_and_none_passes_unseen() -> None:
    seen = []

    @for_each(["even", "odd", "more"], name=str.upper)
    def check(word: str) -> None:
        seen.append(word)
        assert len(word) == 4, "letters"

    with pytest.raises(pytest.fail.Exception, match=r"1 of 3 are wrong:\nODD: letters"):
        check()
    assert seen == ["even", "odd", "more"]


def test_an_error_says_at_which_thing_it_came() -> None:
    @for_each(lambda: [1, 0])
    def check(number: int) -> None:
        assert 1 / number

    with pytest.raises(ZeroDivisionError) as caught:
        check()
    assert caught.value.__notes__ == ["with 0"]


def test_nothing_to_check_is_a_failure() -> None:
    @for_each([])
    def check(thing: object) -> None:
        raise NotImplementedError

    with pytest.raises(AssertionError, match="nothing to check"):
        check()


@for_each([1, 2])
def test_fixtures_are_made_once_for_all(number: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert number < 3
    assert tmp_path_factory.getbasetemp().is_dir()
