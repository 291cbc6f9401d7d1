"""Codebook usage and perplexity where the answer is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics.codebook import CodeUsage


def counted(n_codes, *batches):
    usage = CodeUsage(n_codes)
    for batch in batches:
        usage.update(batch)
    return usage


def test_known_answers():
    one = counted(8, torch.full((2, 3, 4), 5))
    assert one.usage() == 1 / 8
    assert one.perplexity() == pytest.approx(1)
    everything = counted(8, torch.arange(8).repeat(3))
    assert everything.usage() == 1
    assert everything.perplexity() == pytest.approx(8)
    half = counted(8, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    assert half.usage() == 0.5
    assert half.perplexity() == pytest.approx(4)


def test_the_whole_set_counts_not_the_mean_of_batches():
    usage = counted(4, torch.zeros(10, dtype=torch.int64), torch.ones(10, dtype=torch.int64))
    assert usage.perplexity() == pytest.approx(2)  # each batch alone has 1


def test_nothing_counted():
    assert CodeUsage(4).usage() == 0
    assert CodeUsage(4).perplexity() == 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=100), st.integers(0, 100))
def test_bounds_and_batches_do_not_matter(indices, cut):
    tensor = torch.tensor(indices)
    whole, parts = counted(16, tensor), counted(16, tensor[:cut], tensor[cut:])
    assert torch.equal(whole.counts, parts.counts)
    assert whole.usage() == len(set(indices)) / 16
    assert 1 - 1e-9 <= whole.perplexity() <= len(set(indices)) + 1e-9
