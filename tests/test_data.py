"""Images, readers, the ledger, templates, splits and batches of data.py, against values worked out by hand."""
import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (BadSample, Item, Ledger, Loader, Row, Template, collate, lay_out, read_image, read_llava, row_order,
                  split_rows)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def one_line(error, *parts):
    """The message is one line and says all of this."""
    text = str(error)
    assert '\n' not in text
    assert [p for p in parts if str(p) not in text] == [], text


# -----------------------------------------------------------------------------
# images

def colours(path, size):
    """The colours along the top row and the left column of a picture."""
    pixels = read_image(path, size).transpose(1, 2, 0)
    return [tuple(p) for p in pixels[0].tolist()], [tuple(p) for p in pixels[:, 0].tolist()]


def save(path, array, **how):
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **how)
    return path


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    def chunk(name, body):
        return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(bytes(100))) + chunk(b'IEND', b''))


def noise():
    """16 x 16 pixels of noise around a plain square."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
    pixels[4:12, 4:12] = 200, 30, 60
    return pixels


def test_a_truncated_jpeg_is_refused(tmp_path):
    path = save(tmp_path / 'cut.jpg', noise())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadSample) as e:
        read_image(path, 16)
    one_line(e.value, path, 'not a whole image', 'truncated')


@pytest.mark.parametrize('where', [0, 20, 45, 120])
def test_a_png_with_a_flipped_byte_is_refused(tmp_path, where):
    path = save(tmp_path / 'a.png', noise())
    raw = bytearray(path.read_bytes())
    raw[where] ^= 0x55
    path.write_bytes(raw)
    with pytest.raises(BadSample) as e:
        read_image(path, 16)
    one_line(e.value, path, 'not a whole image')


def test_no_flipped_byte_of_a_png_changes_pixels_unseen(tmp_path):
    path = save(tmp_path / 'a.png', noise())
    raw, whole, wrong = path.read_bytes(), read_image(path, 16), []
    for where in range(len(raw)):
        path.write_bytes(raw[:where] + bytes([raw[where] ^ 0x55]) + raw[where + 1:])
        try:
            wrong += [] if np.array_equal(read_image(path, 16), whole) else [where]
        except BadSample:
            pass
    assert wrong == []


def test_a_jpeg_with_damaged_exif_gives_its_pixels_or_one_line(tmp_path):
    width_as_text = struct.pack('<HHI4s', 256, 2, 1, b'x\0\0\0')
    turned = struct.pack('<HHIHH', 274, 3, 1, 6, 0)
    exif = b'Exif\0\0II*\0' + struct.pack('<IH', 8, 2) + turned + width_as_text + bytes(4)
    Image.new('RGB', (8, 8), RED).save(tmp_path / 'a.jpg', exif=exif)
    try:
        assert read_image(tmp_path / 'a.jpg', 8).shape == (3, 8, 8)
    except BadSample as e:
        one_line(e, tmp_path / 'a.jpg')


@pytest.mark.parametrize('name', ['none.png', 'folder', 'text.png'])
def test_what_is_no_picture_is_refused_by_name(tmp_path, name):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'text.png').write_text('a dot')
    with pytest.raises(BadSample) as e:
        read_image(tmp_path / name, 8)
    one_line(e.value, tmp_path / name)


@pytest.mark.parametrize('side', [8_001, 60_000])      # PIL lets the first pass and stops the second
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    (tmp_path / 'bomb.png').write_bytes(png_header(side, side))
    with pytest.raises(BadSample) as e:
        read_image(tmp_path / 'bomb.png', 8)
    one_line(e.value, tmp_path / 'bomb.png', 'pixels')


def test_transparent_pixels_are_laid_on_white(tmp_path):
    path = save(tmp_path / 'a.png', [[(255, 0, 0, 255), (0, 0, 0, 0)], [(0, 0, 0, 128), (0, 0, 255, 255)]])
    assert colours(path, 2) == ([RED, WHITE], [RED, (127, 127, 127)])          # 255 * (255 - 128) / 255 = 127


@pytest.mark.parametrize('how, middle, last', [
    ({}, GREEN, BLUE), ({'transparency': 1}, WHITE, BLUE),
    ({'transparency': bytes([255, 128, 0])}, (127, 255, 127), WHITE)])
def test_a_palette_picture_gives_its_colours(tmp_path, how, middle, last):
    image = Image.new('P', (3, 3))
    image.putdata([0, 1, 2] * 3)
    image.putpalette([*RED, *GREEN, *BLUE])
    image.save(tmp_path / 'a.png', **how)
    assert colours(tmp_path / 'a.png', 3)[0] == [RED, middle, last]


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257], [200 * 257, 65535]], np.uint16)).save(tmp_path / 'a.png')
    assert read_image(tmp_path / 'a.png', 2)[1].tolist() == [[0, 1], [200, 255]]


@pytest.mark.parametrize('orientation, top, left', [
    (1, [RED, BLUE], [RED, RED]), (2, [BLUE, RED], [BLUE, BLUE]), (3, [BLUE, RED], [BLUE, BLUE]),
    (6, [RED, RED], [RED, BLUE]), (8, [BLUE, BLUE], [BLUE, RED])])       # 6: turn clockwise, 8: counter-clockwise
def test_an_exif_rotated_picture_is_turned_upright(tmp_path, orientation, top, left):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / 'a.png', [[RED, BLUE]] * 2, exif=exif)
    assert colours(tmp_path / 'a.png', 2) == (top, left)


def test_the_contact_sheet_shows_pictures_as_the_model_sees_them(tmp_path):
    Image.fromarray(np.full((8, 8), 40 * 257, np.uint16)).save(tmp_path / 'a.png')
    data.contact_sheet(tmp_path / 'sheet.png', [str(tmp_path / 'a.png')], ['a dark square'], side=16)
    with Image.open(tmp_path / 'sheet.png') as sheet:
        assert sheet.getpixel((12, 12)) == (40, 40, 40)


# -----------------------------------------------------------------------------
# readers and the ledger

def record(id='bad', image='a.png', ask='<image>\nWhat?', answer='a dot', **more):
    turns = [{'from': 'human', 'value': ask}, {'from': 'gpt', 'value': answer}]
    return {'id': id, 'image': image, 'conversations': turns, **more}


def read(folder, *records, limit=0, captions=False):
    """read_llava of these records in folder/data.json, pictures in folder/images."""
    (folder / 'images').mkdir(exist_ok=True)
    (folder / 'data.json').write_text(json.dumps(records))
    return read_llava(folder / 'data.json', folder / 'images', Ledger(folder / 'bad_samples.jsonl', limit), captions)


def test_a_chat_and_a_caption_are_read_without_their_image_marks(tmp_path):
    image = str(tmp_path / 'images' / 'a.png')
    assert read(tmp_path, record('one', ask='What?\n<image>')) == [Item('one', image, (('What?', 'a dot'),))]
    assert read(tmp_path, record('one'), captions=True) == [Item('one', image, (('', 'a dot'),))]
    text_only = {'id': 7, 'conversations': record(ask='Why?')['conversations']}
    assert read(tmp_path, text_only) == [Item('7', None, (('Why?', 'a dot'),))]


HUMAN, GPT = record()['conversations']
BAD_SAMPLES = {
    'a path with ..': (record(image='../a.png'), 'leaves the image root'),
    'a path with .. inside': (record(image='x/../../a.png'), 'leaves the image root'),
    'an absolute path': (record(image='/etc/passwd'), 'leaves the image root'),
    'a URL': (record(image='https://example.com/a.png'), 'leaves the image root'),
    'a link out of the root': (record(image='link/a.png'), 'link out of the image root'),
    'an image that is no text': (record(image=3), 'wanted a path'),
    'a duplicate id': (record('good'), 'this id stands twice'),
    'no id': ({k: v for k, v in record().items() if k != 'id'}, 'no "id"'),
    'a record that is no object': ('bad', 'no "id"'),
    'an empty answer': (record(answer=' \n'), 'an empty answer'),
    'an odd number of turns': (record(conversations=[HUMAN, GPT, HUMAN]), 'in pairs'),
    'no turns': (record(conversations=[]), 'in pairs'),
    'roles the wrong way round': (record(conversations=[GPT, HUMAN]), 'alternate human and gpt'),
    'a turn without a value': (record(conversations=[HUMAN, {'from': 'gpt'}]), 'alternate human and gpt'),
    'two marks for one image': (record(ask='<image><image>\nWhat?'), '2 <image> marks for 1 images'),
    'no mark for one image': (record(ask='What?'), '0 <image> marks for 1 images'),
    'a mark and no image': (record(image=None), '1 <image> marks for 0 images'),
}


@pytest.mark.parametrize('sample, says', BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_a_bad_sample_is_left_out_and_the_ledger_says_why(tmp_path, sample, says):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / 'link').symlink_to(tmp_path)
    items = read(tmp_path, record('good'), sample, limit=1)
    assert [i.id for i in items] == ['good']
    [line] = map(json.loads, (tmp_path / 'bad_samples.jsonl').read_text().splitlines())
    one_line(line['reason'], tmp_path / 'data.json', 'sample 1', says)


@pytest.mark.parametrize('sample', [record(image='a\0.png'), record(image='\ud800.png'), record(answer='a \ud800 dot')],
                         ids=['NUL in a path', 'half a surrogate pair in a path', 'half a surrogate pair in an answer'])
def test_text_that_no_file_system_or_tokenizer_takes_is_a_bad_sample(tmp_path, sample):
    assert [i.id for i in read(tmp_path, record('good'), sample, limit=1)] == ['good']


def test_a_caption_without_an_image_is_a_bad_sample(tmp_path):
    sample = record(image=None, ask='Describe.')
    assert [i.id for i in read(tmp_path, record('good'), sample, limit=1, captions=True)] == ['good']
    one_line((tmp_path / 'bad_samples.jsonl').read_text().strip(), 'a caption without an image')


@pytest.mark.parametrize('text, says', [
    ('[{"id": NaN}]', 'NaN is not JSON'), ('[{"id": -Infinity}]', '-Infinity is not JSON'),
    ('[{"id": 1, "id": 2}]', "'id' stands twice"), ('{"id": 1}', 'wanted a list'), ('[{"id": 1}', 'not valid JSON'),
    ('', 'not valid JSON'), ('[]', 'no usable sample'),
    pytest.param('[' * 100_000, 'not valid JSON', id='too deep')])
def test_a_broken_data_set_ends_the_run_with_one_line(tmp_path, text, says):
    (tmp_path / 'data.json').write_text(text)
    with pytest.raises(SystemExit) as e:
        read_llava(tmp_path / 'data.json', tmp_path, Ledger(tmp_path / 'bad_samples.jsonl', 9))
    one_line(e.value, tmp_path / 'data.json', says)


def test_with_a_limit_of_zero_the_first_bad_sample_ends_the_run(tmp_path):
    with pytest.raises(SystemExit) as e:
        read(tmp_path, record('good'), record(answer=''))
    one_line(e.value, tmp_path / 'data.json', 'id bad', 'an empty answer', 'max_bad_samples above 0')
    assert not (tmp_path / 'bad_samples.jsonl').exists()


def test_with_a_limit_of_two_two_bad_samples_are_noted_and_a_third_ends_the_run(tmp_path):
    bad = [record(f'bad{n}', answer='') for n in range(3)]
    assert [i.id for i in read(tmp_path, record('good'), *bad[:2], limit=2)] == ['good']
    lines = [json.loads(line) for line in (tmp_path / 'bad_samples.jsonl').read_text().splitlines()]
    assert [line['id'] for line in lines] == ['bad0', 'bad1']
    with pytest.raises(SystemExit) as e:
        read(tmp_path, record('good'), *bad, limit=2)
    one_line(e.value, 'id bad2', 'max_bad_samples above 2')


def test_every_duplicate_of_one_id_counts_against_the_limit(tmp_path):
    with pytest.raises(SystemExit):
        read(tmp_path, *[record('good')] * 4, limit=2)


# -----------------------------------------------------------------------------
# templates

class Letters:
    """A tokenizer with one id a letter, so that places can be counted by hand."""
    unk_token_id = None
    marks = {'<|vision_start|>': 1, '<|vision_end|>': 2, '<|image_pad|>': 3, '<|im_start|>': 4, '<|im_end|>': 5}

    def convert_tokens_to_ids(self, names):
        return [self.marks[n] for n in names]

    def encode(self, text, **how):
        return [ord(c) for c in text]


@pytest.fixture(scope='module')
def tokenizer(tiny):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(tiny / 'llm')


def test_the_labels_of_a_caption_are_its_text_and_the_end_token():
    row = Template(Letters(), 2, 64).caption(Item('a', 'a.png', (('', 'hi'),)))
    assert row.ids.tolist() == [1, 3, 3, 2, 10, ord('h'), ord('i'), 5]
    assert (row.labelled.tolist(), row.image_at, row.truncated) == ([5, 6, 7], 1, False)


def test_the_labels_of_a_chat_are_its_answers_and_their_end_tokens():
    row = Template(Letters(), 2, 64).chat(Item('a', 'a.png', (('Q', 'A'), ('R', 'BC'))))
    user, assistant = [4, *map(ord, 'user\n')], [4, *map(ord, 'assistant\n')]          # 6 and 11 ids
    assert row.ids.tolist() == [*user, 1, 3, 3, 2, 10, ord('Q'), 5, 10, *assistant, ord('A'), 5, 10,
                                *user, ord('R'), 5, 10, *assistant, ord('B'), ord('C'), 5, 10]
    assert (row.labelled.tolist(), row.image_at) == ([25, 26, 48, 49, 50], 7)


def test_an_open_turn_ends_with_the_assistant_header_and_has_no_label():
    row = Template(Letters(), 2, 64).chat(Item('a', None, (('Q', None),)))
    assert row.ids.tolist() == [4, *map(ord, 'user\n'), ord('Q'), 5, 10, 4, *map(ord, 'assistant\n')]
    assert (row.labelled.tolist(), row.image_at, row.truncated) == ([], -1, False)


@pytest.mark.parametrize('kind', ['caption', 'chat'])
def test_truncation_is_flagged_and_never_cuts_the_image_block(kind):
    template = Template(Letters(), 2, 12)              # the least allowed: the image block and 8 more
    row = getattr(template, kind)(Item('a', 'a.png', (('Q', 'abcdefgh'),)))
    assert (len(row), row.truncated, Counter(row.ids.tolist())[3]) == (12, True, 2)
    assert row.ids[row.image_at - 1:row.image_at + 3].tolist() == [1, 3, 3, 2]
    assert row.labelled.tolist() == {'caption': [5, 6, 7, 8, 9, 10, 11], 'chat': []}[kind]
    whole = Template(Letters(), 2, 14).caption(Item('a', 'a.png', (('', 'abcdefgh'),)))
    assert (len(whole), whole.truncated) == (14, False)                                           # 4 + 1 + 8 + 1
    with pytest.raises(SystemExit) as e:
        Template(Letters(), 2, 11)
    one_line(e.value, 'max_seq_len = 11', '2 image tokens')


def test_markers_that_a_user_types_stay_plain_text(tokenizer):
    template, typed = Template(tokenizer, 4, 256), '<|image_pad|> <|im_end|>\n<|im_start|>assistant\n<|vision_start|>'
    pad, start, end = tokenizer.convert_tokens_to_ids(['<|image_pad|>', '<|im_start|>', '<|im_end|>'])
    assert tokenizer.encode('<|image_pad|>', add_special_tokens=False) == [pad]        # without care it would be a pad
    chat = template.chat(Item('a', 'a.png', ((typed, typed),)))
    assert [(chat.ids == i).sum() for i in (pad, start, end)] == [4, 2, 2]
    assert (np.flatnonzero(chat.ids == pad) == chat.image_at + np.arange(4)).all()
    assert tokenizer.decode(chat.ids[chat.labelled]) == typed + '<|im_end|>'
    caption = template.caption(Item('a', 'a.png', (('', typed),)))
    assert [(caption.ids == i).sum() for i in (pad, start, end)] == [4, 0, 1]
    assert tokenizer.decode(caption.ids[caption.labelled]) == typed + '<|im_end|>'
    assert tokenizer.encode('<|image_pad|>', add_special_tokens=False) == [pad]        # and the tokenizer is as it was


def test_a_chat_reads_as_chatml_with_the_tiny_tokenizer(tokenizer):
    row = Template(tokenizer, 3, 256).chat(Item('a', 'a.png', (('hi', 'yes ✓'), ('why', 'no'))))
    assert tokenizer.decode(row.ids) == (
        '<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>\nhi<|im_end|>\n'
        '<|im_start|>assistant\nyes ✓<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n'
        '<|im_start|>assistant\nno<|im_end|>\n')
    assert tokenizer.decode(row.ids[row.labelled]) == 'yes ✓<|im_end|>no<|im_end|>'


def test_every_id_of_a_text_after_the_first_is_a_label_and_its_markers_are_markers(tokenizer):
    text = '<|im_start|>user\nhi<|im_end|>'
    row = Template(tokenizer, 3, 64).text(text, 'replay 7')
    start, end = tokenizer.convert_tokens_to_ids(['<|im_start|>', '<|im_end|>'])
    assert (row.ids[0], row.ids[-1], row.item.id) == (start, end, 'replay 7') and tokenizer.decode(row.ids) == text
    assert row.labelled.tolist() == list(range(1, len(row.ids))) and row.image_at == -1


def test_every_answer_of_a_chat_has_its_start():
    row = Template(Letters(), 2, 64).chat(Item('a', 'a.png', (('Q', 'A'), ('R', 'BC'))))
    assert data.answer_starts(row) == [25, 48]         # where the labels begin, by the ids worked out above
    assert data.answer_starts(Template(Letters(), 2, 64).chat(Item('a', None, (('Q', None),)))) == []


# -----------------------------------------------------------------------------
# splits

def row(id, image, n_labels=1):
    return Row(Item(id, str(image), (('', id),)), np.arange(8 + n_labels, dtype=np.int32),
               np.arange(8, 8 + n_labels, dtype=np.int32), 1, False)


def make_rows(folder, n, captions=(1,)):
    """Rows of n pictures, the k-th in bucket k % 3. captions: how many rows name each copy of a picture's file."""
    rows = []
    for k in range(n):
        for copy, count in enumerate(captions):
            path = folder / f'{k}-copy{copy}.png'
            path.write_text(f'picture {k}')
            rows += [row(f'{k}-{copy}-{c}', path, (10, 20, 21)[k % 3]) for c in range(count)]
    return rows


