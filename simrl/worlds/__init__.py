"""Worlds whose people are a program, so that the truth about them is known."""
