import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anemoi_dist.optimizers.ademamix_schedules import alpha_at, beta3_at, unfinished_warmups

WARMUPS = st.integers(1, 100_000)
FORMS = st.sampled_from(["apple", "paper"])


def betas(lowest=0.0):
    return st.floats(lowest, 0.99999)


@given(warmup=WARMUPS, step=st.integers(1, 200_000), alpha=st.floats(0, 100))
def test_alpha_rises_to_its_final_value(warmup, step, alpha):
    here, later = (alpha_at(s, alpha=alpha, warmup=warmup) for s in (step, step + 1))
    assert 0.0 <= here <= later <= alpha
    if step >= warmup:
        assert here == alpha


def test_alpha_counts_from_one():
    assert alpha_at(1, alpha=8.0, warmup=4) == 2.0
    assert alpha_at(4, alpha=8.0, warmup=4) == 8.0
    assert alpha_at(1, alpha=8.0, warmup=None) == alpha_at(1, alpha=8.0, warmup=0) == 8.0
    assert alpha_at(-3, alpha=8.0, warmup=4) == 0.0


@given(warmup=WARMUPS, share=st.floats(0, 2), beta1=betas(), beta3=betas(), form=FORMS)
def test_beta3_rises_from_beta1_to_its_final_value(warmup, share, beta1, beta3, form):
    beta1, beta3 = sorted((beta1, beta3))
    step = round(share * warmup)
    here, later = (beta3_at(s, beta1=beta1, beta3=beta3, warmup=warmup, form=form) for s in (step, step + 1))
    offset = 1.1e-8  # what Apple's form adds inside the warm-up, and takes back at its end
    assert beta1 - 1e-12 <= here <= later + offset
    assert later <= beta3 + offset
    if step >= warmup:
        assert here == beta3
    if step <= 0:
        assert here == beta1


@given(warmup=st.integers(2, 100_000), share=st.floats(0.001, 0.999), beta1=betas(0.1), beta3=betas(0.1))
def test_papers_form_is_its_closed_form(warmup, share, beta1, beta3):
    step = max(1, min(warmup - 1, round(share * warmup)))
    x = step / warmup
    closed = math.exp(math.log(beta1) * math.log(beta3) / ((1 - x) * math.log(beta3) + x * math.log(beta1)))
    assert beta3_at(step, beta1=beta1, beta3=beta3, warmup=warmup, form="paper") == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize(("beta3", "difference"), [(0.9999, 1e-4), (0.999999, 1e-2)])
def test_forms_differ_by_apples_offset(beta3, difference):
    options = {"beta1": 0.9, "beta3": beta3, "warmup": 10**6}
    apple, paper = (1 - beta3_at(10**6 - 1, form=form, **options) for form in ("apple", "paper"))
    assert 1 - apple / paper == pytest.approx(difference, rel=0.02)


def test_forms_without_beta1():
    for step in range(1, 5):
        assert 0 <= beta3_at(step, beta1=0.0, beta3=0.9999, warmup=4, form="paper") <= 0.9999
    assert beta3_at(0, beta1=0.0, beta3=0.9999, warmup=4, form="paper") == 0.0
    assert beta3_at(1, beta1=0.0, beta3=0.9999, warmup=4, form="paper") == pytest.approx(0.9999**4)


def test_unfinished_warmups_name_both_numbers():
    [one, two] = unfinished_warmups({"alpha_warmup": 260_000, "beta3_warmup": 260_000}, max_steps=150_000)
    assert "alpha_warmup=260000" in one
    assert "training.max_steps=150000" in one
    assert "beta3_warmup=260000" in two
    assert unfinished_warmups({"alpha_warmup": 100, "beta3_warmup": None}, max_steps=100) == []
    [late] = unfinished_warmups({"alpha_warmup": 100, "schedule_start": 50}, max_steps=120)
    assert "step 50" in late
    assert "alpha_warmup=70" in late
