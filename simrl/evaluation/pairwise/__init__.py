"""Pairwise comparison of assistants by judges who see both responses, in both orders.

`responses`: replies or conversations of assistants by id, from files and stages. `judges`: a judge's prompt, and
verdicts of endpoints and of a model on the device. `table`: verdicts -> win rates with intervals, bias and agreement;
`seeds`: over training seeds.

Read `responses`, `judges`, `table`.
"""
