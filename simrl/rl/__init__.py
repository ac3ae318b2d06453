"""Reinforcement learning of one role of a conversation.

`train`: one step is collect, score, prepare, update. `algorithm`: settings of the update. `prepare`: rewards to
`advantages`. `update`: optimizer steps on `losses`, over `microbatches`. `masked`: masked reductions.

Read `train`, `algorithm`, `prepare`, `update`.
"""
