"""The concierge world: people want a place to eat and say so in short, human-like English.

`language`: intents and how they are put in words. `people`: traits, drawn per person. `replies`: what a person says
next. `outcomes`: what a conversation was worth to them, and how they vote. `scripted`: conversations of a scripted
assistant and of stereotypes, on which the tiny models are trained.

Read `people`, `replies`, `outcomes`.
"""
