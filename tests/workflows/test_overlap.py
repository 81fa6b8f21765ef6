"""Cases side by side: what runs in which thread, in which order, and what an error or an interruption leaves."""

import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
import torch

from cardiac_qc_plugin.workflows.overlap import Overlap


def here():
    return threading.current_thread()


@pytest.fixture
def predictor():
    return SimpleNamespace(compute="its own")


def test_networks_run_in_the_waiting_thread_and_cases_in_others(predictor):
    def work(case):
        return case, here(), predictor.compute(here)

    with Overlap([predictor]) as overlap:
        results = [wait() for _, wait in overlap.map(work, range(5))]
    assert [case for case, _, _ in results] == list(range(5))
    assert all(thread is not here() for _, thread, _ in results)
    assert all(thread is here() for _, _, thread in results)


def in_another_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_only_the_waiting_thread_computes_on_several_cores(predictor):
    """And what threads outside compute on stays as it is: they may be those of a server's other requests."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Overlap([predictor]) as overlap:
            cases = overlap.map(lambda _: (torch.get_num_threads(), predictor.compute(torch.get_num_threads)), range(4))
            results = []
            for _, wait in cases:
                results.append(wait())
                assert in_another_thread(torch.get_num_threads) == 2
        assert results == [(1, 2)] * 4
        assert (torch.get_num_threads(), in_another_thread(torch.get_num_threads)) == (2, 2)
    finally:
        torch.set_num_threads(before)


def test_the_next_case_is_under_way_before_one_has_ended(predictor):
    started = [threading.Event() for _ in range(2)]

    def work(case):
        started[case].set()
        assert started[1].wait(10), "the second case did not start while the first one was under way"
        return case

    with Overlap([predictor]) as overlap:
        assert [wait() for _, wait in overlap.map(work, range(2))] == [0, 1]


def test_an_error_is_its_cases_own(predictor):
    def work(case):
        return predictor.compute(lambda: 6 / case)

    with Overlap([predictor]) as overlap:
        results = []
        for case, wait in overlap.map(work, [1, 0, 2]):
            try:
                results.append(wait())
            except ZeroDivisionError:
                results.append(f"{case} failed")
    assert results == [6, "0 failed", 3]
    assert predictor.compute == "its own"


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_network_ends_the_cases_under_way(predictor, late):
    """The case that waits for a network already, and one that asks for it later."""
    ended, both = [], threading.Barrier(2)

    def until(what):
        for _ in range(1000):
            if what():
                return
            time.sleep(0.01)
        raise TimeoutError

    def interrupt():
        if not late:
            until(lambda: not overlap.requests.empty())
        raise KeyboardInterrupt

    def work(case):
        both.wait(10)
        if late and case == 1:
            until(lambda: overlap.closed)
        try:
            predictor.compute(interrupt)
        except BaseException as error:
            ended.append(type(error))
            raise

    with pytest.raises(KeyboardInterrupt), Overlap([predictor]) as overlap:
        for _, wait in overlap.map(work, range(4)):
            wait()
    assert set(ended) == {KeyboardInterrupt, CancelledError} and len(ended) == 2
    assert predictor.compute == "its own"
    with pytest.raises(CancelledError):  # nobody would answer
        overlap.compute(here)
