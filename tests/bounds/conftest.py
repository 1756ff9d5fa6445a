"""Hypothesis without deadlines: the machine's load must not decide whether mathematics holds."""

from hypothesis import settings

settings.register_profile("bounds", deadline=None)
settings.load_profile("bounds")
