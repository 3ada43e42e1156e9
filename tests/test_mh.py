"""The sampler against posteriors known in closed form, the loss against its equation."""

import math

import numpy as np
import pytest

from mh import (POWERS, Posterior, SamplerError, effective_sample_size, metropolis_hastings, preference_loss, sample_posterior,
                split_rhat)


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


def test_loss_counts_each_pair_by_its_weight():
    returns, pairs, weights, beta = [1.0, 3.0, 2.5], [(1, 0), (0, 2), (1, 2)], [0.5, 2.0, 0.25], 0.7
    expected = 0.0
    for (i, j), weight in zip(pairs, weights):
        a, b = math.exp(beta * returns[i]), math.exp(beta * returns[j])
        expected -= weight * math.log(a / (a + b))
    assert preference_loss(returns, pairs, np.array(weights), beta) == pytest.approx(expected)
    batch = np.array([returns, [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(preference_loss(batch, pairs, np.array(weights), beta), [expected, 2.75 * math.log(2)])
    # One number weighs all pairs alike, and 1 is the paper's.
    assert preference_loss(returns, pairs, 0.25) == pytest.approx(preference_loss(returns, pairs) / 4)
    assert preference_loss(returns, pairs, np.ones(3)) == pytest.approx(preference_loss(returns, pairs))


def test_loss_of_no_pairs_and_of_huge_returns():
    assert preference_loss([1.0, 2.0], []) == 0
    assert preference_loss([1.0, 2.0], [], np.array([])) == 0
    assert preference_loss([1e6, -1e6], [(0, 1)]) == 0
    assert preference_loss([1e6, -1e6], [(1, 0)]) == pytest.approx(0.9 * 2e6)


def test_posterior_of_gaussian_likelihoods():
    # Conjugate: precision adds up. The first parameter is positive (log scale), the second real.
    prior_std = math.log(10)

    def log_likelihood(theta):
        return -0.5 * ((np.log(theta[:, 0]) - 1.5) / 0.5) ** 2 - 0.5 * (theta[:, 1] - 3.0) ** 2

    posterior = sample_posterior(log_likelihood, [2.0, 0.0], prior_std, rng=np.random.default_rng(1))
    estimates = math.log(posterior.mean[0]), posterior.mean[1]         # a geometric mean where θ is positive
    for x, estimate, middle, mean, std in (
            (np.log(posterior.samples[..., 0]), estimates[0], math.log(2.0), 1.5, 0.5),
            (posterior.samples[..., 1], estimates[1], 0.0, 3.0, 1.0)):
        variance = 1 / (1 / prior_std ** 2 + 1 / std ** 2)
        expected = variance * (middle / prior_std ** 2 + mean / std ** 2)
        assert x.mean() == pytest.approx(expected, abs=0.1 * std)
        assert x.std() == pytest.approx(math.sqrt(variance), rel=0.1)
        assert estimate == pytest.approx(x.mean())
    assert posterior.mixed
    assert posterior.samples.shape == (8, 1000, 2)
    assert posterior.mean.shape == posterior.rhat.shape == posterior.ess.shape == (2,)
    assert posterior.interval(0.9).shape == (2, 2)
    low, high = posterior.interval(0.9)
    assert (low < posterior.mean).all() and (posterior.mean < high).all()
    for i in range(2):
        inside = (low[i] <= posterior.samples[..., i]) & (posterior.samples[..., i] <= high[i])
        assert inside.mean() == pytest.approx(0.9, abs=0.002)


def test_what_the_likelihood_ignores_keeps_its_centre():
    # Only the second of three parameters is informed: ten times its centre, give or take a fifth.
    def log_likelihood(theta):
        return -0.5 * ((np.log(theta[:, 1]) - math.log(20.0)) / 0.2) ** 2

    for seed in range(3):
        posterior = sample_posterior(log_likelihood, [5.0, 2.0, -3.0], rng=np.random.default_rng(seed))
        assert posterior.mixed
        # The other two keep theirs exactly, though the means of their draws miss it by chance.
        assert posterior.mean[[0, 2]] == pytest.approx([5.0, -3.0], rel=1e-12)
        for mean, middle, spread, ess in (
                (np.log(posterior.samples[..., 0]).mean(), math.log(5.0), math.log(4), posterior.ess[0]),
                (posterior.samples[..., 2].mean(), -3.0, 3 * math.log(4), posterior.ess[2])):
            assert 1e-6 < abs(mean - middle) < 4 * spread / math.sqrt(ess)
        # Their spread is the prior's: ln 4 in log θ, three times that where θ is real with a centre of -3.
        assert np.log(posterior.samples[..., 0]).std() == pytest.approx(math.log(4), rel=0.07)
        assert posterior.samples[..., 2].std() == pytest.approx(3 * math.log(4), rel=0.07)
        expected = math.log(10) / (1 + (0.2 / math.log(4)) ** 2)
        assert math.log(posterior.mean[1] / 2.0) == pytest.approx(expected, abs=0.8 / math.sqrt(posterior.ess[1]))


def test_a_mean_that_is_shown_to_differ_from_the_centre_is_taken_however_little_it_differs():
    # A sixth of the prior's spread off the centre: more than ten standard errors.
    def log_likelihood(theta):
        return -0.5 * ((np.log(theta[:, 0]) / math.log(4) - 1 / 3)) ** 2

    posterior = sample_posterior(log_likelihood, [1.0], steps=(4000,), rng=np.random.default_rng(0))
    assert math.log(posterior.mean[0], 4) == pytest.approx(1 / 6, abs=3 * math.sqrt(0.5 / posterior.ess[0]))


def test_a_mean_differs_from_the_centre_by_more_than_three_standard_errors_or_not_at_all(monkeypatch):
    draws = np.random.default_rng(0).standard_normal((3, 8, 1000, 4))
    draws -= draws.mean(axis=(1, 2), keepdims=True)
    error = draws[0].std(axis=(0, 1)) / np.sqrt(effective_sample_size(draws[0]))
    draws[0] += [2.9, -2.9, 3.1, -3.1] * error
    monkeypatch.setattr("mh.metropolis_hastings", lambda *args: (draws, 0.3))
    posterior = sample_posterior(lambda theta: np.zeros(len(theta)), np.full(4, 2.0), prior_std=1.0, steps=(1000,))
    np.testing.assert_allclose(posterior.mean, 2 * np.exp([0, 0, 3.1 * error[2], -3.1 * error[3]]), rtol=1e-12)


def test_every_rung_has_its_own_target():
    # Conjugate once more, in the space of the sampler: to rung t the likelihood is as informative as powers[t] says.
    means, stds, powers = np.array([1.5, -1.0]), np.array([0.5, 0.2]), (1.0, 0.5, 0.2, 0.05)

    def log_likelihood(z):
        return -0.5 * (((z - means) / stds) ** 2).sum(axis=-1)

    rng = np.random.default_rng(4)
    draws, acceptance = metropolis_hastings(log_likelihood, lambda z: -0.5 * (z ** 2).sum(axis=-1),
                                            rng.standard_normal((4, 6, 2)), 1000, 2000, rng, powers)
    assert draws.shape == (4, 6, 2000, 2) and 0.2 < acceptance < 0.8
    for rung, power in zip(draws, powers):
        variance = 1 / (1 + power / stds ** 2)
        error = 4 * np.sqrt(variance / effective_sample_size(rung))
        assert (np.abs(rung.mean(axis=(0, 1)) - variance * power * means / stds ** 2) < error).all()
        np.testing.assert_allclose(rung.std(axis=(0, 1)), np.sqrt(variance), rtol=0.1)
    # Neighbours on a ladder swap: a chain stands where the one above it stood a step before.
    assert (draws[:-1, :, 1:] == draws[1:, :, :-1]).all(axis=-1).any(axis=(1, 2)).all()


def test_simulation_based_calibration():
    """Where θ comes from the prior and preferences from θ, θ is one more draw of the posterior: its rank among these is
    uniform (Talts et al., 2018), and so is that of its likelihood, which tells a target that is too flat or too steep
    (Modrák et al., 2023). Each chain has a data set of its own: two weights and a threshold behind ten returns.
    """
    rng, n = np.random.default_rng(0), 1500
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

    draws, _ = metropolis_hastings(log_likelihood, lambda z: -0.5 * (z ** 2).sum(axis=-1), rng.standard_normal((3, n, 3)), 300, 300, rng)
    kept = draws[0, :, ::15]
    ranks = list((kept < truth[:, None]).mean(axis=1).T)
    likelihoods = np.stack([log_likelihood(z) for z in kept.transpose(1, 0, 2)], axis=1)
    ranks.append((likelihoods < log_likelihood(truth)[:, None]).mean(axis=1))
    # In standard errors of a uniform mean. A likelihood to the power of 0.9 gives 3.6 for the last, of 1.15 -6.8.
    errors = [(rank.mean() - 0.5) / np.sqrt(1 / 12 / n) for rank in ranks]
    assert np.abs(errors).max() < 2.5, errors
    assert all(np.histogram(rank, 4, (0, 1))[0].min() > 0.8 * n / 4 for rank in ranks)


def test_posterior_of_a_threshold():
    # r = 1 where force > θ; one trajectory presses with 0.2 N for 50 steps, the other never, and is preferred less.
    # Then P[θ < 0.2 | D] follows from the prior's mass below 0.2 and two values of the likelihood.
    force = np.repeat([0.2, 0.0], 50)

    def log_likelihood(theta):
        return -preference_loss((force > theta).reshape(-1, 2, 50).sum(axis=-1), [(0, 1)])

    posterior = sample_posterior(log_likelihood, [1.0], rng=np.random.default_rng(0))
    below = normal_cdf(math.log(0.2) / math.log(4))
    explained, ignored = below / (1 + math.exp(-0.9 * 50)), (1 - below) / 2
    assert (posterior.samples < 0.2).mean() == pytest.approx(explained / (explained + ignored), abs=0.03)


def test_posterior_of_a_weight_against_integration():
    pairs = [(0, 1), (1, 2)]
    features = np.array([0.3, 0.1, 0.25])

    def log_likelihood(theta):
        return -preference_loss(theta * features, pairs)

    posterior = sample_posterior(log_likelihood, [2.0], rng=np.random.default_rng(3))
    z = np.linspace(-8, 8, 4001)
    theta = 2.0 * np.exp(z * math.log(4))
    density = np.exp(log_likelihood(theta[:, None]) - 0.5 * z ** 2)
    mean = (density * z).sum() / density.sum()
    std = math.sqrt((density * (z - mean) ** 2).sum() / density.sum())
    drawn = np.log(posterior.samples / 2.0) / math.log(4)
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

    a, b = (sample_posterior(log_likelihood, [1.0], rng=np.random.default_rng(5), steps=(50,)) for _ in "ab")
    np.testing.assert_array_equal(a.samples, b.samples)


def test_impossible_regions_are_avoided_and_impossible_likelihoods_refused():
    def log_likelihood(theta):
        with np.errstate(invalid="ignore"):
            return np.where(theta[:, 0] < 1, np.nan, np.where(theta[:, 0] > 10, np.inf, 0.0))

    posterior = sample_posterior(log_likelihood, [1.0], rng=np.random.default_rng(0))
    assert posterior.samples.min() >= 1 and posterior.samples.max() <= 10
    with pytest.raises(SamplerError, match="finite likelihood"):
        sample_posterior(lambda theta: np.full(len(theta), np.nan), [1.0], steps=(20,))


def test_narrow_support_is_found_and_kept():
    # The prior covers the support with 0.4 %: chains that start outside must neither drift away nor be kept there.
    def log_likelihood(theta):
        return np.where((theta[:, 0] > 2) & (theta[:, 0] < 2.04), 0.0, -np.inf)

    posterior = sample_posterior(log_likelihood, [1.0], rng=np.random.default_rng(0), steps=(1000,))
    assert posterior.samples.min() > 2 and posterior.samples.max() < 2.04


def test_no_draw_ever_lies_where_the_likelihood_is_zero():
    # A square that the prior covers with 4 % down to 0.0003 %: found and then never left, or not found, which is said.
    outcomes = []
    for width in (0.3, 0.1, 0.03, 0.01, 0.003):
        def log_likelihood(theta):
            return np.where((np.abs(np.log(theta) - 1) < width).all(axis=1), 0.0, -np.inf)

        for seed in range(5):
            try:
                posterior = sample_posterior(log_likelihood, [1.0, 1.0], steps=(150,), rng=np.random.default_rng(seed))
            except SamplerError:
                outcomes.append("not found")
            else:
                outcomes.append("found")
                assert np.isfinite(log_likelihood(posterior.samples.reshape(-1, 2))).all()
    assert outcomes[:5] == ["found"] * 5 and outcomes[-5:] == ["not found"] * 5


def test_lost_chains_go_on_from_one_that_is_not():
    # One chain of 24 starts where the likelihood is above zero, on any rung; no other would ever get there.
    def log_likelihood(z):
        return np.where((np.abs(z - 3) < 0.001).all(axis=-1), 0.0, -np.inf)

    for rung in range(3):
        start = np.zeros((3, 8, 5))
        start[rung, 2] = 3.0
        draws, _ = metropolis_hastings(log_likelihood, lambda z: -0.5 * (z ** 2).sum(axis=-1), start, 40, 20,
                                       np.random.default_rng(rung))
        assert np.isfinite(log_likelihood(draws)).all()
    with pytest.raises(SamplerError, match="finite likelihood"):
        metropolis_hastings(log_likelihood, lambda z: -0.5 * (z ** 2).sum(axis=-1), np.zeros((3, 8, 5)), 40, 20,
                            np.random.default_rng(0))


def test_lost_chains_look_for_the_support_all_over_the_prior():
    # They start close together, three of the prior's standard deviations away from all that is possible.
    def log_likelihood(z):
        return np.where((np.abs(z - 3) < 0.3).all(axis=-1), 0.0, -np.inf)

    start = 0.1 * np.random.default_rng(1).standard_normal((3, 8, 1))
    draws, _ = metropolis_hastings(log_likelihood, lambda z: -0.5 * (z ** 2).sum(axis=-1), start, 400, 20,
                                   np.random.default_rng(0))
    assert np.isfinite(log_likelihood(draws)).all()


def test_what_is_kept_comes_from_one_fixed_kernel():
    # With a flat likelihood the prior is the target; the acceptance rate is that of the kept part alone. On a ladder of
    # one rung nothing but accepted proposals moves a chain.
    draws, acceptance = metropolis_hastings(lambda z: np.zeros(len(z)), lambda z: -0.5 * (z ** 2).sum(axis=-1),
                                            np.zeros((1, 8, 2)), 500, 3000, np.random.default_rng(0), (1.0,))
    assert draws.shape == (1, 8, 3000, 2)
    moved = (np.diff(draws[0], axis=1) != 0).any(axis=-1)
    assert acceptance == pytest.approx(moved.mean(), abs=0.001)
    assert draws.std() == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="burn_in"):
        sample_posterior(lambda theta: theta[:, 0], [1.0], steps=(1,))


def test_proposals_adapt_in_burn_in_only():
    # With a flat target everything is accepted: proposals that went on learning from the draws would grow without end.
    draws, acceptance = metropolis_hastings(lambda z: np.zeros(len(z)), lambda z: np.zeros(len(z)),
                                            np.random.default_rng(1).standard_normal((1, 8, 2)), 200, 2000,
                                            np.random.default_rng(0), (1.0,))
    lengths = np.abs(np.diff(draws[0], axis=1)).mean(axis=(0, 2))
    assert acceptance == 1 and lengths[-500:].mean() == pytest.approx(lengths[:500].mean(), rel=0.1)


def test_acceptance_is_that_of_the_cold_rung():
    # Peaks so narrow and high that hardly any proposal hits one; the second rung hardly feels them.
    draws, acceptance = metropolis_hastings(lambda z: 50 * np.sin(1e5 * z[:, 0]), lambda z: -0.5 * (z ** 2).sum(axis=-1),
                                            np.random.default_rng(1).standard_normal((2, 8, 1)), 200, 500,
                                            np.random.default_rng(0), (1.0, 0.001))
    moved = (np.diff(draws, axis=2) != 0).mean(axis=(1, 2, 3))
    assert acceptance < 0.2 and moved[1] > 0.5


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


def restated(chains):
    """(R-hat, effective sample size) of one parameter by Gelman et al. (2013), equations 11.3, 11.4, 11.7 and 11.8, step by step."""
    halves = [part for chain in chains for part in (chain[:len(chain) // 2], chain[-(len(chain) // 2):])]
    m, n = len(halves), len(halves[0])
    means = [sum(half) / n for half in halves]
    grand = sum(means) / m
    between = n / (m - 1) * sum((mean - grand) ** 2 for mean in means)
    within = sum(sum((x - mean) ** 2 for x in half) / (n - 1) for half, mean in zip(halves, means)) / m
    variance = (n - 1) / n * within + between / n

    def rho(t):
        if t == 0:
            return 1.0
        # The autocovariance, as Stan estimates it, in place of the variogram of equation 11.7.
        covariance = sum(sum((half[i] - mean) * (half[i + t] - mean) for i in range(n - t)) / n for half, mean in zip(halves, means)) / m
        return 1 - (within - covariance) / variance
    total, smallest = 0.0, math.inf
    for k in range(n // 2):
        pair = rho(2 * k) + rho(2 * k + 1)
        if pair <= 0:
            break
        smallest = min(smallest, pair)
        total += smallest
    return math.sqrt(variance / within), m * n / max(2 * total - 1, 1 / math.log10(m * n))


@pytest.mark.parametrize("rho, drift", [(0.0, 0.0), (0.7, 0.0), (-0.4, 0.0), (0.5, 3.0)])
def test_diagnostics_are_the_published_equations(rho, drift):
    rng = np.random.default_rng(2)
    noise, x = rng.standard_normal((3, 41)), np.zeros((3, 41))
    x[:, 0] = noise[:, 0]
    for t in range(1, 41):
        x[:, t] = rho * x[:, t - 1] + noise[:, t]
    x += drift * np.arange(3)[:, None]
    rhat, ess = restated(x.tolist())
    assert split_rhat(x[..., None]) == pytest.approx(rhat, rel=1e-9)
    assert effective_sample_size(x[..., None]) == pytest.approx(ess, rel=1e-9)


@pytest.mark.parametrize("rhat, ess, mixed", [(1.049, 201, True), (1.051, 1e4, False), (1.0, 199, False)])
def test_draws_have_mixed_where_every_parameter_has(rhat, ess, mixed):
    posterior = Posterior(np.ones((2, 4, 2)), np.ones(2), 0.3, np.array([1.0, rhat]), np.array([1e4, ess]))
    assert posterior.mixed == mixed


@pytest.mark.parametrize("burn_in, steps", [(1, 4), (2, 3), (0, 100)])
def test_too_few_steps_are_refused(burn_in, steps):
    with pytest.raises(ValueError, match="burn_in must be 2 or more"):
        metropolis_hastings(lambda z: -z[:, 0] ** 2, lambda z: -z[:, 0] ** 2, np.zeros((1, 2, 1)), burn_in, steps, np.random.default_rng(0), (1.0,))


def two_far_modes(theta):
    """A mixture of two narrow modes 4 prior standard deviations apart, with masses 1 and 3."""
    z = np.log(theta[:, 0]) / math.log(4)
    return np.logaddexp(-0.5 * ((z + 2) / 0.05) ** 2, math.log(3) - 0.5 * ((z - 2) / 0.05) ** 2)


def test_two_far_modes_that_no_small_step_connects():
    for seed in range(3):
        posterior = sample_posterior(two_far_modes, [1.0], steps=(4000,), rng=np.random.default_rng(seed))
        assert (posterior.samples > 1).mean() == pytest.approx(0.75, abs=0.05)


def test_longer_runs_follow_until_the_draws_have_mixed():
    def sampled(*steps):
        calls = []

        def log_likelihood(theta):
            calls.append(len(theta))
            return two_far_modes(theta)
        posterior = sample_posterior(log_likelihood, [1.0], steps=steps, rng=np.random.default_rng(0))
        return posterior, sum(calls)

    def evaluations(*steps):             # of all chains: each at the start, then at each step of burn-in and of the rest
        return sum(len(POWERS) * 8 * (1 + 2 * n) for n in steps)

    short, count = sampled(20, 40)       # none is long enough: the last one is returned all the same
    assert not short.mixed and short.samples.shape == (8, 40, 1) and count == evaluations(20, 40)
    long, count = sampled(20, 40, 4000, 8000)
    assert long.mixed and long.samples.shape == (8, 4000, 1) and count == evaluations(20, 40, 4000)
    first, count = sampled(4000, 8000)
    assert first.mixed and first.samples.shape == (8, 4000, 1) and count == evaluations(4000)


def test_a_longer_run_goes_on_where_the_last_one_ended():
    # The chains start as draws from the prior, around 0 in log θ; the posterior lies around 6.6.
    tried = []

    def log_likelihood(theta):
        tried.append(np.log(theta[:, 0]))
        return -0.5 * (tried[-1] - 10) ** 2

    sample_posterior(log_likelihood, [1.0], steps=(24, 4), rng=np.random.default_rng(0))
    first, second = tried[0], tried[len(POWERS) * (1 + 2 * 24)]           # the cold rung's starts
    assert first.max() < 4 < second.min()
