"""Talk to trained models: one conversation at a time, its text readable while it is sampled; or serve them to others.

`stream`: a conversation in an agent's view, message by message; `remote`: in that of a model behind an endpoint.
`load`: a name (in a run directory, of a model's folder or file, or on the hub) -> the agent. Its terminal is
`tools/chat.py`. `identity`: a name -> a hash of what decides its replies. `respond`: its responses to prompts or to
the simulated users of its run, as rows of a file.

The server, from `tools/serve.py` inwards: `start` (address, models, then it listens), `listener` (connections),
`server` (routes), `api` (bodies), `jobs` and `prompts` (a body -> what is asked of a model), `answering` and `replies`
(pieces -> JSON), `errors`, `metrics`; `generation` has the words that all of it shares with the `engine`: a queue, its
`rows` on the host and, by `device`, on the device (`slots`, `programs`, `shapes`).
"""
