"""Typed configs: YAML and `key=value` overrides to dataclasses, with errors that name the line and the nearest key."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from genflow.errors import UserError, nearest
from genflow.registry import names, resolve, tag_of

ALSO_CALLED = {"epochs": "train.steps", "learning_rate": "optimizer.lr"}  # what others call a key


@dataclass(frozen=True)
class Choice:
    """Marks a field that takes any dataclass registered under `kind`: a mapping with `name:` and its fields, or a name."""

    kind: str


@dataclass(frozen=True)
class Named:
    """Marks a string that must be a registered name of `kind`, or one of `also`."""

    kind: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Owned:
    """Marks a field whose dataclass is told by another field: the attribute `attribute` of its value."""

    field: str
    attribute: str


@dataclass
class _Node:
    """A YAML value that remembers where it was written. value: scalar, list of _Node or dict of str to _Node."""

    value: Any
    where: str
    text: str | None = None  # a scalar as it was written: `no` is text where text is wanted, 1.10 is not 1.1

    def describe(self) -> str:
        if isinstance(self.value, dict):
            return "a section"
        if isinstance(self.value, list):
            return "a list"
        if self.value is None:
            return "nothing"
        return repr(self.value) if isinstance(self.value, str) else self.text or repr(self.value)

    def plain(self) -> Any:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its surprises: 1e-4 is a number; 010, of base eight, and 1:30, of base sixty, are none, nor dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_TEXT = ("tag:yaml.org,2002:str", re.compile(r"^[-+]?(0[\d_]+|\d[\d_]*(:\d+)+(\.[\d_]*)?)$"))
_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"))
for _first in "-+0123456789.":
    _Loader.yaml_implicit_resolvers[_first] = [_TEXT, *_Loader.yaml_implicit_resolvers.get(_first, []), _FLOAT]


def _parse(text: str, where: str, *, line_numbers: bool = True) -> _Node:
    """YAML text to nodes. Raises UserError for text that is not YAML, and for a key given twice."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return _convert(loader, root, where, line_numbers) if root is not None else _Node({}, where)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"{where}: not YAML: an alias stands within what it names") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # a tag's own, of what it does not name
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark and line_numbers else where
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{place}: not YAML: {problem}") from error


def _convert(loader: _Loader, node: yaml.Node, where: str, line_numbers: bool) -> _Node:
    place = f"{where}:{node.start_mark.line + 1}" if line_numbers else where
    if isinstance(node, yaml.MappingNode):
        result: dict[str, _Node] = {}
        for key_node, value_node in node.value:
            here = f"{where}:{key_node.start_mark.line + 1}" if line_numbers else where
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{here}: a key must be a word")
            key = key_node.value
            if key in result:
                raise UserError(f"{here}: key {key!r} is given twice")
            child = _convert(loader, value_node, where, line_numbers)
            result[key] = dataclasses.replace(child, where=here)
        return _Node(result, place)
    if isinstance(node, yaml.SequenceNode):
        return _Node([_convert(loader, child, where, line_numbers) for child in node.value], place)
    return _Node(loader.construct_object(node), place, node.value)


def _wrap(value: Any, where: str) -> _Node:
    """Plain Python data as nodes."""
    if isinstance(value, dict):
        return _Node({str(k): _wrap(v, where) for k, v in value.items()}, where)
    if isinstance(value, list | tuple):
        return _Node([_wrap(v, where) for v in value], where)
    return _Node(value, where)


