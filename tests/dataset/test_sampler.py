"""The order of training samples: shared by ranks, found again after a kill (T10, T14)."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.sampler import ResumableSampler
from errors import ConfigurationError

batch_sizes = st.integers(1, 4)
worlds = st.integers(1, 4)


def joined(lists):
    return list(chain.from_iterable(lists))


def batches_of(sampler, epoch=None):
    if epoch is not None:
        sampler.set_epoch(epoch)
    keys = list(sampler)
    return [keys[i : i + sampler.batch_size] for i in range(0, len(keys), sampler.batch_size)]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), batch_sizes, worlds, st.integers(0, 5), st.integers(0, 3))
def test_ranks_of_b_see_what_one_process_of_r_times_b_sees(length, batch, world, seed, epoch):
    one = batches_of(ResumableSampler(length, batch * world, seed), epoch)
    ranks = [batches_of(ResumableSampler(length, batch, seed, rank, world), epoch) for rank in range(world)]
    assert one == [joined(parts) for parts in zip(*ranks, strict=True)]
    assert len(one) == length // (batch * world)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), batch_sizes, st.integers(0, 5))
def test_an_epoch_shows_each_sample_once(length, batch, seed):
    sampler = ResumableSampler(length, batch, seed)
    keys = list(sampler)
    assert len(keys) == len(sampler) == length // batch * batch
    assert len({index for _, index in keys}) == len(keys)
    assert all(epoch == 0 and 0 <= index < length for epoch, index in keys)
    assert list(sampler) == keys  # iterating consumes nothing


@settings(deadline=None, max_examples=60)
@given(st.integers(4, 30), batch_sizes, worlds, st.integers(0, 60), st.data())
def test_resuming_gives_exactly_the_rest(length, batch, world, steps, data):
    rank = data.draw(st.integers(0, world - 1))
    make = lambda: ResumableSampler(max(length, batch * world), batch, 3, rank, world)  # noqa: E731
    whole = make()
    epochs = steps // whole.batches + 3
    everything = joined(batches_of(whole, epoch) for epoch in range(epochs))
    resumed = make()
    resumed.resume_at(steps)
    first = resumed.epoch
    assert first == steps // whole.batches
    rest = batches_of(resumed)  # the first epoch without being told, as a loader made before set_epoch does
    assert batches_of(resumed) == rest
    rest += joined(batches_of(resumed, epoch) for epoch in range(first + 1, epochs))
    assert rest == everything[steps:]
    assert len(resumed) == len(whole)


def test_an_epoch_is_a_whole_number_of_windows():
    sampler = ResumableSampler(11, 2, seed=0)  # five batches
    everything = list(sampler)
    sampler.keep_whole_windows(2)
    assert list(sampler) == everything[:8]
    assert len(sampler) == 8
    sampler.resume_at(4)
    assert sampler.epoch == 1
    with pytest.raises(ConfigurationError, match=r"training\.accumulate_grad_batches=5: an epoch has only 4"):
        sampler.keep_whole_windows(5)


def test_epochs_and_seeds_differ():
    sampler = ResumableSampler(50, 1, seed=0)
    first, second = ([index for _, index in joined(batches_of(sampler, epoch))] for epoch in (0, 1))
    other = [index for _, index in ResumableSampler(50, 1, seed=1)]
    assert first != second
    assert first != other
    assert first != sorted(first)
    sampler.set_epoch(7)
    assert {epoch for epoch, _ in sampler} == {7}
