"""What the benchmarks for a GPU set up before torch and trueline are imported: to be imported first.

The repository comes first on the path, so trueline need not be installed. Freed memory can grow together again (`expandable_segments`):
sections differ in the sizes they ask for. Where pydantic is not installed, trueline's settings are imported with a stand-in in its place
that knows names and defaults and checks no values: benchmarks write their settings in code.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

REQUIRED = object()  # in place of a default


class Model:
    """Settings given by name, the others by default; a name that it does not know, or lacks, is a TypeError."""

    model_fields: dict[str, object] = {}

    def __init_subclass__(cls) -> None:
        cls.model_fields = cls.model_fields | {name: vars(cls).get(name, REQUIRED) for name in inspect.get_annotations(cls)}

    def __init__(self, **given: object):
        held = self.model_fields | given
        wrong = [name for name, value in held.items() if name not in self.model_fields or value is REQUIRED]
        if wrong:
            raise TypeError(f"{type(self).__name__} does not know, or lacks: {', '.join(wrong)}")
        vars(self).update(held)

    def model_copy(self, update: Mapping[str, object]) -> "Model":
        return type(self)(**{**vars(self), **update})


def field(default: object = REQUIRED, **limits: object) -> object:
    return default


def unchanged(*given: object, **settings: object) -> Callable[[object], object]:
    """In place of what makes a validator: a decorator that leaves its function as it is."""
    return lambda function: function


def stand_in() -> dict[str, ModuleType]:
    """All that trueline.config imports of pydantic."""
    modules: dict[str, dict[str, object]] = {
        "pydantic": {
            "BaseModel": Model, "ConfigDict": dict, "Field": field, "BeforeValidator": unchanged, "model_validator": unchanged,
            "ValidationError": ValueError,
        },
        "pydantic.fields": {"FieldInfo": object},
    }  # fmt: skip
    made = {name: ModuleType(name) for name in modules}
    for name, module in made.items():
        vars(module).update(modules[name])
    return made


def import_settings() -> None:
    """The stand-in goes once they are imported: other libraries ask whether pydantic is there."""
    made = stand_in()
    sys.modules.update(made)
    try:
        importlib.import_module("trueline.config.load")  # which imports the rest of them
    finally:
        for name in made:
            del sys.modules[name]


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
if importlib.util.find_spec("pydantic") is None:
    import_settings()