def load(path: str | Path, overrides: Sequence[str] = (), *, schema: type) -> Any:
    """Read a YAML file, lay `a.b=value` overrides over it, and build the dataclass `schema`.

    Raises UserError with file and line for what is unknown, ill-typed, given twice or missing.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        hint = near if isinstance(error, FileNotFoundError) and near.startswith(" Did") else ""
        if os.path.isfile(inside := path / "config.yaml"):  # the folder of a run; Path.is_file may raise
            hint = f" Did you mean {str(inside)!r}?"
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read config {path}: {reason}.{hint}") from error
    root = _parse(text, str(path))
    if not isinstance(root.value, dict):
        raise UserError(f"{root.where}: a config is a mapping of sections, not {root.describe()}")
    for override in overrides:
        _override(root, override)
    return _build(schema, root, "")


def _override(root: _Node, text: str) -> None:
    key, equals, value = text.partition("=")
    where = f"override {text!r}"
    if not equals or not key:
        raise UserError(f"{where}: write key=value, for example train.steps=500")
    node = root
    *parents, last = key.split(".")
    for part in parents:
        child = node.value.get(part)
        if child is None or not isinstance(child.value, dict):
            # A choice given as a bare name becomes a section, so that its fields can be set.
            child = _Node({} if child is None or child.value is None else {"name": child}, where)
            node.value[part] = child
        node = child
    if value.strip()[:1] in ("", *"#*%@`"):  # to YAML, comments, aliases of nothing, and no beginnings at all
        new = _Node(value.strip(), where)
    else:
        new = _parse(value, where, line_numbers=False)
    old = node.value.get(last)
    if old is not None and isinstance(old.value, dict) and isinstance(new.value, str):
        new = _Node({"name": new}, where)  # another choice: its fields start from their defaults
    node.value[last] = new


def from_dict(schema: Any, mapping: Any, where: str = "config") -> Any:
    """Build a dataclass, or an Annotated Choice, from plain Python data. Raises UserError like load()."""
    return _build(schema, _wrap(mapping, where), "")


def setting(kind: Any, source: Mapping[str, Any], key: str, where: str) -> Any:
    """source[key] as a kind, such as float or tuple[int, ...]. Raises UserError, which begins with `where`, for another."""
    return _build(kind, _wrap(source.get(key), where), key)


def _build(kind: Any, node: _Node, path: str) -> Any:
    """A value of type `kind` from a node; `path` is its dotted key, for errors."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        marker = next((m for m in args[1:] if isinstance(m, Choice | Named)), None)
        if isinstance(marker, Choice):
            return _build_choice(marker.kind, node, path)
        if isinstance(marker, Named):
            name, known = _build(str, node, path), [*marker.also, *names(marker.kind)]
            if name not in known:
                raise UserError(f"{node.where}: {path}: no {marker.kind} is named {name!r}.{nearest(name, known)}")
            return name
        return _build(args[0], node, path)
    if is_dataclass(kind):
        return _build_dataclass(kind, node, path)
    if origin in (Union, types.UnionType):
        if node.value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        for each in rest[:-1]:
            try:
                return _build(each, node, path)
            except UserError:
                continue
        return _build(rest[-1], node, path)
    if origin is Literal:
        for option in args:
            if str(option) == node.text or (option == node.value and type(option) is type(node.value)):
                return option
        raise UserError(f"{node.where}: {path} is {node.describe()}.{nearest(str(node.value), map(str, args))}")
    if origin in (tuple, list):
        return _build_sequence(kind, node, path)
    if origin is dict and isinstance(node.value, dict):
        return {key: _build(args[1], child, f"{path}.{key}") for key, child in node.value.items()}
    return _build_scalar(kind, node, path)


def _build_scalar(kind: Any, node: _Node, path: str) -> Any:
    value = node.value
    if kind is Any:
        return node.plain()
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    if kind in (str, Path) and value is not None and node.text is not None:
        return kind(node.text)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is not bool and isinstance(value, bool)):
        return node.plain()
    raise UserError(f"{node.where}: {path} must be {_type_name(kind)}, not {node.describe()}")


