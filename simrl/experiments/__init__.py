"""The experiments: stages made of the other rooms' functions.

`experiment`: a pretrained model on people's conversations. `known_answer`: the concierge world.
"""