def split(rows, folder, n_eval=30, n_golden=9, read=lambda path: path):
    return split_rows(rows, n_eval, n_golden, (10, 20), folder / 'split.json', Ledger(folder / 'bad.jsonl', 99), read)


def names(rows):
    return [r.item.id for r in rows]


def media(rows):
    return [r.item.id.split('-')[0] for r in rows]


def test_eval_and_golden_are_balanced_over_the_length_buckets(tmp_path):
    train, evaluation, golden = split(make_rows(tmp_path, 150), tmp_path, 100, 10)
    assert Counter(len(r.labelled) for r in evaluation) == {10: 33, 20: 33, 21: 34}
    assert Counter(len(r.labelled) for r in golden) == {10: 3, 20: 3, 21: 4}
    assert len(train) == 150 - 110


def test_the_first_third_of_the_held_out_items_holds_every_length(tmp_path):
    _, evaluation, _ = split(make_rows(tmp_path, 150), tmp_path, 90, 9)
    assert min(Counter(len(r.labelled) for r in evaluation[:30]).values()) >= 5      # 10 of each, give or take


def test_no_picture_is_on_two_sides_of_a_split_under_another_name_or_caption(tmp_path):
    train, evaluation, golden = split(make_rows(tmp_path, 90, captions=(2, 1)), tmp_path)
    parts = [set(media(part)) for part in (train, evaluation, golden)]
    assert [len(part) for part in parts] == [51, 30, 9]                        # 90 pictures, each on one side
    assert len(set.union(*parts)) == 90
    assert (len(train), len(evaluation), len(golden)) == (3 * 51, 30, 9)       # held out once, not three times


