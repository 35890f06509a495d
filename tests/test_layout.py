"""Imports point down only (see CONTRIBUTING.md), and nothing optional is imported before it is used.

Upwards, every import counts, also one inside a function: a room must be understood without the one above.  Cycles are looked for among
the imports that run when a module does, so a registry may name the environments that build on it, as long as it imports them late.
"""

import ast
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up; rooms of one level may use each other without cycles, unless they are listed in APART.
LEVELS = (
    ("wam.files", "wam.figures", "wam.pictures", "wam.shards", "wam.cells", "wam.config", "wam.config_check", "wam.config_data", "wam.config_disturbances", "wam.config_execution", "wam.config_model", "wam.config_planner", "wam.config_robot", "wam.config_runtime", "wam.config_time", "wam.config_training", "wam.config_tree", "wam.presets", "wam.robots", "wam.flow", "wam.solvers", "wam.relations", "wam.relations_text", "wam.timeline"),
    ("wam.codec", "wam.text", "wam.model"),
    ("wam.pretrained",),
    ("wam.data", "wam.convert"),
    ("wam.training", "wam.inference"),
    ("wam.evaluation", "wam.serving"),
    ("wam.commands",),
    ("wam.cli",),
)
APART = {"wam.training", "wam.inference"}
OPTIONAL = {"metaworld", "mujoco", "decord", "tensorboard", "matplotlib", "xformers", "deepspeed", "peft", "torchcodec", "wandb", "gymnasium", "gym_pusht", "libero", "lerobot"}
HEAVY = {"diffusers", "transformers"}  # take seconds to import; only a model needs them
WITHOUT_A_MODEL = ("wam.cli", "wam.evaluation.vector", "wam.evaluation.collect", "wam.evaluation.baseline_runs", "wam.evaluation.check_report", "wam.evaluation.report", "wam.evaluation.paired")
SIMULATORS = {"metaworld", "mujoco"}  # an environment's own file in wam/evaluation may need its simulator; nothing else may then need that file


