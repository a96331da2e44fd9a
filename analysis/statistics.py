"""Estimates, intervals and tests behind every table: pure functions of arrays.

Two sources of noise are kept apart. Over training seeds: `summarise`, `paired`, `detectable_dz`, `holm`. Over test
patients: `delong` (images independent) and `macro_replicates` (bootstrap over groups, generator passed in). Only numpy
and scipy.special are imported, so that a plan can print what its seeds can show without loading anything heavy.

Sources: Bouthillier et al., Accounting for Variance in Machine Learning Benchmarks (MLSys 2021); Demšar (JMLR 2006);
Holm (Scand. J. Stat. 1979); DeLong et al. (Biometrics 1988); Sun & Xu (IEEE Signal Processing Letters 21, 2014).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import nctdtr, ndtr, ndtri, stdtr, stdtrit

Floats = npt.NDArray[np.float64]

ALPHA = 0.05  # two-sided level of every interval and mark
POWER = 0.8  # power at which an effect counts as detectable
_CHUNK = 4_000_000  # bootstrap multiplicities held at a time (images × draws): 16 MB of int32


@dataclass(frozen=True)
class Summary:
    """A row's figure over its seeds. `std` divides by n − 1 and is NaN for n < 2; `best` is the largest value."""

    mean: float
    std: float
    n: int
    best: float


@dataclass(frozen=True)
class Paired:
    """Differences a − b over pairs (same seed): everything in units of the metric except d_z and the p values.

    Attributes:
        delta: mean difference.
        low, high: 95 % paired t interval of the mean difference; NaN for n < 2.
        std: sample standard deviation of the differences (n − 1).
        dz: delta / std; infinite where the differences are equal and not zero, NaN where they are all zero.
        p: two-sided paired t test; NaN for n < 2.
        n: pairs.
        detectable_dz: smallest |d_z| this n detects at 80 % power; None for n < 2.
        detectable_delta: detectable_dz × std, the smallest difference this comparison could have detected.
        smallest_attainable_p: least two-sided p of a test on n pairs that assumes no distribution (2^(1 − n)).
    """

    delta: float
    low: float
    high: float
    std: float
    dz: float
    p: float
    n: int
    detectable_dz: float | None
    detectable_delta: float
    smallest_attainable_p: float


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval. `incomplete`: bootstrap draws that left some class with a single value."""

    value: float
    low: float
    high: float
    p: float = math.nan
    incomplete: int = 0


@dataclass(frozen=True, eq=False)
class DeLong:
    """AUCs (M,) of M models on one test set, and their covariance (M, M); NaN where a side has a single image."""

    auc: Floats
    covariance: Floats


# ---------------------------------------------------------------- noise over seeds


def summarise(values: npt.ArrayLike) -> Summary:
    """Mean, sample standard deviation (n − 1), n and best of a row's values (n,).

    Raises:
        ValueError: a value is not finite; a missing cell must be left out by name, never averaged over.
    """
    x = _finite("values", values)
    if not x.size:
        return Summary(math.nan, math.nan, 0, math.nan)
    return Summary(float(x.mean()), _sample_std(x), x.size, float(x.max()))


def paired(a: npt.ArrayLike, b: npt.ArrayLike) -> Paired:
    """Compare two rows by their differences a − b, (n,) each, position by position the same seed.

    Interval: delta ± t(1 − α/2, n − 1) · std / √n. Test: t = delta · √n / std on n − 1 degrees of freedom.

    Raises:
        ValueError: the shapes differ or a value is not finite.
    """
    x, y = _finite("a", a), _finite("b", b)
    if x.shape != y.shape:
        raise ValueError(f"a has {x.size} values and b has {y.size}; pairs need the same seeds in the same order")
    differences, n = x - y, x.size
    if not n:
        nan = math.nan
        return Paired(nan, nan, nan, nan, nan, nan, 0, None, nan, 1.0)
    delta, low, high = (float(part) for part in t_interval(differences))
    std = _sample_std(differences, noise=float(max(np.abs(x).max(), np.abs(y).max())))
    detectable = detectable_dz(n)
    return Paired(
        delta=delta,
        low=low,
        high=high,
        std=std,
        dz=_ratio(delta, std),
        p=_paired_t_p(delta, std, n),
        n=n,
        detectable_dz=detectable,
        detectable_delta=math.nan if detectable is None else detectable * std,
        smallest_attainable_p=smallest_attainable_p(n),
    )


def t_interval(values: npt.ArrayLike, alpha: float = ALPHA) -> tuple[Floats, Floats, Floats]:
    """Mean and 1 − alpha Student interval of values (…, n) along the last axis: three arrays (…,).

    The bounds are NaN for n < 2.
    """
    x = np.asarray(values, dtype=np.float64)
    n = x.shape[-1]
    mean = x.mean(axis=-1)
    if n < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    half = half_width_in_std(n, alpha) * x.std(axis=-1, ddof=1)
    return mean, mean - half, mean + half


def half_width_in_std(n: int, alpha: float = ALPHA) -> float:
    """Half width of the paired t interval in standard deviations of the differences: t(1 − α/2, n − 1) / √n."""
    return float(stdtrit(n - 1, 1 - alpha / 2)) / math.sqrt(n) if n >= 2 else math.nan


@lru_cache(maxsize=1024)
def detectable_dz(n: int, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Smallest effect size d_z that a two-sided paired t test on n pairs detects with the given power.

    Solves 1 − F(t; n − 1, d_z √n) + F(−t; n − 1, d_z √n) = power for d_z, with F the noncentral t distribution and
    t = t(1 − α/2, n − 1). None for n < 2, where no test exists.

    Raises:
        ValueError: alpha or power outside (0, 1), or power not above alpha.
    """
    if not 0 < alpha < power < 1:
        raise ValueError(f"alpha = {alpha}, power = {power}: expected 0 < alpha < power < 1")
    if n < 2:
        return None
    low, high = 0.0, 1.0
    while _paired_t_power(high, n, alpha) < power:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _paired_t_power(middle, n, alpha) < power else (low, middle)
    return high


