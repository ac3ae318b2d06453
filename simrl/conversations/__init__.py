"""Conversations as words and as tokens.

Words: `records` (conversations, preferences, examples; strict readers). Tokens: `chat` (a chat template as constant
token runs around messages), `sentencepiece` (the same for a sentencepiece tokenizer), `views` (training rows and
prompts), `batches` (rows in length buckets).

Read `records`, `chat`, `views`.
"""
