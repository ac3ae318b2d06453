"""Set-up of the tests of simulators, which converse."""

from tests.shapes import one_shape

__all__ = ['one_shape']
