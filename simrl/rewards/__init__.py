"""The reward of a conversation.

`rewards`: the `Rewards` type, parts kept apart, and the mask of failures. `reward_model`: a decoder with a scalar head.
"""
