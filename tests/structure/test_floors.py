"""Imports go down only, and each floor keeps to its libraries."""

import ast
import sys

import pytest

from tests.structure.tree import functions, imports, modules

FLOORS = ("errors", "config", "data", "model", "families", "parallel", "rollout", "train", "interchange", "recipes", "api", "cli")
LIBRARIES = {
    "errors": set(),
    "config": {"pydantic", "yaml"},
    "data": {"numpy", "pyarrow", "tokenizers", "tiktoken", "sentencepiece"},
    "cli": {"typer"},
}
ORACLES = {"transformers", "peft", "accelerate", "datasets", "trl", "vllm"}
OPTIONAL = {"torch.utils.tensorboard", "tensorboard", "torch_npu", "jieba", "sacrebleu", "rouge_score"}
STAGE_CONFIGS = {"StageConfig", "SftConfig", "RewardConfig", "DpoStageConfig", "PpoStageConfig", "EvaluateConfig", "STAGES"}


def floor_of(module: str) -> str:
    return (module.split(".") + [""])[1]


def test_every_module_stands_on_a_floor() -> None:
    strays = [name for name in modules() if floor_of(name) not in (*FLOORS, "", "__main__")]
    assert not strays, f"not on any floor of the architecture: {strays}"


def test_imports_go_down_only() -> None:
    breaches = []
    for module, tree in modules().items():
        if floor_of(module) not in FLOORS:
            continue
        height = FLOORS.index(floor_of(module))
        for name, line in imports(tree):
            if name.startswith("trueline.") and floor_of(name) in FLOORS and FLOORS.index(floor_of(name)) > height:
                breaches.append(f"{module}:{line} imports {name}")
            assert not name.startswith("."), f"{module}:{line}: relative import"
    assert not breaches, "\n".join(breaches)


def test_no_circular_imports() -> None:
    graph = {
        module: {name for name, _ in imports(tree) if name in modules() and name not in (module, "trueline")}
        for module, tree in modules().items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "circular: " + " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for name in graph[module]:
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("floor", LIBRARIES)
def test_floor_keeps_to_its_libraries(floor: str) -> None:
    allowed = LIBRARIES[floor] | set(sys.stdlib_module_names) | {"trueline"}
    breaches = [
        f"{module}:{line} imports {name}"
        for module, tree in modules().items()
        if floor_of(module) == floor
        for name, line in imports(tree)
        if name.split(".")[0] not in allowed
    ]
    assert not breaches, "\n".join(breaches)


def test_losses_import_only_torch() -> None:
    tree = modules().get("trueline.train.losses")
    if tree is None:
        pytest.skip("there are no losses yet")
    allowed = {"torch"} | set(sys.stdlib_module_names)
    assert not [name for name, _ in imports(tree) if name.split(".")[0] not in allowed]


def test_oracles_are_for_tests_only() -> None:
    used = [f"{m}:{line} {name}" for m, tree in modules().items() for name, line in imports(tree) if name.split(".")[0] in ORACLES]
    named = [
        f"{m}:{node.lineno} {node.args[0].value}"
        for m, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and isinstance(node.args[0], ast.Constant)
        if str(node.args[0].value).split(".")[0] in ORACLES and m != GATE
    ]
    assert not used + named, "\n".join(used + named)


def test_torch_distributed_stays_in_parallel() -> None:
    breaches = []
    for module, tree in modules().items():
        if floor_of(module) == "parallel":
            continue
        names = [(name, line) for name, line in imports(tree)]
        names += [(ast.unparse(node), node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        breaches += [
            f"{module}:{line} {name}"
            for name, line in names
            if name.startswith("torch.distributed") and not name.startswith("torch.distributed.checkpoint")
        ]
    assert not breaches, "\n".join(breaches)


def test_only_recipes_read_the_whole_configuration() -> None:
    breaches = []
    for module, tree in modules().items():
        if floor_of(module) in ("config", "recipes", "api", "cli"):
            continue
        breaches += [f"{module}:{line} {name}" for name, line in imports(tree) if name.rpartition(".")[2] in STAGE_CONFIGS]
    assert not breaches, "below the recipes a function takes its own section: " + "\n".join(breaches)


def test_rollout_never_sees_text() -> None:
    text = ("trueline.data.tokenizer", "trueline.data.conversation", "trueline.data.formats")
    breaches = [f"{m}:{line} {n}" for m, t in modules().items() if floor_of(m) == "rollout" for n, line in imports(t) if n.startswith(text)]
    assert not breaches, "\n".join(breaches)


# the export's check, a process of its own, loads a folder as others will where they are installed; nobody else may start them
GATE = "trueline.recipes.gate"
# the package and the command line load recipes late; the GPU's attention is an optional accelerator library that takes two seconds;
# the hub's client and Parquet are for few runs, and every start and every process would pay for them
LATE_MODULES = ("trueline", "trueline.cli", "trueline.model.attention", "trueline.parallel.kernels", GATE)
LATE_MODULES += ("trueline.families.folder", "trueline.data.tables")


def test_what_few_runs_need_is_loaded_late() -> None:
    late = ("huggingface_hub", "pyarrow.parquet")
    assert not [f"{m}:{line} {n}" for m, tree in modules().items() for n, line in imports(tree) if n.startswith(late)]


def test_no_imports_inside_functions() -> None:
    """The command line loads recipes late, so that `--help` is fast; optional libraries are loaded where they are asked for."""
    breaches = []
    for module, tree in modules().items():
        for function in functions(tree):
            for name, line in imports(function):
                if module != "trueline.cli" and not name.startswith(tuple(OPTIONAL)):
                    breaches.append(f"{module}:{line} {function.name} imports {name}")
        late = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")]
        if late and module not in LATE_MODULES:
            breaches.append(f"{module}:{late[0].lineno} import_module")
    assert not breaches, "\n".join(breaches)
