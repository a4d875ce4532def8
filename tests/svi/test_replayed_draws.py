"""Draws from a memory and stored data: the fit is p* whoever drew, and data of another policy are refused."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import bayesrl
from bayesrl import run_folder
from bayesrl.core.draws import Draws
from bayesrl.core.programs import Programs
from bayesrl.core.structure import inspect
from bayesrl.errors import FitError, ObjectiveError
from bayesrl.objectives import TrajectoryBalance
from bayesrl.svi import replayed_draws

MEANS = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
BETA = 0.1
BEST = np.exp(MEANS / BETA) / np.exp(MEANS / BETA).sum()


def bandit() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(5)))
    bayesrl.reward("payoff", jnp.asarray(MEANS)[arm])


def fitted(source: Any, program: Any = bandit, steps: int = 400, **options: Any) -> bayesrl.Posterior:
    objective = TrajectoryBalance(**{"form": "variance", **options})
    return bayesrl.fit(
        jax.random.key(0), program, beta=BETA, objective=objective, source=source, num_steps=steps, progress=False
    )


def law(posterior: bayesrl.Posterior) -> np.ndarray:
    return np.exp(np.asarray(posterior.log_prob({"arm": jnp.arange(5)})[0], float))


@pytest.mark.parametrize(
    "source",
    [
        bayesrl.ReplayDraws(prior_fraction=0.5, priority=1.0),
        bayesrl.ReplayDraws(num_particles=16, replay_fraction=1.0, stored={"arm": np.arange(5)}),
        bayesrl.ReplayDraws(
            replay_fraction=0.7, priority=0.5, capacity=70, stored={"arm": np.array([0, 0, 1, 2, 3, 4])}
        ),
    ],
)
def test_whoever_drew_the_fit_is_p_star(source: bayesrl.ReplayDraws) -> None:
    """With stored arms alone, no draw is one of the fitted policy; the noise vanishes at p*, so seeds hardly matter."""
    posterior = fitted(source)
    np.testing.assert_allclose(law(posterior), BEST, atol=1e-3)
    told = float(posterior.history["objective"][-1, 0])
    if source.stored is None:
        assert told == pytest.approx(0.753593, abs=5e-3)
    elif source.replay_fraction == 1.0:
        assert np.isnan(told), "nobody knows who drew the data, so J of the fit is unknown"


def test_the_memory_forgets_the_oldest_and_prefers_the_best() -> None:
    programs = Programs(bandit, bandit, inspect(jax.random.key(0), bandit), (), {})
    plain = bayesrl.ReplayDraws(num_particles=40, capacity=30, stored={"arm": np.arange(5)})
    sharp = bayesrl.ReplayDraws(num_particles=400, replay_fraction=0.9, priority=3.0, stored={"arm": np.arange(5)})
    for i in range(4):
        batch = plain(jax.random.key(i), {}, programs)
    held = plain._memory
    assert held is not None
    np.testing.assert_array_equal(held.sites["arm"][:5], np.arange(5))
    assert len(held.sites["arm"]) == 35, "stored data stay, beside as many new ones as the memory holds"
    np.testing.assert_array_equal(held.sites["arm"][-20:], batch.sites["arm"][:20])
    replayed = sharp(jax.random.key(1), {}, programs).sites["arm"][40:]
    assert (np.asarray(replayed) == 4).mean() > 0.9, "ranks 1 to 9 or so are draws of the best arm"
    plain.close()
    assert plain._memory is None


def shifted() -> None:
    arm = numpyro.sample("arm", dist.Categorical(logits=jnp.arange(5.0)))
    bayesrl.reward("payoff", jnp.asarray(MEANS)[arm])


def gap_in_prior() -> None:
    arm = numpyro.sample("arm", dist.Categorical(probs=jnp.array([0.5, 0.5, 0.0])))
    bayesrl.reward("payoff", 1.0 * arm)


def drawn(program: Any) -> Draws:
    programs = Programs(program, None, inspect(jax.random.key(0), program), (), {})
    return programs.draw(jax.random.key(1), {}, 8)


@pytest.mark.parametrize(
    ("program", "stored", "message"),
    [
        (bandit, {"leg": np.arange(5)}, "hold site 'leg', which the policy does not draw: they are of another policy"),
        (bandit, {}, "lack site 'arm'"),
        (bandit, {"arm": np.zeros((4, 2), int)}, r"have shape \(4, 2\); pass \[draws\], as many"),
        (bandit, {"arm": np.zeros(0, int)}, "have shape"),
        (bandit, {"arm": np.array([0.5, 1.0])}, "of site 'arm' are float64; pass whole numbers"),
        (bandit, {"arm": np.array([None])}, "of site 'arm' are object; pass whole numbers"),
        (gap_in_prior, {"arm": np.array([0, 2])}, "the policy gives 1 of 2 stored draws probability 0 at site 'arm'"),
    ],
)
def test_stored_draws_that_do_not_fit_are_refused(program: Any, stored: Any, message: str) -> None:
    with pytest.raises(FitError, match=message):
        fitted(bayesrl.ReplayDraws(replay_fraction=1.0, stored=stored), program, 1)


def test_stored_draws_of_another_policy_are_refused_and_of_this_one_known() -> None:
    with pytest.raises(FitError, match="made by another policy: the log π₀ at site 'arm'"):
        fitted(bayesrl.ReplayDraws(replay_fraction=1.0, stored=drawn(shifted)), bandit, 1)
    own = fitted(bayesrl.ReplayDraws(replay_fraction=1.0, stored=drawn(bandit)), bandit, 1)
    assert np.isfinite(own.history["objective"]).all(), "these draws tell who drew them"


def narrow() -> None:
    numpyro.sample("arm", dist.Categorical(logits=numpyro.param("logits", jnp.array([0.0, 0.0, -jnp.inf]))))


def test_draws_of_the_prior_that_the_guide_cannot_make_are_refused() -> None:
    def program() -> None:
        bayesrl.reward("payoff", 1.0 * numpyro.sample("arm", dist.Categorical(logits=jnp.zeros(3))))

    source = bayesrl.ReplayDraws(prior_fraction=1.0)
    with pytest.raises(FitError, match=r"the guide gives \d+ of 32 draws of the prior probability 0 at site 'arm'"):
        bayesrl.fit(
            jax.random.key(0),
            program,
            beta=1.0,
            guide=narrow,
            objective=TrajectoryBalance(form="variance"),
            source=source,
            num_steps=1,
            progress=False,
        )


def test_mini_batches_are_refused() -> None:
    def program() -> None:
        with numpyro.plate("n", 4, subsample_size=2):
            bayesrl.reward("payoff", 1.0 * numpyro.sample("arm", dist.Bernoulli(0.5)))

    with pytest.raises(FitError, match="would mix mini-batches of plate 'n'"):
        fitted(bayesrl.ReplayDraws(), program, 1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay_fraction": 1.0}, "makes no new draw of 64, and has nothing stored"),
        ({"priority": -1.0}, "got priority=-1.0"),
        ({"prior_fraction": 2.0}, "got prior_fraction=2.0"),
        ({"num_particles": 1}, "got num_particles=1"),
        ({"stored": [1, 2]}, r"got stored=\[1, 2\]"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        bayesrl.ReplayDraws(**options)


def test_yes_and_no_are_numbers() -> None:
    programs = Programs(bandit, bandit, inspect(jax.random.key(0), bandit), (), {})
    source = bayesrl.ReplayDraws(replay_fraction=1.0, stored={"arm": np.array([False, True])})
    assert set(np.unique(source(jax.random.key(0), {}, programs).sites["arm"])) == {0, 1}


def test_objectives_of_the_present_policy_refuse_a_memory() -> None:
    with pytest.raises(ObjectiveError, match="ReverseKL learns from draws of the present policy, and ReplayDraws"):
        bayesrl.fit(jax.random.key(0), bandit, beta=BETA, source=bayesrl.ReplayDraws(), progress=False)


@pytest.mark.parametrize(
    ("source", "objective"),
    [
        (bayesrl.ReplayDraws(8, capacity=40, stored={"arm": np.arange(5)}, priority=1.0), TrajectoryBalance()),
        (bayesrl.ReuseDraws(8, num_updates=7), bayesrl.objectives.ClippedKL(8)),
    ],
)
def test_a_run_resumes_with_its_memory(source: Any, objective: Any, tmp_path: Path) -> None:
    """Two lanes with memories of their own, cut within a batch that serves 7 updates: bit for bit as uncut."""
    options: dict[str, Any] = {"objective": objective, "source": source, "num_steps": 40, "progress": False}
    betas, folder = jnp.array([BETA, 1.0]), tmp_path / "run"

    def cut(row: Any) -> bool:
        return bool(row["step"] == 17)

    bayesrl.fit(jax.random.key(0), bandit, beta=betas, directory=folder, callback=cut, **options)
    held = run_folder.load_memories(folder)
    assert {name.split("/")[0] for name in held} == {"0", "1"}
    resumed = bayesrl.resume(folder, bandit, objective=objective, source=source, progress=False)
    whole = bayesrl.fit(jax.random.key(0), bandit, beta=betas, **options)
    for name in whole.history:
        np.testing.assert_array_equal(resumed.history[name], whole.history[name], err_msg=name)
    np.testing.assert_array_equal(resumed.params["arm$table"], whole.params["arm$table"])


def test_a_memory_too_large_for_a_checkpoint_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(bandit, bandit, inspect(jax.random.key(0), bandit), (), {})
    source = bayesrl.ReplayDraws(8)
    assert source.save_state() == {}
    source(jax.random.key(0), {}, programs)
    kept = source.save_state()
    assert len(kept["sites/arm"]) == 4
    monkeypatch.setattr(replayed_draws, "_MOST_KEPT", 10)
    assert source.save_state() == {}
    again = bayesrl.ReplayDraws(8)
    again.restore_state(kept)
    np.testing.assert_array_equal(again._memory.sites["arm"], kept["sites/arm"])  # type: ignore[union-attr]
