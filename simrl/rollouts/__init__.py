"""Conversations of two agents: examples in, trajectories out.

`agents`: a `ModelAgent` (a `Policy` on the device) or a `HostAgent`, and the limits of conversations. `collect`:
conversations from examples, for a training step or an evaluation. `dialogue`: the conversation loop; `state`: what it
changes; `interleave`: it continues elsewhere while it waits; `compaction`: finished rows leave its batch. `continuous`:
the same conversations, each at its own pace, by `schedule`, `flight`, `window` and `histories`. `messages`: one message
in two views; `generate`: the decode loop; `token_sampling`: draw a token; `vocabulary`: its blocks, and its parts on a
mesh; `context`: one model's view, with its KV cache. `host`: replies of an agent off the device. `replay`: recorded
conversations, to be continued; `logs`: people's as such a record. `completion`: single replies to prompts. `prompts`:
examples as arrays. `trajectories`: what training, rewards and logs read. `sizes`: those that conversations may
meet; `programs` and `window_programs`: what they compile for
these, counted or from shapes.

Read `agents`, `collect`, `dialogue`, `generate`.
"""
