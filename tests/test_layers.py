"""The wings of agp_jax stand in one order, so do their modules, and arrows point down.

A module imports only what stands before it. `docs/architecture.md` draws this order.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import agp_jax

# From the ground up. Moving a name in this list is a design decision.
ORDER = [
    # prune: what rules say and what is ranked
    "trees",  # names for the leaves of any pytree
    "shardings",  # what an explicit mesh wants to be told
    "bits",  # floats as integers of the same order
    "schedules",  # when to prune how much
    "structures",  # how a tensor divides into cells
    "boxes",  # sums over cells, the same on any mesh
    "selection",  # the largest scores, exactly
    "rules",  # which parameter is pruned by what
    "packing",  # masks at one bit per weight
    "couplings",  # which slices of which leaves go together
    # programs: what a function does to every axis
    "programs",
    "programs.jaxprs",  # traced functions as plain values
    "programs.atoms",  # what goes together, as a union-find
    "programs.labels",  # what is known about an axis
    "programs.elementwise",  # what ties what, and where zeros stay zeros
    "programs.vanishing",  # what is wholly zero once certain leaves are
    "programs.constants",  # what is known when tracing
    "programs.numbers",  # integers that count the indices of an axis
    "programs.moves",  # a label rule for each primitive that hands axes on
    "programs.reductions",  # and for each that reduces them
    "programs.propagation",  # label rules, applied to a whole program
    "programs.analyses",  # the labels of a whole function
    "programs.branching",  # what is added to streams, and can be left out
    "programs.grouping",  # and the couplings that follow from them
    # prune: masks, and the optimizer that keeps them
    "cells",  # what a parameter's cells are ranked by
    "units",  # what coupled slices are ranked by
    "branches",  # what layers of a loop are ranked by
    "contests",  # which of these compete, and how many go
    "masks",  # what the rules keep at a step
    "pruning",  # the optax transformation that prunes
    # thinning: what a cut leaves
    "thinning",
    "thinning.cuts",  # which slices stay
    "thinning.remains",  # what a cut leaves of every value of a function
    "thinning.resizing",  # equations whose parameters hold a size
    "thinning.removal",  # a function without the leaves that are gone
    "thinning.replay",  # a function at the shapes of a cut
    "thinning.routers",  # a function in which masked experts are never chosen
    "thinning.trees",  # what a cut leaves of any tree
    "thinning.states",  # and of an optimizer's state
    "thinning.checks",  # whether the thinned function is the masked one
    "costs",  # parameters, non-zeros and multiply-adds
    "planning",  # what rules will leave
]
CORE = list(ORDER)
ORDER += [
    # data: examples, prepared and in batches
    "data.sources",  # where examples come from
    "data.augmentations",  # how training varies images
    "data.batches",  # batches as a function of seed and step
    "data.datasets",  # what is known of each dataset
    "data.cifar10",  # its archive
    "data.digits",  # scikit-learn's
    "data.directories",  # where prepared data lies
    "data.imagenet_tars",  # its archives
    "data.imagenet",  # its preparation
    "data.preparation",  # of any dataset
    "data.splits",  # the splits of prepared data
    "data.vocabularies",  # what the numbers of tokens stand for
    "data.corpora",  # where text comes from
    "data.text",  # tokens in batches, as a function of seed and step
    "data.command",  # python -m agp_jax.data
    "data",
    "data.__main__",
    # models: those of published results
    "models.layers",  # as wide as their stored kernels
    "models.mlp",
    "models.alexnet",
    "models.mobilenet",
    "models.resnet",
    "models.resnet_cifar",
    "models.vit",
    "models.lstm",
    "models.gpt",
    "models",
    "models.folding",  # normalisation folded into kernels
    "models.torch_weights",  # published weights
    # training: an experiment from its config to its report
    "training",
    "training.published",  # what others have published
    "training.tasks",  # what is learned, as the loop sees it
    "training.config",  # an experiment as plain values
    "training.fields",  # and its fields on the command line
    "training.distillation",  # what a model learns from its teacher
    "training.classification",  # the task of images
    "training.language",  # and that of text
    "training.optimizers",  # how weights move
    "training.meshes",  # where arrays live
    "training.experiment",  # a config made concrete
    "training.steps",  # its jitted steps
    "training.courses",  # weights and work over training
    "training.counts",  # how much of every kernel is left
    "training.plans",  # what a run will end with
    "training.processes",  # how several train one model
    "training.evaluation",  # how good and how sparse a state is
    "training.workdirs",  # the home of a run
    "training.checkpoint",  # what it can go on from
    "training.sampling",  # text that a trained model writes
    "training.records",  # what it writes for programs
    "training.printing",  # sentences and tables that fit a console
    "training.progress",  # how far a run is
    "training.pictures",  # its quality and sparsity
    "training.reports",  # and what it tells people
    "training.loop",  # the run itself
]

PACKAGE = Path(agp_jax.__file__).parent


def module_name(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")  # that of the package itself stays


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
each_file = pytest.mark.parametrize("name", FILES)


def parse(name):
    return ast.parse(FILES[name].read_text(), filename=str(FILES[name]))


def imported(name):
    """The dotted names that a file imports, and where: [(name, line)]."""
    found = []
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("agp_jax.") in FILES
                found.append((inner if is_module else node.module, node.lineno))
    return found


def own_imports(name):
    """What a file imports from agp_jax, without that prefix: [(name, line)]."""
    return [
        (target.removeprefix("agp_jax").removeprefix("."), line)
        for target, line in imported(name)
        if target.split(".")[0] == "agp_jax"
    ]


def test_every_module_has_its_place_in_the_order():
    assert sorted(ORDER) == sorted(set(FILES) - {"__init__"})


@each_file
def test_a_module_imports_only_earlier_ones(name):
    place = ORDER.index(name) if name in ORDER else len(ORDER)
    wrong = [
        f"line {line}: {target or 'the package itself'}"
        for target, line in own_imports(name)
        if target not in ORDER[:place]
    ]
    assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_pruning_needs_no_program():
    """Which units go is decided by couplings as values, wherever they come from."""
    first, last = ORDER.index("rules"), ORDER.index("pruning")
    pruning = [name for name in ORDER[first : last + 1] if "." not in name]
    imports = {name: [target for target, _ in own_imports(name)] for name in pruning}
    assert {"couplings", "units", "masks"} <= set(pruning)
    assert not {n: t for n, ts in imports.items() for t in ts if t[:8] == "programs"}


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_jax_numpy_and_optax_alone(name):
    allowed = {"agp_jax", "jax", "numpy", "optax"} | sys.stdlib_module_names
    others = {t for t, _ in imported(name) if t.split(".")[0] not in allowed}
    assert not others


# What takes seconds to import, and a run needs once or not at all.
HEAVY = {"sklearn", "matplotlib"}


@each_file
def test_imports_stand_at_the_top_or_are_heavy(name):
    tree = parse(name)
    imports = (ast.Import, ast.ImportFrom)
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    head = 0
    while head < len(body) and isinstance(body[head], imports):
        head += 1
    late = {
        id(node): node.lineno for node in ast.walk(tree) if isinstance(node, imports)
    }
    for node in body[:head]:
        del late[id(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in HEAVY:
            late.pop(id(node), None)
    assert not late, f"{name} imports on lines {sorted(late.values())}"


def test_nothing_heavy_is_imported_before_it_is_used():
    program = (
        "import sys, agp_jax.training.loop; "
        f"sys.exit(' '.join({HEAVY!r} & sys.modules.keys()) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@each_file
def test_every_file_says_first_what_it_is(name):
    assert ast.get_docstring(parse(name)), f"{name} has no docstring"


def test_the_package_only_re_exports_each_public_name_once():
    names = []
    for node in ast.walk(parse("__init__")):
        assert not isinstance(node, ast.Import | ast.ClassDef)
        if isinstance(node, ast.ImportFrom):
            assert node.module.startswith("agp_jax.")
            names += [alias.asname or alias.name for alias in node.names]
    assert sorted(names) == agp_jax.__all__ == sorted(set(agp_jax.__all__))
    modules = {name.partition(".")[0] for name in ORDER}
    assert not set(names) & modules, "a name of the package hides a module of it"
