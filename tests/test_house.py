"""The house: what stands where, who imports whom, and limits against the next squeeze."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from graphlib import TopologicalSorter

import pytest

from helpers import ROOT

TOP_LEVEL = {
    "train_dpo.py",
    "dpo_loss.py",
    "data.py",
    "config.yaml",
    "requirements.txt",
    "README.md",
    "LICENSE",
    "tests",
    "support",
}
METHOD = ["train_dpo.py", "dpo_loss.py", "data.py"]
FILES = [*METHOD, *sorted(f"support/{path.name}" for path in (ROOT / "support").glob("*.py"))]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.splitlines()


def parse(name):
    source = (ROOT / name).read_text(encoding="utf-8")
    return source, ast.parse(source)


def code_lines(source, tree):
    """The numbers of the lines that hold code: no blank ones, comments or docstrings."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def imported(name):
    """The modules that a file imports, with dots: `from support import x` is support.x."""
    _, tree = parse(name)
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module == "support":
            modules |= {f"support.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    return modules


def test_the_top_level_holds_the_method_and_two_folders():
    names = {path.partition("/")[0] for path in tracked() if not path.startswith(".")}
    assert names == TOP_LEVEL or not names  # a copy without git has no list


def test_support_imports_nothing_of_the_top_level():
    method = {name.removesuffix(".py") for name in METHOD}
    for name in FILES:
        if name.startswith("support/"):
            assert not method & imported(name), name


def test_no_room_reaches_back():
    graph = {}
    for name in FILES:
        room = name.removesuffix(".py").replace("/", ".")
        graph[room] = imported(name)
    order = list(TopologicalSorter(graph).static_order())  # raises for a circle
    assert order[-1] == "train_dpo"


def test_the_loss_imports_torch_alone():
    packages = {module.partition(".")[0] for module in imported("dpo_loss.py")}
    assert packages - sys.stdlib_module_names == {"torch"}


def test_the_data_knows_no_model():
    modules = imported("data.py")
    assert not modules & {"transformers", "dpo_loss", "train_dpo", "support.model"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_short_and_not_dense(name):
    source, tree = parse(name)
    assert len(source.splitlines()) <= 550
    lines = code_lines(source, tree)
    if not lines:
        return
    nodes = [node for node in ast.walk(tree) if not isinstance(node, ast.Load | ast.Store)]
    statements = sum(isinstance(node, ast.stmt) for node in nodes)
    comprehensions = sum(isinstance(node, COMPREHENSIONS) for node in nodes)
    assert len(nodes) / statements <= 8.5
    assert len(nodes) / len(lines) <= 7.5
    assert comprehensions / len(lines) <= 0.04
    for node in nodes:
        if isinstance(node, FUNCTIONS):
            assert len(lines & set(range(node.lineno, node.end_lineno + 1))) <= 45, node.name


def test_method_and_loss_are_read_in_one_sitting():
    lengths = [len(parse(name)[0].splitlines()) for name in ("train_dpo.py", "dpo_loss.py")]
    assert sum(lengths) <= 800


def test_functions_are_simple_and_the_formatter_has_run():
    """Complexity 10 and 15 locals at most: ruff's C901 and PLR0914."""
    for command in (["check", "--select", "C901,PLR0914", *FILES], ["format", "--check", "."]):
        ruff = [sys.executable, "-m", "ruff", *command]
        ran = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout


def test_nothing_is_kept_from_the_formatter():
    for path in tracked():
        if path.endswith(".py") and path != "tests/test_house.py":
            source = (ROOT / path).read_text(encoding="utf-8")
            assert not re.search(r"# fmt: (skip|off)", source), path


def test_the_readme_is_short_and_its_links_point_at_the_lines_they_name():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 170
    links = re.findall(r"\[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)\)", readme)
    assert len(links) >= 8
    for name, path, number in links:
        line = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert re.match(rf"\s*(def |class )?{name}\b(?! \()", line), (name, line)
