"""Worlds whose people are programs: the truth about them is known."""
