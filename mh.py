"""Reward parameters from preferences: the Boltzmann-rational likelihood and Metropolis-Hastings.

Needs numpy only, and knows nothing of robots: a trajectory is its return, a reward its parameter vector θ.

With returns R_θ(τ) and a set D of pairs (i, j), each saying that τ_i is preferred to τ_j,

    P[τ_i ≻ τ_j | θ] = exp(β R_θ(τ_i)) / (exp(β R_θ(τ_i)) + exp(β R_θ(τ_j)))
    L(θ) = − Σ_{(i,j) ∈ D} log P[τ_i ≻ τ_j | θ]
    p(θ | D) ∝ exp(−L(θ)) p(θ)

Thresholds inside the reward make L piecewise constant, so its gradient says nothing and the posterior is sampled:

    def log_likelihood(theta):                                     # theta (C, P), one row per chain
        return -preference_loss(returns(theta), pairs)             # returns (C, K)
    posterior = sample_posterior(log_likelihood, centre=[1.0, 2.0], rng=np.random.default_rng(1))
    posterior.median, posterior.rhat, posterior.mixed
"""

from dataclasses import dataclass

import numpy as np

BETA = 0.9                  # Boltzmann rationality, the paper's value
PRIOR_STD = np.log(10.0)    # of log θ: one standard deviation is a factor of ten
TARGET_ACCEPTANCE = 0.3     # near the optimum of random walks in a few to ten dimensions (Roberts et al., 1997)
MAX_RHAT, MIN_ESS = 1.1, 100.0   # beyond these the draws are not to be trusted (Gelman et al., 2013)


def preference_loss(returns, pairs, beta=BETA):
    """L(θ) above.

    returns: (..., K), R_θ of K trajectories; leading axes may be chains. pairs: int (M, 2), the preferred one
    first. Returns shape (...,). Computed as Σ log(1 + exp(−β (R_i − R_j))), which does not overflow.
    """
    returns, pairs = np.asarray(returns, dtype=float), np.asarray(pairs, dtype=int).reshape(-1, 2)
    margin = returns[..., pairs[:, 0]] - returns[..., pairs[:, 1]]
    return np.logaddexp(0.0, -beta * margin).sum(axis=-1)


@dataclass
class Posterior:
    """Draws of θ and what says whether to trust them.

    samples (C, S, P) in θ's own scale, C chains of S draws; acceptance, the share of proposals accepted after
    burn-in; rhat (P,) and ess (P,), computed where θ was sampled (log θ for positive parameters).
    """

    samples: np.ndarray
    acceptance: float
    rhat: np.ndarray
    ess: np.ndarray

    @property
    def median(self):
        """(P,) Marginal medians: unlike a mean they are the same in θ and in log θ."""
        return np.median(self.samples, axis=(0, 1))

    def interval(self, mass=0.9):
        """(2, P) The central interval that holds `mass` of each parameter's draws."""
        return np.quantile(self.samples, [(1 - mass) / 2, (1 + mass) / 2], axis=(0, 1))

    @property
    def mixed(self):
        """Whether every parameter's chains agree (R-hat) and hold enough independent draws (ESS)."""
        return bool(np.all(self.rhat < MAX_RHAT) and np.all(self.ess > MIN_ESS))


def sample_posterior(log_likelihood, centre, prior_std=PRIOR_STD, chains=8, burn_in=1500, steps=2500, rng=None):
    """Draws θ from exp(log_likelihood(θ)) p(θ) by Metropolis-Hastings, all chains in one vectorised evaluation.

    A parameter whose `centre` is above zero is positive and sampled as log θ ~ N(log centre, prior_std²); any
    other is real and sampled as θ ~ N(centre, (prior_std · max(1, |centre|))²).

    log_likelihood: maps θ of shape (C, P) to (C,); NaN and infinities count as impossible. centre: (P,).
    Returns a Posterior. Raises ValueError when no θ with a finite likelihood is found.
    """
    centre = np.atleast_1d(np.asarray(centre, dtype=float))
    positive = centre > 0
    safe = np.where(positive, centre, 1.0)
    middle = np.where(positive, np.log(safe), centre)
    scale = np.where(positive, prior_std, prior_std * np.maximum(1.0, np.abs(centre)))

    def theta_of(z):                                                # z is standard normal under the prior
        u = middle + scale * z
        return np.where(positive, np.exp(np.minimum(u, 700.0)), u)

    def log_density(z):
        value = np.asarray(log_likelihood(theta_of(z)), dtype=float) - 0.5 * (z ** 2).sum(axis=-1)
        return np.where(np.isfinite(value), value, -np.inf)

    # Chains start as draws from the prior: wider than the posterior, as R-hat asks for.
    rng = rng or np.random.default_rng()
    start = rng.standard_normal((chains, len(centre)))
    draws, acceptance = metropolis_hastings(log_density, start, burn_in, steps, rng)
    return Posterior(theta_of(draws), acceptance, split_rhat(draws), effective_sample_size(draws))