def smallest_attainable_p(n: int) -> float:
    """Least two-sided p of an exact rank or sign-flip test on n pairs: 2 of the 2^n sign patterns, so 2^(1 − n)."""
    return min(1.0, 2.0 ** (1 - n))


def holm(p: npt.ArrayLike) -> Floats:
    """Holm's step-down adjustment of p values (m,): p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) · p_(j)).

    NaN marks a comparison that could not be tested: it stays NaN and is not counted in m.
    """
    raw = np.asarray(p, dtype=np.float64)
    adjusted = np.full(raw.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(raw))
    order = tested[np.argsort(raw[tested], kind="stable")]
    factors = np.arange(order.size, 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * raw[order]))
    return adjusted


# ---------------------------------------------------------------- noise over test patients


def class_auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> Floats:
    """Area under the ROC curve of each class; labels and scores (N, C) → (C,). Ties count one half.

    A label of −1 is unlabelled: the image is left out of that class.
    NaN where a class has one value in the split: it is undefined, not 0 and not 0.5.
    """
    y, s = _labels(labels, ndim=2, masked=True), _finite("scores", scores, ndim=2)
    _same_shape(y, s)
    once = np.ones((len(y), 1), dtype=np.int32)
    return np.array([_weighted_auc(y[:, c], s[:, c], once)[0] for c in range(y.shape[1])])


def macro(values: npt.ArrayLike) -> float:
    """Mean over the defined (not NaN) classes of values (C,); NaN where none is defined."""
    x = np.asarray(values, dtype=np.float64)
    defined = ~np.isnan(x)
    return float(x[defined].mean()) if defined.any() else math.nan


def delong(labels: npt.ArrayLike, scores: npt.ArrayLike) -> DeLong:
    """AUCs of M models and their covariance; labels (N,), scores (M, N). O(M · N log N + M² N).

    Fast form of Sun & Xu (2014), with midranks T_Z over all images, T_X over the m positive, T_Y over the n negative:
    θ = (Σ T_Z(X_i) / m − (m + 1) / 2) / n, V10 = (T_Z(X) − T_X) / n, V01 = 1 − (T_Z(Y) − T_Y) / m,
    cov(θ) = cov(V10) / m + cov(V01) / n.

    Raises:
        ValueError: the labels hold one value only (the AUC is undefined), or shapes differ.
    """
    y, s = _labels(labels, ndim=1), _finite("scores", scores, ndim=2)
    if s.shape[1] != y.size:
        raise ValueError(f"scores have {s.shape[1]} images and labels {y.size}")
    positive, negative = s[:, y == 1], s[:, y == 0]
    m, n = positive.shape[1], negative.shape[1]
    if not (m and n):
        raise ValueError(f"{m} positive and {n} negative images: the AUC is undefined; leave the class out by name")
    ranks = np.array([_midranks(row) for row in np.hstack([positive, negative])])
    of_positive = (ranks[:, :m] - [_midranks(row) for row in positive]) / n
    of_negative = 1 - (ranks[:, m:] - [_midranks(row) for row in negative]) / m
    return DeLong(of_positive.mean(axis=1), _covariance(of_positive) / m + _covariance(of_negative) / n)


