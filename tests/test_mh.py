"""The sampler against posteriors known in closed form, the diagnostics against ArviZ."""

import math

import numpy as np
import pytest
from conftest import example, run_alone

import mh
from mh import Posterior, metropolis, preference_loss, rhat_ess, sample_posterior

LOG4 = math.log(4)


def flat(theta):
    return np.zeros(len(theta))


def z_of(posterior):
    """Draws on the scale on which the prior is standard normal, where its centre is 1."""
    return np.log(posterior.samples) / LOG4


def test_docstring_example(tmp_path):
    check = "\nassert posterior.mixed and theta[0] < 0.2 and 0.3 < theta[1] < 1.5"
    run_alone(mh, example(mh) + check, tmp_path)


def test_pairs_of():
    pairs = mh.pairs_of([[2], [0, 3], [1]])
    assert sorted(pairs.tolist()) == [[0, 1], [2, 0], [2, 1], [2, 3], [3, 1]]
    for ranking in ([], [[0, 1, 2]]):
        pairs = mh.pairs_of(ranking)
        assert pairs.shape == (0, 2) and np.issubdtype(pairs.dtype, np.integer)


def test_discordance():
    pairs = mh.pairs_of([[0], [1], [2]])
    batch = [[[3, 2, 1], [1, 2, 3]], [[2, 2, 1], [1, 1, 1]]]
    np.testing.assert_allclose(mh.discordance(batch, pairs), [[0, 1], [1 / 6, 0.5]])
    assert mh.discordance([3, 1, 2], pairs) == pytest.approx(1 / 3)
    np.testing.assert_array_equal(mh.discordance(np.ones((4, 3)), []), np.zeros(4))
    assert mh.discordance([np.nan, 2, 1], pairs) == pytest.approx(1 / 3)


def test_loss_equation():
    returns, pairs, weights = [1.0, 3.0, 2.5], [(1, 0), (0, 2), (1, 2)], [0.5, 2.0, 0.25]
    for beta in (0.9, 0.7):
        losses = []
        for i, j in pairs:
            a, b = math.exp(beta * returns[i]), math.exp(beta * returns[j])
            losses.append(-math.log(a / (a + b)))
        batch = [returns, [0.0, 0.0, 0.0]]
        expected = [np.dot(weights, losses), 2.75 * math.log(2)]
        np.testing.assert_allclose(preference_loss(batch, pairs, weights, beta), expected)
        assert preference_loss(returns, pairs, 0.25, beta) == pytest.approx(sum(losses) / 4)
    assert preference_loss(returns, pairs) == preference_loss(returns, pairs, 1, 0.9)
    assert preference_loss(returns, []) == 0
    # Nothing overflows.
    np.testing.assert_allclose(preference_loss([[1e6, 0], [0, 1e6]], [(0, 1)], 2.0), [0, 1.8e6])


def test_real_parameters():
    # positive=False: N(3, (1.5 · 3)²); by the centre's sign: N(−0.5, 1.5²); positive: log-normal.
    signs = [False, False, False, True]
    posterior = sample_posterior(flat, [3.0, -0.5, 0.0, 1.0], 1.5, rng=1, positive=signs)
    draws = posterior.samples
    np.testing.assert_allclose(draws.std(axis=(0, 1))[:3], [4.5, 1.5, 1.5], rtol=0.15)
    np.testing.assert_allclose(posterior.mean, [3.0, -0.5, 0.0, 1.0], atol=0.5)
    estimate = posterior.estimate(flat)  # all draws are as likely
    np.testing.assert_allclose(estimate, posterior.mean, atol=0.3)
    assert draws[..., 3].min() > 0 and np.log(draws[..., 3]).std() == pytest.approx(1.5, rel=0.15)
    default = sample_posterior(flat, [-0.5, 1.0], rng=1)
    assert default.samples[..., 0].min() < -0.5 and default.samples[..., 1].min() > 0


@pytest.mark.parametrize("centre", [-1.0, 0.0, math.nan, math.inf])
def test_impossible_centre(centre):
    with pytest.raises(ValueError, match="centre"):
        sample_posterior(flat, [centre], positive=[True])


