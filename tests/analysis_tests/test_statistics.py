"""Estimates and intervals against hand-computed values, other libraries, a naive DeLong, and known truths."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from analysis import statistics as st

STUDIES = 2000
COVERED = (0.935, 0.965)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def test_a_summary_has_the_sample_std_and_keeps_the_best_run_apart() -> None:
    summary = st.summarise([0.8331, 0.8302, 0.8309])  # the paper's three runs: 0.8314 ± 0.0015
    assert summary.mean == pytest.approx(0.8314, abs=5e-5)
    assert summary.std == pytest.approx(math.sqrt((0.0017**2 + 0.0012**2 + 0.0005**2) / 2), rel=1e-6)
    assert (summary.n, summary.best) == (3, 0.8331)


def test_one_value_has_no_std_and_none_has_no_mean() -> None:
    assert math.isnan(st.summarise([0.5]).std)
    assert st.summarise([]).n == 0
    assert math.isnan(st.summarise([]).mean)


def test_a_missing_value_is_refused_and_never_averaged_over() -> None:
    with pytest.raises(ValueError, match="1 values that are not finite"):
        st.summarise([0.5, math.nan])
    with pytest.raises(ValueError, match="same seeds"):
        st.paired([0.1, 0.2], [0.1])


def test_a_paired_comparison_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1/√3, t(0.975, 2) = 4.302653.
    result = st.paired([2, 4, 6], [1, 2, 3])
    assert (result.delta, result.std, result.dz, result.n) == (2, 1, 2, 3)
    assert result.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert result.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    assert result.smallest_attainable_p == 0.25
    assert result.detectable_delta == pytest.approx(3.264, abs=1e-3)


def test_a_paired_comparison_as_scipy_computes_it(rng: np.random.Generator) -> None:
    a, b = rng.normal(0.8, 0.01, 7), rng.normal(0.79, 0.01, 7)
    expected = stats.ttest_rel(a, b)
    bounds = expected.confidence_interval(0.95)
    result = st.paired(a, b)
    assert (result.low, result.high, result.p) == pytest.approx((bounds.low, bounds.high, expected.pvalue), rel=1e-9)


def test_equal_differences_have_no_spread_though_floats_round() -> None:
    a = np.array([0.81, 0.83, 0.87])
    constant = st.paired(a + 0.1, a)
    assert (constant.std, constant.dz, constant.p) == (0.0, math.inf, 0.0)
    nothing = st.paired(a, a)
    assert (nothing.delta, nothing.p) == (0.0, 1.0)
    assert math.isnan(nothing.dz)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_pairs_have_neither_interval_nor_test(n: int) -> None:
    result = st.paired([0.5] * n, [0.4] * n)
    assert all(math.isnan(x) for x in (result.low, result.high, result.p, result.detectable_delta))
    assert result.detectable_dz is None


@pytest.mark.parametrize(("n", "dz", "half"), [(3, 3.26, 2.48), (5, 1.68, 1.24), (10, 1.00, 0.72), (29, 0.54, 0.38)])
def test_what_n_seeds_can_show(n: int, dz: float, half: float) -> None:
    detectable = st.detectable_dz(n)
    assert detectable is not None
    assert round(detectable, 2) == dz
    assert round(st.half_width_in_std(n), 2) == half
    assert TTestPower().power(detectable, n, 0.05) == pytest.approx(0.8, abs=1e-6)


def test_no_effect_is_detectable_with_less_than_two_pairs_and_nonsense_is_refused() -> None:
    assert st.detectable_dz(1) is None
    with pytest.raises(ValueError, match="alpha"):
        st.detectable_dz(5, alpha=0.9, power=0.8)


def test_the_least_p_of_a_rank_test() -> None:
    a = np.array([1.0, 2.0, 3.0])
    assert st.smallest_attainable_p(3) == stats.wilcoxon(a, np.zeros(3), method="exact").pvalue == 0.25


def test_holm_as_statsmodels_computes_it(rng: np.random.Generator) -> None:
    p = rng.uniform(0, 0.1, 9)
    assert st.holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_holm_by_hand_leaves_untested_comparisons_out() -> None:
    assert st.holm([0.01, math.nan, 0.04, 0.03])[[0, 2, 3]] == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(st.holm([0.01, math.nan])[1])


def test_paired_intervals_cover_the_truth(rng: np.random.Generator) -> None:
    for n in (3, 10):
        _, low, high = st.t_interval(rng.normal(0.01, 0.004, (STUDIES, n)))
        assert COVERED[0] <= np.mean((low <= 0.01) & (high >= 0.01)) <= COVERED[1]


# ---------------------------------------------------------------- test patients


def test_class_aucs_agree_with_scikit_learn_and_ties_count_half(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 2, (200, 3))
    scores = np.round(rng.normal(labels, 1.0), 1)  # many ties
    expected = [roc_auc_score(labels[:, c], scores[:, c]) for c in range(3)]
    assert st.class_auc(labels, scores) == pytest.approx(expected, abs=1e-12)


def test_a_class_with_one_value_is_undefined_and_left_out_of_the_macro() -> None:
    labels = np.array([[0, 0], [1, 0], [1, 0]])
    aucs = st.class_auc(labels, np.array([[0.1, 0.3], [0.4, 0.2], [0.6, 0.1]]))
    assert aucs[0] == 1.0
    assert math.isnan(aucs[1])
    assert st.macro(aucs) == 1.0
    assert math.isnan(st.macro([math.nan]))


def test_labels_other_than_0_and_1_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels hold \[255\]"):
        st.class_auc(np.array([[0], [255]]), np.zeros((2, 1)))


def naive_delong(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeLong (1988) from its definition: kernel ψ over all pairs, structural components, their covariances."""
    x, y = scores[:, labels == 1], scores[:, labels == 0]
    psi = (x[:, :, None] > y[:, None, :]) + 0.5 * (x[:, :, None] == y[:, None, :])
    v10, v01 = psi.mean(axis=2), psi.mean(axis=1)
    return psi.mean(axis=(1, 2)), np.cov(v10) / x.shape[1] + np.cov(v01) / y.shape[1]


