"""data.py: readers, templates, splits, samplers and batches, against values worked out by hand."""
import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here

import data
from templates import ChatTemplate
from data import (
    Loader, ShuffledSampler, attention_groups, choose_split, collate, image_reader, label_thirds,
    length_buckets, load_split, padded_layout, shuffled_index)
from examples import Example
from lists import Item, read_llava, read_texts
from media import BadSample, BadSamples


def one_line(error, *parts):
    """The message is one line and says all of this."""
    text = str(error)
    assert '\n' not in text
    assert [part for part in parts if str(part) not in text] == [], text


# -----------------------------------------------------------------------------
# readers


def record(id='bad', image='a.png', ask='<image>\nWhat?', answer='a dot', **more):
    turns = [{'from': 'human', 'value': ask}, {'from': 'gpt', 'value': answer}]
    return {'id': id, 'image': image, 'conversations': turns, **more}


def read_content(folder, content, limit=0, **how):
    """read_llava of a list with this content, pictures in folder/images."""
    (folder / 'images').mkdir(exist_ok=True)
    (folder / 'data.json').write_bytes(content.encode())
    bad_samples = BadSamples(folder / 'bad_samples.jsonl', limit)
    return read_llava(folder / 'data.json', folder / 'images', bad_samples, **how)


def read(folder, *records, **how):
    return read_content(folder, json.dumps(records), **how)


def test_a_chat_and_a_caption_are_read_without_their_image_marks(tmp_path):
    image = str(tmp_path / 'images' / 'a.png')
    assert read(tmp_path, record('one')) == [Item('one', (image,), (('What?', 'a dot'),))]
    caption = record('one', ask='What?\n<image>')
    assert read(tmp_path, caption, captions=True) == [Item('one', (image,), (('', 'a dot'),))]
    text_only = {'id': 7, 'conversations': record(ask='Why?')['conversations']}
    assert read(tmp_path, text_only) == [Item('7', (), (('Why?', 'a dot'),))]


@pytest.mark.parametrize('ask, question, before', [
    ('<image>\nWhat?', 'What?', ''), ('<image>What?', 'What?', ''), ('<image>', '', ''),
    ('What?\n<image>', 'What?', 'What?'), ('What? <image>\n', 'What?', 'What?'), ('Is <image> big?', 'Is  big?', 'Is '),
    ('Is\n<image>\nbig?', 'Is\n\nbig?', 'Is\n')])
def test_the_image_stays_where_its_mark_stands(tmp_path, ask, question, before):
    [item] = read(tmp_path, record(ask=ask))
    assert item.turns == ((question, 'a dot'),) and item.image_places == ((0, len(before)),)
    assert question.startswith(before)


HUMAN, GPT = record()['conversations']
SYSTEM = {'from': 'system', 'value': 'Be brief.'}
BOM = '\ufeff'
WHOLE = {
    'a byte order mark': BOM + json.dumps([record()]),
    'JSONL': f'{json.dumps(record())}\r\n\n',
    'JSONL with a byte order mark': f'{BOM}\n{json.dumps(record())}',
    'a line separator inside a text': json.dumps(record(ask='<image>\nOne\u2028two?'), ensure_ascii=False),
    'a list of one image': json.dumps([record(image=['a.png'])]),
    'a system turn': json.dumps([record(conversations=[SYSTEM, HUMAN, GPT])]),
    'a number as id': json.dumps([record(7)]),
    'NaN where nothing looks': json.dumps([record(score=float('nan'))]),
}


@pytest.mark.parametrize('kind', WHOLE)
def test_lists_are_taken_as_they_come(tmp_path, kind):
    [item] = read_content(tmp_path, WHOLE[kind])
    question = 'One\u2028two?' if 'separator' in kind else 'What?'
    system = 'Be brief.' if 'system' in kind else ''
    id = '7' if 'number' in kind else 'bad'
    assert item == Item(id, (str(tmp_path / 'images' / 'a.png'),), ((question, 'a dot'),), system)


def test_an_id_that_comes_again_gets_a_number_and_so_does_a_sample_without_one(tmp_path):
    given = ['a', 'a', 'a#2', 3, '3', 'a', None, '', 'a#2']
    records = [record(id) for id in given]
    del records[6]['id']
    wanted = ['a', 'a#2', 'a#2#2', '3', '3#2', 'a#3', '6', '7', 'a#2#3']
    assert [item.id for item in read(tmp_path, *records)] == wanted
    records[1] = record('a', answer='')                # a bad one has its number too: repaired, it moves no other
    assert [item.id for item in read(tmp_path, *records, limit=1)] == wanted[:1] + wanted[2:]
    assert json.loads((tmp_path / 'bad_samples.jsonl').read_text())['id'] == 'a#2'


@pytest.mark.parametrize('first', ['{"id": "0", "image": ', 'age": "a.png"}', '"id"', 'null', '{"id"\n{"id"\n]'])
def test_a_damaged_first_line_of_jsonl_is_left_out_as_any_other(tmp_path, first):
    n_bad = len(first.splitlines())
    (tmp_path / 'data.json').write_text(f'{first}\n{json.dumps(record())}\n')
    found = read_llava(tmp_path / 'data.json', tmp_path, BadSamples(tmp_path / 'bad_samples.jsonl', n_bad))
    assert [item.id for item in found] == [record()['id']]
    assert f'{tmp_path}/data.json:1' in (tmp_path / 'bad_samples.jsonl').read_text()


