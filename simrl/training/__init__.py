"""Training by gradient steps: fine-tuning, reward models, and the loop and optimizer that RL shares with them.

`loop`: steps, checkpoints, logs, resume. `optimizer`: AdamW and the training state. `partition`: trained and frozen
parameters. `scoring`: log-probabilities of whole batches. `supervised`: the fit behind `sft` (fine-tuning) and
`preference` (reward models).

Read `loop`, `optimizer`, `supervised`, `sft`.
"""
