"""Who plays the user.

Each module makes an agent from a model: `role_play` (an instructed model, in the swapped view), `fine_tuned` (a model
fine-tuned on people's turns, told an intent), `personas` (what a model is told beside the intent).
"""