def test_fast_delong_equals_its_definition_with_ties(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 2, 150)
    scores = np.round(labels + rng.normal(0, 1.5, (3, 150)) + rng.normal(0, 0.5, 150), 1)
    fit, (auc, covariance) = st.delong(labels, scores), naive_delong(labels, scores)
    assert fit.auc == pytest.approx(auc, abs=1e-12)
    assert fit.covariance == pytest.approx(covariance, abs=1e-12)


def test_delong_of_a_class_with_one_value_is_refused_and_one_positive_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="undefined"):
        st.delong(np.zeros(4), np.zeros((1, 4)))
    fit = st.delong(np.array([1, 0, 0]), np.array([[0.9, 0.1, 0.2], [0.1, 0.2, 0.3]]))
    assert fit.auc.tolist() == [1.0, 0.0]
    assert np.isnan(st.delong_contrast(fit, [1, -1]).low)


def test_delong_intervals_of_a_difference_cover_the_truth(rng: np.random.Generator) -> None:
    """Two binormal models with AUC Φ(d / √2) on shared images."""
    truth = stats.norm.cdf(1.2 / math.sqrt(2)) - stats.norm.cdf(0.9 / math.sqrt(2))
    labels = np.arange(160) % 2
    shared = rng.normal(0, math.sqrt(0.5), (STUDIES, 1, 160))
    noise = shared + rng.normal(0, math.sqrt(0.5), (STUDIES, 2, 160))
    scores = noise + labels * np.array([1.2, 0.9])[:, None]
    estimates = [st.delong_contrast(st.delong(labels, study), [1, -1]) for study in scores]
    covered = np.mean([e.low <= truth <= e.high for e in estimates])
    assert COVERED[0] <= covered <= COVERED[1]


