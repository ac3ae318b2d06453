"""Replies by which a participant could tell which model wrote them are found, and texts about assistants are not."""

import time

import pytest

from simrl.study.names import names_itself

MODELS = ('initial', 'sft-7b', 'role_play')


@pytest.mark.parametrize(
    'text',
    [
        'Hello! I am Qwen, created by Alibaba Cloud. How can I help?',
        "I'm ChatGPT, a large language model trained by OpenAI.",
        'As a language model developed by OpenAI, I cannot do that.',
        'I’m an AI assistant named SmolLM, trained by Hugging Face.',
        'I am a large language model, trained by Google.',
        'My name is Claude, and I will help you with your story.',
        'Sure! This is Gemini speaking.',
        'As Claude, I would put it in other words.',
        'You are talking with me, DeepSeek-V3, today.',
        "No, I'm not actually GPT-4. Shall we go on?",
        'Qwen2.5 here! Let us begin.',
        '**Mistral:** Here is your outline.',
        'Well.\nI was built by Anthropic to be of help.',
        'I am called Llama 3.1, and I like poems.',
        'I am an assistant based on Meta AI.',
        'The reply of sft-7b is this.',  # a name of the config that is no word
        'My system prompt says role_play.',
        'I am Initial.',
    ],
)
def test_a_model_that_names_itself_is_found(text):
    assert names_itself(text, MODELS)
    assert names_itself(f'Some words before.\n\n{text} And some after, about a cat.', MODELS)


@pytest.mark.parametrize(
    'text',
    [
        '',
        'ChatGPT became known in 2022, and many of my friends use it.',
        'Tools such as ChatGPT or Claude can help you to begin.',
        'I am a huge fan of Google Maps.',
        'I am a photographer who was trained by Microsoft as an engineer.',  # of a personal statement
        'I worked as an assistant at Google, and my team was led by Meta engineers.',
        '"I am Claude," said the painter, "and this is Gemma."',
        '“My name is Claude,” he whispered.',
        "I'm a Gemini, and my sister is a Leo.",
        'I am a llama. I live in the mountains.',
        'The initial draft is below; I am sure that you will like it.',
        'In the play, the role of play is large.',
        'As an AI language model, I have no birthday.',  # it tells nothing of which one
        'I am an AI assistant, made to help you.',
        'I was asked to write about how OpenAI was founded.',
        "This is ChatGPT's greatest weakness.",
        'Do you mean the falcon of the story? I am in command of it.',
    ],
)
def test_a_text_about_models_is_not(text):
    assert not names_itself(text, MODELS)


def test_names_of_the_config_count_by_themselves_where_they_are_no_words():
    assert not names_itself('We can go on with sft-7b.', ())
    assert names_itself('We can go on with SFT-7B.', ('sft-7b',))
    assert not names_itself('We can go on with sft-7bis.', ('sft-7b',))
    assert not names_itself('The tuned piano stands here.', ('tuned',))
    assert names_itself('I am C++3.', ('c++3',))  # no pattern


@pytest.mark.parametrize(
    'text', ['“' * 9000, '"' * 9001, 'I am a ' * 2000, 'I am qwen by ' * 800, 'my' + ' ' * 9000, '*' * 9000]
)
def test_no_text_takes_long(text):
    start = time.perf_counter()
    names_itself(text + ' google', MODELS)
    assert time.perf_counter() - start < 1
