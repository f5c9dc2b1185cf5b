"""A module that cannot be imported."""

import a_library_that_is_not_here  # noqa: F401
