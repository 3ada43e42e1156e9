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
    posterior.medoid, posterior.interval(), posterior.mixed
"""

from dataclasses import dataclass

import numpy as np

BETA = 0.9                  # Boltzmann rationality, the paper's value
PRIOR_STD = np.log(10.0)    # of log θ: one standard deviation is a factor of ten
MAX_RHAT, MIN_ESS = 1.1, 100.0   # beyond these the draws are not to be trusted (Gelman et al., 2013)


def preference_loss(returns, pairs, beta=BETA):
    """L(θ) above.

    returns: (..., K), R_θ of K trajectories; leading axes may be chains. pairs: int (M, 2), the preferred one
    first. Returns shape (...,). Computed as Σ log(1 + exp(−β (R_i − R_j))), which does not overflow.
    """
    returns, pairs = np.asarray(returns, dtype=float), np.asarray(pairs, dtype=int).reshape(-1, 2)
    margin = returns[..., pairs[:, 0]] - returns[..., pairs[:, 1]]
    return np.logaddexp(0.0, -beta * margin).sum(axis=-1)


class SamplerError(ValueError):
    """Nothing can be sampled; the message says why."""


@dataclass
class Posterior:
    """Draws of θ and what says whether to trust them.

    samples (C, S, P) in θ's own scale, C chains of S draws; medoid (P,), the draw nearest to all others; acceptance,
    the share of proposals accepted after burn-in; rhat (P,) and ess (P,). Distances and diagnostics are those of the
    space θ was sampled in (log θ for positive parameters).

    The medoid is the estimate to use: a median of all parameters together. Marginal medians may combine into a θ that
    explains nothing, and the highest density often is a spike with little mass, at the edge of a threshold's range.
    """

    samples: np.ndarray
    medoid: np.ndarray
    acceptance: float
    rhat: np.ndarray
    ess: np.ndarray

    def interval(self, mass=0.9):
        """(2, P) The central interval that holds `mass` of each parameter's draws."""
        return np.quantile(self.samples, [(1 - mass) / 2, (1 + mass) / 2], axis=(0, 1))

    @property
    def mixed(self):
        """Whether every parameter's chains agree (R-hat) and hold enough independent draws (ESS)."""
        return bool(np.all(self.rhat < MAX_RHAT) and np.all(self.ess > MIN_ESS))


def sample_posterior(log_likelihood, centre, prior_std=PRIOR_STD, chains=8, burn_in=6000, steps=6000, rng=None):
    """Draws θ from exp(log_likelihood(θ)) p(θ) by Metropolis-Hastings, all chains in one vectorised evaluation.

    A parameter whose `centre` is above zero is positive and sampled as log θ ~ N(log centre, prior_std²); any
    other is real and sampled as θ ~ N(centre, (prior_std · max(1, |centre|))²).

    log_likelihood: maps θ of shape (C, P) to (C,); NaN and infinities count as impossible. centre: (P,).
    Returns a Posterior. Raises SamplerError when no θ with a finite likelihood is found.
    """
    centre = np.atleast_1d(np.asarray(centre, dtype=float))
    positive = centre > 0
    safe = np.where(positive, centre, 1.0)
    middle = np.where(positive, np.log(safe), centre)
    scale = np.where(positive, prior_std, prior_std * np.maximum(1.0, np.abs(centre)))

    def theta_of(z):                                                # z is standard normal under the prior
        u = middle + scale * z
        return np.where(positive, np.exp(np.minimum(u, 700.0)), u)

    def density(z):
        value = np.asarray(log_likelihood(theta_of(z)), dtype=float)
        return np.where(np.isfinite(value), value, -np.inf)

    # Chains start as draws from the prior: wider than the posterior, as R-hat asks for.
    rng = rng or np.random.default_rng()
    start = rng.standard_normal((chains, len(centre)))
    draws, acceptance = metropolis_hastings(density, lambda z: -0.5 * (z ** 2).sum(axis=-1), start, burn_in, steps, rng)
    return Posterior(theta_of(draws), theta_of(medoid(draws)), acceptance, split_rhat(draws),
                     effective_sample_size(draws))


def metropolis_hastings(log_likelihood, log_prior, start, burn_in, steps, rng):
    """Random-walk Metropolis-Hastings (Metropolis et al., 1953; Hastings, 1970) with several chains at once.

    log_likelihood, log_prior: (C, P) to (C,), each up to a constant. start: (C, P), of prior density above zero.
    Half of the proposals move one parameter, by anything from a small step to a jump across the prior: thresholds
    put modes far apart along one axis. The other half move all of them, along the difference between two draws of
    the burn-in (ter Braak & Vrugt, 2008): whatever ridges the posterior has, such differences lie along them.

    Everything that adapts does so in burn-in only, so that what is kept comes from a Markov chain with the right
    stationary distribution: the likelihood is raised to a power that grows from 0 to 1 over the first half (annealing,
    lest chains stay in the first mode they meet), and differences come from the second half of the draws so far.

    Returns (draws (C, steps, P), acceptance rate after burn-in). Raises SamplerError when no chain has found a finite
    likelihood by the end of burn-in.
    """
    if burn_in < 2 or steps < 4:
        raise ValueError(f"burn_in must be 2 or more and steps 4 or more, not {burn_in} and {steps}")
    x = np.array(start, dtype=float)
    chains, dim = x.shape
    likelihood, prior = log_likelihood(x), log_prior(x)
    draws = np.empty((1 + burn_in + steps, chains, dim))
    draws[0] = x
    accepted = 0
    for t in range(1, 1 + burn_in + steps):
        newest = min(t, burn_in)
        archive = draws[newest // 2:newest].reshape(-1, dim)
        first, second = archive[rng.integers(len(archive), size=(2, chains))]
        along = rng.choice((0.1, 0.5, 1.0), (chains, 1)) * (first - second) + 1e-3 * rng.standard_normal((chains, dim))
        axis = np.arange(dim) == rng.integers(dim, size=(chains, 1))
        single = axis * 10 ** rng.uniform(-1.5, 0.3, (chains, 1)) * rng.standard_normal((chains, 1))
        proposal = x + np.where(rng.random((chains, 1)) < 0.5, along, single)
        new_likelihood, new_prior = log_likelihood(proposal), log_prior(proposal)
        # All proposals are symmetric, so the Hastings ratio is that of the densities. Where the likelihood is zero
        # before and after, the prior alone decides, which keeps a lost chain from drifting away.
        power = min(1.0, 2 * t / burn_in) if t <= burn_in else 1.0
        lost = np.isneginf(likelihood) & np.isneginf(new_likelihood)
        gain = np.subtract(new_likelihood, likelihood, out=np.zeros(chains), where=~lost)
        accept = np.log(rng.random(chains)) < power * gain + new_prior - prior
        x = np.where(accept[:, None], proposal, x)
        likelihood, prior = np.where(accept, new_likelihood, likelihood), np.where(accept, new_prior, prior)
        draws[t] = x
        accepted += accept.sum() * (t > burn_in)
        if t == burn_in and np.isneginf(likelihood).all():
            raise SamplerError("Metropolis-Hastings found no parameters with a finite likelihood")
    return draws[1 + burn_in:].transpose(1, 0, 2), accepted / (steps * chains)


def medoid(draws, most=800):
    """The draw with the least mean L1 distance to the others: draws (C, S, P) to (P,), thinned to `most` of them."""
    flat = draws.reshape(-1, draws.shape[-1])
    flat = flat[::-(-len(flat) // most)]
    distances = np.abs(flat[:, None] - flat[None]).sum(axis=-1).mean(axis=1)
    return flat[distances.argmin()]


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
