"""Batches under a token budget, in order; what waits is embedded before the thread ends."""

import threading

import pytest
import torch

from trainers.serve.batching import Batcher, Item, Overloaded


class SlowModel:
    """Waits to be released before every batch, and keeps the batches."""

    def __init__(self):
        self.batches, self.released, self.started = [], threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, contents):
        self.batches.append(list(contents))
        self.started.release()
        assert self.released.acquire(timeout=30)
        return torch.tensor([[float(content)] for content in contents])


def items(*contents, tokens=10):
    return [Item(content, tokens) for content in contents]


def release(model, batcher, count=10):
    for _ in range(count):
        model.released.release()
    batcher.close()


def test_what_waits_shares_batches_under_the_budget():
    model = SlowModel()
    batcher = Batcher(model, token_budget=30, max_waiting=1000)
    first, *others = [items(1), items(2, 3), items(4), [Item(5, 99)], items(6)]
    batcher.submit(first)
    assert model.started.acquire(timeout=30)  # the model computes; what comes now waits
    for request in others:
        batcher.submit(request)
    assert batcher.waiting == 5
    release(model, batcher)
    assert model.batches == [[1], [2, 3, 4], [5], [6]]  # 5 costs more than the budget: a batch by itself
    results = [item.result.result(timeout=0).item() for request in [first, *others] for item in request]
    assert results == [1, 2, 3, 4, 5, 6] and not batcher.alive


def test_a_request_that_would_wait_behind_too_much_is_turned_away_whole():
    model = SlowModel()
    batcher = Batcher(model, token_budget=10, max_waiting=30)
    batcher.submit(items(1))
    assert model.started.acquire(timeout=30)
    batcher.submit(items(*range(10)))  # nothing waited: it is taken whatever its size
    with pytest.raises(Overloaded):
        batcher.submit(items(11))
    release(model, batcher, 20)
    assert [content for batch in model.batches for content in batch] == [1, *range(10)]


def test_an_error_of_the_model_goes_to_whoever_asked_and_the_next_batch_is_computed():
    calls = []

    def embed(contents):
        calls.append(contents)
        if contents == ["bad"]:
            raise RuntimeError("out of memory")
        return torch.zeros(len(contents), 2)

    batcher = Batcher(embed, token_budget=1, max_waiting=100)
    bad, good = Item("bad", 1), Item("good", 1)
    batcher.submit([bad, good])
    batcher.close()
    assert isinstance(bad.result.exception(timeout=0), RuntimeError) and good.result.result(timeout=0).shape == (2,)