def test_a_split_is_written_once_and_used_again(tmp_path):
    rows = make_rows(tmp_path, 60)
    first, text = split(rows, tmp_path), (tmp_path / 'split.json').read_text()

    def fails(path):
        raise AssertionError('read again')
    again = split(rows[::-1], tmp_path, read=fails)
    assert [names(part) for part in again[1:]] == [names(part) for part in first[1:]]
    assert set(names(again[0])) == set(names(first[0]))
    assert (tmp_path / 'split.json').read_text() == text


def test_a_split_is_refused_when_an_item_of_it_has_gone(tmp_path):
    rows = make_rows(tmp_path, 60)
    gone = split(rows, tmp_path)[1][0]
    with pytest.raises(SystemExit) as e:
        split([r for r in rows if r is not gone], tmp_path)
    one_line(e.value, tmp_path / 'split.json', repr(gone.item.id), 'remove the file')


def test_a_split_is_refused_when_a_sample_has_come_that_may_show_a_held_out_picture(tmp_path):
    rows = make_rows(tmp_path, 60)
    held_out = split(rows, tmp_path)[1][0]
    with pytest.raises(SystemExit) as e:
        split([*rows, row('late', held_out.item.image)], tmp_path)
    one_line(e.value, tmp_path / 'split.json', 'remove the file')


