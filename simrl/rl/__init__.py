"""Reinforcement learning of one role of a conversation.

`train`: one step is collect, score, prepare, update. `algorithm`: settings of the update. `futures`: rewards of replies
by conversations that continue from them. `prepare`: rewards to `advantages`. `update`: optimizer steps on `losses`,
over `microbatches`. `masked`: masked reductions. `gradients`: of single examples, for forecasts. `programs`: those that
a training compiles, counted or from shapes. `logs`: of a step.

Read `train`, `algorithm`, `prepare`, `update`.
"""
