"""Reward parameters from preferences: the Boltzmann-rational likelihood and Metropolis-Hastings.

With returns R_θ(τ) and a set D of pairs (i, j), each saying that τ_i is preferred to τ_j,
    P[τ_i ≻ τ_j | θ] = exp(β R_θ(τ_i)) / (exp(β R_θ(τ_i)) + exp(β R_θ(τ_j)))
    L(θ) = − Σ_{(i,j) ∈ D} w_ij log P[τ_i ≻ τ_j | θ],  p(θ | D) ∝ exp(−L(θ)) p(θ)
The paper has w = 1. But a ranking of K trajectories, up to K (K − 1) / 2 pairs, says about as
much as K − 1 pairs. So w = 2 / K (a composite likelihood: Varin, Reid & Firth, 2011).
Thresholds inside a reward make L piecewise constant, so the posterior is sampled:

    from mh import pairs_of, preference_loss, sample_posterior
    force = [0.0, 0.2, 0.3, 1.5]  # in each of four trajectories
    pairs = pairs_of([[1, 2], [0, 3]])  # 1 and 2 are equally good, and better than 0 and 3
    def log_likelihood(theta):  # θ (N, 2): the least force of a touch, and of a knock
        returns = 5.0 * (theta[:, :1] < force) - 5.0 * (theta[:, 1:] < force)
        return -preference_loss(returns, pairs, weights=2 / 4)
    posterior = sample_posterior(log_likelihood, centre=[1.0, 2.0], rng=0)
    theta = posterior.estimate(log_likelihood)
    print(theta, posterior.interval(0.9), posterior.mixed)
    # For plots: arviz.convert_to_dataset({"theta": posterior.samples})
"""

from dataclasses import dataclass
from itertools import combinations, product
from statistics import NormalDist

import numpy as np

BETA = 0.9  # Boltzmann rationality, the paper's value
PRIOR_STD = np.log(4.0)  # of log θ: one standard deviation is a factor of four
CHAINS, TRIES = 16, 100  # TRIES: draws from the prior for each chain, to find its start
STEPS = (200, 400, 800, 1600)  # of each chain, by round
# ESS 400: the standard error of the mean is 1/20 of the posterior's standard deviation. R-hat 1.05:
# 32 half-chains that have mixed reach 1.04 by chance.
MAX_RHAT, MIN_ESS = 1.05, 400


def pairs_of(ranking) -> np.ndarray:
    """The pairs (better, worse), (M, 2), of a ranking: groups of equal indices, best first."""
    pairs = [pair for better, worse in combinations(ranking, 2) for pair in product(better, worse)]
    return np.array(pairs, dtype=int).reshape(-1, 2)


def discordance(returns, pairs) -> np.ndarray:
    """Share, shape (...), of pairs that returns (..., K) order otherwise; ties, NaN count half."""
    x = np.diff(np.take(returns, np.reshape(pairs, (-1, 2)).astype(int), axis=-1))[..., 0]
    return (0.5 + 0.5 * np.nan_to_num(np.sign(x))).sum(axis=-1) / max(1, x.shape[-1])


def preference_loss(returns, pairs, weights=1.0, beta=BETA) -> np.ndarray:
    """L(θ), shape (...), of returns (..., K), pairs (M, 2) and weights (M,) or one number."""
    x = beta * np.diff(np.take(returns, np.reshape(pairs, (-1, 2)).astype(int), axis=-1))[..., 0]
    return (weights * (np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0))).sum(axis=-1)


class SamplerError(ValueError):
    """No θ with a finite likelihood was found."""