def delong_contrast(fit: DeLong, weights: npt.ArrayLike, alpha: float = ALPHA) -> Estimate:
    """Weighted sum of correlated AUCs, weights (M,): (1, −1) compares two models, (½, ½, −½, −½) two rows of two seeds.

    Normal interval w·θ ± z √(wᵀ S w) and two-sided p of w·θ = 0 (DeLong et al. 1988).
    """
    w = _finite("weights", weights)
    value = float(w @ fit.auc)
    variance = float(w @ fit.covariance @ w)
    se = math.nan if math.isnan(variance) else math.sqrt(max(variance, 0.0))
    half = float(ndtri(1 - alpha / 2)) * se
    z = _ratio(abs(value), se)
    p = 1.0 if value == 0 and se == 0 else float(2 * ndtr(-z))
    return Estimate(value, value - half, value + half, p)


def macro_replicates(
    labels: npt.ArrayLike, scores: npt.ArrayLike, groups: npt.ArrayLike, *, rng: np.random.Generator, draws: int = 1000
) -> tuple[Floats, int]:
    """Macro AUC of M models in each of D bootstrap draws of whole groups (patients), the same draws for all models.

    Args:
        labels: (N, C) of 0 and 1; −1 is unlabelled and left out of its class.
        scores: (M, N, C).
        groups: (N,) group of each image; all images of a group are drawn together, as often as the group is.
        rng: the generator; the same state gives the same bits.
        draws: D.

    Returns:
        replicates (M, D), each the mean over the classes that are defined in the draw, and the number of draws in which
        a class that is defined in the full split was not.
    """
    y, s = _labels(labels, ndim=2, masked=True), _finite("scores", scores, ndim=3)
    _same_shape(y, s[0])
    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    defined = np.flatnonzero((y == 0).any(axis=0) & (y == 1).any(axis=0))
    if codes.shape != (len(y),) or not defined.size:
        raise ValueError(f"{codes.size} groups and {len(y)} images, {defined.size} classes with both values")
    replicates, incomplete = [], 0
    for counts in draw_groups(codes, rng, draws):
        aucs = np.array([[_weighted_auc(y[:, c], model[:, c], counts) for c in defined] for model in s])
        undefined = np.isnan(aucs)
        incomplete += int(undefined.any(axis=(0, 1)).sum())
        n = (~undefined).sum(axis=1)
        replicates.append(np.where(undefined, 0.0, aucs).sum(axis=1) / np.where(n, n, np.nan))
    return np.concatenate(replicates, axis=1), incomplete


