"""The reward of a conversation.

`rewards`: the `Rewards` type, parts kept apart, and the mask of failures. `reward_model`: a decoder with a scalar head.
`rubric`: criteria, and a judge's prompt; `judging`: conversations as questions to a judge, verdicts as rewards;
`llm_judge`: a language model on the device as a judge; `panel`: several behind endpoints. `shaping`: changes by length
and by cut messages.
"""
