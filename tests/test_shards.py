"""Tokenized shards: what is written is what is read, damage is refused, rows and batches are as worked out by hand."""
import json
import resource

import numpy as np
import pytest
import torch
from test_data import one_line
from test_uti import AUDIO, BASE, IMAGE, SPACE

from data import (
    Item, Ledger, Loader, Record, Row, collate, load_shard, read_index, read_sealed, read_shards, token_row,
    write_sealed, write_shard)
from uti import Grammar, TokenSpace

GRAMMAR = Grammar(SPACE)
PICTURE, CLIP = [104, 105, 106, 119], [120, 128, 127, 135]


def make_folder(folder, space=SPACE):
    """Two shards: a picture with two captions and a clip with one to train on, a picture in eval."""
    train = write_shard(folder, 'train-00000', space, [('p1', 'image', PICTURE), ('c1', 'audio', CLIP)],
                        [('a', 0, [7, 8]), ('b', 0, [9]), ('c', 1, [1, 2, 3])])
    held = write_shard(folder, 'eval-00000', space, [('p2', 'image', PICTURE[::-1])], [('d', 0, [4])])
    write_sealed(folder / 'index.json', {'token_space': space.sha256, 'splits': {
        split: {'shards': [{'name': s['name'], 'sha256': s['shard_sha256']} for s in shards]}
        for split, shards in (('train', [train]), ('eval', [held]), ('golden', []))}})
    space.save(folder / 'token_space.json')
    return folder


def plain(records):
    return [(r.id, r.modality, r.payload.tolist(), r.text.tolist(), r.media) for r in records]


def test_what_was_written_is_read(tmp_path):
    make_folder(tmp_path)
    assert plain(read_shards(tmp_path, 'train', SPACE)) == [
        ('a', 'image', PICTURE, [7, 8], 'p1'), ('b', 'image', PICTURE, [9], 'p1'),
        ('c', 'audio', CLIP, [1, 2, 3], 'c1')]
    assert plain(read_shards(tmp_path, 'eval')) == [('d', 'image', PICTURE[::-1], [4], 'p2')]
    assert read_shards(tmp_path, 'golden') == []
    with pytest.raises(SystemExit, match="no split 'test': wanted one of train, eval, golden"):
        read_shards(tmp_path, 'test')


def test_the_tensors_of_a_shard_by_hand(tmp_path):
    make_folder(tmp_path)
    side = read_sealed(tmp_path / 'train-00000.json')
    tensors, _ = load_shard(tmp_path, 'train-00000', side['shard_sha256'], SPACE)
    assert {k: (v.dtype.name, v.tolist()) for k, v in tensors.items()} == {
        'ids': ('int32', [*PICTURE, *CLIP, 7, 8, 9, 1, 2, 3]), 'offsets': ('int64', [0, 4, 8, 10, 11, 14]),
        'kinds': ('uint8', [1, 2, 0, 0, 0]), 'items': ('int32', [[0, 2], [0, 3], [1, 4]])}
    assert side == {'name': 'train-00000', 'shard_sha256': side['shard_sha256'], 'token_space': SPACE.sha256, 'ids': 14,
                    'bytes': (tmp_path / 'train-00000.safetensors').stat().st_size, 'media': ['p1', 'c1'],
                    'items': ['a', 'b', 'c']}


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for name in 'one', 'two':
        (tmp_path / name).mkdir()
        make_folder(tmp_path / name)
    files = sorted(p.name for p in (tmp_path / 'one').iterdir())
    assert len(files) == 6
    assert all((tmp_path / 'one' / f).read_bytes() == (tmp_path / 'two' / f).read_bytes() for f in files)


def test_an_empty_shard_is_a_shard(tmp_path):
    side = write_shard(tmp_path, 'x', SPACE, [], [])
    tensors, _ = load_shard(tmp_path, 'x', side['shard_sha256'], SPACE)
    assert [tensors[k].shape for k in ('ids', 'offsets', 'kinds', 'items')] == [(0,), (1,), (0,), (0, 2)]


