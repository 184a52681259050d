"""Batches come in order and with the values of their steps, and the thread ends whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from raywgen.training.prefetch import DrawnBatch, Prefetch
from tests.builders import noise_for, weight_batch


def drawing(drawn: list[int], num_values: int = 0) -> Callable[[int], DrawnBatch]:
    """Draws batches that say their step, of any size without taking memory for it."""
    batch = weight_batch(num=2)
    if num_values:
        batch = replace(batch, values_BD=torch.zeros(1).expand(2, num_values))

    def draw(step: int) -> DrawnBatch:
        assert threading.current_thread() is not threading.main_thread()
        drawn.append(step)
        return replace(batch, sample_index_B=torch.tensor([step, step])), noise_for(2, first=step)

    return draw


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "raywgen-prefetch"]


def wait_until_idle(drawn: list[int], num: int) -> None:
    """Waits until so many batches are drawn, and gives the thread a moment to draw one too many."""
    pause = threading.Event()
    for _ in range(200):
        if len(drawn) >= num:
            break
        pause.wait(0.01)
    pause.wait(0.05)


def test_every_step_gets_its_own_batch_and_noise() -> None:
    with Prefetch(drawing([]), range(3, 9)) as prefetch:
        for step in range(3, 9):
            batch, noise = prefetch.next()
            assert batch.sample_index_B.tolist() == [step, step]
            assert torch.equal(noise.uniform(4), noise_for(2, first=step).uniform(4))
    assert not prefetch_threads()


def test_two_batches_are_drawn_ahead_and_no_more() -> None:
    drawn: list[int] = []
    with Prefetch(drawing(drawn, num_values=5 << 20), range(10)) as prefetch:
        wait_until_idle(drawn, 2)
        assert drawn == [0, 1]
        prefetch.next()
        wait_until_idle(drawn, 3)
        assert drawn == [0, 1, 2]


def test_small_batches_are_drawn_eight_ahead_and_four_in_a_row() -> None:
    drawn: list[int] = []
    with Prefetch(drawing(drawn), range(20)) as prefetch:
        wait_until_idle(drawn, 8)
        assert drawn == list(range(8))
        for num_drawn in (8, 8, 8, 12, 12):
            prefetch.next()
            wait_until_idle(drawn, num_drawn)
            assert drawn == list(range(num_drawn))


def test_large_batches_are_drawn_when_they_are_needed() -> None:
    drawn: list[int] = []
    with Prefetch(drawing(drawn, num_values=100 << 20), range(10)) as prefetch:
        for step in range(3):
            assert prefetch.next()[0].sample_index_B[0] == step
            wait_until_idle(drawn, step + 1)
            assert drawn == list(range(step + 1))


def test_an_error_is_raised_in_the_step_that_needs_the_batch() -> None:
    def draw(step: int) -> DrawnBatch:
        if step == 1:
            raise ValueError("the shard is gone")
        return weight_batch(num=2), noise_for(2)

    with Prefetch(draw, range(4)) as prefetch:
        prefetch.next()
        with pytest.raises(ValueError, match="the shard is gone"):
            prefetch.next()
    assert not prefetch_threads()


def test_the_thread_ends_with_an_exception_of_the_step() -> None:
    def train() -> None:
        with Prefetch(drawing([]), range(100)) as prefetch:
            prefetch.next()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train()
    assert not prefetch_threads()


def test_nothing_is_drawn_while_something_else_is_read() -> None:
    drawn: list[int] = []
    with Prefetch(drawing(drawn, num_values=5 << 20), range(10)) as prefetch:
        wait_until_idle(drawn, 2)

        def read() -> Iterator[str]:
            prefetch.next()
            wait_until_idle(drawn, 3)
            assert drawn == [0, 1]
            yield "read"

        assert list(prefetch.aside(read())) == ["read"]
        wait_until_idle(drawn, 3)
        assert drawn == [0, 1, 2]