@pytest.mark.parametrize('sample, says', [
    (record(image='x/../../a.png'), 'leaves the image root'),
    (record(image='/etc/passwd'), 'leaves the image root'),
    (record(image='https://example.com/a.png'), 'leaves the image root'),
    (record(image='link/a.png'), 'link out of the image root'),
    (record(image=3), 'image is 3, wanted a path'),
    (record(image=float('nan')), 'image is NaN, wanted a path'),
    (record(image=['a.png', 'b.png']), '2 images, wanted one'),
    (record(image=[['a.png']]), 'image is a list, wanted a path'),
    (record(image='a\0.png'), 'is no file name'),
    (record(1.5), 'id is 1.5, wanted text or a whole number'),
    (record(True), 'id is true'),
    (record(['x']), 'id is a list'),
    (record('\ud83d'), r'id is "\ud83d"'),
    ('bad', 'found "bad", wanted an object'),
    (record(answer=' \n'), 'an empty answer'),
    (record(answer='a \ud800 dot'), 'not Unicode'),
    (record(conversations=[HUMAN, GPT, HUMAN]), 'in pairs'),
    (record(conversations=[SYSTEM, HUMAN]), 'in pairs'),
    (record(conversations=[]), 'in pairs'),
    (record(conversations=[GPT, HUMAN]), 'alternate human and gpt'),
    (record(conversations=[HUMAN, GPT, SYSTEM, GPT]), 'alternate human and gpt'),
    (record(conversations=[HUMAN, {'from': 'gpt'}]), 'alternate human and gpt'),
    (record(ask='<image><image>\nWhat?'), '2 <image> marks for 1 images'),
    (record(ask='What?'), '0 <image> marks for 1 images'),
    (record(image=None), '1 <image> marks for 0 images'),
    (record(image=[]), '1 <image> marks for 0 images'),
    (record(conversations=[HUMAN, GPT, HUMAN, GPT]), '2 <image> marks for 1 images'),
    (record(ask='<video>\nWhat?', image=None), '<video> in question 1, wanted an image'),
    (record(image=None, video='a.mp4'), 'a video, wanted an image'),
], ids=lambda value: value if isinstance(value, str) else '')
@pytest.mark.parametrize('ending', ['json', 'jsonl'])
def test_a_bad_sample_is_left_out_and_its_line_says_why(tmp_path, sample, says, ending):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / 'link').symlink_to(tmp_path)
    records = [record('good'), sample]
    content = json.dumps(records) if ending == 'json' else '\n'.join(map(json.dumps, records))
    assert [item.id for item in read_content(tmp_path, content, limit=1)] == ['good']
    line = json.loads((tmp_path / 'bad_samples.jsonl').read_text())
    one_line(line['reason'], tmp_path / 'data.json', ', sample 1' if ending == 'json' else ':2', says)


@pytest.mark.parametrize('asks, n_images, says', [
    (['<image><image><image>\nWhat?'], 3, '3 images, wanted at most max_images = 2'),
    (['<image>\nWhat?', 'And?'], 2, '1 <image> marks for 2 images'),
    (['<image>\nWhat?', '<image> <image>'], 2, '3 <image> marks for 2 images'),
    (['What?', '<video> <image>'], 1, '<video> in question 2')])
def test_too_many_images_or_other_numbers_of_marks_are_one_line(tmp_path, asks, n_images, says):
    turns = [turn for ask in asks for turn in ({'from': 'human', 'value': ask}, GPT)]
    sample = record(image=['a.png'] * n_images, conversations=turns)
    assert [item.id for item in read(tmp_path, record('good'), sample, limit=1, max_images=2)] == ['good']
    one_line(json.loads((tmp_path / 'bad_samples.jsonl').read_text())['reason'], 'data.json, sample 1', says)


def test_a_caption_whose_image_comes_later_is_a_bad_sample(tmp_path):
    sample = record(conversations=[{'from': 'human', 'value': 'Hello'}, GPT, HUMAN, GPT])
    assert [item.id for item in read(tmp_path, record('good'), sample, limit=1, captions=True)] == ['good']
    one_line((tmp_path / 'bad_samples.jsonl').read_text().strip(), 'wanted it in the first')


def test_a_caption_without_an_image_is_a_bad_sample(tmp_path):
    sample = record(image=None, ask='Describe.')
    assert [item.id for item in read(tmp_path, record('good'), sample, limit=1, captions=True)] == ['good']
    one_line((tmp_path / 'bad_samples.jsonl').read_text().strip(), 'a caption without an image')


@pytest.mark.parametrize('text, says', [
    ('[{"id": 1, "id": 2}]', "'id' stands twice"), ('{\n"data": []}', 'found a dict, wanted a list'),
    ('[{"id": 1}', 'not valid JSON'), ('[]', 'no usable sample'), ('', 'not valid JSON'),
    pytest.param('[' * 100_000, 'not valid JSON', id='too deep')])
def test_a_broken_data_set_ends_the_run_with_one_line(tmp_path, text, says):
    (tmp_path / 'data.json').write_text(text)
    with pytest.raises(SystemExit) as e:
        read_llava(tmp_path / 'data.json', tmp_path, BadSamples(tmp_path / 'bad_samples.jsonl', 9))
    one_line(e.value, tmp_path / 'data.json', says)


def test_one_bad_sample_more_than_the_limit_ends_the_run(tmp_path):
    with pytest.raises(SystemExit) as e:
        read(tmp_path, record('good'), record(answer=''))
    one_line(e.value, tmp_path / 'data.json', "id 'bad'", 'an empty answer', 'max_bad_samples above 0')
    assert not (tmp_path / 'bad_samples.jsonl').exists()
    with pytest.raises(SystemExit):                    # every one of the same id counts
        read(tmp_path, record('good'), *[record(answer='')] * 3, limit=2)


def test_texts_are_read_as_they_stand(tmp_path):
    path = tmp_path / 'text.jsonl'
    path.write_text(f'{BOM}{{"text": "one"}}\n\n{BOM}{{"text": " two\u2028\\n"}}\r\n')
    assert read_texts(path) == ['one', ' two\u2028\n']
    path.write_text('\n')
    for name, says in ('text.jsonl', 'holds no text'), ('none', 'cannot read this text file'):
        with pytest.raises(SystemExit) as e:
            read_texts(tmp_path / name)
        one_line(e.value, tmp_path / name, says)


