"""Models in other programs' file formats.

`load` picks the reader for a source: `huggingface` (a hub name or folder; `huggingface_config` reads its config.json,
`huggingface_table` names its tensors) or `gguf` (`gguf_file` reads the container, `gguf_tokenizer` the tokenizer).
`export` writes a Hugging Face folder.
"""