def test_known_mean_is_geometric():
    # A normal likelihood in log θ, as strong as the prior: the mean lies halfway.
    def log_likelihood(theta):
        return -0.5 * (np.log(theta[:, 0] / 9) / LOG4) ** 2

    posterior = sample_posterior(log_likelihood, [1.0, 1.0], rng=0)
    np.testing.assert_allclose(posterior.mean, [3.0, 1.0], rtol=0.15)
    np.testing.assert_allclose(z_of(posterior).std(axis=(0, 1)), [math.sqrt(0.5), 1], rtol=0.1)
    np.testing.assert_allclose(posterior.interval(0.9)[:, 1], [0.1, 9.8], rtol=0.2)


def test_estimate_lies_in_a_mode():
    # Good below 0.1, worse above, and bad between 0.3 and 3: the mean of all draws lies there.
    def log_likelihood(theta):
        x = theta[:, 0]
        return np.select([x < 0.1, x < 0.3, x < 3.0], [0.0, -1.0, -9.0], -1.0)

    posterior = sample_posterior(log_likelihood, [1.0], rng=0)
    assert 0.1 < posterior.mean[0] < 3.0
    assert posterior.estimate(log_likelihood)[0] < 0.1
    wide = posterior.estimate(log_likelihood, share=1.0)
    np.testing.assert_allclose(wide, posterior.mean, rtol=0.1)


def test_narrow_ridges():
    # Three products of two parameters each, known to 2 %; along each ridge the prior remains.
    def log_likelihood(theta):
        return -0.5 * ((np.log(theta[:, :3] * theta[:, 3:]) / 0.02) ** 2).sum(axis=1)

    posterior = sample_posterior(log_likelihood, [1.0] * 6, rng=0)
    z = z_of(posterior)
    assert posterior.mixed
    assert np.abs((z[..., :3] + z[..., 3:]).std(axis=(0, 1)) * LOG4 - 0.02).max() < 0.003
    np.testing.assert_allclose(z.std(axis=(0, 1)), math.sqrt(0.5), rtol=0.15)


def test_two_modes():
    # Masses of 1 and 3 around ∓1, each a tenth wide, in three dimensions.
    def log_likelihood(theta):
        z = np.log(theta) / LOG4
        low, high = (-50 * ((z - mode) ** 2).sum(axis=1) for mode in (-1, 1))
        return np.logaddexp(low, math.log(3) + high)

    posterior = sample_posterior(log_likelihood, [1.0] * 3, rng=0)
    assert posterior.ess.min() > 100
    assert (posterior.samples[..., 0] > 1).mean() == pytest.approx(0.75, abs=0.12)


def test_small_support():
    # It holds half a percent of the prior, so few of the first draws lie inside.
    def log_likelihood(theta):
        return np.select([theta[:, 0] < 2, theta[:, 0] > 2.05], [np.nan, np.inf], 0.0)

    posterior = sample_posterior(log_likelihood, [1.0], rng=0)
    assert posterior.mixed and posterior.samples.shape[0] == mh.CHAINS
    assert posterior.samples.min() >= 2 and posterior.samples.max() <= 2.05
    assert posterior.mean[0] == pytest.approx(2.025, abs=0.01)
    with pytest.raises(mh.SamplerError, match="finite likelihood"):
        sample_posterior(lambda theta: np.full(len(theta), -np.inf), [1.0], rng=0)


def test_rounds():
    def log_likelihood(theta):
        return -0.5 * ((np.log(theta[:, 0]) - 8) / 0.05) ** 2

    short = sample_posterior(log_likelihood, [1.0], steps=(20, 40), rng=0)
    assert not short.mixed and short.samples.shape == (mh.CHAINS, 40, 1)
    # The third round has mixed and is the last.
    long = sample_posterior(log_likelihood, [1.0], steps=(20, 40, 2000, 4000), rng=0)
    assert long.mixed and long.samples.shape == (mh.CHAINS, 2000, 1)
    moved = (np.diff(long.samples[..., 0], axis=1) != 0).mean()
    assert long.acceptance == pytest.approx(moved) and 0.02 < moved < 1
    # The first round is burn-in, however well it looks.
    assert sample_posterior(flat, [1.0], steps=(2000, 1000), rng=0).samples.shape[1] == 1000


def test_seeds():
    def draw(rng):
        return sample_posterior(flat, [1.0], steps=(50,), rng=rng).samples

    np.testing.assert_array_equal(draw(0), draw(np.random.default_rng(0)))
    assert not np.array_equal(draw(0), draw(1)) and not np.array_equal(draw(None), draw(None))


