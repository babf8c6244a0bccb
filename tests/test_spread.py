"""Work spread over processes: every item has its outcome, whatever it raises and whoever dies."""

import os
import signal
import time

import pytest

from kaggle_utils import spread


def square(number: int) -> int:
    if number == 3:
        raise ValueError("not three")
    return number * number


def kill_at_four(number: int) -> int:
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return number * number


def slow(number: int) -> int:
    time.sleep(0.3)
    return number


def own_process(_: int) -> tuple[int, int]:
    time.sleep(0.2)
    return os.getpid(), spread.once(new_object, "x")


def new_object(name: str) -> int:
    time.sleep(0.1)
    return time.monotonic_ns()


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_item_has_its_outcome(jobs):
    with spread.Team(jobs) as team:
        assert team.size == jobs
        found = dict(team.run(square, iter(range(6))))
    assert isinstance(found.pop(3), ValueError) and found == {0: 0, 1: 1, 2: 4, 4: 16, 5: 25}


def test_a_worker_that_dies_costs_its_own_item():
    with spread.Team(2) as team:
        found = dict(team.run(kill_at_four, range(8)))
    assert isinstance(found.pop(4), spread.WorkerDied)
    assert found == {number: number * number for number in (0, 1, 2, 3, 5, 6, 7)}


def test_items_are_asked_for_when_a_worker_is_free():
    asked = []

    def items():
        for number in range(6):
            asked.append(number)
            yield number

    with spread.Team(2) as team:
        outcomes = team.run(slow, items())
        next(outcomes)
        assert len(asked) < 6
        list(outcomes)
    assert asked == list(range(6))


def test_a_process_makes_an_object_once():
    with spread.Team(2) as team:
        made = {outcome for _ in range(2) for _, outcome in team.run(own_process, range(6))}
    processes = {process for process, _ in made}
    assert len(made) == len(processes) <= 2 and os.getpid() not in processes


def test_what_cannot_be_a_team_is_refused():
    with pytest.raises(ValueError, match="expected one of loky, dask, ray, found 'spark'"):
        spread.Team(2, "spark")
    with pytest.raises(ValueError, match="expected a number of processes"):
        spread.Team(0)
