"""The sampler against posteriors known in closed form, the loss against its equation."""

import math

import numpy as np
import pytest

from mh import effective_sample_size, medoid, metropolis_hastings, preference_loss, sample_posterior, split_rhat


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_loss_is_the_equation():
    returns, pairs, beta = [1.0, 3.0, 2.5], [(1, 0), (0, 2)], 0.9
    expected = 0.0
    for i, j in pairs:
        a, b = math.exp(beta * returns[i]), math.exp(beta * returns[j])
        expected -= math.log(a / (a + b))
    assert preference_loss(returns, pairs) == pytest.approx(expected)
    batch = np.array([returns, [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(preference_loss(batch, pairs), [expected, 2 * math.log(2)])


def test_loss_of_no_pairs_and_of_huge_returns():
    assert preference_loss([1.0, 2.0], []) == 0
    assert preference_loss([1e6, -1e6], [(0, 1)]) == 0
    assert preference_loss([1e6, -1e6], [(1, 0)]) == pytest.approx(0.9 * 2e6)


def test_posterior_of_gaussian_likelihoods():
    # Conjugate: precision adds up. The first parameter is positive (log scale), the second real.
    prior_std = math.log(10)

    def log_likelihood(theta):
        return -0.5 * ((np.log(theta[:, 0]) - 1.5) / 0.5) ** 2 - 0.5 * (theta[:, 1] - 3.0) ** 2

    posterior = sample_posterior(log_likelihood, [2.0, 0.0], prior_std, rng=np.random.default_rng(1))
    for x, middle, mean, std in ((np.log(posterior.samples[..., 0]), math.log(2.0), 1.5, 0.5),
                                 (posterior.samples[..., 1], 0.0, 3.0, 1.0)):
        variance = 1 / (1 / prior_std ** 2 + 1 / std ** 2)
        expected = variance * (middle / prior_std ** 2 + mean / std ** 2)
        assert x.mean() == pytest.approx(expected, abs=0.1 * std)
        assert x.std() == pytest.approx(math.sqrt(variance), rel=0.1)
    assert posterior.mixed
    assert posterior.samples.shape == (8, 6000, 2)
    low, high = posterior.interval(0.9)
    assert (low < posterior.medoid).all() and (posterior.medoid < high).all()


def test_medoid_lies_where_draws_are_and_medians_need_not():
    # Three modes on three axes: the medians of each parameter meet at the origin, where there is no draw.
    rng = np.random.default_rng(0)
    draws = np.repeat(np.eye(3), [320, 280, 200], axis=0) + 0.01 * rng.standard_normal((800, 3))
    np.testing.assert_allclose(np.median(draws, axis=0), [0, 0, 0], atol=0.05)
    np.testing.assert_allclose(medoid(draws.reshape(8, 100, 3)), [1, 0, 0], atol=0.05)


def test_posterior_of_a_threshold():
    # r = 1 where force > θ; one trajectory presses with 0.2 N for 50 steps, the other never, and is preferred less.
    # Then P[θ < 0.2 | D] follows from the prior's mass below 0.2 and two values of the likelihood.
    force = np.repeat([0.2, 0.0], 50)

    def log_likelihood(theta):
        return -preference_loss((force > theta).reshape(-1, 2, 50).sum(axis=-1), [(0, 1)])

    posterior = sample_posterior(log_likelihood, [1.0], rng=np.random.default_rng(0))
    below = normal_cdf(math.log(0.2) / math.log(10))
    explained, ignored = below / (1 + math.exp(-0.9 * 50)), (1 - below) / 2
    assert (posterior.samples < 0.2).mean() == pytest.approx(explained / (explained + ignored), abs=0.03)


def test_posterior_of_a_weight_against_integration():
    pairs = [(0, 1), (1, 2)]
    features = np.array([0.3, 0.1, 0.25])

    def log_likelihood(theta):
        return -preference_loss(theta * features, pairs)

    posterior = sample_posterior(log_likelihood, [2.0], rng=np.random.default_rng(3))
    z = np.linspace(-8, 8, 4001)
    theta = 2.0 * np.exp(z * math.log(10))
    density = np.exp(log_likelihood(theta[:, None]) - 0.5 * z ** 2)
    mean = (density * z).sum() / density.sum()
    std = math.sqrt((density * (z - mean) ** 2).sum() / density.sum())
    drawn = np.log(posterior.samples / 2.0) / math.log(10)
    assert drawn.mean() == pytest.approx(mean, abs=0.1)
    assert drawn.std() == pytest.approx(std, rel=0.1)


def test_finds_the_tenfold_error_of_a_weight():
    # The LLM wrote push_weight = 2; its preferences follow from 20, with reaching worth 1.
    rng = np.random.default_rng(0)
    reach, push = rng.uniform(0, 50, 40), rng.uniform(0, 5, 40)
    truth = reach + 20 * push
    pairs = [(i, j) for i in range(40) for j in range(40) if truth[i] > truth[j] + 5]

    def log_likelihood(theta):
        return -preference_loss(theta[:, :1] * reach + theta[:, 1:] * push, pairs)

    posterior = sample_posterior(log_likelihood, [1.0, 2.0], rng=rng)
    ratio = posterior.samples[..., 1] / posterior.samples[..., 0]
    assert np.median(ratio) == pytest.approx(20, rel=0.1)


def test_same_seed_same_draws():
    def log_likelihood(theta):
        return -theta[:, 0]

    a, b = (sample_posterior(log_likelihood, [1.0], rng=np.random.default_rng(5), burn_in=50, steps=50) for _ in "ab")
    np.testing.assert_array_equal(a.samples, b.samples)


def test_impossible_regions_are_avoided_and_impossible_likelihoods_refused():
    def log_likelihood(theta):
        with np.errstate(invalid="ignore"):
            return np.where(theta[:, 0] < 1, np.nan, 0.0)

    posterior = sample_posterior(log_likelihood, [1.0], rng=np.random.default_rng(0))
    assert posterior.samples.min() >= 1
    with pytest.raises(ValueError, match="finite likelihood"):
        sample_posterior(lambda theta: np.full(len(theta), np.nan), [1.0], burn_in=20, steps=20)


def test_narrow_support_is_found_and_kept():
    # The prior covers the support with 0.4 %: chains that start outside must neither drift away nor be kept there.
    def log_likelihood(theta):
        return np.where((theta[:, 0] > 2) & (theta[:, 0] < 2.04), 0.0, -np.inf)

    posterior = sample_posterior(log_likelihood, [1.0], rng=np.random.default_rng(0), burn_in=2000, steps=2000)
    assert posterior.samples.min() > 2 and posterior.samples.max() < 2.04


def test_what_is_kept_comes_from_one_fixed_kernel():
    # With a flat likelihood the prior is the target; the acceptance rate is that of the kept part alone.
    draws, acceptance = metropolis_hastings(lambda z: np.zeros(len(z)), lambda z: -0.5 * (z ** 2).sum(axis=-1),
                                            np.zeros((8, 2)), 500, 3000, np.random.default_rng(0))
    moved = (np.diff(draws, axis=1) != 0).any(axis=-1)
    assert acceptance == pytest.approx(moved.mean(), abs=0.001)
    assert draws.std() == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="burn_in"):
        sample_posterior(lambda theta: theta[:, 0], [1.0], burn_in=0)


def test_diagnostics_tell_mixed_from_stuck():
    rng = np.random.default_rng(0)
    independent = rng.standard_normal((8, 2000, 1))
    assert split_rhat(independent) == pytest.approx(1, abs=0.01)
    assert effective_sample_size(independent) == pytest.approx(16000, rel=0.1)
    stuck = independent * 0.1 + np.arange(8)[:, None, None]
    assert split_rhat(stuck) > 5
    assert effective_sample_size(stuck) < 20
    drifting = independent + np.linspace(-2, 2, 2000)[None, :, None]   # the same in every chain: only the split shows it
    within = 1 + 4 / 12                                               # of a half: noise and a ramp of length 2
    assert split_rhat(drifting) == pytest.approx(np.sqrt((within + 1) / within), rel=0.05)
    constant = np.zeros((4, 100, 1))
    assert effective_sample_size(constant) == 0


def test_effective_sample_size_of_an_autoregression():
    rng, rho = np.random.default_rng(1), 0.9
    x = np.zeros((8, 4000, 1))
    noise = rng.standard_normal(x.shape)
    for t in range(1, 4000):
        x[:, t] = rho * x[:, t - 1] + noise[:, t]
    assert effective_sample_size(x) == pytest.approx(8 * 4000 * (1 - rho) / (1 + rho), rel=0.2)


def test_two_far_modes_that_no_small_step_connects():
    # A mixture of two narrow modes 4 prior standard deviations apart, with masses 1 and 3.
    def log_likelihood(theta):
        z = np.log(theta[:, 0]) / math.log(10)
        return np.logaddexp(-0.5 * ((z + 2) / 0.05) ** 2, math.log(3) - 0.5 * ((z - 2) / 0.05) ** 2)

    posterior = sample_posterior(log_likelihood, [1.0], rng=np.random.default_rng(2), steps=12000)
    assert (posterior.samples > 1).mean() == pytest.approx(0.75, abs=0.12)