@pytest.mark.parametrize('line, says', [
    ('{"text": null}', 'text is null'), ('{"text": 2024}', 'text is 2024'), ('{"text": NaN}', 'text is NaN'),
    ('{"text": ["a"]}', 'text is a list'), ('{"text": ""}', 'text is ""'), ('{"text": " \\n"}', r'text is " \n"'),
    (r'{"text": "x \ud83d"}', r'text is "x \ud83d", which is not Unicode'), ('{"txt": "one"}', 'found no "text"'),
    ('["one"]', 'found no "text"'), ('"text"', 'found no "text"'), ('{"text": "one"', 'not valid JSON'),
    ('{"text": "one", "text": "two"}', "key 'text' stands twice"), ('\udce9', 'not valid JSON'),
    pytest.param('{"text": ' + '[' * 100_000, 'not valid JSON', id='too deep')])
def test_a_line_without_a_text_is_named(tmp_path, line, says):
    path = tmp_path / 'text.jsonl'
    path.write_bytes(f'{{"text": "one"}}\n\n{line}\n'.encode(errors='surrogateescape'))
    with pytest.raises(SystemExit) as e:
        read_texts(path)
    one_line(e.value, f'{path}:3', says)


@pytest.mark.parametrize('flag', ['--prompt', '--draw', '--sound'])
def test_a_text_on_the_command_line_that_is_not_utf8_is_one_line(flag):
    code, _ = run_here('sample.py', 'no run', '--image', 'a.png', flag, 'caf\udce9')      # as Latin-1 comes
    one_line(code, r"'caf\udce9' is not UTF-8")


# -----------------------------------------------------------------------------
# templates


class Letters:
    """A tokenizer with one id a letter, so that positions can be counted by hand."""
    unk_token = unk_token_id = chat_template = None
    marks = {'<|vision_start|>': 1, '<|vision_end|>': 2, '<|image_pad|>': 3, '<|im_start|>': 4, '<|im_end|>': 5}

    def convert_tokens_to_ids(self, name):
        return self.marks.get(name)

    def encode(self, text, split_special_tokens=False, **named):
        ids = []
        for word in re.split(r'(<\|\w+\|>)', text):
            is_mark = word in self.marks and not split_special_tokens
            ids += [self.marks[word]] if is_mark else map(ord, word)
        return ids


LETTERS = ChatTemplate(Letters(), 2, 64)


@pytest.fixture(scope='module')
def tokenizer(tiny):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(tiny / 'llm')


def test_the_labels_of_a_caption_are_its_text_and_the_end_token():
    example = LETTERS.caption(Item('a', ('a.png',), (('', 'hi'),)))
    assert example.ids.tolist() == [1, 3, 3, 2, 10, ord('h'), ord('i'), 5]
    assert (example.label_positions.tolist(), example.image_starts.tolist()) == ([5, 6, 7], [1])
    assert not example.truncated


def test_the_labels_of_a_chat_are_its_answers_and_their_end_tokens():
    example = LETTERS.chat(Item('a', ('a.png',), (('Q', 'A'), ('R', 'BC'))))
    user = [4, *map(ord, 'user\n')]                    # 6 ids
    assistant = [4, *map(ord, 'assistant\n')]          # 11 ids
    assert example.ids.tolist() == [
        *user, 1, 3, 3, 2, 10, ord('Q'), 5, 10, *assistant, ord('A'), 5, 10,
        *user, ord('R'), 5, 10, *assistant, ord('B'), ord('C'), 5, 10]
    assert (example.label_positions.tolist(), example.image_starts.tolist()) == ([25, 26, 48, 49, 50], [7])
    assert data.answer_starts(example) == [25, 48]


def test_a_system_turn_comes_first_and_has_no_label():
    turns = (('Q', 'A'),)
    plain = LETTERS.chat(Item('a', ('a.png',), turns))
    example = LETTERS.chat(Item('a', ('a.png',), turns, system='S'))
    system = [4, *map(ord, 'system\nS'), 5, 10]
    assert example.ids.tolist() == [*system, *plain.ids.tolist()]
    assert example.label_positions.tolist() == [len(system) + position for position in plain.label_positions]
    assert example.image_starts == len(system) + plain.image_starts


@pytest.mark.parametrize('offset, before, after', [(0, '', '\nQ R'), (3, 'Q R\n', ''), (2, 'Q ', 'R')])
def test_an_image_stands_where_its_item_says(offset, before, after):
    example = LETTERS.chat(Item('a', ('a.png',), (('Q R', 'A'),), image_places=((0, offset),)))
    start = [4, *map(ord, f'user\n{before}'), 1, 3, 3, 2, *map(ord, after), 5]
    assert example.ids[:len(start)].tolist() == start
    [image_start] = example.image_starts
    assert example.ids[image_start:].tolist() == start[image_start:] + [
        10, 4, *map(ord, 'assistant\nA'), 5, 10]
    assert example.ids[image_start] == 3


@pytest.mark.parametrize('asks, wanted', [
    (['<image>\n<image>\nQ'], ['#\n#\nQ']), (['<image> <image>Q'], ['#\n#\nQ']), (['Q<image>\n<image>'], ['Q\n#\n#']),
    (['A <image> B <image>\nQ'], ['A # B #\nQ']), (['<image>\nA<image>'], ['#\nA\n#']),
    (['<image> A <image> Q'], ['#\nA # Q']), (['<image><image>'], ['#\n#\n']),
    (['<image>\nQ', 'R\n<image>', 'S'], ['#\nQ', 'R\n#', 'S']),
    (['Q', 'Is <image> like <image>?'], ['Q', 'Is # like #?'])])
