"""Settings of all tests."""

from hypothesis import settings

# A deadline for each example fails on a machine that is busy with something else.
settings.register_profile("kdlib", deadline=None)
settings.load_profile("kdlib")
