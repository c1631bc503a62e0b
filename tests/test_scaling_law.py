"""The law of routed models: the published coefficients give the published losses, and a fit finds a law that is there."""

import numpy as np
import pytest

from moe_jax.analysis.scaling_law import PUBLISHED, ScalingLaw, fit, saturated

S_BASE = PUBLISHED["S-BASE"]


@pytest.mark.parametrize("parameters, experts, loss", [(5e6, 1, 3.483), (5e6, 128, 2.892), (1.3e9, 1, 2.237)])
def test_the_published_law_by_hand(parameters, experts, loss):
    """N = 5M, E = 1: Ê = 1.847, log10 0.2665; -0.082·6.699 - 0.108·0.2665 + 0.009·6.699·0.2665 + 1.104 = 0.5420."""
    assert S_BASE.loss(parameters, experts) == pytest.approx(loss, abs=5e-4)


def test_saturation_starts_where_it_says_rises_and_ends_where_it_says():
    assert saturated(1, 1.847, 314.478) == pytest.approx(1.847)
    assert saturated(1e12, 1.847, 314.478) == pytest.approx(314.478)
    values = saturated(2.0 ** np.arange(12), 1.847, 314.478)
    assert (np.diff(values) > 0).all()


def test_equivalent_parameters_are_those_of_the_dense_model_with_the_same_loss():
    assert S_BASE.equivalent_parameters(5e6, 128) == pytest.approx(51.8e6, rel=2e-3)
    for law in PUBLISHED.values():
        for parameters, experts in ((5e6, 128), (1.3e9, 16), (1e8, 1)):
            equivalent = law.equivalent_parameters(parameters, experts)
            assert law.loss(equivalent, 1) == pytest.approx(law.loss(parameters, experts))
    assert S_BASE.equivalent_parameters(1e8, 1) == pytest.approx(1e8)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_fit_finds_the_law_that_made_the_losses(name):
    law = PUBLISHED[name]
    parameters_R, experts_R = (grid.reshape(-1) for grid in np.meshgrid([1.5e7, 5.5e7, 3.7e8, 1.3e9], 2.0 ** np.arange(10)))
    found, rest = fit(parameters_R, experts_R, law.loss(parameters_R, experts_R))
    assert rest < 1e-6
    np.testing.assert_allclose([found.a, found.b, found.c, found.d], [law.a, law.b, law.c, law.d], rtol=1e-2)
    np.testing.assert_allclose([found.start, found.most], [law.start, law.most], rtol=2e-2)


def test_noise_stays_in_what_remains():
    law = ScalingLaw(-0.1, -0.1, 0.01, 1.2, 1.5, 100.0)
    parameters_R, experts_R = (grid.reshape(-1) for grid in np.meshgrid([1e5, 1e6, 1e7], [1, 2, 4, 8, 16, 32, 64]))
    noise_R = np.random.default_rng(0).normal(0, 1e-3, parameters_R.shape)
    found, rest = fit(parameters_R, experts_R, law.loss(parameters_R, experts_R) * 10**noise_R)
    assert 0.4e-3 < rest < 1.3e-3
    grid = found.loss(parameters_R, experts_R) / law.loss(parameters_R, experts_R)
    np.testing.assert_allclose(grid, 1, atol=5e-3)


def test_too_few_runs_are_no_law():
    with pytest.raises(ValueError, match="6 runs of 1 sizes and 3 numbers of experts"):
        fit(np.full(6, 1e6), np.array([1, 4, 16] * 2), np.ones(6))
