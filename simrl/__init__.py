"""simrl: how good is a user simulator? RL-train one assistant per simulator and compare the assistants.

The rooms, in the order in which data passes through them and imports point: `run` (a run directory), `conversations`,
`models`, `rollouts` (conversations of two agents), `remote` (endpoints), `simulators`, `rewards`, `training`, `rl`,
`worlds`, `evaluation`, and `experiments`, which puts them together. `main` is the command line.
"""

__version__ = '0.1.0'