def test_one_step_leaves_the_target():
    # Draws of a normal are still its draws after a step whose proposals follow another normal.
    rng, covariance = np.random.default_rng(0), np.array([[2.0, 1.0], [1.0, 3.0]])
    start, mean = rng.standard_normal((100_000, 2)), np.array([0.5, 0.0])
    draws = metropolis(lambda z: -0.5 * (z**2).sum(axis=1), start, mean, covariance, 1, rng)[:, 0]
    np.testing.assert_allclose(draws.mean(axis=0), 0, atol=0.015)
    np.testing.assert_allclose(np.cov(draws.T), np.eye(2), atol=0.02)


def test_simulation_based_calibration():
    # Talts et al. (2018): θ from the prior, preferences from θ; the rank of θ among draws of its
    # posterior is uniform. Each chain has its own data set, and proposals follow a wrong normal.
    rng, n = np.random.default_rng(0), 1000
    near, force = rng.uniform(0, 4, (n, 10)), np.exp(rng.normal(0, 1, (n, 10, 5)))
    better, worse = np.triu_indices(10, 1)

    def margins(z):
        theta = np.exp(0.7 * z)
        counts = (force > theta[:, 2, None, None]).sum(axis=-1)
        returns = theta[:, :1] * near + 0.5 * theta[:, 1:2] * counts
        return 0.9 * (returns[:, better] - returns[:, worse])

    truth = rng.standard_normal((n, 3))
    sign = np.where(rng.random((n, 45)) < 1 / (1 + np.exp(-margins(truth))), 1.0, -1.0)

    def log_likelihood(z):
        return -np.logaddexp(0, -sign * margins(z)).sum(axis=-1)

    def log_density(z):
        return log_likelihood(z) - 0.5 * (z**2).sum(axis=-1)

    covariance = np.array([[1.0, 0.4, 0.0], [0.4, 0.8, -0.2], [0.0, -0.2, 0.6]])
    start, mean = rng.standard_normal((n, 3)), np.array([0.2, -0.1, 0.1])
    draws = metropolis(log_density, start, mean, covariance, 604, rng)
    kept = draws[:, 300::16]  # 19 draws, so 20 ranks
    ranks = list((kept < truth[:, None]).mean(axis=1).T)
    likelihoods = np.stack([log_likelihood(z) for z in kept.transpose(1, 0, 2)], axis=1)
    ranks.append((likelihoods < log_likelihood(truth)[:, None]).mean(axis=1))
    # In standard errors of a uniform mean.
    errors = [(rank.mean() - 0.5) / np.sqrt(1 / 12 / n) for rank in ranks]
    assert np.abs(errors).max() < 2.5, errors
    assert all(np.histogram(rank, 4, (0, 1))[0].min() > 0.8 * n / 4 for rank in ranks)


@pytest.mark.parametrize(
    "rho, steps, rhat, ess",
    [(0.6, 101, 1.04034292, 150.60022075), (-0.3, 100, 1.00342974, 1349.48500217)],
)
def test_diagnostics_against_arviz(rho, steps, rhat, ess):
    draws = np.random.default_rng(1).standard_normal((5, steps, 1))
    for t in range(1, steps):
        draws[:, t] += rho * draws[:, t - 1]
    found = rhat_ess(np.round(draws, 1))  # with ties
    np.testing.assert_allclose(np.ravel(found), [rhat, ess], rtol=1e-7)


def test_diagnostics_of_chains_with_one_mean():
    draws = np.random.default_rng(0).standard_normal((8, 500, 3))
    draws[0, :, 1] = 0.0  # stuck in the middle, where only the folded R-hat sees it
    draws[0, :, 2] *= 5
    rhat, ess = rhat_ess(draws)
    assert rhat[0] < 1.01 and rhat[1:].min() > 1.05 and ess[0] > 3000


def test_diagnostics_without_movement():
    draws = np.random.default_rng(0).standard_normal((4, 100, 5))
    draws[2, 30, :2] = math.nan, math.inf
    draws[..., 2] = 0.1
    draws[..., 3] = np.arange(4)[:, None] / 3
    rhat, ess = rhat_ess(draws)
    assert (rhat[:4] == math.inf).all() and (ess[:4] == 0).all()
    assert rhat[4] < 1.1 and ess[4] > 200


@pytest.mark.parametrize("rhat, ess, mixed", [(1.04, 401, 1), (1.06, 999, 0), (1, 399, 0)])
def test_mixed(rhat, ess, mixed):
    rhats, sizes = np.array([1.0, rhat]), np.array([1e4, ess])
    assert Posterior(np.ones((2, 4, 2)), np.ones(2), 0.3, rhats, sizes).mixed == mixed
