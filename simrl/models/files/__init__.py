"""Models in other programs' files.

`load` picks the reader by what the source is: `huggingface` (a hub name or folder; `huggingface_config` its
config.json) or `gguf` (`gguf_file` the container, `gguf_tokenizer` its tokenizer). `export` writes a Hugging Face
folder.
"""
