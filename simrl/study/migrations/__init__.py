"""Alembic's revisions of a study's tables; `database.migrate` runs them, within one transaction.

`env` is what Alembic runs to connect; `versions` are the revisions, each with its way up and down.
"""
