"""A short form of ``make fuzz``: ten seconds of it."""

import random

import numpy as np
from fuzz_reading import CONTAINED, INTERESTING, fuzz, mutated


def test_mutated_clips_are_read_or_refused():
    outcomes, memory = fuzz(40, seed=1, seconds=10)
    assert not {outcome for _, outcome in outcomes} & set(CONTAINED)
    assert {("picture", "read"), ("sound", "read"), ("cache", "refused")} <= set(outcomes)
    assert np.median(memory[-10:]) < np.median(memory[:10]) + 300


def test_inputs_are_the_same_for_the_same_seed():
    content = bytes(range(256)) * 8
    first, again, other = (mutated(content, random.Random(seed)) for seed in (0, 0, 1))
    assert first == again != other and len(INTERESTING) == len(set(INTERESTING))
