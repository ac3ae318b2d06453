"""Talk to trained models: one conversation at a time, its text readable while it is sampled.

`stream`: a conversation in an agent's view, message by message. `load`: a name (in a run directory, of a model's folder
or file, or on the hub) -> the agent. Its terminal is `tools/chat.py`.
"""