def test_several_images_stand_where_their_marks_do_in_any_question(tmp_path, asks, wanted):
    turns = [turn for ask in asks for turn in ({'from': 'human', 'value': ask}, GPT)]
    names = [f'{k}.png' for k in range(str(asks).count('<image>'))]
    [item] = read(tmp_path, record(image=names, conversations=turns), max_images=2)
    assert [Path(path).name for path in item.images] == names
    example = ChatTemplate(Letters(), 2, 256).chat(item)
    text = ''.join(map(chr, example.ids)).replace('\1\3\3\2', '#')
    assert re.findall('\4user\n(.*?)\5', text, re.DOTALL) == wanted
    assert [example.ids[start - 1:start + 3].tolist() for start in example.image_starts] == len(names) * [[1, 3, 3, 2]]
    labels = ''.join(chr(id) for id in example.ids[example.label_positions])
    assert labels == len(asks) * 'a dot\5' and not example.truncated


def test_an_image_that_does_not_fit_is_left_out_whole_with_what_follows():
    item = Item('a', ('a.png', 'b.png'), (('Q', 'A'), ('R', 'B')), image_places=((0, 0), (1, 0)))
    whole = ChatTemplate(Letters(), 2, 64).chat(item)
    second = whole.image_starts[1]
    for room in -1, 0, 1, 2:                           # up to one id short of its <|vision_end|>
        cut = ChatTemplate(Letters(), 2, int(second) + room).chat(item)
        assert cut.ids.tolist() == whole.ids[:min(second - 1, second + room)].tolist() and cut.truncated
        assert cut.image_starts.tolist() == [7] and cut.item.images == ('a.png',) and len(cut.label_positions) == 2
    kept = ChatTemplate(Letters(), 2, int(second) + 3).chat(item)
    assert kept.image_starts.tolist() == whole.image_starts.tolist() and kept.item == item


def test_a_long_text_before_an_image_is_cut_and_the_image_is_whole():
    template = ChatTemplate(Letters(), 2, 20)
    example = template.chat(Item('a', ('a.png',), (('Q' * 40, 'A'),), image_places=((0, 40),)))
    assert example.ids.tolist() == [4, *map(ord, 'user\nQQQQQQQQQQ'), 1, 3, 3, 2]
    assert (example.image_starts.tolist(), example.label_positions.tolist(), example.truncated) == ([17], [], True)
    batch = collate([example, TEXT_ONLY], [[np.ones((3, 2, 2), np.uint8)], []], num_image_tokens=2)
    assert batch.input_ids[batch.image_positions].tolist() == [3, 3]


def test_an_open_turn_ends_with_the_assistant_header_and_has_no_label():
    example = LETTERS.chat(Item('a', (), (('Q', None),)))
    assert example.ids.tolist() == [4, *map(ord, 'user\n'), ord('Q'), 5, 10, 4, *map(ord, 'assistant\n')]
    assert (example.label_positions.tolist(), example.image_starts.tolist(), example.truncated) == ([], [], False)
    assert data.answer_starts(example) == []


@pytest.mark.parametrize('kind, label_positions', [('caption', [5, 6, 7, 8, 9, 10, 11]), ('chat', [])])
def test_truncation_is_flagged_and_never_cuts_the_image_block(kind, label_positions):
    template = ChatTemplate(Letters(), 2, 12)          # the least allowed: the image block and 8 more
    example = getattr(template, kind)(Item('a', ('a.png',), (('Q', 'abcdefgh'),)))
    assert (len(example), example.truncated) == (12, True)
    [image_start] = example.image_starts
    assert example.ids[image_start - 1:image_start + 3].tolist() == [1, 3, 3, 2]
    assert example.label_positions.tolist() == label_positions
    whole = ChatTemplate(Letters(), 2, 14).caption(Item('a', ('a.png',), (('', 'abcdefgh'),)))
    assert (len(whole), whole.truncated) == (14, False)                                           # 4 + 1 + 8 + 1
    with pytest.raises(SystemExit) as e:
        ChatTemplate(Letters(), 2, 11)
    one_line(e.value, 'max_seq_len = 11', '2 image tokens')


def test_markers_that_a_user_types_stay_plain_text(tokenizer):
    template = ChatTemplate(tokenizer, 4, 256)
    typed = '<|image_pad|> <|im_end|>\n<|im_start|>assistant\n<|vision_start|>'
    marks = tokenizer.convert_tokens_to_ids(['<|image_pad|>', '<|im_start|>', '<|im_end|>'])
    assert tokenizer.encode('<|image_pad|>', add_special_tokens=False) == marks[:1]    # without care it would be a pad
    chat = template.chat(Item('a', ('a.png',), ((typed, typed),)))
    caption = template.caption(Item('a', ('a.png',), (('', typed),)))
    for example, counts in (chat, [4, 2, 2]), (caption, [4, 0, 1]):
        assert [(example.ids == mark).sum() for mark in marks] == counts
        assert tokenizer.decode(example.ids[example.label_positions]) == typed + '<|im_end|>'
    assert (np.flatnonzero(chat.ids == marks[0]) == chat.image_starts + np.arange(4)).all()


def test_a_chat_reads_as_chatml_with_the_tiny_tokenizer(tokenizer):
    example = ChatTemplate(tokenizer, 3, 256).chat(Item('a', ('a.png',), (('hi', 'yes ✓'), ('why', 'no'))))
    assert tokenizer.decode(example.ids) == (
        '<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>\nhi<|im_end|>\n'
        '<|im_start|>assistant\nyes ✓<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n'
        '<|im_start|>assistant\nno<|im_end|>\n')
    assert tokenizer.decode(example.ids[example.label_positions]) == 'yes ✓<|im_end|>no<|im_end|>'


def test_every_id_of_a_text_after_the_first_is_a_label_and_its_markers_are_markers(tokenizer):
    text = '<|im_start|>user\nhi<|im_end|>'
    example = ChatTemplate(tokenizer, 3, 64).text(text, 'replay 7')
    ends = tokenizer.convert_tokens_to_ids(['<|im_start|>', '<|im_end|>'])
    assert example.ids[[0, -1]].tolist() == ends and tokenizer.decode(example.ids) == text
    assert example.label_positions.tolist() == list(range(1, len(example)))
    assert (example.item.id, len(example.image_starts)) == ('replay 7', 0)
    with pytest.raises(SystemExit) as e:               # nothing is before it to predict it
        LETTERS.text('a', 'text.jsonl:7')
    one_line(e.value, 'text.jsonl:7: text is "a", one token')


