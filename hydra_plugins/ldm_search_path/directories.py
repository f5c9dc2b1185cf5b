"""Adds the directories of options of the command line and of installed packages to Hydra's."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class OptionDirectories(SearchPathPlugin):
    """Serves the commands of ldm alone: other programs here may use Hydra as well."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends every directory as a path, since `pkg://` would import the package."""
        from ldm.config.search_path import CONF_DIR, list_config_directories

        paths = [element.path for element in search_path.get_path()]
        if CONF_DIR in paths or f"file://{CONF_DIR}" in paths:
            for directory in list_config_directories()[1:]:
                search_path.append(f"options in {directory}", f"file://{directory}")
