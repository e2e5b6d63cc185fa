"""Our own threads: order, errors, one thread."""

import threading
import time

import pytest

from toolkit_kernels.pool import Pool, num_cores


@pytest.mark.parametrize("num_threads", [1, 2, 8, None])
def test_results_come_in_the_order_of_the_items(num_threads):
    def slow_first(i: int) -> int:
        time.sleep(0.01 if i % 7 == 0 else 0)
        return i * i

    with Pool(num_threads) as pool:
        assert pool.map(slow_first, range(40)) == [i * i for i in range(40)]
        assert pool.map(slow_first, []) == []
        assert pool.map(slow_first, [3]) == [9]
        assert pool.num_threads == (num_threads or num_cores())


def test_one_thread_is_the_caller():
    with Pool(1) as pool:
        assert set(pool.map(lambda _: threading.get_ident(), range(5))) == {threading.get_ident()}


def test_threads_work_at_the_same_time():
    """Each waits for the others: with fewer than three at once this would end in an error."""
    meeting = threading.Barrier(3, timeout=20)
    with Pool(3) as pool:
        assert sorted(pool.map(lambda _: meeting.wait(), range(3))) == [0, 1, 2]


@pytest.mark.parametrize("num_threads", [1, 4])
def test_the_first_error_ends_the_work(num_threads):
    """The error itself comes out, what had not begun is left, and the pool is good for more."""
    begun = []

    def fail_at_five(i: int) -> int:
        begun.append(i)
        if i == 5:
            raise ValueError("item five")
        time.sleep(0.002)
        return i

    with Pool(num_threads) as pool:
        with pytest.raises(ValueError, match="item five"):
            pool.map(fail_at_five, range(10_000))
        num_begun = len(begun)
        assert num_begun < 1_000
        time.sleep(0.05)
        assert len(begun) == num_begun
        assert pool.map(abs, [-1, -2, -3]) == [1, 2, 3]


def test_two_callers_share_a_pool():
    results: dict[int, list[int]] = {}
    with Pool(3) as pool:

        def call(caller: int) -> None:
            results[caller] = pool.map(lambda i: i + 100 * caller, range(50))

        callers = [threading.Thread(target=call, args=(caller,)) for caller in range(4)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join()
    assert results == {caller: [i + 100 * caller for i in range(50)] for caller in range(4)}
