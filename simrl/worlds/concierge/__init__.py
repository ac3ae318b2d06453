"""The concierge world: people want a place to eat and say so in short, human-like English.

`language`: intents and their wording. `people`: traits, drawn per person. `replies`: a person's next message.
`outcomes`: a person's satisfaction and vote. `scripted`: conversations with a scripted assistant, on which the tiny
models are trained.

Read `people`, `replies`, `outcomes`.
"""
