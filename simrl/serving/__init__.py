"""Talk to trained models: one conversation at a time, its text readable while it is sampled; or have them respond.

`stream`: a conversation in an agent's view, message by message; `remote`: in that of a model behind an endpoint.
`load`: a name (in a run directory, of a model's folder or file, or on the hub) -> the agent. Its terminal is
`tools/chat.py`. `identity`: a name -> a hash of what decides its replies. `respond`: its responses to prompts or to
the simulated users of its run, as rows of a file.
"""
