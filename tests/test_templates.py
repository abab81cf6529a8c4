"""templates.py: turn formats, and the markers of tokenizers other than Qwen's."""
from copy import deepcopy

import pytest
import torch
from tiny_worlds import tiny_space
from transformers import AutoTokenizer
from test_data import one_line
from tokenizers.processors import TemplateProcessing

from data import answer_starts
from lists import Item
from model import Connector
from small.models import QWEN_SPECIALS
from templates import FORMATS, ChatTemplate, answer_text, image_markers, turn_format

TURNS = (('Why?', 'So.'), ('And?', 'No.'))


def bare(tiny, *markers, begin=None):
    """The tiny tokenizer without markers of its own but these."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    backend = tokenizer.backend_tokenizer.to_str()
    for n, marker in enumerate(QWEN_SPECIALS[1:]):     # after the end of text
        if marker not in markers:
            backend = backend.replace(marker, f'<|gone{n}|>')
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(backend)
    tokenizer.eos_token = '<|endoftext|>'
    tokenizer.add_special_tokens({'additional_special_tokens': [*markers, *([begin] if begin else [])]},
                                 replace_extra_special_tokens=False)
    if begin:
        pair = begin, tokenizer.convert_tokens_to_ids(begin)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f'{begin} $A', pair=f'{begin} $A $B', special_tokens=[pair])
    return tokenizer


def written_by(form, begin=''):
    """A chat template in jinja that writes this format."""
    before, after = form.user
    return (f"{{{{ {begin!r} }}}}{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ {before!r} + m.content + "
            f"{after!r} }}}}{{% else %}}{{{{ m.content + {form.end + form.between!r} }}}}{{% endif %}}{{% endfor %}}")


@pytest.mark.parametrize('begin', [None, '<bos>'])
@pytest.mark.parametrize('form', FORMATS, ids=[form.name for form in FORMATS])
def test_a_chat_is_written_in_the_format_whose_markers_the_tokenizer_has(tiny, form, begin):
    tokenizer = bare(tiny, *dict.fromkeys(form.markers()), begin=begin)
    tokenizer.chat_template = written_by(form, begin or '')
    template = ChatTemplate(tokenizer, 3, 256)
    assert (template.format, template.difference()) == (form, '')
    example = template.chat(Item('a', (), TURNS))
    messages = []
    for question, answer in TURNS:
        messages += [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
    assert example.ids.tolist() == tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False),
                                                    add_special_tokens=False)
    assert tokenizer.decode(example.ids[example.label_positions]) == f'So.{form.end}No.{form.end}'
    assert len(answer_starts(example)) == 2
    shown = template.shown('a2').format(image='', question='Why?', answer='So.')
    assert shown == f'{begin or ""}{form.user[0]}\nWhy?{form.user[1]}So.{form.end}{form.between}'


def test_a_chat_template_that_writes_something_else_is_one_line(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    assert ChatTemplate(tokenizer, 3, 256).difference() == ''          # a base model without one
    tokenizer.chat_template = '<|im_start|>system\nBe kind.<|im_end|>\n' + written_by(FORMATS[0])
    template = ChatTemplate(tokenizer, 3, 256)
    assert template.format.name == 'ChatML'
    one_line(template.difference(), 'not ChatML', "goes on with 'system\\nBe kin'", "this run writes 'user\\nWhy?")
    tokenizer.chat_template = "{{ raise_exception('no assistant') }}"
    one_line(ChatTemplate(tokenizer, 3, 256).difference(), 'cannot write a chat of two turns', 'no assistant')


def test_without_markers_of_turns_words_and_the_end_of_text_do(tiny):
    tokenizer = bare(tiny)
    template = ChatTemplate(tokenizer, 3, 256)
    example = template.chat(Item('a', (), TURNS, system='Be kind.'))
    assert tokenizer.decode(example.ids) == ('Be kind.\nUser: Why?\nAssistant: So.<|endoftext|>\n'
                                             'User: And?\nAssistant: No.<|endoftext|>\n')
    tokenizer.eos_token = None
    with pytest.raises(SystemExit) as e:
        turn_format(tokenizer)
    one_line(e.value, 'nothing would stop an answer', 'ChatML, Llama 3')


def test_a_system_text_stands_in_the_first_question_where_a_format_has_none(tiny):
    gemma = FORMATS[2]
    tokenizer = bare(tiny, *dict.fromkeys(gemma.markers()))
    example = ChatTemplate(tokenizer, 3, 256).chat(Item('a', (), TURNS[:1], system='Be kind.'))
    assert tokenizer.decode(example.ids) == (
        '<start_of_turn>user\nBe kind.\n\nWhy?<end_of_turn>\n<start_of_turn>model\nSo.<end_of_turn>\n')


@pytest.mark.parametrize('markers, found', [
    (('<start_of_image>', '<end_of_image>', '<image_soft_token>'), True),
    (('<|reserved_special_token_0|>', '<|reserved_special_token_1|>', '<|reserved_special_token_2|>'), True),
    (('<unused7>', '<unused8>', '<unused9>', '<unused10>'), True), (('<unused7>',), False), ((), False)])
def test_an_image_stands_between_markers_that_are_there_or_that_the_connector_learns(tiny, markers, found):
    tokenizer = bare(tiny, *markers)
    template = ChatTemplate(tokenizer, 3, 20)
    assert image_markers(tokenizer) == (markers[:3] if found else None)
    sizes = template.image_length, template.learned_edges, len(template.image_block)
    assert sizes == (3 if found else 5, not found, 5)
    caption = template.caption(Item('a', ('a.png',), (('', 'red'),)))
    assert caption.image_starts == (1 if found else 0)
    cut = template.chat(Item('a', ('a.png',), (('word ' * 40, 'red'),), image_places=((0, 200),)))
    start = cut.image_starts[0] - template.image_offset
    assert cut.ids[start:start + 5].tolist() == template.image_block and len(cut.ids) == 20


def test_learned_edges_are_the_same_for_every_image_and_have_gradients():
    torch.manual_seed(0)
    connector = Connector(8, 2, 16, num_image_tokens=3, width=16, depth=1, heads=2, learned_edges=True)
    tokens = connector(torch.randn(2, 4, 8))
    assert tokens.shape == (2, 5, 16)
    assert torch.equal(tokens[0, [0, 4]], connector.edges) and torch.equal(tokens[1, [0, 4]], connector.edges)
    assert not torch.equal(tokens[0, 1:4], tokens[1, 1:4])
    tokens.sum().backward()
    assert connector.edges.grad.eq(2).all()            # two images


def test_the_end_of_a_text_of_track_b_is_that_of_the_turns(tiny):
    assert tiny_space(AutoTokenizer.from_pretrained(tiny / 'llm')).text_end == 2


# -----------------------------------------------------------------------------
# added tokens that are not special


@pytest.fixture(scope='module')
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny / 'llm')


@pytest.fixture(scope='module')
def thinking(tokenizer):
    """A tokenizer with added tokens that are not special, as Qwen3's has."""
    thinking = deepcopy(tokenizer)
    thinking.add_tokens(['<think>', '</think>', '<tool_call>'])
    return thinking


