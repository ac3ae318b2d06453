"""Reinforcement learning of one role of a conversation.

`train`: one step is collect, score, prepare, update. `algorithm`: settings of the update. `futures`: rewards of replies
by conversations that continue from them. `prepare`: rewards to `advantages`. `update`: optimizer steps on `losses`,
over `microbatches`. `masked`: masked reductions. `gradients`: of single examples, for forecasts. `programs`: how many a
training compiles at most; `ahead`: these, from shapes.

Read `train`, `algorithm`, `prepare`, `update`.
"""
