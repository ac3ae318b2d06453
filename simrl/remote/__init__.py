"""Models behind OpenAI-compatible endpoints: requests in, answers or causes of failure out, in the same order.

`settings`: an endpoint, as a config states it. `requests`: chats and raw completions as JSON bodies and cache keys.
`answers`: a server's reply as an answer or a failure. `schema`: structured answers, strictly. `cache`: answers in
sqlite. `transport`: one request over HTTP. `streams`: a chat's reply in pieces. `client`: calls under a cap, with
tries, back-off, deadlines and spend. `usage`: their sums.

Read `settings`, `requests`, `answers`, `client`.
"""