def clustered(rng: np.random.Generator, patients: int, shift: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two images a patient that share their label and much of their noise: labels and scores (N, 1), groups (N,)."""
    labels = np.repeat(rng.integers(0, 2, patients), 2)[:, None]
    noise = np.repeat(rng.normal(0, math.sqrt(0.8), patients), 2) + rng.normal(0, math.sqrt(0.2), 2 * patients)
    return labels, shift * labels + noise[:, None], np.repeat(np.arange(patients), 2)


def macro_interval(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, *, rng: np.random.Generator, draws: int
) -> st.Estimate:
    """Macro AUC of one model, labels and scores (N, C), with the percentile interval over groups (N,)."""
    replicates, incomplete = st.macro_replicates(labels, scores[None], groups, rng=rng, draws=draws)
    return st.percentile_estimate(st.macro(st.class_auc(labels, scores)), replicates[0], incomplete)


def test_the_bootstrap_is_wider_over_patients_than_over_images(rng: np.random.Generator) -> None:
    labels, scores, patients = clustered(rng, 150, 1.0)
    by_patient = macro_interval(labels, scores, patients, rng=np.random.default_rng(0), draws=600)
    by_image = macro_interval(labels, scores, np.arange(300), rng=np.random.default_rng(0), draws=600)
    assert by_patient.value == by_image.value == pytest.approx(roc_auc_score(labels[:, 0], scores[:, 0]))
    assert by_patient.high - by_patient.low > 1.2 * (by_image.high - by_image.low)


@pytest.mark.slow
def test_bootstrap_intervals_over_patients_cover_the_truth_where_images_do_not(rng: np.random.Generator) -> None:
    truth = stats.norm.cdf(1.0 / math.sqrt(2))
    covered = {"patients": 0, "images": 0}
    for _ in range(STUDIES):
        labels, scores, patients = clustered(rng, 150, 1.0)
        for what, groups in (("patients", patients), ("images", np.arange(300))):
            estimate = macro_interval(labels, scores, groups, rng=rng, draws=500)
            covered[what] += estimate.low <= truth <= estimate.high
    assert COVERED[0] <= covered["patients"] / STUDIES <= COVERED[1]
    assert covered["images"] / STUDIES < 0.90


def test_a_bootstrap_draw_counts_every_image_of_a_group_as_often_as_the_group() -> None:
    """Replicates equal AUCs of data sets in which the drawn groups' images are truly repeated."""
    rng = np.random.default_rng(3)
    labels, scores, groups = rng.integers(0, 2, (40, 2)), np.round(rng.normal(0, 1, (1, 40, 2)), 1), np.arange(40) // 4
    replicates, _ = st.macro_replicates(labels, scores, groups, rng=np.random.default_rng(5), draws=4)
    drawn = np.random.default_rng(5).integers(0, 10, size=(4, 10))
    for draw, replicate in zip(drawn, replicates[0], strict=True):
        images = np.concatenate([np.flatnonzero(groups == group) for group in draw])
        expected = [roc_auc_score(labels[images, c], scores[0, images, c]) for c in range(2)]
        assert replicate == pytest.approx(np.mean(expected), abs=1e-12)


def test_two_models_are_compared_on_the_same_draws(rng: np.random.Generator) -> None:
    labels, scores, groups = clustered(rng, 50, 1.0)
    replicates, _ = st.macro_replicates(labels, np.stack([scores, scores]), groups, rng=rng, draws=100)
    assert np.array_equal(replicates[0], replicates[1])


def test_the_same_generator_state_gives_the_same_interval(rng: np.random.Generator) -> None:
    labels, scores, groups = clustered(rng, 50, 1.0)
    first, second, other = (
        macro_interval(labels, scores, groups, rng=np.random.default_rng(s), draws=100) for s in (1, 1, 2)
    )
    assert first == second != other


def test_draws_that_lose_a_class_are_counted() -> None:
    labels = np.array([[1], [0], [0], [0]])
    estimate = macro_interval(
        labels, np.array([[0.9], [0.1], [0.2], [0.3]]), np.arange(4), rng=np.random.default_rng(0), draws=200
    )
    assert 20 < estimate.incomplete < 120  # without the only positive: (3/4)^4 = 32 %
    assert estimate.value == 1.0


def test_importing_the_statistics_stays_light() -> None:
    code = (
        "import sys, analysis.statistics; "
        "heavy = {'pandas', 'matplotlib', 'mlflow', 'torch', 'scipy.stats', 'sklearn', 'jinja2'} & set(sys.modules); "
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