# -----------------------------------------------------------------------------
# splits


def example_of(id, image, n_labels=1):
    return Example(Item(id, (str(image),), (('', id),)), np.arange(8 + n_labels, dtype=np.int32),
                   np.arange(8, 8 + n_labels, dtype=np.int32), np.ones(1, np.int32), False)


def make_examples(folder, n, captions=(1,)):
    """Examples of n pictures, the k-th in bucket k % 3. captions: how many examples each copy of a file has."""
    examples = []
    for k in range(n):
        for copy, count in enumerate(captions):
            path = folder / f'{k}-copy{copy}.png'
            path.write_text(f'picture {k}')
            for c in range(count):
                examples.append(example_of(f'{k}-{copy}-{c}', path, (10, 20, 21)[k % 3]))
    return examples


def split(examples, folder, n_eval=30, n_golden=9, edges=(10, 20), read=lambda path: path):
    path = folder / 'split.json'
    choose_split(examples, n_eval, n_golden, edges, path=path, bad_samples=BadSamples(folder / 'bad.jsonl', 99),
                 read=read)
    *sets, found_edges = load_split(examples, path, n_eval)
    assert found_edges == list(edges) or not edges
    return sets


def ids(examples):
    return [example.item.id for example in examples]


def pictures(examples):
    return {example.item.id.split('-')[0] for example in examples}


def test_eval_and_golden_are_balanced_over_the_length_buckets_and_so_is_a_part_of_them(tmp_path):
    train_set, eval_set, golden_set = split(make_examples(tmp_path, 150), tmp_path, n_eval=100, n_golden=10)
    assert Counter(len(example.label_positions) for example in eval_set) == {10: 33, 20: 33, 21: 34}
    assert Counter(len(example.label_positions) for example in golden_set) == {10: 3, 20: 3, 21: 4}
    assert len(train_set) == 150 - 110
    part = Counter(len(example.label_positions) for example in eval_set[:30])
    assert min(part.values()) >= 5                     # 10 of each, give or take


def test_a_bucket_that_has_too_few_is_filled_up_from_the_others(tmp_path):
    """Edges that do not fit: nothing is short, and what is long is soon used up."""
    _, eval_set, golden_set = split(make_examples(tmp_path, 60), tmp_path, n_eval=30, n_golden=9, edges=(5, 20))
    assert len(eval_set) == 30 and len(golden_set) == 9


def test_without_edges_the_buckets_are_thirds_of_the_data(tmp_path):
    examples = make_examples(tmp_path, 60)
    assert label_thirds(examples) == [10, 20] and label_thirds([]) == [0, 0]
    _, eval_set, _ = split(examples, tmp_path, edges=())
    assert Counter(len(example.label_positions) for example in eval_set) == {10: 10, 20: 10, 21: 10}


def test_the_length_buckets_are_masks_of_those_that_hold_any():
    masks = length_buckets([1, 10, 21, 3], (10, 20))
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        'short': [True, True, False, True], 'long': [False, False, True, False]}


def test_no_picture_is_on_two_sides_of_a_split_under_another_name_or_caption(tmp_path):
    train_set, eval_set, golden_set = split(make_examples(tmp_path, 90, captions=(2, 1)), tmp_path)
    parts = [pictures(part) for part in (train_set, eval_set, golden_set)]
    assert [len(part) for part in parts] == [51, 30, 9] and len(set.union(*parts)) == 90
    assert (len(train_set), len(eval_set), len(golden_set)) == (3 * 51, 30, 9)   # held out once, not three times


def test_every_sample_that_shares_any_picture_with_a_held_out_one_is_held_out(tmp_path):
    examples = make_examples(tmp_path, 90)
    shared = []                                        # of two pictures, the second a copy of that of another sample
    for k in range(0, 90, 2):
        paths = (tmp_path / f'own{k}.png', tmp_path / f'copy{k}.png')
        paths[0].write_text(f'own {k}')
        paths[1].write_text(f'picture {k}')
        example = example_of(f'{k}-shared', '', 10)
        item = replace(example.item, images=tuple(map(str, paths)), image_places=((0, 0), (0, 0)))
        shared.append(replace(example, item=item, image_starts=ints(1, 4)))
    train_set, eval_set, golden_set = split(examples + shared, tmp_path)
    assert len(eval_set) == 30 and any('shared' in id for id in ids(eval_set + golden_set))
    parts = [pictures(part) for part in (train_set, eval_set, golden_set)]
    assert not parts[0] & (parts[1] | parts[2]) and not parts[1] & parts[2]
    pair = next(example for example in eval_set if 'shared' in example.item.id)
    path = Path(pair.item.images[1])                   # its second picture, other bytes of the same size
    path.write_text('other'.ljust(path.stat().st_size))
    with pytest.raises(SystemExit) as e:
        split(examples + shared, tmp_path)
    one_line(e.value, 'was chosen from other data', repr(pair.item.id))


def test_a_split_is_written_once_and_used_again(tmp_path):
    examples = make_examples(tmp_path, 60)
    first = split(examples, tmp_path)
    text = (tmp_path / 'split.json').read_text()

    def fails(path):
        raise AssertionError('read again')
    again = split(examples, tmp_path, read=fails)
    assert [ids(part) for part in again] == [ids(part) for part in first]
    assert (tmp_path / 'split.json').read_text() == text
    assert [ids(part) for part in split(examples[::-1], tmp_path / 'other')[1:]] == [ids(part) for part in first[1:]]


def changed(examples, n, **change):
    """The examples with another item in the place of number n."""
    return [*examples[:n], replace(examples[n], item=replace(examples[n].item, **change)), *examples[n + 1:]]


