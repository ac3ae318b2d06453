"""WildBench v2 (arXiv:2406.04770): assistants on 1,024 real tasks, each with a checklist.

`tasks`: tasks from the hub or a file, and their overlap with training data. `generations`: replies of an assistant.
`checklist`: the protocol of arXiv:2605.09808, the share of a checklist that a panel of judges finds satisfied.
`judge_files`: judge files in the benchmark's own layout; `official`: WB-Score and WB-Reward from them; `verdicts`: such
files by our own judges. `asking`: requests to judges; `means`: over tasks.

Read `tasks`, `generations`, `checklist`, `judge_files`, `official`, `verdicts`.
"""