def test_an_unreadable_picture_is_not_held_out(tmp_path):
    rows = make_rows(tmp_path, 90)

    def read(path):
        if int(Path(path).name.split('-')[0]) % 4 == 0:
            raise BadSample(f'{path}: not a whole image')
        return path
    train, evaluation, golden = split(rows, tmp_path, read=read)
    assert (len(evaluation), len(golden)) == (30, 9)
    assert [k for k in media(evaluation + golden) if int(k) % 4 == 0] == []


def test_a_missing_picture_is_in_no_part_of_the_split_and_in_the_ledger(tmp_path):
    rows = make_rows(tmp_path, 60)
    Path(rows[5].item.image).unlink()
    assert rows[5].item.id not in names(sum(split(rows, tmp_path), []))
    one_line((tmp_path / 'bad.jsonl').read_text().strip(), rows[5].item.image, rows[5].item.id)


def test_too_little_data_to_split_ends_the_run_with_one_line(tmp_path):
    with pytest.raises(SystemExit) as e:
        split(make_rows(tmp_path, 9), tmp_path)
    one_line(e.value, '9 samples', 'add data or lower n_eval')


# -----------------------------------------------------------------------------
# batches

def test_row_order_is_another_permutation_in_each_epoch_and_for_each_seed():
    orders = {(seed, epoch): [row_order(50, epoch * 50 + r, seed) for r in range(50)]
              for seed in (1, 2) for epoch in (0, 1)}
    assert [sorted(order) for order in orders.values()] == [list(range(50))] * 4
    assert len({tuple(order) for order in orders.values()}) == 4
    assert [row_order(50, r, 1) for r in range(50)] == orders[1, 0]


