"""What the command line answers at once: before JAX is imported, and wrong spellings with what was meant."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bayesrl
from bayesrl import ready_models as catalogue
from bayesrl.cli.suggestions import _FLAGS, _OPTIONS, suggest_command
from bayesrl.problem import load_problem
from bayesrl.ready_models import ProblemError, check_use, model_names, model_options, model_uses

pytestmark = pytest.mark.xdist_group("cli")
CODE = """
import sys
from bayesrl.cli import app
heavy = {"jax", "numpyro", "scipy", "xarray", "arviz_stats", "matplotlib"}
code = 0
try:
    app(prog_name="bayesrl")
except SystemExit as end:
    code = end.code
sys.stdout.flush()
print("HEAVY", sorted(heavy & set(sys.modules)), "RICH" if "rich" in sys.modules else "", code, file=sys.stderr)
"""


def answer(*args: object, **environment: str) -> tuple[int, str, str]:
    """Run a command in a fresh process and give its exit code, what it printed and its errors; JAX must be absent."""
    result = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", **environment},
        check=False,
        timeout=120,
    )
    rest, _, told = result.stderr.rpartition("HEAVY")
    assert told.startswith(" []"), (told, rest)
    return int(told.split()[-1]), result.stdout, rest


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("--help",), 0, "Commands:"),
        (("--version",), 0, f"bayesrl {bayesrl.__version__}"),
        (("models",), 0, "digits_bandit"),
        (("fit", "--help"), 0, "--restarts"),
        (("cache",), 0, "compiled programs in"),
        (("fti", "digits_bandit"), 2, "Did you mean 'fit'?"),
        (("fit", "digits_bandit", "--step", "3"), 2, "Did you mean: bayesrl fit digits_bandit --steps 3\n"),
        (("fit", "digits_bandit", "--steps", "many"), 2, "--steps"),
        (("fit", "digits_bandit", "--steps", "1e3"), 2, "Did you mean: bayesrl fit digits_bandit --steps 1000\n"),
        (("fit", "digits_bandit", "--arms", "3"), 2, "Did you mean: bayesrl fit bernoulli_bandit --set arms=3\n"),
        (("fit", "digits_bandit", "--set", "arms=3"), 2, "or `bayesrl fit bernoulli_bandit --set arms=...`"),
        (("fit", "deep_sea", "--episodes", "9"), 2, "Did you mean: bayesrl learn deep_sea --episodes 9\n"),
        (("show", "runs", "--steps", "3"), 2, "No such option"),
        (("fit", "bernoulli_bandit", "--guide", "X"), 2, "No such option: --guide\n"),
        (("--verbose",), 2, "No such option: --verbose\n"),
        (("fit", "digits_bandt"), 2, "there is no model 'digits_bandt'; did you mean 'digits_bandit'?"),
        (("learn", "deap_sea"), 2, "did you mean 'deep_sea'?"),
        (("learn", "digits_bandit"), 2, "or use `bayesrl fit digits_bandit`"),
        (("fit", "nowhere.py"), 2, "there is no model 'nowhere.py'; choose from"),
        (("fit", "digits_bandit", "--set", "hiden=3"), 2, "has no option 'hiden'; did you mean 'hidden'? Its options"),
        (
            ("fit", "digits_bandit", "--set", "hidden=two"),
            2,
            "option hidden must be an integer, such as 128, got 'two'",
        ),
        (("fit", "digits_bandit", "--set", "hidden"), 2, "not of the form name=value"),
        (("fit", "digits_bandit", "--beta", "warm"), 2, "is not a number"),
        (("fit", "digits_bandit", "--beta", "nan"), 2, "must be positive and finite"),
        (("fit", "digits_bandit", "--restarts", "0"), 2, "num_restarts=0; use an integer of at least 1"),
        (("learn", "bernoulli_bandit"), 2, "is fitted, not learned: choose another model, or use `bayesrl fit"),
        (("fit", "bernoulli_bandit", "--beta", "0.1,", "0.2"), 2, "Did you mean: bayesrl fit bernoulli_bandit --beta"),
        (("show", "nowhere"), 2, "is not a run folder"),
        (("resume", "nowhere"), 2, "is not a run folder"),
        (("report", "nowhere"), 2, "is not a run folder"),
    ],
)
def test_it_answers_before_jax_is_imported(args: tuple[str, ...], code: int, text: str) -> None:
    ended, out, err = answer(*args)
    assert ended == code
    assert text in out + err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("fit bandit --beta 0.1, 0.2", "fit bandit --beta 0.1,0.2"),
        ("fit bandit --beta 0.1 , 0.2 ,1", "fit bandit --beta 0.1,0.2,1"),
        ("fit --beta 1 2 3 bandit", "fit --beta 1,2,3 bandit"),
        ("fit bandit arms=3 --steps 5", "fit bandit --set arms=3 --steps 5"),
        ("fit bandit --set arms=3 best=1", "fit bandit --set arms=3 --set best=1"),
        ("fit bandit --beta 0.1", None),
        ("fit bandit --steps 1 2", None),
        ("fit bernoulli_bandit --beta=0.1 --steps=5 --quiet", None),
        # options of a model, of another model, and of the other command
        ("fit bernoulli_bandit --arms 3", "fit bernoulli_bandit --set arms=3"),
        ("fit --arms=3 bernoulli_bandit", "fit --set arms=3 bernoulli_bandit"),
        ("fit digits_bandit --arms 3", "fit bernoulli_bandit --set arms=3"),
        ("fit --arms 3 digits_bandit", "fit --set arms=3 bernoulli_bandit"),
        ("fit frozen_lake --slippery", "fit frozen_lake --set slippery=true"),
        ("fit digits_bandit --hiden 3", "fit digits_bandit --set hidden=3"),
        ("learn bernoulli_arms --states 3", "learn river_swim --set states=3"),
        ("fit deep_sea --episodes 10", "learn deep_sea --episodes 10"),
        ("learn deep_sea --steps 10", "fit deep_sea --steps 10"),
        ("fit digits_bandit --episodes 10", None),
        ("fit digits_bandit --lr 0.1", None),
        ("fit bernoulli_bandit --guide X", None),
        ("learn deep_sea --rule thompson", None),
        ("report runs/x --folder y", None),
        # whole numbers
        ("fit digits_bandit --steps 1e3", "fit digits_bandit --steps 1000"),
        ("fit digits_bandit --steps=2,000 --seed 7.0", "fit digits_bandit --steps 2000 --seed 7"),
        ("learn deep_sea --runs 1_0 --episodes 2k", "learn deep_sea --runs 10 --episodes 2000"),
        ("resume runs/x --steps 1e4", "resume runs/x --steps 10000"),
        ("fit digits_bandit --steps 2.5", None),
        ("fit digits_bandit --steps inf", None),
        # names that are near
        ("fit digits_bandit --step 3", "fit digits_bandit --steps 3"),
        ("fit digits_bandit --num-restarts 3", "fit digits_bandit --restarts 3"),
        ("learn deep_sea --n_runs 3", "learn deep_sea --runs 3"),
        ("report runs/x --output a.html", "report runs/x --out a.html"),
        ("fit digits_bandit --quite", "fit digits_bandit --quiet"),
        ("cache --clean", "cache --clear"),
    ],
)
def test_the_command_that_was_meant(typed: str, meant: str | None) -> None:
    command, *words = typed.split()
    assert suggest_command(command, words) == meant


def test_slips_know_the_options_that_the_commands_have() -> None:
    import typer

    from bayesrl.cli import app

    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        options = {one.opts[0]: one for one in command.params if one.opts[0].startswith("--")}
        valued = {
            option: int if one.type_descriptor.annotation is int else str
            for option, one in options.items()
            if not one.is_flag
        }
        assert valued == _OPTIONS.get(name, {}), name
        assert {option for option, one in options.items() if one.is_flag} <= {*_FLAGS.get(name, ())}, name


@pytest.mark.parametrize(
    ("name", "function", "options", "extra"),
    [
        ("digits_bandit", "problem", {}, "digits"),
        ("cartpole", "problem", {}, "control"),
        ("pendulum", "problem", {"physics": "gymnasium"}, "control"),
        ("frozen_lake", "learning", {}, "control"),
        ("translation", "problem", {}, "lm"),
        ("text_generation", "problem", {}, "lm"),
    ],
)
def test_a_model_says_which_extra_it_needs(
    monkeypatch: pytest.MonkeyPatch, name: str, function: str, options: dict[str, str], extra: str
) -> None:
    monkeypatch.setattr(catalogue, "find_spec", lambda package: None)
    with pytest.raises(ProblemError, match=rf"not installed: install bayesrl\[{extra}\]"):
        check_use(name, function, options)
    check_use("pendulum", "problem", {"physics": "program"})
    check_use("bernoulli_bandit", "problem")


def test_a_file_beside_the_one_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "bandits.py").write_text("def problem(*, arms: int = 2): ...")
    (tmp_path / "broken.py").write_text("def problem(:")
    assert f"did you mean '{tmp_path}/bandits.py'?" in answer("fit", tmp_path / "bandit.py")[2]
    assert "did you mean 'arms'?" in answer("fit", tmp_path / "bandits.py", "--set", "arm=3")[2]
    assert "does not import: SyntaxError" in answer("fit", tmp_path / "broken.py")[2]


def test_a_run_is_shown_without_jax(tmp_path: Path) -> None:
    command = "from bayesrl.cli import app; app()"
    fit = [sys.executable, "-c", command, "fit", "bernoulli_bandit", "--steps", "20", "--out", str(tmp_path / "run")]
    subprocess.run(fit, check=True, capture_output=True, timeout=240)
    code, out, err = answer("show", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "20 of 20" in out
    assert "gap = J* − J" in out
    assert "end of the history" in out
    model = tmp_path / "run" / "model.json"
    model.write_text(json.dumps({"model": "bernouli_bandit", "options": {}}))
    code, _, err = answer("resume", tmp_path / "run")
    assert code == 2
    assert "did you mean 'bernoulli_bandit'?" in err


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("fit dig", ["digits_bandit"]),
        ("fi", ["fit"]),
        ("fit digits_bandit --set hid", ["hidden="]),
        ("fit --beta 1 digits_bandit --set hid", ["hidden="]),
        ("fit nothing --set hid", []),
        ("show --qui", []),
        ("fit digits_bandit --restar", ["--restarts"]),
    ],
)
def test_a_shell_completes(typed: str, completed: list[str]) -> None:
    count = str(len(typed.split()))
    words = {"_BAYESRL_COMPLETE": "complete_bash", "COMP_WORDS": f"bayesrl {typed}", "COMP_CWORD": count}
    assert answer(**words)[1].split() == completed


def test_completion_offers_files_and_can_be_had(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "mine.txt").write_text("")
    words = {"_BAYESRL_COMPLETE": "complete_bash", "COMP_WORDS": f"bayesrl fit {tmp_path}/mi", "COMP_CWORD": "2"}
    assert answer(**words)[1].split() == [f"{tmp_path}/mine.py"]
    script = answer(_BAYESRL_COMPLETE="source_bash")[1]
    assert "complete -o default -F _bayesrl_completion bayesrl" in script


def test_a_pipe_gets_no_colours_and_a_terminal_may_forbid_them() -> None:
    assert "\x1b" not in answer("fit", "nothing", TERM="xterm-256color")[2]


def test_the_cache_is_told_and_emptied(tmp_path: Path) -> None:
    folder = tmp_path / "compiled"
    folder.mkdir()
    (folder / f"jit_f-{64 * 'a'}.compiled").write_bytes(b"x" * 2048)
    (folder / "mine.txt").write_text("mine")
    own = {"BAYESRL_CACHE": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    assert answer("cache", **own)[1] == f"compiled programs in {folder}\n1 entry, 2.05 kB\n"
    assert answer("cache", "--clear", **own)[1] == f"compiled programs in {folder}\ndeleted 1 entry, 2.05 kB\n"
    assert answer("cache", **own)[1] == f"compiled programs in {folder}\n0 entries, 0 bytes\n"
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert str(tmp_path / "jax") in answer("cache", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"))[1]


# ---- the catalogue ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", model_names())
def test_options_are_those_of_the_imported_model(name: str) -> None:
    """What a file says of a model, as it is written, is what Python makes of it."""
    import inspect

    from bayesrl.problem import _module
    from bayesrl.ready_models import model_path

    module = _module(model_path(name))
    for use in model_uses(name):
        parameters = inspect.signature(getattr(module, use)).parameters
        assert model_options(name, use) == {p.name: p.default for p in parameters.values()}
    assert {use for use in ("problem", "learning") if hasattr(module, use)} == set(model_uses(name))


@pytest.mark.parametrize(
    "source",
    [
        "from elsewhere import problem",
        "from elsewhere import *",
        "problem = make()",
        "if True:\n    def problem(**options): ...",
        "@decorated\ndef problem(): ...",
        "def problem(*, a=1): ...\nproblem = wrapped(problem)",
        "def __getattr__(name): ...",
        "def problem(*, a: int = 1, **options): ...",
    ],
)
def test_in_doubt_nothing_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(source)
    check_use(str(tmp_path / "mine.py"), "problem", {"other": 2})


def test_defaults_may_be_constants_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("SIZE = 3\ndef problem(*, size: int = SIZE, at=len('ab'), needed: float): ...")
    told = model_options(str(tmp_path / "mine.py"))
    assert told["size"] == 3
    assert repr(told["at"]) == "len('ab')"
    with pytest.raises(ProblemError, match="option needed must be a number, got 'x'"):
        check_use(str(tmp_path / "mine.py"), "problem", {"needed": "x"})


def test_a_wrong_model_in_python_says_what_was_meant() -> None:
    with pytest.raises(ProblemError, match="did you mean 'gaussian_target'"):
        load_problem("gausian_target")


# ---- the package ------------------------------------------------------------------------------


def test_public_names_have_one_home_each() -> None:
    """Type checkers read one list of names, Python another: they are the same."""
    tree = ast.parse(Path(bayesrl.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    rooms = {name for name, home in told.items() if home == "bayesrl"}
    assert set(told) == set(bayesrl.__all__)
    assert {name: home for name, home in told.items() if name not in rooms} == bayesrl._HOME
    assert set(bayesrl.__all__) <= set(dir(bayesrl))


def test_names_come_when_they_are_asked_for() -> None:
    code = (
        "import sys, bayesrl\n"
        "assert not {'jax', 'numpy', 'typer'} & set(sys.modules)\n"
        "assert 'fit' in dir(bayesrl) and 'jax' not in sys.modules\n"
        "assert not hasattr(bayesrl, 'nothing') and not hasattr(bayesrl, '__wrapped__')\n"
        "assert 'jax' not in sys.modules\n"
        "from bayesrl import control, lm, fit\n"
        "assert bayesrl.control is control and bayesrl.fit is fit and bayesrl.lm.LoRA is lm.LoRA\n"
        "assert bayesrl.run_folder.PROBLEM == 'problem.json'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr


def test_loading_knows_what_the_domains_bring() -> None:
    """Run folders name guides and objectives, some of them of `control` and `lm`."""
    code = "import sys; from bayesrl import load; assert {'bayesrl.control', 'bayesrl.lm'} <= set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
