"""Who may import whom: the levels are read from the docstring of `tisdpo`, the imports from the sources."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import tisdpo

ROOT = Path(tisdpo.__file__).parent
PACKAGE = "functional"  # the level of `tisdpo` itself: its __init__ offers what `functional` has
ALONE = "reference"  # imports nothing of the package and is imported by nothing


def levels_of(docstring: str) -> dict[str, int]:
    """{module: level} from the indented lines `a, b -> c -> ...` of a docstring; a line that goes on starts with an arrow."""
    lines = [line.strip() for line in docstring.splitlines() if line.startswith("    ") and "->" in line]
    groups = re.sub(r"\s*->\s*", "->", " ".join(lines)).split("->")
    return {name.strip(): level for level, group in enumerate(groups) for name in group.split(",")}


def part_of(module: str) -> str:
    """tisdpo.ops.fold -> ops; tisdpo -> the level of the package itself."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else PACKAGE


def imports_of(path: Path) -> set[str]:
    """Parts of the package that this file imports, anywhere in it (inside functions too)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {part_of(alias.name) for alias in node.names if alias.name.split(".")[0] == "tisdpo"}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write imports from the root, `from tisdpo.x import y`"
            if node.module == "tisdpo":
                found |= {alias.name if alias.name in parts() else PACKAGE for alias in node.names}
            elif node.module and node.module.startswith("tisdpo."):
                found.add(part_of(node.module))
    return found


@cache
def parts() -> dict[str, list[Path]]:
    """The modules and subpackages of tisdpo with their files."""
    files = {path.stem: [path] for path in sorted(ROOT.glob("*.py")) if path.stem != "__init__"}
    return files | {d.name: sorted(d.rglob("*.py")) for d in ROOT.iterdir() if (d / "__init__.py").exists()}


LEVELS = levels_of(tisdpo.__doc__)


@pytest.mark.parametrize("part", sorted(set(parts()) - {ALONE}))
def test_imports_go_along_the_arrows(part):
    assert part in LEVELS, f"tisdpo.{part} has no place in the levels of tisdpo/__init__.py's docstring"
    for path in parts()[part]:
        for other in imports_of(path) - {part}:
            assert other in LEVELS, f"{path.relative_to(ROOT)} imports tisdpo.{other}, which has no place in the levels"
            where = "stands to the right" if LEVELS[other] > LEVELS[part] else "is on the same level"
            assert LEVELS[other] < LEVELS[part], f"{path.relative_to(ROOT)} imports tisdpo.{other}, which {where}"


def test_the_reference_stands_alone():
    assert imports_of(ROOT / f"{ALONE}.py") == set()
    assert ALONE not in LEVELS
    for files in parts().values():
        assert not [path for path in files if ALONE in imports_of(path)]


def test_the_package_itself_offers_nothing_from_above_its_level():
    assert all(LEVELS[part] <= LEVELS[PACKAGE] for part in imports_of(ROOT / "__init__.py"))


def test_every_name_of_the_levels_exists():
    assert set(LEVELS) <= set(parts()), sorted(set(LEVELS) - set(parts()))


def test_levels_are_read_from_any_layout():
    text = "Title.\n\nAn a -> b in a sentence is no level.\n\n    a, b -> c\n    -> d\n    -> e, f\n"
    assert levels_of(text) == {"a": 0, "b": 0, "c": 1, "d": 2, "e": 3, "f": 3}


def test_operators_and_small_maths_need_torch_alone():
    """No module up to `functional` imports anything outside the standard library but torch (the kernels: triton), so that any trainer can
    use them."""
    for part in (p for p in parts() if LEVELS.get(p, 0) <= LEVELS[PACKAGE]):
        allowed = sys.stdlib_module_names | {"torch", "tisdpo"} | ({"triton"} if part == "kernels" else set())
        for path in parts()[part]:
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                assert all(name.split(".")[0] in allowed for name in names), f"{path.relative_to(ROOT)} imports {names}"


def test_importing_the_package_loads_no_trainer():
    code = "import sys, tisdpo; print(sorted({m.split('.')[0] for m in sys.modules} & {'transformers', 'datasets', 'trl', 'matplotlib'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_importing_it_beside_a_clone_of_its_name(tmp_path):
    """A folder `tisdpo` without an __init__.py, as a clone is to a script next to it, hides nothing."""
    (tmp_path / "tisdpo" / "tests").mkdir(parents=True)
    code = "import tisdpo; print(tisdpo.linear_tis_dpo_loss.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "linear_tis_dpo_loss", done.stderr