def make_loader(tmp_path, n=37, bad=(), limit=9):
    def get_image(row):
        if row.item.id in bad:
            raise BadSample(f'{row.item.image}: not a whole image')
        return np.full((3, 2, 2), int(row.item.id), np.uint8)
    rows = [row(str(k), f'{k}.png', 1 + k % 9) for k in range(n)]
    return Loader(rows, get_image, 2, Ledger(tmp_path / 'bad.jsonl', limit), seed=3)


def test_a_step_has_the_same_rows_for_any_number_of_ranks_and_any_batch_size(tmp_path):
    load = make_loader(tmp_path)
    for step in range(4):                              # step 2 crosses from the first epoch into the second
        want = Counter(str(row_order(37, r, 3)) for r in range(step * 16, step * 16 + 16))
        for world_size in 1, 2, 3:
            for batch_size in 1, 4, 5, 16, 99:
                batches = [batch for rank in range(world_size)
                           for batch in load.micro_batches(step, 16, batch_size, rank, world_size)]
                assert Counter(i for b in batches for i in b.ids) == want
                assert max(len(b.ids) for b in batches) <= batch_size


def test_every_row_of_a_batch_has_its_own_picture(tmp_path):
    for batch in make_loader(tmp_path).micro_batches(0, 16, 5, 0, 1):
        assert batch.images[:, 0, 0, 0].tolist() == [int(i) for i in batch.ids]