def metropolis_hastings(log_density, start, burn_in, steps, rng):
    """Random-walk Metropolis-Hastings (Metropolis et al., 1953; Hastings, 1970) with several chains at once.

    log_density: (C, P) to (C,), up to a constant. start: (C, P). The proposal's covariance and scale follow the
    chains during burn-in (Haario et al., 2001) and stay fixed after it, so that what is kept is a Markov chain
    with the right stationary distribution. Returns (draws (C, steps, P), acceptance rate after burn-in).
    Raises ValueError when no chain has found a finite density by the end of burn-in.
    """
    x = np.array(start, dtype=float)
    chains, dim = x.shape
    current = log_density(x)
    factor, log_scale = np.eye(dim), np.log(2.38 / np.sqrt(dim))    # the optimum for a Gaussian
    draws = np.empty((burn_in + steps, chains, dim))
    accepted = 0
    for t in range(burn_in + steps):
        proposal = x + np.exp(log_scale) * rng.standard_normal((chains, dim)) @ factor.T
        proposed = log_density(proposal)
        # The proposal is symmetric: the Hastings ratio is that of the densities. A chain that starts where the
        # density is zero moves on whatever comes.
        accept = np.log(rng.random(chains)) < np.where(np.isneginf(current), np.inf, proposed - current)
        x, current = np.where(accept[:, None], proposal, x), np.where(accept, proposed, current)
        draws[t] = x
        if t < burn_in:
            log_scale += (accept.mean() - TARGET_ACCEPTANCE) / np.sqrt(t + 1)
            if (t + 1) % 100 == 0:
                recent = draws[(t + 1) // 2:t + 1].reshape(-1, dim)
                factor = np.linalg.cholesky(np.atleast_2d(np.cov(recent, rowvar=False)) + 1e-6 * np.eye(dim))
            if t == burn_in - 1 and np.isneginf(current).any():
                alive = np.flatnonzero(~np.isneginf(current))
                if not len(alive):
                    raise ValueError("Metropolis-Hastings found no parameters with a finite likelihood")
                lost = np.flatnonzero(np.isneginf(current))
                x[lost], current[lost] = x[alive[lost % len(alive)]], current[alive[lost % len(alive)]]
        else:
            accepted += accept.sum()
    return draws[burn_in:].transpose(1, 0, 2), accepted / (steps * chains)


def split_rhat(draws):
    """Split R-hat of each parameter (Gelman et al., 2013, eq. 11.4): draws (C, S, P) to (P,), 1 when mixed."""
    half = draws.shape[1] // 2
    split = np.concatenate([draws[:, :half], draws[:, -half:]])
    within = split.var(axis=1, ddof=1).mean(axis=0)
    between = split.mean(axis=1).var(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rhat = np.sqrt((within * (half - 1) / half + between) / within)
    return np.where(within > 0, rhat, np.where(between > 0, np.inf, 1.0))


def effective_sample_size(draws):
    """Effective sample size of each parameter (Gelman et al., 2013, eq. 11.8): draws (C, S, P) to (P,).

    Autocorrelations are summed in pairs until a pair turns negative (Geyer, 1992) and pairs may not grow.
    Constant draws have no information on mixing: their size is 0.
    """
    half = draws.shape[1] // 2
    split = np.concatenate([draws[:, :half], draws[:, -half:]])
    chains, n, _ = split.shape
    centred = split - split.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(centred, 2 * n, axis=1)
    covariance = np.fft.irfft(spectrum * spectrum.conj(), axis=1)[:, :n].mean(axis=0) / n
    within = covariance[0] * n / (n - 1)
    total = within * (n - 1) / n + split.mean(axis=1).var(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = 1 - (within - covariance) / total
    rho[0] = 1.0
    pairs = rho[0:2 * (n // 2):2] + rho[1:2 * (n // 2):2]
    positive = np.logical_and.accumulate(pairs > 0, axis=0)
    tau = 2 * (np.minimum.accumulate(pairs, axis=0) * positive).sum(axis=0) - 1
    return np.where(total > 0, chains * n / np.maximum(tau, 1 / np.log10(chains * n)), 0.0)
