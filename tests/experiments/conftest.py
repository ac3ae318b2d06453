"""Set-up of the tests that run whole experiments."""

from tests.shapes import one_shape

__all__ = ['one_shape']
