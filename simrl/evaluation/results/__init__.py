"""Dataclasses of the files in `results/` of a run.

`measures`: what was compared, and how assistants came out; `simulators`: the matrix, fidelity and forecast; `training`
and `conversations`: the course of the run; `study`: a user study of its assistants, which adds its result later.
`files` writes and reads them.

Read `measures`, `files`.
"""
