import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from anemoi_dist.data.fields import evenly_spaced, window_starts


@given(
    steps=st.lists(st.sampled_from([6, 6, 6, 12]), min_size=0, max_size=30),
    missing=st.sets(st.integers(0, 30), max_size=5),
    window=st.integers(1, 6),
)
def test_window_starts_equal_a_plain_search(steps, missing, window):
    dates = np.cumsum([0, *steps])
    missing = {index for index in missing if index < len(dates)}
    expected = [
        start
        for start in range(len(dates) - window + 1)
        if not missing & set(range(start, start + window))
        and all(dates[i + 1] - dates[i] == 6 for i in range(start, start + window - 1))
    ]
    assert window_starts(dates, missing, window=window, frequency_s=6).tolist() == expected


@given(count=st.integers(1, 2000), at_most=st.none() | st.integers(8, 300), day=st.sampled_from([1, 2, 4, 8, 24]))
def test_evenly_spaced_covers_the_times_of_day(count, at_most, day):
    picked = evenly_spaced(count, at_most=at_most, frequency_s=86400 // day)
    assert len(picked) == count if at_most is None or at_most >= count else len(picked) <= at_most
    assert len(set(np.diff(picked).tolist())) <= 1
    if len(picked) >= day:
        assert len(np.unique(picked % day)) == day
