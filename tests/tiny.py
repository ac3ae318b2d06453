"""Small things that tests and benchmarks are made of."""

import functools
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import sentencepiece
import tokenizers
import transformers

from simrl.models.files.load import load_tokenizer
from simrl.models.transformer import TransformerConfig

CHATML_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


def tiny_config(vocab_size: int, **changes: Any) -> TransformerConfig:
    """A decoder of one layer with a key/value head for two query heads."""
    sizes = {'model_dim': 16, 'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 8, 'mlp_dim': 16}
    return TransformerConfig(vocab_size, **sizes | {'max_positions': 256} | changes)


def byte_tokenizer(
    special_tokens: Sequence[str] = CHATML_TOKENS,
    template: str | None = CHATML,
    *,
    merges: Sequence[tuple[str, str]] = (),
    bos_token: str | None = None,
    eos_token: str | None = None,
    without: str = '',
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes, what `merges` joins (in byte-level characters), and `special_tokens` after them.

    Bytes in `without` (byte-level characters) have no token; their ids stay free.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(a + b for a, b in merges), *special_tokens]
    vocab = {piece: i for i, piece in enumerate(pieces) if piece not in set(without)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(special_tokens))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos_token, eos_token=eos_token)
    tokenizer.chat_template = template
    return tokenizer


CHATML_THINK = (*CHATML_TOKENS, '<think>', '</think>')
LLAMA3_TOKENS = ('<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>')
FAMILY_TOKENS = {  # the special tokens that each published template needs
    'gemma': ('<bos>', '<eos>', '<start_of_turn>', '<end_of_turn>'),
    'llama3': LLAMA3_TOKENS,
    'llama3_1': LLAMA3_TOKENS,
    'llama3_2': LLAMA3_TOKENS,
    'phi3': ('<s>', '<|endoftext|>', '<|system|>', '<|user|>', '<|assistant|>', '<|end|>'),
    'qwen2_5': CHATML_TOKENS,
    'qwen3': CHATML_THINK,
    'qwen3_instruct_2507': CHATML_THINK,
    'smollm2': CHATML_TOKENS,
}


def family_tokenizer(family: str, template: str) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer with a family's own special tokens and the text of its own chat template."""
    tokens = FAMILY_TOKENS[family]
    if tokens[0] == '<|endoftext|>':
        return byte_tokenizer(tokens, template, eos_token=tokens[0])
    return byte_tokenizer(tokens, template, bos_token=tokens[0], eos_token=tokens[1])


WORDS = 'Hello, how are you? Fine. What is the answer to this question! I say yes (or no), and you say: "well, no". '


@functools.cache
def _sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS + '[INST] user assistant system <|user|> <<SYS>>']),
        model_writer=model,
        model_type='bpe',
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def sentencepiece_tokenizer(
    folder: pathlib.Path, template: str, *, special_tokens: Sequence[str] = (), prepend: bool = False
) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer as of Llama 2, with bytes for what has no piece.

    Args:
        folder: to write its files into.
        template: its chat template.
        special_tokens: beside `<s>`, `</s>` and `<unk>`.
        prepend: True puts a space before the text after each special token, as older files of these tokenizers do;
            False before the whole text only.
    """
    folder.mkdir()
    (folder / 'tokenizer.model').write_bytes(_sentencepiece_model())
    (folder / 'config.json').write_text('{"model_type": "llama"}')
    tokens = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}
    settings = {'tokenizer_class': 'LlamaTokenizer', 'legacy': False, 'chat_template': template} | tokens
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    if prepend:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        spaces = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
        steps = [{'type': 'Prepend', 'prepend': '▁'}, spaces]
        state |= {'normalizer': {'type': 'Sequence', 'normalizers': steps}, 'pre_tokenizer': None}
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
        tokenizer.chat_template = template
    tokenizer.add_tokens(list(special_tokens), special_tokens=True)
    return tokenizer


# Published chat templates of models whose headers or ends are text.
_TAGS = "{{ '<|' + m['role'] + '|>\n' + m['content'] + %s }}"
_ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
TEXT_TEMPLATES = {
    'zephyr': '{% for m in messages %}'
    + _TAGS % "eos_token + '\n'"
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    'chatml': CHATML,
    'inst': '{{ bos_token }}{% for m in messages %}'
    + _ALTERNATE
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}",
    'inst_system': "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
    '{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}'
    + _ALTERNATE
    + "{% if m['role'] == 'user' %}{{ ' [INST] ' }}{% if loop.first and s is defined %}{{ s + '\n\n' }}{% endif %}"
    "{{ m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    'llama2': "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
    '{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% set s = false %}{% endif %}'
    '{% for m in turns %}'
    + _ALTERNATE
    + "{% if loop.index0 == 0 and s != false %}{% set text = '<<SYS>>\n' + s + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    'tulu': '{{ bos_token }}{% for m in messages %}'
    "{% if m['role'] == 'assistant' %}" + _TAGS % 'eos_token' + "{{ '\n' if not loop.last }}"
    '{% else %}'
    + _TAGS % "'\n'"
    + "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
}
