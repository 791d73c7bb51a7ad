"""One self-contained Python file out of modules of this package, for checkpoints that load with `trust_remote_code`.

The code exists once, in the package; the file in the checkpoint is made from it, so the two cannot drift apart.
"""

from __future__ import annotations

import ast
import functools
import importlib.resources

from neuroweave import __version__

# not needed at run time: annotations are never evaluated, and the package's own names are all in this file
DROPPED_IMPORTS = ("neuroweave", "jaxtyping", "__future__")


@functools.cache
def join_modules(modules: tuple[tuple[str, str], ...], ending: str = "") -> str:
    """The modules' sources one after the other, their imports of each other left out; `ending`: code after them.

    `modules`: (folder in the package, file), in an order in which each needs only those before it.
    """
    parts = [
        f'"""Made by neuroweave {__version__}: what AutoModel needs to load this checkpoint without the package.\n\n'
        f'Apache-2.0. Joined from the package\'s own modules; edit those, not this file.\n"""\n',
        "from __future__ import annotations\n",
    ]
    for folder, name in modules:
        source = importlib.resources.files("neuroweave").joinpath(folder, name).read_text()
        parts.append(f"\n# {'-' * 30} neuroweave/{folder}/{name}\n\n{without_own_imports(source)}")
    return "\n".join([*parts, *([f"\n{ending}\n"] if ending else [])])


def without_own_imports(source: str) -> str:
    """The source less its module docstring and its top-level imports from `DROPPED_IMPORTS`."""
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    for index, node in enumerate(tree.body):
        docstring = index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dropped = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in DROPPED_IMPORTS
        if docstring or dropped:
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    return "".join(lines).strip() + "\n"
