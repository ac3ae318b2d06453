"""Dataclasses of the files in `results/` of a run.

`measures`: what was compared, and how assistants came out; `simulators`: the matrix, fidelity and forecast; `training`
and `conversations`: the course of the run. Added later by tools: `study`, a user study of its assistants; `judges`, who
compared them; `wildbench`. `files` writes and reads them all.

Read `measures`, `files`.
"""