DIFFERENT = {
    'gone': lambda examples: (examples[:40] + examples[41:], 40),
    'gone from the end': lambda examples: (examples[:-1], 59),
    'come': lambda examples: ([*examples, replace(examples[0], item=replace(examples[0].item, id='late'))], 60),
    'in another order': lambda examples: ([*examples[:7], *examples[:6:-1]], 7),
    'id': lambda examples: (changed(examples, 3, id='other'), 3),
    'answer': lambda examples: (changed(examples, 4, turns=(('', 'rewritten'),)), 4),
    'system': lambda examples: (changed(examples, 5, system='Be brief.'), 5),
    'image': lambda examples: (changed(examples, 6, images=examples[7].item.images), 6),
    'one more image': lambda examples: (changed(examples, 9, images=2 * examples[9].item.images), 9),
    'place of the image': lambda examples: (changed(examples, 8, image_places=((0, 1),)), 8)}


@pytest.mark.parametrize('kind', DIFFERENT)
def test_a_split_of_other_samples_is_refused_and_the_first_one_named(tmp_path, kind):
    examples = make_examples(tmp_path, 60)
    split(examples, tmp_path)
    others, n = DIFFERENT[kind](examples)
    with pytest.raises(SystemExit) as e:
        split(others, tmp_path)
    name = others[n].item.id if n < len(others) else 'gone'
    one_line(e.value, tmp_path / 'split.json', f'number {n}, ', name, 'remove the file to choose anew')


def test_a_split_of_other_pictures_is_refused(tmp_path):
    examples = make_examples(tmp_path, 60)
    train_set, eval_set, _ = split(examples, tmp_path)
    for example, content in (train_set[0], 'of another size'), (eval_set[0], None):
        path = Path(example.item.images[0])
        whole = path.read_bytes()
        path.write_bytes(whole[::-1] if content is None else content.encode())   # held out: its bytes, not its size
        with pytest.raises(SystemExit) as e:
            split(examples, tmp_path)
        one_line(e.value, tmp_path / 'split.json', repr(example.item.id), 'restore it')
        path.write_bytes(whole)
    split(examples, tmp_path)


@pytest.mark.parametrize('changed', [{'n_eval': 24}, {'n_golden': 6}, {'edges': (5, 20)}])
def test_a_split_that_was_asked_for_otherwise_is_refused(tmp_path, changed):
    examples = make_examples(tmp_path, 60)
    split(examples, tmp_path)
    with pytest.raises(SystemExit) as e:
        split(examples, tmp_path, **changed)
    [(name, value)] = changed.items()
    one_line(e.value, tmp_path / 'split.json', name, f'this run has {list(value) if name == "edges" else value}')


@pytest.mark.parametrize('damage', [
    lambda body: b'{}', lambda body: b'', lambda body: body[:len(body) // 2], lambda body: b'[1]',
    lambda body: body.replace(b'"0-0-0"', b'"1-0-0"', 1),
    lambda body: body[:900] + bytes([body[900] ^ 1]) + body[901:]])
def test_a_damaged_split_is_refused(tmp_path, damage):
    examples = make_examples(tmp_path, 60)
    split(examples, tmp_path)
    path = tmp_path / 'split.json'
    path.write_bytes(damage(path.read_bytes()))
    for part_of_start in load_split, lambda *args: split(examples, tmp_path):
        with pytest.raises(SystemExit) as e:
            part_of_start(examples, path, 30)
        one_line(e.value, path, 'remove it')


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / 'a.png')
    with pytest.raises(BadSample) as e:
        data.media_key(Item('a', (str(tmp_path / 'a.png'),), ()))
    one_line(e.value, tmp_path / 'a.png', 'cannot read this image')


def test_an_unreadable_picture_is_not_held_out(tmp_path):
    def read(path):
        if int(Path(path).name.split('-')[0]) % 4 == 0:
            raise BadSample(f'{path}: not a whole image')
        return path
    _, eval_set, golden_set = split(make_examples(tmp_path, 90), tmp_path, read=read)
    assert (len(eval_set), len(golden_set)) == (30, 9)
    assert not [k for k in pictures(eval_set + golden_set) if int(k) % 4 == 0]


def test_a_missing_picture_is_in_no_part_of_the_split_and_a_bad_sample(tmp_path):
    examples = make_examples(tmp_path, 60)
    Path(examples[5].item.images[0]).unlink()
    parts = split(examples, tmp_path)
    assert examples[5].item.id not in ids(sum(parts, []))
    one_line((tmp_path / 'bad.jsonl').read_text().strip(), examples[5].item.images[0], examples[5].item.id)


def test_too_little_data_to_split_ends_the_run_with_one_line(tmp_path):
    with pytest.raises(SystemExit) as e:
        split(make_examples(tmp_path, 9), tmp_path)
    one_line(e.value, '9 samples', 'add data or lower n_eval')


# -----------------------------------------------------------------------------
# a run of A2


