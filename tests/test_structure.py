"""What the layout of the package promises, read from its imports and definitions."""

import ast
from pathlib import Path

import pytest

from tests.tiny import REPOSITORY

PACKAGE = REPOSITORY / "cnn_jax"
# From top to bottom: a room imports from itself and from those after it.
ROOMS = "main cli studies analysis train data config models ops common".split()  # noqa: SIM905
NOT_ROOMS = {"__init__.py", "__main__.py", "__pycache__", "README.md", "py.typed"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


TREES = {
    module_of(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(tree: ast.Module) -> list[tuple[str, int]]:
    """(module of the package, line) of every import, also of those inside functions."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in TREES else node.module for name in full]
        found += [(name, node.lineno) for name in names if name in TREES]
    return found


def climbing(module: str, tree: ast.Module) -> list[str]:
    """The imports from rooms above that of `module`."""
    floor = ROOMS.index(room_of(module))
    return [
        f"{module}:{line} imports {target}"
        for target, line in imports(tree)
        if ROOMS.index(room_of(target)) < floor
    ]


def room_of(module: str) -> str:
    if module == "cnn_jax":  # imports nothing, so that everybody may import it
        return ROOMS[-1]
    room = module.split(".")[1]
    return "main" if room == "__main__" else room


def circle(arrows: dict[str, set[str]]) -> set[str]:
    """The modules that import each other in a circle, or lead to one; none if there is none."""
    left = dict(arrows)
    while leaves := [name for name in left if not left[name] & left.keys()]:
        for name in leaves:
            del left[name]
    return set(left)


def long_definitions(tree: ast.Module) -> dict[str, int]:
    """Lines, the docstring apart, of functions of more than 50 and of classes of more than 200."""
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        if lines > (200 if isinstance(node, ast.ClassDef) else 50):
            found[node.name] = lines
    return found


def test_the_package_has_at_most_ten_entries():
    entries = {path.name for path in PACKAGE.iterdir()} - NOT_ROOMS
    assert entries == {"main.py", *ROOMS[1:]}
    assert len(entries) <= 10


def test_imports_run_downwards():
    assert [line for module, tree in TREES.items() for line in climbing(module, tree)] == []


def test_no_modules_import_each_other_in_a_circle():
    arrows = {module: {target for target, _ in imports(tree)} for module, tree in TREES.items()}
    assert sum(map(len, arrows.values())) > 150
    assert circle(arrows) == set()


def test_definitions_are_short():
    found = {
        f"{module}.{name}" for module, tree in TREES.items() for name in long_definitions(tree)
    }
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "from cnn_jax.train import loop",
        "from cnn_jax.train.loop import train",
        "import cnn_jax.train.loop",
        "def f():\n    from cnn_jax.train import loop",
        "if TYPE_CHECKING:\n    from cnn_jax.train.loop import train",
    ],
)
def test_an_import_that_climbs_is_found(code):
    tree = ast.parse(code)
    assert len(climbing("cnn_jax.data.loader", tree)) == 1
    assert climbing("cnn_jax.train.progress", tree) == []
    assert climbing("cnn_jax.main", tree) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == set()
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == {"a", "b", "c"}


def test_long_definitions_are_found():
    def body(lines: int) -> str:
        return '    """One.\n\n    Two.\n    """\n' + "    x = 1\n" * lines

    code = "".join(
        [
            f"def short():\n{body(49)}",
            f"def long():\n{body(50)}",
            f"class Short:\n{body(199)}",
            f"class Long:\n{body(200)}",
        ]
    )
    assert long_definitions(ast.parse(code)) == {"long": 51, "Long": 201}