def draw_groups(codes: npt.NDArray[np.intp], rng: np.random.Generator, draws: int) -> Iterator[npt.NDArray[np.int32]]:
    """How often each image is drawn, (N, d) a chunk: G groups with replacement, then all images of each.

    Args:
        codes: (N,) number of each image's group, 0 … G − 1.
        rng: the generator; draws: their number over all chunks.
    """
    n_groups = int(codes.max()) + 1
    chunk = max(1, _CHUNK // len(codes))
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        drawn = rng.integers(0, n_groups, size=(size, n_groups))
        flat = np.bincount((drawn + np.arange(size)[:, None] * n_groups).ravel(), minlength=size * n_groups)
        yield np.ascontiguousarray(flat.reshape(size, n_groups).T[codes], dtype=np.int32)


def percentile_estimate(value: float, replicates: Floats, incomplete: int = 0, alpha: float = ALPHA) -> Estimate:
    """A value with the percentile interval of its bootstrap replicates (D,), draws of no class left out."""
    defined = replicates[~np.isnan(replicates)]
    if not defined.size:
        return Estimate(value, math.nan, math.nan, incomplete=incomplete)
    low, high = np.quantile(defined, [alpha / 2, 1 - alpha / 2])
    return Estimate(value, float(low), float(high), incomplete=incomplete)


# ---------------------------------------------------------------- parts


def _sample_std(x: Floats, noise: float = 0.0) -> float:
    """Sample standard deviation (n − 1); exactly 0 where all that varies is the rounding of numbers of size `noise`."""
    if x.size < 2:
        return math.nan
    std = float(x.std(ddof=1))
    return 0.0 if std <= 4 * np.finfo(np.float64).eps * noise else std


def _ratio(numerator: float, denominator: float) -> float:
    """The limits at 0 are meant: 0 / 0 is undefined (NaN), x / 0 is infinite with the sign of x."""
    if denominator == 0:
        return math.nan if numerator == 0 else math.copysign(math.inf, numerator)
    return numerator / denominator


def _paired_t_p(delta: float, std: float, n: int) -> float:
    if n < 2:
        return math.nan
    if delta == 0:
        return 1.0
    return float(2 * stdtr(n - 1, -abs(_ratio(delta, std)) * math.sqrt(n)))


def _paired_t_power(dz: float, n: int, alpha: float) -> float:
    critical, noncentrality = stdtrit(n - 1, 1 - alpha / 2), dz * math.sqrt(n)
    upper = 1 - nctdtr(n - 1, noncentrality, critical)
    return float(upper + nctdtr(n - 1, noncentrality, -critical))


def _midranks(x: Floats) -> Floats:
    """Ranks (N,) from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def _covariance(x: Floats) -> Floats:
    """Sample covariance (M, M) of x (M, N); NaN where N < 2."""
    m, n = x.shape
    if n < 2:
        return np.full((m, m), np.nan)
    centred = x - x.mean(axis=1, keepdims=True)
    covariance: Floats = centred @ centred.T / (n - 1)
    return covariance


def _weighted_auc(labels: npt.NDArray[np.int8], scores: Floats, counts: npt.NDArray[np.int32]) -> Floats:
    """AUC (D,) of labels and scores (N,) in which image i counts counts[i, d] times; NaN where a side is empty.

    Mann–Whitney: Σ over positives of (negatives below + ½ negatives at the same score). Negatives are summed between
    the scores of positives only, which are few.
    """
    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    levels, level = np.unique(scores[positives], return_inverse=True)
    negatives = negatives[np.argsort(scores[negatives], kind="stable")]
    cuts = np.concatenate([np.searchsorted(scores[negatives], levels, side) for side in ("left", "right")])
    sums = _sums_before(counts[negatives], cuts)
    below = (sums[: len(levels)] + sums[len(levels) :]) / 2
    drawn = counts[positives].astype(np.float64)
    pairs = drawn.sum(axis=0) * counts[negatives].sum(axis=0, dtype=np.float64)
    wins: Floats = np.einsum("nd,nd->d", drawn, below[level])
    aucs: Floats = np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)
    return aucs


def _sums_before(rows: npt.NDArray[np.int32], cuts: npt.NDArray[np.intp]) -> Floats:
    """Sums (K, D) of the rows (n, D) before each cut (K,)."""
    starts, segment = np.unique(np.append(cuts, 0), return_inverse=True)
    ends = np.zeros((len(starts), rows.shape[1]))
    inner = starts[starts < len(rows)]
    if len(inner):
        sums = np.add.reduceat(rows, inner, axis=0)
        np.cumsum(sums[: len(starts) - 1], axis=0, out=ends[1:])
    totals: Floats = ends[segment[: len(cuts)]]
    return totals


def _finite(name: str, values: npt.ArrayLike, ndim: int = 1) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != ndim:
        raise ValueError(f"{name} has shape {x.shape}; expected {ndim} dimensions")
    if not np.isfinite(x).all():
        raise ValueError(
            f"{name} has {int((~np.isfinite(x)).sum())} values that are not finite; leave them out by name"
        )
    return x


def _labels(labels: npt.ArrayLike, ndim: int, *, masked: bool = False) -> npt.NDArray[np.int8]:
    y = np.asarray(labels)
    allowed = (-1, 0, 1) if masked else (0, 1)
    if y.ndim != ndim:
        raise ValueError(f"labels have shape {y.shape}; expected {ndim} dimensions")
    if not np.isin(y, allowed).all():
        expected = "0, 1 and −1 (unlabelled)" if masked else "0 and 1"
        raise ValueError(
            f"labels hold {sorted(set(np.unique(y).tolist()) - set(allowed))[:5]}; expected {expected} only"
        )
    return y.astype(np.int8)


def _same_shape(labels: npt.NDArray[np.int8], scores: Floats) -> None:
    if labels.shape != scores.shape:
        raise ValueError(f"labels have shape {labels.shape} and scores {scores.shape}; expected the same (N, C)")
