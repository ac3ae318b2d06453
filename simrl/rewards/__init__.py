"""What a conversation was worth.

`rewards`: the `Rewards` type, parts kept apart and failures masked. `reward_model`: a decoder with a scalar head.
"""