def _build_sequence(kind: Any, node: _Node, path: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if not isinstance(node.value, list):
        raise UserError(f"{node.where}: {path} must be {_type_name(kind)}, not {node.describe()}")
    if origin is list or (len(args) == 2 and args[1] is ...):
        types_ = [args[0]] * len(node.value)
    elif len(args) != len(node.value):
        raise UserError(f"{node.where}: {path} must have {len(args)} values, not {len(node.value)}")
    else:
        types_ = list(args)
    return origin(_build(t, n, f"{path}[{i}]") for i, (t, n) in enumerate(zip(types_, node.value, strict=True)))


def _build_dataclass(schema: Any, node: _Node, path: str) -> Any:
    if isinstance(node.value, dict):
        given = node.value
    elif node.value is None:
        given = {}
    else:
        raise UserError(f"{node.where}: {path or 'the config'} must be a section of keys, not {node.describe()}")
    hints = typing.get_type_hints(schema, include_extras=True)
    known = {f.name: f for f in fields(schema) if f.init}
    prefix = f"{path}." if path else ""
    for key, child in given.items():
        if key not in known:
            place = f" in {path}" if path else ""
            word = f".{ALSO_CALLED.get(key, key)}"
            inside = [at for at in _places(schema, node, path) if f".{at}".endswith(word)]
            near = f" Did you mean {' or '.join(map(repr, inside))}?" if inside else nearest(key, known)
            raise UserError(f"{child.where}: unknown key {key!r}{place}.{near}")
    owned = {key: marker for key in given if (marker := _owner(hints[key])) is not None}
    values = {
        key: _build(hints[key], _named(known[key], child), prefix + key)
        for key, child in given.items()
        if key not in owned
    }
    for key, marker in owned.items():
        owner = values[marker.field] if marker.field in values else known[marker.field].default_factory()  # type: ignore
        values[key] = _build_dataclass(getattr(owner, marker.attribute), given[key], prefix + key)
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{node.where}: {prefix}{name} is missing")
    try:
        return schema(**values)
    except ValueError as error:
        at_fault = given.get(
            str(error).partition(" ")[0], node
        )  # such an error begins with the key, where it is of one
        raise UserError(f"{at_fault.where}: {path + ': ' if path else ''}{error}") from error


def _places(schema: type, node: _Node, path: str) -> Iterator[str]:
    """The dotted keys of a section and of all sections within it, as they are or would be."""
    given = node.value if isinstance(node.value, dict) else {}
    for name in (f.name for f in fields(schema) if f.init):
        place = f"{path}.{name}" if path else name
        yield place
        if (inner := _section(schema, name, given)) is not None:
            yield from _places(inner, given.get(name, _Node({}, "")), place)


def _section(schema: type, name: str, given: Mapping[str, _Node]) -> Any:
    """The dataclass of a field, where it is one: of a choice, that which is named, or the default one."""
    hint = typing.get_type_hints(schema, include_extras=True)[name]
    if (owner := _owner(hint)) is not None:
        section = getattr(_section(schema, owner.field, given), owner.attribute, None)
        return section if is_dataclass(section) else None
    marker = next((m for m in get_args(hint)[1:] if isinstance(m, Choice)), None)
    if marker is None:
        return hint if is_dataclass(hint) else None
    field = next(f for f in fields(schema) if f.name == name)
    value = _named(field, given.get(name, _Node({}, ""))).value
    name = value["name"].value if isinstance(value, dict) and "name" in value else value
    return resolve(marker.kind, name) if name in names(marker.kind) else None


def _owner(hint: Any) -> Owned | None:
    return next((m for m in get_args(hint)[1:] if isinstance(m, Owned)), None)


def _named(field: dataclasses.Field, node: _Node) -> _Node:
    """A choice given by its fields alone is the default one."""
    tag = tag_of(type(_default(field)))
    if tag is None or not isinstance(node.value, dict) or "name" in node.value:
        return node
    return dataclasses.replace(node, value={"name": _Node(tag.names[0], node.where, tag.names[0]), **node.value})


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _build_choice(kind: str, node: _Node, path: str) -> Any:
    value = node.value
    if is_dataclass(value) and not isinstance(value, type):
        return value
    if isinstance(value, str):
        name, rest = value, {}
    elif isinstance(value, dict) and "name" in value:
        name = _build(str, value["name"], f"{path}.name")
        rest = {k: v for k, v in value.items() if k != "name"}
    else:
        options = ", ".join(names(kind))
        raise UserError(f"{node.where}: {path or 'it'} needs a `name`, one of: {options}")
    if name not in names(kind):
        place = f"{node.where}: {path}" if path else node.where
        raise UserError(f"{place}: no {kind} is named {name!r}.{nearest(name, names(kind))}")
    return _build_dataclass(resolve(kind, name), _Node(rest, node.where), path)


def _type_name(kind: Any) -> str:
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    if kind in plain:
        return plain[kind]
    return {tuple: "a list", list: "a list", dict: "a section of keys"}.get(get_origin(kind), str(kind))


def to_dict(config: Any) -> Any:
    """Plain data (dicts, lists, scalars) of a config; registered dataclasses carry their `name`."""
    if is_dataclass(config) and not isinstance(config, type):
        tag = tag_of(type(config))
        head = {"name": tag.names[0]} if tag is not None else {}
        return head | {f.name: to_dict(getattr(config, f.name)) for f in fields(config) if f.init}
    if isinstance(config, list | tuple):
        return [to_dict(v) for v in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return str(config) if isinstance(config, Path) else config


def completed(written: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """A section as plain data, and behind it the defaults of what it does not say."""
    defaults = {f.name: to_dict(value) for f in fields(kind) if f.init and (value := _default(f)) is not MISSING}
    return {**written, **defaults, **written}


def dump(config: Any, path: str | Path) -> None:
    """Write a config as YAML; load() of it gives the same config."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