@pytest.mark.stage
def test_a2_takes_lists_as_they_come_and_goes_on_over_the_same_data_alone(a2_config, tiny, tmp_path):
    """One id for all, JSONL with a byte order mark; of three chats one is of text alone, one has a system turn and its
    image at the end, one has two images, the second in its last question."""
    chats = json.loads((tiny / 'instruct' / 'data.json').read_text())
    images = [chat['image'] for chat in chats]
    for n, chat in enumerate(chats):
        turns = chat['conversations']
        question = turns[0]['value'].replace('<image>', '').strip()
        chat['id'] = '000000033471'
        if n % 3 == 0:
            turns[0]['value'] = question
            del chat['image']
        elif n % 3 == 1:
            turns[0]['value'] = f'{question}\n<image>'
            turns.insert(0, SYSTEM)
            chat['image'] = [chat['image']]
        else:
            turns[-2]['value'] += '\n<image>'
            chat['image'] = [images[n], images[n - 2]]         # that of the chat which is text alone now
    path = tmp_path / 'chats.json'
    command = ('train_a2.py', a2_config, f'--out_dir={tmp_path}/out', f'--data_json={path}', '--epoch_samples=16',
               '--micro_batch_size=1', '--eval_every=2', f'--feature_cache={tmp_path}/features')

    def write():
        path.write_text(BOM + '\n'.join(json.dumps(chat) for chat in chats))
    write()
    code, printed = run_here(*command)
    assert code in (0, 1) and 'examples to train on' in printed and (tmp_path / 'out' / 'gates.json').exists(), code
    predictions = [json.loads(line) for line in (tmp_path / 'out' / 'predictions.jsonl').read_text().splitlines()]
    assert predictions and all(line['image'] and line['id'].startswith('000000033471') for line in predictions)
    n_images = [len(line['image']) for line in predictions if isinstance(line['image'], list)]
    assert n_images and set(n_images) == {2}           # a path where there is one
    chats[9]['conversations'][1]['value'] = 'rewritten'
    write()
    code, _ = run_here(*command, '--resume=True')
    one_line(code, 'split.json was chosen from other data', "number 9, '000000033471#10'")


# -----------------------------------------------------------------------------
# samplers and the loader


def test_the_order_is_another_permutation_in_each_epoch_and_for_each_seed():
    orders = [[shuffled_index(50, k, seed) for k in range(epoch * 50, epoch * 50 + 50)]
              for seed in (1, 2) for epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(50))] * 4
    assert len(set(map(tuple, orders))) == 4
    assert [shuffled_index(50, k, 1) for k in range(50)] == orders[0]


def test_one_order_is_kept_for_each_of_many_tasks():
    orders = [data.epoch_order(40 + seed, 0, seed) for seed in range(30)]
    assert all(data.epoch_order(40 + seed, 0, seed) is order for seed, order in enumerate(orders))
    later = data.epoch_order(40, 1, 0)
    assert later is data.epoch_order(40, 1, 0) and later.tolist() != orders[0].tolist()
    assert data.epoch_order(40, 0, 0).tolist() == orders[0].tolist()               # drawn again, the same


SAMPLER = ShuffledSampler([example_of(str(k), f'{k}.png', 1 + k % 9) for k in range(37)], 16, seed=3)


def make_loader(folder, bad=(), limit=9):
    """Of pictures whose pixels are their number."""
    def read(path):
        number = path.split('.')[0]
        if number in bad:
            raise BadSample(f'{path}: not a whole image')
        return np.full((3, 2, 2), int(number), np.uint8)
    return Loader(image_reader(read), 2, BadSamples(folder / 'bad.jsonl', limit))


def test_a_step_has_the_same_examples_longest_first_for_any_number_of_ranks_and_any_micro_batch(tmp_path):
    loader = make_loader(tmp_path)
    for step in 0, 2:                                  # step 2 crosses from the first epoch into the second
        examples = SAMPLER.step(step)
        wanted = Counter(str(shuffled_index(37, k, 3)) for k in range(step * 16, step * 16 + 16))
        assert Counter(ids(examples)) == wanted
        assert [len(example) for example in examples] == sorted(map(len, examples), reverse=True)
        for world_size in 1, 2, 3, 4:
            for micro_batch_size in 1, 5, 99:
                batches = []
                for rank in range(world_size):
                    batches += loader.rank_batches(examples, micro_batch_size, rank, world_size=world_size)
                assert Counter(id for batch in batches for id in batch.ids) == wanted
                assert max(len(batch.ids) for batch in batches) <= micro_batch_size
                for batch in batches:                  # each example with its own picture
                    assert batch.images[:, 0, 0, 0].tolist() == [int(id) for id in batch.ids]


def real_lengths(stage, n, rng):
    """Tokens of examples as A1, A2 and B4 have them: captions, chats with an image, codes of an image or a clip."""
    if stage == 'a1':
        return 68 + rng.lognormal(2.7, 0.45, n).clip(4, 60)
    if stage == 'a2':
        n_turns = rng.choice([1, 2, 3, 4, 5], n, p=[0.6, 0.05, 0.1, 0.15, 0.1])
        return 75 + n_turns * (25 + rng.lognormal(4.2, 0.7, n).clip(1, 400))
    text = rng.lognormal(5.5, 0.8, n).clip(20, 2048)
    codes = rng.choice([579, 1503, 0], n, p=[0.5, 0.4, 0.1])
    return np.where(codes == 0, text, codes + rng.integers(8, 60, n))


@pytest.mark.parametrize('n_ranks', [2, 4, 8])
@pytest.mark.parametrize('stage, global_batch_size', [('a1', 256), ('a2', 128), ('b4', 128)])
def test_the_busiest_rank_has_hardly_more_tokens_than_the_others(stage, global_batch_size, n_ranks):
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(30):
        lengths = real_lengths(stage, global_batch_size, rng).astype(int)
        longest_first = [np.empty(n) for n in sorted(lengths, reverse=True)]
        parts = data.deal(longest_first, n_ranks)
        tokens = [sum(len(example) for example in part) for part in parts]
        shares.append(np.mean(tokens) / max(tokens))
        assert sum(tokens) == lengths.sum() and sum(map(len, parts)) == global_batch_size
        assert all(part == sorted(part, key=len, reverse=True) for part in parts)
    assert min(shares) > 0.95 and np.mean(shares) > 0.98


def test_examples_are_dealt_to_the_part_that_has_the_fewest_tokens_and_one_part_has_them_as_they_came(tmp_path):
    examples = [np.empty(n) for n in (9, 7, 6, 5, 5, 1)]
    dealt = [[len(example) for example in part] for part in data.deal(examples, 2)]
    assert dealt == [[9, 5, 1], [7, 6, 5]]             # 9 | 7, 9 | 13, 14 | 13, 14 | 18, 15 | 18 tokens
    [everything] = data.deal(examples, 1)
    assert all(one is other for one, other in zip(everything, examples, strict=True))
    examples = SAMPLER.step(0)
    before = [ids(examples[k:k + 5]) for k in range(0, 16, 5)]     # one rank's micro-batches as they have always been
    loader = make_loader(tmp_path)
    assert [batch.ids for batch in loader.rank_batches(examples, 5, 0, world_size=1)] == before
    assert [len(part) for part in data.deal(examples[:3], 4)] == [1, 1, 1, 0]


