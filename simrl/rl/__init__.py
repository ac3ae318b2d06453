"""Reinforcement learning of one role of a conversation.

`train`: one step is collect, score, prepare, update. `algorithm`: its settings. `prepare`: a scored batch with
advantages, by `advantages`; `update`: optimizer steps over `microbatches`, by `losses`. `masked`: masked reductions.

Read `train`, `algorithm`, `prepare`, `update`.
"""