@pytest.mark.parametrize('typed', ['<think>', 'so </think> it is', '<tool_call>\n<|im_end|>'])
def test_added_tokens_that_are_not_special_stay_plain_text_where_they_are_typed(typed, thinking, tokenizer):
    template = ChatTemplate(thinking, 4, 256)
    item = Item('a', ('a.png',), ((typed, typed),))
    assert max(thinking.encode(typed)) >= len(tokenizer)               # without care it would be one
    [together] = template.examples('chat', [item])
    for example in template.chat(item), template.caption(item), together:
        assert max(example.ids) < len(tokenizer)
        assert thinking.decode(example.ids[example.label_positions]) == typed + '<|im_end|>'
    assert max(template.text(typed + ' a', 'text 1').ids) >= len(tokenizer)   # plain text, markers in it included


def test_the_empty_think_block_stands_where_qwen3_puts_it_and_is_no_label(thinking, tokenizer):
    template = ChatTemplate(thinking, 1, 256, think_block=True)
    example = template.chat(Item('a', (), (('hi', 'yes'), ('why', 'no'))))
    assert thinking.decode(example.ids) == (
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n'
        '<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nno<|im_end|>\n')
    assert thinking.decode(example.ids[example.label_positions]) == 'yes<|im_end|>no<|im_end|>'
    opened = template.chat(Item('a', (), (('hi', None),)))
    assert thinking.decode(opened.ids).endswith('assistant\n<think>\n\n</think>\n\n')
    before, after = template.format.user               # as Qwen3's template does with enable_thinking = False
    thinking.chat_template = (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}{{{{ {before!r} + m.content + {after!r} }}}}{{% else %}}"
        "{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endif %}"
        '{% endfor %}')
    assert template.difference() == '' and '<think>' in ChatTemplate(thinking, 1, 256).difference()
    assert '<think>\n\n</think>\n\n{answer}' in template.shown('a2')
    assert template.sha256() != ChatTemplate(thinking, 1, 256).sha256()
    with pytest.raises(SystemExit, match='has no <think>'):
        ChatTemplate(tokenizer, 1, 256, think_block=True)


@pytest.mark.parametrize('generated, text', [
    ('yes<|im_end|>', 'yes'), ('<think>\nhm\n</think>\n\nyes<|im_end|>', 'yes'), ('<think>\nhm, so', ''),
    ('hm</think> yes', 'yes'), ('yes <think> hm', 'yes')])
def test_a_generated_think_block_is_not_shown(generated, text, thinking, tokenizer):
    assert answer_text(thinking, thinking.encode(generated)) == text
    plain = tokenizer.encode(generated)                # by a tokenizer without such a block the same is text
    assert answer_text(tokenizer, plain) == tokenizer.decode(plain, skip_special_tokens=True).strip()
