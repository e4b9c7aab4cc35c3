"""Pooling of token states against a naive loop, and its precision."""

import pytest
import torch

from modeling_proclip.pooling import pool_tokens


def naive_pooling(states: torch.Tensor, mask: torch.Tensor, marked: torch.Tensor | None, pooling: str) -> torch.Tensor:
    rows = []
    for i in range(len(states)):
        tokens = [j for j in range(states.shape[1]) if mask[i, j]]
        pooled = [j for j in tokens if marked is None or marked[i, j]] or tokens
        if pooling == "bos_token":
            rows.append(states[i, tokens[0]])
        elif pooling in ("last_token", "eos_token"):
            rows.append(states[i, tokens[-1]])
        else:
            weights = [1.0 if pooling == "mean" else rank for rank in range(1, len(pooled) + 1)]
            total = sum(w * states[i, j] for w, j in zip(weights, pooled, strict=True))
            rows.append(total / sum(weights))
    return torch.stack(rows)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last_token", "eos_token", "bos_token"])
def test_pooling_against_a_naive_loop(pooling, side):
    torch.manual_seed(0)
    states = torch.randn(4, 6, 3, requires_grad=True)
    lengths = torch.tensor([6, 4, 1, 3])
    positions = torch.arange(6).expand(4, 6)
    mask = (positions >= 6 - lengths[:, None] if side == "left" else positions < lengths[:, None]).long()
    marked = mask * (torch.rand(4, 6) > 0.5)
    marked[3] = 0  # nothing marked in a row
    for token_type_ids in (None, marked):
        expected = naive_pooling(states, mask, token_type_ids, pooling)
        actual = pool_tokens(states, mask, token_type_ids, pooling)
        torch.testing.assert_close(actual, expected)
        (expected_gradient,) = torch.autograd.grad(expected.square().sum(), states)
        (gradient,) = torch.autograd.grad(actual.square().sum(), states)
        torch.testing.assert_close(gradient, expected_gradient)


def test_pooling_sums_in_float32():
    """256 + 1 is 256 in bfloat16: a running sum in it would stop there."""
    states = torch.ones(1, 1000, 2, dtype=torch.bfloat16)
    for pooling in ("mean", "weighted_mean"):
        pooled = pool_tokens(states, torch.ones(1, 1000), None, pooling)
        assert pooled.dtype == torch.bfloat16 and torch.equal(pooled, torch.ones(1, 2, dtype=torch.bfloat16))