@pytest.mark.parametrize('name', ['train-00000.safetensors', 'train-00000.json', 'index.json', 'token_space.json'])
@pytest.mark.parametrize('where', [0.02, 0.5, 0.98])
def test_a_flipped_bit_anywhere_is_refused_with_one_line(tmp_path, name, where):
    path = make_folder(tmp_path) / name
    body = bytearray(path.read_bytes())
    body[int(where * len(body))] ^= 1
    path.write_bytes(bytes(body))
    with pytest.raises(SystemExit) as e:
        read_shards(tmp_path, 'train')
    one_line(e.value, name)


@pytest.mark.parametrize('name', ['train-00000.safetensors', 'train-00000.json', 'index.json', 'token_space.json'])
def test_a_missing_or_cut_file_is_refused_with_one_line(tmp_path, name):
    path = make_folder(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SystemExit) as e:
        read_shards(tmp_path, 'train')
    one_line(e.value, name)
    path.unlink()
    with pytest.raises(SystemExit) as e:
        read_shards(tmp_path, 'train')
    one_line(e.value, name, 'No such file')


def test_a_full_disk_gets_one_line_and_leaves_no_half_of_a_shard(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(SystemExit) as e:
            write_shard(tmp_path, 'x', SPACE, [('p', 'image', np.zeros(1000, np.int32))], [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(e.value, f'{tmp_path}/x.safetensors: cannot write here, is the disk full? ([Errno 27] File '
             'too large); mend that and start again, the finished shards are kept')
    assert not list(tmp_path.glob('x.safetensors')) and not list(tmp_path.glob('x.json'))


def test_two_shards_that_changed_places_are_refused(tmp_path):
    make_folder(tmp_path)
    for end in 'safetensors', 'json':
        a, b = tmp_path / f'train-00000.{end}', tmp_path / f'eval-00000.{end}'
        mine, theirs = a.read_bytes(), b.read_bytes()
        a.write_bytes(theirs), b.write_bytes(mine)
    with pytest.raises(SystemExit, match='train-00000.safetensors: sha256 .* damaged or exchanged'):
        read_shards(tmp_path, 'train')


def test_another_token_space_is_refused_by_name(tmp_path):
    other = TokenSpace(BASE, {**IMAGE, 'sha256': 'xx'}, AUDIO)
    with pytest.raises(SystemExit, match="has another token space: image.sha256 is 'cd' there and 'xx' here"):
        read_shards(make_folder(tmp_path), 'train', other)
    other.save(tmp_path / 'token_space.json')          # a file that was put there afterwards
    with pytest.raises(SystemExit, match='index.json and token_space.json are not of one build'):
        read_shards(tmp_path, 'train')
    shard = read_index(make_folder(tmp_path))[0]['splits']['train']['shards'][0]
    with pytest.raises(SystemExit, match='train-00000.safetensors: made for token space'):
        load_shard(tmp_path, shard['name'], shard['sha256'], other)


# -----------------------------------------------------------------------------
# rows

def record(payload=PICTURE, text=(7, 8), modality='image', id='a'):
    return Record(id, modality, np.array(payload, np.int32), np.array(text, np.int32), 'p1')


@pytest.mark.parametrize('task, ids, labelled, ranges', [
    ('i2t', [100, *PICTURE, 101, 7, 8, 99], [6, 7, 8], [0, 0, 0]),
    ('t2i', [7, 8, 100, *PICTURE, 101], [3, 4, 5, 6, 7], [2, 2, 2, 2, 1]),
    ('text', [7, 8, 99], [1, 2], [0, 0])])
def test_rows_by_hand(task, ids, labelled, ranges):
    row = token_row(record(), task, GRAMMAR, 64)
    assert (row.ids.tolist(), row.labelled.tolist(), row.ranges.tolist()) == (ids, labelled, ranges)
    assert (row.item.id, row.image_at, row.truncated) == ('a', -1, False)


@pytest.mark.parametrize('task, ids, labelled', [
    ('i2t', [100, *PICTURE, 101, 7, 8, 9], [6, 7, 8]),             # what is said ends without its end token
    ('t2i', [7, 8, 100, *PICTURE, 101], [3, 4, 5, 6, 7])])         # the prompt is cut, the picture is whole
def test_what_does_not_fit_is_cut_from_the_text_and_flagged(task, ids, labelled):
    fits = token_row(record(text=(7, 8)), task, GRAMMAR, 9)
    assert not fits.truncated and len(fits) <= 9
    row = token_row(record(text=(7, 8, 9)), task, GRAMMAR, 9)
    assert (row.truncated, row.ids.tolist(), row.labelled.tolist()) == (True, ids, labelled)
    assert len(row.ranges) == len(labelled)
    with pytest.raises(SystemExit, match='max_seq_len = 7 leaves no room for text in .*: wanted at least 8'):
        token_row(record(), task, GRAMMAR, 7)


def test_a_record_of_the_other_modality_is_refused():
    with pytest.raises(SystemExit, match='item a has an image: task a2t wants an audio'):
        token_row(record(), 'a2t', GRAMMAR, 64)


# -----------------------------------------------------------------------------
# batches

def test_labels_of_a_batch_stand_sorted_by_range_with_their_counts():
    rows = [token_row(record(), 't2i', GRAMMAR, 64), token_row(record(CLIP, (5,), 'audio', 'b'), 't2a', GRAMMAR, 64),
            token_row(record(text=(9,), id='c'), 'i2t', GRAMMAR, 64)]
    batch = collate(rows, [None] * 3, 0)
    assert batch.input_ids.tolist() == [7, 8, 100, *PICTURE, 101, 5, 102, *CLIP, 103, 100, *PICTURE, 101, 9, 99]
    assert batch.label_ranges == [(0, 2), (1, 2), (2, 4), (3, 2), (4, 2)]      # text, special, image, audio_0, audio_1
    assert batch.labels.tolist() == [9, 99, 101, 103, *PICTURE, 120, 127, 128, 135]
    assert batch.label_rows.tolist() == [2, 2, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.label_positions.tolist() == [20, 21, 6, 13, 2, 3, 4, 5, 9, 11, 10, 12]
    assert batch.input_ids[batch.label_positions + 1].tolist() == batch.labels.tolist()
    assert batch.n_labels == 12 and batch.images is None and batch.ids == ['a', 'b', 'c']
    assert all(type(n) is int for pair in batch.to('cpu').label_ranges for n in pair)


def test_plain_text_among_typed_rows_counts_as_text_and_track_a_has_no_ranges():
    text = Row(Item('t', None, ()), np.array([30, 31, 32], np.int32), np.array([1, 2], np.int32), -1, False)
    batch = collate([token_row(record(), 't2i', GRAMMAR, 64), text], [None, None], 0)
    assert batch.label_ranges == [(0, 2), (1, 1), (2, 4)] and batch.labels.tolist() == [31, 32, 101, *PICTURE]
    alone = collate([text], [None], 0)
    assert alone.label_ranges == [] and alone.label_positions.tolist() == [0, 1]


def test_the_loader_of_track_a_takes_rows_of_shards(tmp_path):
    records = read_shards(make_folder(tmp_path), 'train')
    rows = [token_row(r, task, GRAMMAR, 64) for r in records for task in ('i2t', 't2i') if r.modality == 'image']
    load = Loader(rows, None, 0, Ledger(tmp_path / 'bad.jsonl', 0), seed=1)
    batches = load.micro_batches(0, 4, 2, 0, 1)
    assert sorted(i for b in batches for i in b.ids) == ['a', 'a', 'b', 'b']
    for batch in batches:
        first, end = (torch.tensor(np.repeat(GRAMMAR.bounds([r for r, _ in batch.label_ranges])[side],
                                             [n for _, n in batch.label_ranges])) for side in (0, 1))
        assert ((batch.labels >= first) & (batch.labels < end)).all()


def test_json_of_a_sealed_file_is_plain(tmp_path):
    write_sealed(tmp_path / 'x.json', {'a': [1, 'ü']})
    assert set(json.loads((tmp_path / 'x.json').read_text())) == {'a', 'sha256'}
    assert read_sealed(tmp_path / 'x.json') == {'a': [1, 'ü']}
