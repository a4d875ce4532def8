"""Figures: what stands on the axes is what was drawn, and nothing is left behind."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import Array
from matplotlib.figure import Figure
from numpyro.contrib.control_flow import scan

import bayesrl
from bayesrl.errors import PolicyError, RunFolderError
from bayesrl.exact.enumeration import enumerate_posterior
from bayesrl.exact.weighted_draws import WeightedDraws
from bayesrl.posterior.posterior import Posterior
from bayesrl.report.evidence_figures import (
    frontier_figure,
    held_out_figure,
    objective_figure,
    over_optimisation_figure,
    restarts_figure,
    turning_kl,
    weights_figure,
)
from bayesrl.report.fit_figures import policy_figure, save_figures, site_figures, training_figure
from bayesrl.report.site_panels import FITTED, PRIOR, TARGET
from tests.handmade import evidence, frontier, interval

MEANS = jnp.array([0.0, 1.0, 2.0])


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
    bayesrl.reward("payoff", MEANS[arm])


def fit(policy: object, *args: object, beta: object = 1.0, steps: int = 30, restarts: int = 1) -> Posterior:
    return bayesrl.fit(
        jax.random.key(0), policy, *args, beta=beta, num_steps=steps, num_restarts=restarts, progress=False
    )


@pytest.fixture(scope="module")
def sweep() -> tuple[Posterior, WeightedDraws]:
    betas = jnp.array([0.5, 2.0])
    return fit(bandit, beta=betas, restarts=2), enumerate_posterior(bandit, beta=betas)


def bars(figure: Figure, panel: int) -> dict[str, list[float]]:
    """Heights of the bars of one panel, by label."""
    return {c.get_label(): [float(bar.get_height()) for bar in c] for c in figure.axes[panel].containers}


def test_bars_are_frequencies_beside_the_exact_target(sweep: tuple[Posterior, WeightedDraws]) -> None:
    posterior, target = sweep
    figure = policy_figure(posterior, target)
    assert len(figure.axes) == 2
    best = posterior.select(restart="best")
    for panel, beta in enumerate((0.5, 2.0)):
        heights = bars(figure, panel)
        assert list(heights) == ["prior π₀", "fitted q", "target p*"]
        drawn = np.asarray(best.draws["arm"])[panel, 0]
        np.testing.assert_allclose(heights["fitted q"], np.bincount(drawn, minlength=3) / drawn.size, atol=1e-6)
        prior = np.asarray(posterior.prior_draws["arm"])
        np.testing.assert_allclose(heights["prior π₀"], np.bincount(prior, minlength=3) / prior.size, atol=1e-6)
        truth = np.exp(np.asarray(MEANS) / beta)
        np.testing.assert_allclose(heights["target p*"], truth / truth.sum(), atol=1e-5)
        assert f"β = {beta:g}" in figure.axes[panel].get_title()


def test_training_lines_are_the_history(sweep: tuple[Posterior, WeightedDraws]) -> None:
    posterior, target = sweep
    optimum = np.asarray(target.optimum)
    figure = training_figure(posterior, optimum)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert [("reward units" in label, "nats" in label) for label in labels] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    for axes, name in zip(figure.axes, ("objective", "reward", "kl"), strict=True):
        lines = [np.asarray(line.get_ydata()) for line in axes.get_lines()]
        for beta in range(2):
            for restart in range(2):
                history = posterior.history[name][:, beta, restart]
                assert any(len(line) == len(history) and np.allclose(line, history) for line in lines)
    dashed = [
        line.get_ydata()[0]
        for line in figure.axes[0].get_lines()
        if line.get_linestyle() == "--" and len(line.get_ydata())
    ]
    np.testing.assert_allclose(sorted(dashed), sorted(optimum), rtol=1e-6)


def test_many_betas_get_a_colour_bar_and_three_panels() -> None:
    posterior = fit(bandit, beta=jnp.geomspace(0.1, 10.0, 9), steps=5)
    assert [axes.get_ylabel() for axes in training_figure(posterior).axes][-1] == "β"
    titles = [axes.get_title() for axes in policy_figure(posterior).axes]
    assert titles == ["β = 0.1", "β = 1", "β = 10"]


def test_reals_are_densities_with_the_target_of_the_program() -> None:
    def program() -> None:
        action = numpyro.sample("action", dist.Normal(0.0, 1.0))
        bayesrl.reward("closeness", -0.5 * (action - 2.0) ** 2)

    axes = policy_figure(fit(program, steps=200)).axes[0]
    drawn = [patch for patch in axes.patches if patch.get_label() in ("prior π₀", "fitted q")]
    for patch in drawn:
        data = patch.get_data()
        assert np.isclose((data.values * np.diff(data.edges)).sum(), 1.0)
    grid, density = axes.get_lines()[0].get_data()
    exact = np.exp(-((grid - 1.0) ** 2)) / np.sqrt(np.pi)  # Normal(1, 1/√2)
    np.testing.assert_allclose(density, exact, atol=0.01)
    assert axes.get_ylabel() == "probability density"


def test_whole_numbers_are_bars_over_their_range() -> None:
    def program() -> None:
        count = numpyro.sample("count", dist.Poisson(4.0))
        bayesrl.reward("more", 0.1 * count)

    posterior = fit(program, steps=50)
    heights = bars(policy_figure(posterior), 0)
    assert set(heights) == {"prior π₀", "fitted q"}
    drawn = np.asarray(posterior.draws["count"]).ravel()
    assert np.isclose(max(heights["fitted q"]), np.bincount(drawn).max() / drawn.size)


def contexts(best: Array) -> None:
    with numpyro.plate("context", len(best), subsample_size=4) as i:
        arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3)))
        bayesrl.reward("right", 1.0 * (arm == best[i]))


def test_contexts_get_the_probability_of_the_best_action() -> None:
    best = jnp.arange(12) % 3
    posterior = fit(contexts, best, beta=0.5, steps=20)
    figure = policy_figure(posterior, enumerate_posterior(bayesrl.full_data(contexts), best, beta=0.5))
    marginal, by_context = figure.axes
    assert "12 contexts" in marginal.get_title()
    counts = {patch.get_label().split(" (")[0]: patch.get_data().values for patch in by_context.patches}
    assert {name: values.sum() for name, values in counts.items()} == {
        "prior π₀": 12,
        "fitted q": 12,
        "target p*": 12,
    }
    p_best = np.exp(2.0) / (np.exp(2.0) + 2)
    assert counts["target p*"][int(p_best * 20)] == 12
    assert f"mean {p_best:.2f}" in by_context.get_legend().get_texts()[2].get_text()


def test_sequences_are_maps_of_time_by_value() -> None:
    def chain() -> None:
        def step(state: Array, _: None) -> tuple[Array, None]:
            state = numpyro.sample("state", dist.Categorical(logits=jnp.zeros((3, 3))[state]))
            bayesrl.reward("high", 1.0 * state)
            return state, None

        scan(step, jnp.asarray(0), None, length=4)

    posterior = fit(chain, steps=20)
    figure = policy_figure(posterior, enumerate_posterior(chain, beta=1.0))
    maps = [axes.get_images()[0].get_array() for axes in figure.axes if axes.get_images()]
    assert len(maps) == 3
    drawn = np.asarray(posterior.draws["state"])[0]
    for value in range(3):
        np.testing.assert_allclose(maps[1][value], (drawn == value).mean(0), atol=1e-6)
    truth = np.exp(np.arange(3.0))
    np.testing.assert_allclose(maps[2], np.tile(truth / truth.sum(), (4, 1)).T, atol=1e-5)
    assert figure.axes[0].get_xlabel() == "time step"
    small = site_figures(posterior, enumerate_posterior(chain, beta=1.0))
    for one, image in zip(small, maps, strict=True):
        np.testing.assert_array_equal(one.axes[0].get_images()[0].get_array(), image)


def test_elements_and_real_sequences() -> None:
    def program() -> None:
        x = numpyro.sample("x", dist.Normal(jnp.zeros(5), 1.0).to_event(1))
        bayesrl.reward("sum", x.sum())

    posterior = fit(program, steps=20)
    axes = policy_figure(posterior).axes[0]
    assert axes.get_xlabel() == "element"
    middle = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    np.testing.assert_allclose(middle["fitted q"], np.median(np.asarray(posterior.draws["x"])[0], 0), atol=0.02)


def test_saved_figures_and_those_of_a_loaded_posterior(sweep: tuple[Posterior, WeightedDraws], tmp_path: Path) -> None:
    posterior, target = sweep
    written = save_figures(tmp_path, posterior, target)
    assert [path.name for path in written] == ["training.png", "training.svg", "policy.png", "policy.svg"]
    assert all(path.stat().st_size > 5000 for path in written)
    tree = bayesrl.to_datatree(posterior)
    from bayesrl.posterior.datatree import from_datatree

    loaded = from_datatree(tree, {}, {})
    again = policy_figure(loaded.select(beta=0.5))
    fitted = bars(policy_figure(posterior), 0)["fitted q"]
    np.testing.assert_allclose(bars(again, 0)["fitted q"], fitted, atol=1e-6)
    with pytest.raises(RunFolderError, match="cannot write"):
        save_figures(tmp_path / "training.png", posterior)
    with pytest.raises(PolicyError, match="no draws of site 'leg'; choose from arm"):
        policy_figure(posterior, site="leg")


def test_the_three_colours_differ_in_grey() -> None:
    from matplotlib.colors import to_rgb

    grey = sorted(float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114))) for colour in (PRIOR, FITTED, TARGET))
    assert min(np.diff(grey)) > 0.08


def test_weights_stand_around_log_z_and_restarts_at_their_j(sweep: tuple[Posterior, WeightedDraws]) -> None:
    posterior, _ = sweep
    known = evidence([0.5, 2.0])
    axes = weights_figure(posterior, known).axes[0]
    best = np.asarray(posterior.select(restart="best").statistics["log_weight"])
    assert known.by_context is not None
    for i, patch in enumerate(axes.patches):
        data = patch.get_data()
        centred = best[i, 0] - known.by_context.mean[i]
        held = np.histogram(centred, data.edges)[0].sum() / centred.size
        assert held > 0.98
        np.testing.assert_allclose(data.values.sum(), 1.0)
    points = [c.lines[0].get_ydata() for c in restarts_figure(posterior).axes[0].containers]
    np.testing.assert_allclose(points, np.asarray(posterior.objective_by_restart()), rtol=1e-4)


def test_frontier_and_over_optimisation_show_their_numbers() -> None:
    told = frontier([0.1, 0.3, 1.0])
    axes = frontier_figure(told.evidence).axes[0]
    x, y = axes.containers[0].lines[0].get_data()
    np.testing.assert_allclose((x, y), (told.evidence.kl.mean, told.evidence.reward.mean))
    drawn = over_optimisation_figure(told.evidence.kl, told.evidence.reward, told.gold, "gold", turning_kl(told))
    proxy, gold = (c.lines[0].get_data() for c in drawn.axes[0].containers)
    np.testing.assert_allclose(proxy[0], np.sqrt(told.evidence.kl.mean))
    assert told.gold is not None
    np.testing.assert_allclose(gold[1], told.gold.mean)
    assert turning_kl(told) == np.sqrt(told.evidence.kl.mean[1])
    assert turning_kl(frontier(gold=False)) is None
    objective = objective_figure(told.evidence).axes[0]
    np.testing.assert_allclose(objective.containers[0].lines[0].get_ydata(), told.evidence.objective.mean)


def test_dollars_in_names_are_not_mathematics(tmp_path: Path) -> None:
    def program() -> None:
        arm = numpyro.sample(r"$\frac{", dist.Bernoulli(0.5))
        bayesrl.reward("win", 1.0 * arm)

    policy_figure(fit(program, steps=5)).savefig(tmp_path / "figure.svg")
    three = interval([0.1, 0.2, 0.3])
    over_optimisation_figure(three, three, three * 100, r"$\frac{").savefig(tmp_path / "gold.svg")
    for name in ("figure", "gold"):
        assert r"\frac{" in (tmp_path / f"{name}.svg").read_text(encoding="utf-8")


def test_a_fit_without_rewards_is_drawn_in_nats() -> None:
    def program() -> None:
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        numpyro.sample("data", dist.Normal(mean, 1.0), obs=jnp.array(1.0))

    posterior = bayesrl.fit(jax.random.key(0), program, num_steps=20, num_restarts=2, progress=False)
    labels = [
        axes.get_ylabel() for figure in (training_figure(posterior), restarts_figure(posterior)) for axes in figure.axes
    ]
    assert labels == ["J, the ELBO  (nats)", "KL to prior  (nats)", "J, the ELBO  (nats)"]
    estimates = jax.tree.map(lambda x: x[:1], posterior.estimates)
    figure = held_out_figure([None], estimates, estimates)
    assert figure.axes[0].get_ylabel() == "J, the ELBO  (nats)"