@dataclass
class Posterior:
    """Draws of θ from C chains of S steps, and what says whether to trust them."""

    samples: np.ndarray  # (C, S, P)
    mean: np.ndarray  # (P,), geometric for positive parameters
    acceptance: float  # share of the steps in which θ moved
    rhat: np.ndarray  # (P,)
    ess: np.ndarray  # (P,)

    def interval(self, mass=0.9) -> np.ndarray:
        """(2, P): the central interval that holds `mass` of the draws."""
        return np.quantile(self.samples, [(1 - mass) / 2, (1 + mass) / 2], axis=(0, 1))

    def estimate(self, log_likelihood, share=0.1) -> np.ndarray:
        """One θ (P,): the mean of the `share` of the draws with the highest likelihood.

        Thresholds split the posterior into modes, and the mean of all draws may lie between two.
        """
        draws = self.samples.reshape(-1, self.samples.shape[-1])
        draws = draws[:: len(draws) // 1_000 + 1]
        likelihood = log_likelihood(draws)
        best = draws[likelihood >= np.quantile(likelihood, 1 - share)]
        positive = (best > 0).all(axis=0)
        mean = np.log(best, out=best.copy(), where=positive).mean(axis=0)
        return np.exp(mean, out=mean, where=positive)

    @property
    def mixed(self) -> bool:
        return bool(np.all(self.rhat < MAX_RHAT) and np.all(self.ess > MIN_ESS))


def sample_posterior(
    log_likelihood, centre, prior_std=PRIOR_STD, steps=STEPS, rng=None, positive=None
) -> Posterior:
    """Draws θ from exp(log_likelihood(θ)) p(θ); log_likelihood maps θ (N, P) to (N,).

    Where `positive` (by default centre > 0), log θ ~ N(log centre, prior_std²) a priori, else
    θ ~ N(centre, (prior_std max(1, |centre|))²). The first round of `steps` is burn-in, and so is
    each later one that has not mixed; the last is returned, mixed or not. rng: a Generator or a
    seed. Raises SamplerError if no θ has a finite likelihood.
    """
    centre, rng = np.array(centre, dtype=float, ndmin=1), np.random.default_rng(rng)
    positive = np.broadcast_to(centre > 0 if positive is None else positive, centre.shape)
    if not np.isfinite(centre).all() or (centre[positive] <= 0).any():
        raise ValueError("centre must be finite, and above zero for positive parameters")
    dim, scale = len(centre), prior_std * np.where(positive, 1.0, np.maximum(1.0, np.abs(centre)))
    middle = np.log(centre, out=centre, where=positive)

    def theta_of(z):  # z is standard normal under the prior
        u = middle + scale * z
        return np.exp(u, out=u, where=positive)

    def log_density(z):
        with np.errstate(all="ignore"):
            value = np.reshape(log_likelihood(theta_of(z)), len(z)) - 0.5 * (z**2).sum(axis=-1)
        return np.where(np.isfinite(value), value, -np.inf)

    z = rng.standard_normal((TRIES, CHAINS, dim))
    x = z[np.isfinite([log_density(block) for block in z])]
    if not len(x):
        raise SamplerError("Metropolis-Hastings found no parameters with a finite likelihood")
    x, mean, covariance = x[np.arange(CHAINS) % len(x)], np.zeros(dim), np.eye(dim)
    for number, length in enumerate(steps):
        z = metropolis(log_density, x, mean, covariance, length, rng)
        rhat, ess = rhat_ess(z)
        acceptance = float(np.diff(z, axis=1).any(axis=-1).mean())
        posterior = Posterior(theta_of(z), theta_of(z.mean(axis=(0, 1))), acceptance, rhat, ess)
        if number and posterior.mixed:
            break
        x, recent = z[:, -1], z[:, length // 2 :].reshape(-1, dim)
        mean, covariance = recent.mean(axis=0), np.cov(recent.T) + 1e-8 * np.eye(dim)
    return posterior


def metropolis(log_density, x, mean, covariance, steps, rng) -> np.ndarray:
    """Draws (C, steps, P) by Metropolis-Hastings from x (C, P).

    With u ~ U(0, 1) and ξ ~ N(0, covariance), x' = mean + √(1−u) (x − mean) + √u ξ is
    reversible for N(mean, covariance) (Cotter et al., 2013). So the chance to accept x' is
    w(x') / w(x), with w the ratio of the target's density to this normal's.
    """
    root, draws = np.linalg.cholesky(covariance), np.empty((len(x), steps, x.shape[1]))
    y = np.linalg.solve(root, (x - mean).T).T  # standard normal where x is N(mean, covariance)
    ratio = log_density(x) + 0.5 * (y**2).sum(axis=-1)
    for t in range(steps):
        u = rng.random((len(x), 1))
        new = np.sqrt(1 - u) * y + np.sqrt(u) * rng.standard_normal(x.shape)
        new_ratio = log_density(mean + new @ root.T) + 0.5 * (new**2).sum(axis=-1)
        accept = np.log(rng.random(len(x))) < new_ratio - ratio
        y, ratio = np.where(accept[:, None], new, y), np.where(accept, new_ratio, ratio)
        draws[:, t] = mean + y @ root.T
    return draws


def rhat_ess(draws) -> tuple[np.ndarray, np.ndarray]:
    """R-hat, ESS (P,) of draws (C, S, P) (Vehtari et al., 2021); inf, 0 if stuck or not finite."""
    valid = np.isfinite(draws).all(axis=(0, 1)) & (draws != draws[:, :1]).any(axis=(0, 1))
    draws, n = np.where(valid, draws, 0.0).transpose(2, 0, 1), draws.shape[1] // 2
    # Halves of chains, and their distances from the median: R-hat of location and of spread.
    halves, size = np.concatenate([draws[..., :n], draws[..., -n:]], axis=1), 2 * n * draws.shape[1]
    x = np.array([halves, np.abs(halves - np.median(halves, axis=(1, 2), keepdims=True))])
    # Rank normalisation; ties share their average rank.
    levels = (np.arange(2, 2 * size + 1) / 2 - 0.375) / (size + 0.25)  # of ranks 1, 1.5, ..., size
    quantiles = np.array([NormalDist().inv_cdf(level) for level in levels])
    for row in x.reshape(-1, size):
        _, place, count = np.unique(row, return_inverse=True, return_counts=True)
        row[:] = quantiles[2 * np.cumsum(count) - count - 1][place]
    within, between = x.var(axis=-1, ddof=1).mean(axis=-1), x.mean(axis=-1).var(axis=-1, ddof=1)
    # Autocorrelation rho by FFT, and its sum by Geyer's (1992) initial monotone sequence.
    spectrum = np.fft.rfft(x[0] - x[0].mean(axis=-1, keepdims=True), 2 * n)
    covariance = np.fft.irfft(np.abs(spectrum) ** 2)[..., :n].mean(axis=1).T / n  # (n, P)
    with np.errstate(divide="ignore", invalid="ignore"):
        rhat = np.sqrt(1 - 1 / n + np.fmax(*(between / within)))
        rho = 1 - (within[0] - covariance) / (within[0] * (1 - 1 / n) + between[0])
    rho[0] = 1.0
    sums = rho[: n - n % 2].reshape(n // 2, 2, -1).sum(axis=1)
    kept = np.minimum.accumulate(sums, axis=0) * np.logical_and.accumulate(sums > 0, axis=0)
    ess = size / np.maximum(2 * kept.sum(axis=0) - 1, 1 / np.log10(size))
    return np.where(valid, rhat, np.inf), np.where(valid, ess, 0.0)
