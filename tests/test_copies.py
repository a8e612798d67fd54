"""The scripts share no code, so that each reads alone: what has the same name in two of them has the same text. The
commands in their docstrings, and what README.md quotes of them, are right."""

import ast
import importlib
import itertools
import re
import shlex

import gymnasium as gym
import numpy as np
import pytest
import tyro
from helpers import NAMES, ROOT, load, make_teacher, run_command

MAY_DIFFER = {
    "Args": "each script has the flags that do something in it",
    "main": "the loop is what a script is for",
    "make_envs": "each script chooses among the suites that it knows",
}
README = (ROOT / "README.md").read_text()
SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in NAMES}


def definitions(name):
    """{name: text} of the functions, classes and constants at the top of a script, decorators with them."""
    lines, found = SOURCES[name].splitlines(), {}
    for node in ast.parse(SOURCES[name]).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            found[getattr(node, "name", ast.unparse(node).split(" =")[0])] = lines[first - 1 : node.end_lineno]
    return found


@pytest.mark.parametrize("pair", list(itertools.combinations(NAMES, 2)), ids="-".join)
def test_same_name_same_text(pair):
    first, second = map(definitions, pair)
    shared = (first.keys() & second.keys()) - MAY_DIFFER.keys()
    assert {"save", "load", "evaluate", "RunningMeanStd", "layer_init", "NUM_CORES"} <= shared
    assert {name for name in shared if first[name] != second[name]} == set()


@pytest.mark.parametrize("name", NAMES)
def test_no_script_imports_another(name):
    nodes = list(ast.walk(ast.parse(SOURCES[name])))
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    assert "torch" in imported and not {word.split(".")[0] for word in imported} & {"", "helpers", *NAMES}


def commands():
    for name, text in {**SOURCES, "README": README}.items():
        text = text if name == "README" else ast.get_docstring(ast.parse(text))
        for line in re.findall(rf"python ((?:{'|'.join(NAMES)})\.py(?: [^`\n#]*)?)", text):
            yield pytest.param(line, id=f"{name}: {line.strip()}")


@pytest.mark.parametrize("line", list(commands()))
def test_commands_parse(line):
    script, *arguments = shlex.split(line)
    Args = importlib.import_module(script.removesuffix(".py")).Args
    arguments = [argument for argument in arguments if not argument.isupper()]  # such as RUN_FOLDER
    assert tyro.cli(Args, args=arguments) != Args() or not arguments


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_quotes_the_marked_lines_of_the_loop():
    blocks = [block.splitlines() for block in BLOCKS if "# PPD:" in block]
    loop = SOURCES["ppd_continuous"].split("        for global_step")[1].split("# RESULT")[0]
    for block in blocks:
        assert [line.strip() for line in block] == [line.strip() for line in loop.splitlines() if "# PPD:" in line]


@pytest.mark.parametrize("block", [block for block in BLOCKS if "torch.load" in block])
def test_readme_uses_a_policy_file(monkeypatch, capsys, block):
    """The block runs as it stands, and gets the score in the file."""
    monkeypatch.chdir(ROOT)
    names = {}
    exec(block, names)
    scores = [float(number) for number in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
    assert len(scores) > 1 and isinstance(names["env"], gym.Env)
    assert np.mean(scores) == pytest.approx(names["policy"]["score"]["mean"], rel=0.05)


RECIPES = re.split(r"^# .*\n", re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1], flags=re.MULTILINE)[1:]


def distance(first, second):
    """The largest difference between the actors of two policy files."""
    first, second = load(first)["actor"], load(second)["actor"]
    return max((first[name] - second[name]).abs().max() for name in first)


@pytest.mark.parametrize("diff", RECIPES)
def test_readme_changes_the_script(folder, monkeypatch, diff):
    """Each recipe applies to ppd_continuous.py, and the copy learns something else."""
    source = SOURCES["ppd_continuous"]
    for hunk in diff.split("@@\n"):
        old, new = ("".join(line[1:] for line in hunk.splitlines(True) if line[0] in kept) for kept in (" -", " +"))
        assert source.count(old) == 1
        source = source.replace(old, new)
    (folder / "changed.py").write_text(source)
    line = ["ppd_continuous.py", "--teacher", make_teacher(), "--eval-episodes", "1", "--num-envs", "2"]
    line += ["--minibatch-size", "64", "--total-timesteps", "128", "--save-path"]
    run_command(monkeypatch, [*line, "plain.pt"])
    line[0] = folder / "changed.py"
    second = ["--second-teacher", make_teacher(path="second.pt", seed=1)] if "second_teacher" in diff else []
    run_command(monkeypatch, [*line, "changed.pt", *second])
    assert distance("plain.pt", "changed.pt") > 1e-7
    if second:  # the same teacher twice is that teacher, up to rounding
        run_command(monkeypatch, [*line, "twice.pt", "--second-teacher", "teacher.pt"])
        assert distance("plain.pt", "twice.pt") < 1e-7
