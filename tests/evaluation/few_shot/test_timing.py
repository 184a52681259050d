import time

import pytest
import torch

from raywgen.evaluation.few_shot import FewShotError, time_alternating


def test_candidates_take_turns_with_one_thread_and_warm_up_does_not_count() -> None:
    threads = torch.get_num_threads()
    calls: list[tuple[str, int]] = []

    def slow() -> None:
        calls.append(("slow", torch.get_num_threads()))
        time.sleep(0.5 if len(calls) == 1 else 0.02)

    def quick() -> None:
        calls.append(("quick", torch.get_num_threads()))

    found = time_alternating({"slow": slow, "quick": quick}, repetitions=5, warm_up=1, tasks_per_call=4)
    assert calls == [("slow", 1), ("quick", 1)] * 6
    assert torch.get_num_threads() == threads
    slowest = found["slow"]
    assert 5 <= slowest.low_ms <= slowest.median_ms <= slowest.high_ms < 100
    assert found["quick"].median_ms < slowest.median_ms


def test_the_number_of_threads_comes_back_after_an_error() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        time_alternating({"broken": lambda: 1 / 0})
    assert torch.get_num_threads() == threads


def test_time_of_the_processor_leaves_waiting_out() -> None:
    found = time_alternating({"waits": lambda: time.sleep(0.1)}, repetitions=2, warm_up=0, clock=time.thread_time)
    assert found["waits"].median_ms < 50


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(FewShotError, match="give a candidate"):
        time_alternating({})
