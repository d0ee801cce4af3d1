"""Attention to remembered tokens against the definition, a head before all rows included."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from trace_hydra.models import remembered

MODULE: Any = SimpleNamespace(layer_idx=1)


def inputs(rows=3, tokens=2, columns=7, head=5):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        query, key, value = (torch.randn(rows, heads, count, 8) for heads, count in
                             ((4, tokens), (2, columns), (2, columns)))  # fmt: skip
        states = [(torch.randn(1, 2, head, 8), torch.randn(1, 2, head, 8)) for _ in range(2)]
    seen = torch.tensor([[2, 3], [5, 6], [0, 1]])[:rows]
    return query, key, value, (torch.arange(columns) <= seen[..., None])[:, None], states


def expected(query, key, value, mask, states, scaling):
    """Each token of each head by itself."""
    result = torch.zeros(query.shape[0], query.shape[2], query.shape[1], 8)
    for row in range(query.shape[0]):
        for head in range(4):
            keys = torch.cat([one[0][0, head // 2] for one in states] + [key[row, head // 2]])
            values = torch.cat([one[1][0, head // 2] for one in states] + [value[row, head // 2]])
            for token in range(query.shape[2]):
                seen = torch.cat([torch.ones(len(keys) - mask.shape[-1], dtype=torch.bool), mask[row, 0, token]])
                weights = torch.softmax(keys[seen] @ query[row, head, token] * scaling, 0)
                result[row, token, head] = weights @ values[seen]
    return result


@pytest.mark.parametrize("scores", [2**24, 1], ids=["at once", "row by row"])
@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("with_head", [False, True])
def test_attention_by_definition(with_head, scaling, scores):
    query, key, value, mask, states = inputs()
    head = remembered.behind(states if with_head else ())
    with torch.inference_mode(), patch.object(remembered, "_SCORES", scores), head:
        found = remembered.attend(MODULE, query, key, value, mask, scaling, {})
    before = states[1:] if with_head else []
    assert found is not None
    assert torch.allclose(found, expected(query, key, value, mask, before, scaling or 8**-0.5), atol=1e-5)


def test_what_is_left_to_others():
    """A pass that trains, one without our mask, one over its own tokens only."""
    query, key, value, mask, _ = inputs()
    assert remembered.attend(MODULE, query, key, value, mask, None, {}) is None
    with torch.inference_mode():
        assert remembered.attend(MODULE, query, key, value, None, None, {}) is None
        assert remembered.attend(MODULE, query, key, value, mask.float(), None, {}) is None
        assert remembered.attend(MODULE, query, key, value, mask, None, {"position_bias": mask}) is None
        assert remembered.attend(MODULE, query, key[:, :, :2], value[:, :, :2], mask[..., :2], None, {}) is None


def test_the_head_is_gone_afterwards():
    query, key, value, mask, states = inputs()
    with torch.inference_mode():
        with pytest.raises(ZeroDivisionError), remembered.behind(states):
            raise ZeroDivisionError
        found = remembered.attend(MODULE, query, key, value, mask, None, {})
    assert found is not None and torch.allclose(found, expected(query, key, value, mask, [], 8**-0.5), atol=1e-5)
