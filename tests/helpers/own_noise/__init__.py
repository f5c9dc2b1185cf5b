"""A package of a user's own, with a noise schedule."""