def room_and_level(module: str) -> tuple[str, int]:
    for level, rooms in enumerate(LEVELS):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return room, level
    raise AssertionError(f"{module} is in no room; give it one in LEVELS of tests/test_layout.py and in docs/architecture.md")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(nodes: Iterable[ast.AST], module: str, is_package: bool, modules: set[str]) -> set[str]:
    """The wam modules that these nodes of a module import; `from wam import files` counts as wam.files."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: None if is_package else -1]
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]) if node.level else node.module or ""
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names}
    return {name for name in found if name.split(".")[0] == "wam"} - {"wam"}  # the package itself holds only the version


def problems(graph: dict[str, set[str]]) -> list[str]:
    """Every import that does not point down."""
    found = []
    for module, targets in graph.items():
        room, level = room_and_level(module)
        for target in targets:
            target_room, target_level = room_and_level(target)
            if target_level > level:
                found.append(f"{module} imports {target}, which is above it")
            elif room != target_room and {room, target_room} <= APART:
                found.append(f"{module} imports {target}; {room} and {target_room} are kept apart")
    return sorted(found)


def module_level(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements that run when a module is imported: all but the bodies of functions and `if TYPE_CHECKING`."""
    found = []
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        found.append(node)
        for name in ("body", "orelse", "finalbody"):
            found += module_level(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            found += module_level(handler.body)
    return found


def packages(tree: ast.Module) -> set[str]:
    """What is imported as soon as a module is: packages, and the full names of what may be modules in them."""
    found = set()
    for node in module_level(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found | {name.split(".")[0] for name in found}


def optional_imports(tree: ast.Module) -> set[str]:
    """Optional packages that are imported as soon as a module is."""
    found = packages(tree)
    return found & OPTIONAL | ({"tensorboard"} if any(name.startswith("torch.utils.tensorboard") for name in found) else set())


def waits(start: str, early: dict[str, set[str]], heavy: set[str]) -> list[str]:
    """The imports that lead from a module to one of `heavy` when it is imported; empty where none do."""
    ways, known = [[start]], {start}
    for way in ways:
        if way[-1] in heavy:
            return way
        ahead = sorted(early.get(way[-1], set()) - known)
        ways += [[*way, module] for module in ahead]
        known.update(ahead)
    return []


def needless(early: dict[str, set[str]], optional: dict[str, set[str]]) -> list[str]:
    """Modules that cannot be imported without an optional package, although they should."""
    simulators = {module for module, names in optional.items() if names and names <= SIMULATORS and module.startswith("wam.evaluation.")}
    found = [f"{module} imports {', '.join(sorted(names))} at the top" for module, names in optional.items() if names and module not in simulators]
    found += [
        f"{module} imports {', '.join(sorted(names & simulators))} at the top"
        for module, names in early.items()
        if names & simulators and module not in simulators
    ]
    return sorted(found)


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted((ROOT / "wam").rglob("*.py"))}


def graph_of(trees: dict[Path, ast.Module], early: bool) -> dict[str, set[str]]:
    """Who imports whom: anywhere, or `early`, when the module itself is imported."""
    modules = {module_name(path) for path in trees}
    nodes = {path: module_level(tree.body) if early else ast.walk(tree) for path, tree in trees.items()}
    graph = {module_name(path): imports(nodes[path], module_name(path), path.name == "__init__.py", modules) for path in trees}
    assert not graph.pop("wam"), "wam/__init__.py imports nothing: every room would come with it"
    return graph


def test_imports_point_down(trees: dict[Path, ast.Module]) -> None:
    found = problems(graph_of(trees, early=False))
    assert not found, "\n".join(found)


def test_no_cycles(trees: dict[Path, ast.Module]) -> None:
    try:
        TopologicalSorter(graph_of(trees, early=True)).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def test_optional_packages_are_imported_where_they_are_used(trees: dict[Path, ast.Module]) -> None:
    found = needless(graph_of(trees, early=True), {module_name(path): optional_imports(tree) for path, tree in trees.items()})
    assert not found, "\n".join(found)


def test_what_needs_no_model_does_not_wait_for_its_libraries(trees: dict[Path, ast.Module]) -> None:
    """`wam report`, and every process of a simulator, would take seconds longer to start."""
    early, heavy = graph_of(trees, early=True), {module_name(path) for path, tree in trees.items() if packages(tree) & HEAVY}
    found = [" imports ".join(way) for start in WITHOUT_A_MODEL if (way := waits(start, early, heavy))]
    assert not found, "\n".join(found)
    assert waits("wam.training.loop", early, heavy), "training needs a model"


def test_the_checks_see_what_they_should() -> None:
    modules = {"wam.files", "wam.model", "wam.model.cache", "wam.data.windows", "wam.training.loop"}
    source = "from wam import files\nfrom . import cache\nfrom .cache import Cache\ndef f():\n    import wam.training.loop\n"
    assert imports(ast.walk(ast.parse(source)), "wam.model", True, modules) == {"wam.files", "wam.model.cache", "wam.training.loop"}
    assert imports(module_level(ast.parse(source).body), "wam.model", True, modules) == {"wam.files", "wam.model.cache"}
    assert imports(ast.parse("from . import cache\nfrom ..files import x").body, "wam.model.wam", False, modules) == {"wam.model.cache", "wam.files"}

    assert problems({"wam.model.wam": {"wam.training.loop"}}) == ["wam.model.wam imports wam.training.loop, which is above it"]
    assert problems({"wam.training.loop": {"wam.inference.session"}}), "training and inference are kept apart"
    assert not problems({"wam.cli": {"wam.training.loop"}, "wam.model.wam": {"wam.text.bytes"}})
    with pytest.raises(AssertionError, match="in no room"):
        problems({"wam.modle.wam": set()})

    assert optional_imports(ast.parse("try:\n    import mujoco\nexcept ImportError:\n    from torch.utils.tensorboard import SummaryWriter")) == {
        "mujoco",
        "tensorboard",
    }
    assert not optional_imports(ast.parse("import torch\ndef f():\n    import mujoco\nif TYPE_CHECKING:\n    import peft"))

    early = {"wam.cli": {"wam.data.video", "wam.data.views"}, "wam.data.video": {"wam.figures"}, "wam.data.views": {"wam.model.wam"}, "wam.figures": {"wam.data.video"}}
    assert waits("wam.cli", early, {"wam.model.wam"}) == ["wam.cli", "wam.data.views", "wam.model.wam"] and not waits("wam.data.video", early, {"wam.model.wam"})

    simulator = {"wam.evaluation.robosim": {"mujoco"}, "wam.data.video": set()}
    assert not needless({"wam.evaluation.robosim": set()}, simulator)
    assert needless({"wam.evaluation.rollout": {"wam.evaluation.robosim"}}, simulator) == ["wam.evaluation.rollout imports wam.evaluation.robosim at the top"]
    assert needless({}, {"wam.data.video": {"decord"}}) == ["wam.data.video imports decord at the top"]
    assert needless({}, {"wam.evaluation.plots": {"matplotlib"}}) and needless({}, {"wam.model.wam": {"mujoco"}})
