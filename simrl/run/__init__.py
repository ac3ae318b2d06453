"""A run directory and the process that works on it; knows nothing of models.

`config`: dataclasses <-> ConfigDict, strictly. `stages`: run what is missing, resume, rerun; `stage_files`: what a
stage's folder holds, locks and hashes; `workers`: stages side by side in processes. `metrics`, `progress` and
`profiling`: what a stage logs. `runtime`: compilation cache and XLA flags.

Read `stages` first, then `config`.
"""
