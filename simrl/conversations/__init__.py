"""Conversations as words and as tokens.

Words: `records` (conversations, preferences, examples; strict readers) in JSONL or Parquet (`row_files`); `wildchat`
(its first pass: `wildchat_facts`) and `choices` make such records of published data (`raw_rows`), with `splits`,
`openings` (duplicates) and a `manifest`; `completion` (a model as a function of chats), `intents` (a sentence for each
conversation, by such a model), `quoting` (texts of others inside prompts). Tokens: `chat` (a chat template as constant
token runs around messages), `templates` (finds the runs of a Hugging Face template, with `template_probes` and
`huggingface_tokenizer`), `sentencepiece` (the same for a sentencepiece tokenizer), `views` (training rows and prompts),
`batches` (rows in length buckets).

Read `records`, `chat`, `templates`, `views`.
"""