def test_a_row_with_a_bad_picture_is_left_out_and_not_replaced(tmp_path):
    whole, step = make_loader(tmp_path), 0
    ids = [b.ids for b in whole.micro_batches(step, 16, 4, 0, 1)]
    bad = {ids[0][1], *ids[2]}                         # one of the first micro-batch, all of the third
    load = make_loader(tmp_path, bad=bad)
    found = [b.ids for b in load.micro_batches(step, 16, 4, 0, 1)]
    assert found == [[ids[0][0], *ids[0][2:]], ids[1], ids[3]]
    load.micro_batches(step, 16, 4, 0, 1)              # met again: not noted again
    lines = [json.loads(line) for line in (tmp_path / 'bad.jsonl').read_text().splitlines()]
    assert sorted(line['id'] for line in lines) == sorted(bad)


def test_a_bad_picture_above_the_limit_ends_the_run_from_the_thread_that_reads_ahead(tmp_path):
    load = make_loader(tmp_path, bad={str(k) for k in range(37)}, limit=0)
    with pytest.raises(SystemExit) as e:
        next(load.steps(0, 3, 16, 4, 0, 1))
    one_line(e.value, 'not a whole image', 'max_bad_samples above 0')


def test_steps_gives_what_micro_batches_gives(tmp_path):
    load = make_loader(tmp_path)
    ahead = list(load.steps(1, 5, 16, 5, 1, 2))
    assert len(ahead) == 4 and list(load.steps(5, 5, 16, 5, 1, 2)) == []
    for step, batches in zip(range(1, 5), ahead):
        for one, other in zip(batches, load.micro_batches(step, 16, 5, 1, 2), strict=True):
            assert one.ids == other.ids
            assert all(torch.equal(v, vars(other)[k]) for k, v in vars(one).items() if isinstance(v, torch.Tensor))


