"""Replies in which a model may name itself, its family or its maker: a participant could tell by them which one it is.

They are flagged and not changed: a changed reply would be another reply. A text about assistants names none ("ChatGPT
became known in 2022"). A name counts where the writer introduces itself by it. Names that are words or people, too
(Claude, Gemini), count there without an article and outside of quotation marks, as stories are full of them; companies
that make more than models (Google) count where the sentence is about a model.
"""

import functools
import re
from collections.abc import Collection


def _words(text: str) -> list[str]:
    return text.split()


# Patterns of names in small letters, each with a beginning of plain letters by which texts without any are sorted out.
MODELS = _words(r"""
    chatgpt[\w.-]* chat-gpt[\w.-]* gpt[\s-]?[2-9][\w.-]* gpt-oss[\w.-]* qwen[\w.-]* qwq[\w.-]* deepseek[\w.-]*
    smollm[\w.-]* mistral[\w.-]* mixtral[\w.-]* ministral[\w.-]* llama[\s-]?[2-9][\w.-]* vicuna gemma[\s-]?[1-9][\w.-]*
    gemini[\s-][1-9][\w.-]* phi-[1-9][\w.-]* claude[\s-](?:[1-9]|opus|sonnet|haiku)[\w.-]* kimi[\s-]k[1-9][\w.-]*
    chatglm[\w.-]* glm-[1-9][\w.-]* olmo[\w.-]* nemotron[\w.-]* hunyuan[\w.-]* doubao baichuan[\w.-]* internlm[\w.-]*
    stablelm[\w.-]* ernie\sbot meta\sai github\scopilot google\s(?:bard|gemini) microsoft\scopilot
""")
WORDS = _words('claude gemini gemma llama phi bard copilot grok kimi falcon granite command nova alpaca ernie')
LABS = _words(r"""
    openai open\sai anthropic deepseek deepmind hugging\s?face mistral(?:\sai)? moonshot(?:\sai)? zhipu(?:\sai)? minimax
    cohere xai allen\sinstitute alibaba\scloud qwen\steam eleuther\s?ai stability\sai
""")
COMPANIES = _words('google meta microsoft amazon ibm nvidia alibaba tencent bytedance baidu facebook apple')

MADE = r'(?:made|created|built|developed|trained|designed|released|fine-tuned|provided|powered|hosted)'
NOUN = r'(?:AI|A\.I\.|artificial intelligence|(?:language\s|LLM\s?)?model|LLM|chat\s?bot|assistant)'
# What may stand between an introduction and a name.
BETWEEN = (
    r'(?:(?:an?|the|your|not|actually|just|really|only|large|small|language|model|models|AI|assistant|chat\s?bot|LLM|'
    r'helpful|friendly|virtual|version|instance|variant|of|by|on|based|powered|built|running|named|called|known|as|'
    r'that|is|was|made|part|family|series)[\s,:*"“]+){0,12}'
)
INTRODUCTION = (
    r"(?:\bI\s?am|\bI['’]m|\bI\swas|\bmy\sname(?:\sis|['’]s)|\bcall\sme|\b(?:to|with)\sme,?|\bthis\sis)[\s:*\"“]+"
)
FIRST_PERSON = re.compile(r"\b(?:I|I['’]m|I['’]ve|me|my|as\san?\s(?:\w+\s){0,2}(?:model|AI|assistant))\b")
QUOTED = re.compile(r'"[^"\n]*"|“[^“”\n]*”|«[^«»\n]*»')
SENTENCE = re.compile(r'(?<=[.!?])\s+|\n+')
DISTINCT = re.compile(r'[\d_.-]')  # a model's name in the config with one of these is no word of a text


def names_itself(text: str, model_names: Collection[str]) -> bool:
    """True if a model may name itself in its reply.

    Args:
        model_names: its names in the config, and others that would give it away. One with a digit, _, - or . counts
            wherever it is in the text.
    """
    lowered = text.lower()
    if not any(beginning in lowered for beginning in (*_BEGINNINGS, *(name.lower() for name in model_names))):
        return False
    anywhere, introduced, word = _patterns(frozenset(model_names))
    if anywhere.search(text) or introduced.search(text) or word.search(QUOTED.sub(' ', text)):
        return True
    return any(_names_maker(sentence) for sentence in SENTENCE.split(text))


def _names_maker(sentence: str) -> bool:
    """True if a sentence in the first person says by whom its writer was made."""
    if not FIRST_PERSON.search(sentence):
        return False
    return bool(_BY_LAB.search(sentence) or (_BY_COMPANY.search(sentence) and _NOUN.search(sentence)))


def _any(names: Collection[str]) -> str:
    return rf"(?:{'|'.join(names)})(?![\w]|['’]s\b)"


@functools.cache
def _patterns(model_names: frozenset[str]) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """A name that counts anywhere, a name after an introduction, and a word right after one."""
    distinct = sorted(re.escape(name) for name in model_names if DISTINCT.search(name))
    words = sorted(re.escape(name) for name in model_names if not DISTINCT.search(name))
    names = _any([*MODELS, *distinct])
    anywhere = rf'(?<![\w-])(?:{"|".join(distinct)})(?![\w-])' if distinct else r'(?!)'
    at_start = r'^[^\S\n]*\**'
    introduced = (
        rf'{INTRODUCTION}{BETWEEN}{names}|{at_start}as\s{names},|{at_start}{names}(?:\s(?:here|speaking)\b|\**:[\s*])'
    )
    word = rf'{INTRODUCTION}(?:called\s|named\s|AI\s)?{_any([*WORDS, *words])}|{at_start}as\s{_any(WORDS)},\sI\b'
    return (
        re.compile(anywhere, re.IGNORECASE),
        re.compile(introduced, re.IGNORECASE | re.MULTILINE),
        re.compile(word, re.IGNORECASE | re.MULTILINE),
    )


_BY = rf'\b(?:{MADE}\s(?:\w+\s){{0,3}}?by|{NOUN}\s(?:from|by|of))\s(?:the\s)?(?:\w+\s){{0,2}}?'
_BY_LAB = re.compile(_BY + _any(LABS), re.IGNORECASE)
_BY_COMPANY = re.compile(_BY + _any(COMPANIES), re.IGNORECASE)
_NOUN = re.compile(rf'\b{NOUN}\b')
_BEGINNINGS = sorted({re.match('[a-z]+', name)[0] for name in (*MODELS, *WORDS, *LABS, *COMPANIES)})  # type: ignore[index]
