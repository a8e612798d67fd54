"""The scripts share no code, so that each reads alone: what has the same name in two of them has the same text."""

import ast
import itertools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ["train_teacher", "ppd_atari", "ppd_continuous", "ppd_procgen", "student_distill", "teacher_distill"]
SCRIPTS = [ROOT / f"{name}.py" for name in NAMES if (ROOT / f"{name}.py").exists()]
MAY_DIFFER = {
    "Args": "each script has the flags that do something in it",
    "main": "the loop is what a script is for",
    "make_networks": "each suite has its own networks",
}


def definitions(path):
    source = path.read_text()
    lines = source.splitlines()
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    starts = [min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) for node in nodes]
    return {node.name: lines[start - 1 : node.end_lineno] for node, start in zip(nodes, starts, strict=True)}


PAIRS = [pytest.param(pair, id="-".join(p.stem for p in pair)) for pair in itertools.combinations(SCRIPTS, 2)]


@pytest.mark.parametrize("pair", PAIRS)
def test_same_name_same_text(pair):
    first, second = (definitions(path) for path in pair)
    shared = (first.keys() & second.keys()) - MAY_DIFFER.keys()
    assert len(shared) > 10
    assert {name for name in shared if first[name] != second[name]} == set()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_script_imports_another(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    assert "torch" in imported
    assert not {name.split(".")[0] for name in imported} & {"", *NAMES}
