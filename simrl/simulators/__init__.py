"""User simulators: each module makes an agent from a model.

`role_play`: an instructed model, in the swapped view. `fine_tuned`: a model fine-tuned on people's turns, given an
intent. `personas`: system texts that add a kind of person to the intent.
"""
