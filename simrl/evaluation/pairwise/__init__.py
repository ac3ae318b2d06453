"""Pairwise comparison of assistants by judges who see both responses, in both orders.

`responses`: replies or conversations of assistants by id, from files and stages. `judges`: a judge's prompt, and
verdicts of endpoints and of a model on the device. `table`: verdicts -> win rates with intervals and what biases them;
`agreement`: judges beside each other and people; `seeds`: over training seeds; `text`: for a console; `of_run`: for the
results of a run.

Read `responses`, `judges`, `table`.
"""
