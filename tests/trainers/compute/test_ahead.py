"""Items made ahead: their order, how many, and when an error comes."""

import threading

import pytest

from trainers.compute.ahead import one_ahead


def test_one_item_is_made_while_another_is_used():
    made, second_is_made = [], threading.Event()

    def items():
        for number in range(4):
            made.append(number)
            if number == 1:
                second_is_made.set()
            yield number

    for number in one_ahead(items()):
        if number == 0:
            assert second_is_made.wait(30)
        assert len(made) <= number + 2
    assert made == [0, 1, 2, 3]
    assert list(one_ahead(iter([]))) == []


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield "first"
        raise ValueError("the second is broken")

    used = []
    with pytest.raises(ValueError, match="the second is broken"):
        for item in one_ahead(items()):
            used.append(item)
    assert used == ["first"]
