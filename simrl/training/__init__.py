"""Training by gradient steps, whatever is trained.

`loop`: steps, checkpoints, logs, resume. `optimizer`: AdamW and the training state. `partition`: which parameters are
trained and which are frozen. `scoring`: log-probabilities of whole batches. `sft` and `preference`: fine-tuning and
reward models.

Read `loop`, `optimizer`, `sft`.
"""
