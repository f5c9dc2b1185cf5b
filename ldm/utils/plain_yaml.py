"""Parses untrusted YAML to plain values: no tags, no aliases, limited in size and depth."""

import yaml

MAX_YAML_LENGTH = 2**20  # characters; configurations of runs have some 4,000
MAX_YAML_DEPTH = 20


class PlainYamlLoader(yaml.SafeLoader):
    """A safe loader without aliases and of limited depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        """Raises yaml.YAMLError for an alias: a few lines of them can expand to gigabytes."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has a YAML alias, which no configuration of a run has")
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_YAML_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse_plain_yaml(text: object) -> object:
    """Returns the values of a YAML text, with interpolations as text; ValueError for others."""
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
    """Like `parse_plain_yaml`; ValueError if the text is no mapping with text as keys."""
    mapping = parse_plain_yaml(text)
    if not isinstance(mapping, dict):
        raise ValueError(f"it is no mapping, but of type {type(mapping).__name__}")
    for key in mapping:
        if not isinstance(key, str):
            raise ValueError(f"its key {key!r} is no text")
    return mapping
