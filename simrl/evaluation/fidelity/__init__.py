"""Simulators beside people: how near what they say is to what people said at the same place of a conversation.

`turns`: people's turns, and what a simulator said in their place. `annotators`: the libraries that describe texts, and
`embeddings`: sentences as vectors. `features`: texts as counts, whose distributions are compared. `distances`: the
comparison, with the distance between people as the floor. `behaviour`: ends, roles, intents, openings. `measure`: all
of them for the turns of a simulator, or of people alone. `likelihood`: of people's messages under a simulator.

Read `turns`, `distances`, `features`, `measure`.
"""