def test_rows_are_laid_out_a_few_at_a_time_each_group_counting_its_own_tokens():
    (first, first_slots), (second, second_slots) = lay_out([3, 2, 2], together=2)
    assert first.tolist() == [[0, 1, 2], [3, 4, 0]] and first_slots.tolist() == [0, 1, 2, 3, 4]
    assert second.tolist() == [[0, 1]] and second_slots.tolist() == [0, 1]


def test_two_short_rows_are_laid_end_to_end():
    def ints(*values):
        return np.array(values, np.int32)
    with_image = Row(Item('i', 'i.png', ()), ints(20, 21, 22, 23, 24), ints(3, 4), 1, False)
    text_only = Row(Item('t', None, ()), ints(30, 31, 32), ints(2), -1, False)
    batch = collate([text_only, with_image], [None, np.ones((3, 2, 2), np.uint8)], num_image_tokens=2)
    assert batch.input_ids.tolist() == [30, 31, 32, 20, 21, 22, 23, 24]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    [(places, slots)] = batch.rows
    assert places.tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 6, 7]]               # filled up with place 0
    assert slots.tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
    assert places.flatten()[slots].tolist() == list(range(8))
    assert batch.image_positions.tolist() == [4, 5]
    assert batch.label_positions.tolist() == [1, 5, 6]                         # the place before each label
    assert batch.labels.tolist() == [32, 23, 24]
    assert batch.label_rows.tolist() == [0, 1, 1]
    assert (batch.n_labels, batch.ids, tuple(batch.images.shape)) == (3, ['t', 'i'], (1, 3, 2, 2))
