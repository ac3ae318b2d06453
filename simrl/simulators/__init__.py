"""User simulators: each module makes an agent from a model.

`role_play`: an instructed model, in the swapped view; `person`: what it is told of whom it plays; `prompts`: the
texts, with their version. `fine_tuned`: a model fine-tuned on people's turns. `personas`: system texts of a model that
has learnt to take direction. `text_view`: a model that is met through its texts, which may have another tokenizer.
`remote`: models behind an endpoint; `replies`: the rules for what they write, and for text beside the signal.

Read `role_play`, `person`, `fine_tuned`, `replies`, `remote`.
"""
