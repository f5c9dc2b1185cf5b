"""YAML that a file brings, as plain values: nothing is called, looked up or multiplied."""

import yaml

MAX_YAML_LENGTH = 2**20  # characters; configurations of runs have some 4,000
MAX_YAML_DEPTH = 20


class PlainYamlLoader(yaml.SafeLoader):
    """A loader without tags of Python's, without aliases, and of a bounded depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        """The next node; yaml.YAMLError for an alias, which a few lines multiply to gigabytes."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has a YAML alias, which no configuration of a run has")
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_YAML_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse_plain_yaml(text: object) -> object:
    """The plain values that a YAML text is; interpolations stay what they are, text.

    Raises ValueError, with the reason, for anything else.
    """
    if not isinstance(text, str):
        raise ValueError(f"it is no text, but of type {type(text).__name__}")
    if len(text) > MAX_YAML_LENGTH:
        raise ValueError(f"it has {len(text)} characters, and none has more than {MAX_YAML_LENGTH}")
    try:
        return PlainYamlLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        why = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"it is no YAML of plain values ({why[0]})") from error


def parse_plain_mapping(text: object) -> dict[str, object]:
    """The mapping that a YAML text is, as `read_yaml` reads it; ValueError for anything else."""
    found = parse_plain_yaml(text)
    if not isinstance(found, dict):
        raise ValueError(f"it is no mapping, but of type {type(found).__name__}")
    if odd := [key for key in found if not isinstance(key, str)]:
        raise ValueError(f"its key {odd[0]!r} is no text")
    return found
