"""Reading the YAML files a person writes: a mistake names the file, the key, what was found and what is accepted.

PyYAML and pydantic come with the extra `compiler`; without them `load` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from horq_tvm import extras
from horq_tvm.errors import UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    Model = TypeVar("Model", bound=BaseModel)


def load(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, every key a string as it is written (`123`, `on` and `1e3` are layer names too).

    Raises:
        UsageError: the file cannot be read, is not YAML, is not a mapping, or says a key twice.
        HorqError: PyYAML is not installed.
    """
    yaml = _import_yaml()
    try:
        text = Path(path).read_text(encoding="utf-8")
        document = yaml.load(text, Loader=_loader(yaml))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {_yaml_problem(error)}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path}: holds {type(document).__name__}; accepted: a mapping (`key: value` lines)")
    return document


def validate(model: type[Model], document: Mapping[str, Any], source: str) -> Model:
    """`document` as a pydantic `model`.

    Raises:
        UsageError: the first mistake; names `source` (the file, and the key under which `document` stands) and the key.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise UsageError(f"{source}: {_first_problem(error, model)}") from error


def _import_yaml() -> Any:
    try:
        import pydantic  # noqa: F401
        import yaml
    except ImportError as error:
        raise extras.missing(error) from error
    return yaml


def _loader(yaml: Any) -> Any:
    class Loader(yaml.SafeLoader):
        """SafeLoader with keys kept as written, each allowed once (PyYAML lets the last one win in silence)."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
            mapping: dict[str, Any] = {}
            self.flatten_mapping(node)
            for key_node, value_node in node.value:
                if not isinstance(key_node, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "a key must be a scalar", key_node.start_mark)
                if key_node.value in mapping:
                    problem = f"the key {key_node.value!r} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                mapping[key_node.value] = self.construct_object(value_node, deep=True)
            return mapping

        def construct_yaml_map(self, node: Any) -> dict[str, Any]:
            return self.construct_mapping(node)

    Loader.add_constructor("tag:yaml.org,2002:map", Loader.construct_yaml_map)
    return Loader


def _yaml_problem(error: Any) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem


def _first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    # A misspelt key is also a missing one: the spelling is the news.
    first = min(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"]) or "(top)"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key; accepted: {', '.join(model.model_fields)}"
    if first["type"] == "missing":
        return f"{where}: missing"
    # A ValueError raised by a validator of ours already says what was found.
    found = "" if first["type"] == "value_error" else f"; found {first['input']!r}"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{found}"