def test_an_example_with_a_bad_picture_is_left_out_and_not_replaced(tmp_path):
    examples = SAMPLER.step(0)
    first, second, third, fourth = [ids(examples[k:k + 4]) for k in (0, 4, 8, 12)]
    bad = {first[1], *third}                           # one of the first micro-batch, all of the third
    loader = make_loader(tmp_path, bad=bad)
    for _ in range(2):                                 # met again: not noted again
        found = [batch.ids for batch in loader.rank_batches(examples, 4, 0, world_size=1)]
        assert found == [[first[0], *first[2:]], second, fourth]
    lines = [json.loads(line) for line in (tmp_path / 'bad.jsonl').read_text().splitlines()]
    assert sorted(line['id'] for line in lines) == sorted(bad)


def test_each_example_has_its_images_in_their_order_and_none_when_one_is_bad(tmp_path):
    examples = []
    for k, paths in enumerate([('1.png', '2.png'), (), ('3.png',), ('4.png', '5.png')]):
        starts = ints(*(1 + 3 * n for n in range(len(paths))))
        examples.append(Example(Item(str(k), paths, ()), np.arange(9, dtype=np.int32), ints(8), starts, False))
    batch = make_loader(tmp_path).collate(examples)
    assert batch.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert batch.image_positions.tolist() == [1, 2, 4, 5, 19, 20, 28, 29, 31, 32]      # of two tokens each
    batch = make_loader(tmp_path, bad={'5'}).collate(examples)
    assert batch.ids == ['0', '1', '2'] and batch.images[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert json.loads((tmp_path / 'bad.jsonl').read_text())['id'] == '3'


def test_a_bad_picture_above_the_limit_ends_the_run_from_the_thread_that_reads_ahead(tmp_path):
    loader = make_loader(tmp_path, bad={str(k) for k in range(37)}, limit=0)
    with pytest.raises(SystemExit) as e:
        next(loader.steps(SAMPLER, 0, 3, micro_batch_size=4, rank=0, world_size=1))
    one_line(e.value, 'not a whole image', 'max_bad_samples above 0')


def test_steps_gives_the_batches_of_each_step_in_order(tmp_path):
    loader = make_loader(tmp_path)
    ahead = list(loader.steps(SAMPLER, 1, 5, micro_batch_size=5, rank=1, world_size=2))
    assert len(ahead) == 4 and list(loader.steps(SAMPLER, 5, 5, micro_batch_size=5, rank=1, world_size=2)) == []
    for step, batches in zip(range(1, 5), ahead):
        for one, other in zip(batches, loader.rank_batches(SAMPLER.step(step), 5, 1, world_size=2), strict=True):
            assert one.ids == other.ids
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.images, other.images)


def test_a_cache_takes_the_place_of_the_files_and_names_what_it_lacks():
    get_image = image_reader(None, {'0.png': 'features'})
    assert get_image('0.png') == 'features'
    with pytest.raises(BadSample, match='1.png: no such image'):
        get_image('1.png')


# -----------------------------------------------------------------------------
# batches


def test_examples_are_laid_out_a_group_at_a_time_each_counting_its_own_tokens():
    first, second = padded_layout([3, 2, 2], groups=[2, 1])
    assert [index.tolist() for index in first] == [[[0, 1, 2], [3, 4, 0]], [0, 1, 2, 3, 4]]
    assert [index.tolist() for index in second] == [[[0, 1]], [0, 1]]
    [(pad_index, unpad_index)] = padded_layout([3, 5], groups=[2])
    assert pad_index.tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 6, 7]]            # filled up with token 0
    assert unpad_index.tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
    assert pad_index.flatten()[unpad_index].tolist() == list(range(8))


@pytest.mark.parametrize('lengths, groups', [
    ([10] * 40, [16, 16, 8]),
    ([10, 9, 9, 8], [4]),                              # 4 x 100 for 326: 1.23 of what is real
    ([10, 8, 7, 7], [2, 2]),                           # 3 x 100 for 213 would be 1.41
    ([2000, 200, 190, 20], [1, 2, 1]), ([5], [1])])
def test_a_group_ends_where_filling_it_up_would_cost_a_quarter_more(lengths, groups):
    assert attention_groups(lengths) == groups


def ints(*values):
    return np.array(values, np.int32)


WITH_IMAGE = Example(Item('i', ('i.png',), ()), ints(20, 21, 22, 23, 24), ints(3, 4), ints(1), False)
TEXT_ONLY = Example(Item('t', (), ()), ints(30, 31, 32), ints(2), ints(), False)


def test_two_short_examples_are_laid_end_to_end():
    batch = collate([TEXT_ONLY, WITH_IMAGE], [[], [np.ones((3, 2, 2), np.uint8)]], num_image_tokens=2)
    assert batch.input_ids.tolist() == [30, 31, 32, 20, 21, 22, 23, 24]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert [pad_index.tolist() for pad_index, _ in batch.layout] == [[[0, 1, 2]], [[0, 1, 2, 3, 4]]]
    assert batch.image_positions.tolist() == [4, 5]
    assert batch.logit_positions.tolist() == [1, 5, 6]                         # the position before each label
    assert batch.labels.tolist() == [32, 23, 24]
    assert batch.label_examples.tolist() == [0, 1, 1]
    assert (batch.n_labels, batch.ids, tuple(batch.images.shape)) == (3, ['t', 'i'], (1, 3, 2, 2))
    assert batch.label_ranges == []                    # Track A has none
    assert batch.to('meta').labels.device.type == batch.to('meta').layout[0][0].device.type == 'meta'
