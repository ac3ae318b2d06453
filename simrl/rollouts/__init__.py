"""Conversations of two agents: examples in, trajectories out.

`agents`: who speaks, and the limits of a conversation. `context`: one model's view of a batch of conversations, with
its KV cache. `generate`: sample one message. `messages`: add a message to both views. `dialogue`: the conversation
loop on the device; `host`: with an agent off the device. `compaction`: finished rows leave the batch. `trajectories`:
what training sees.

Read `agents`, `dialogue`, `generate`.
"""
