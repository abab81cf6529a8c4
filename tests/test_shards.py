"""shards.py: lists of captioned media, shards written and read, their examples and batches, mixtures of tasks."""
import json

import numpy as np
import pytest
import torch
from conftest import damage, on_two_ranks, read_lines, run_here
from safetensors import safe_open
from test_common import no_file_larger_than
from test_data import TEXT_ONLY, Letters, one_line
from test_uti import AUDIO, BASE, IMAGE, SPACE

import common
import shards
from common import read_sealed, write_sealed
from data import Loader, collate
from media import BadSamples
from shards import (
    Caption, CaptionedMedia, Medium, MixtureSampler, Record, Records, check_shard, label_counts, passes_line,
    prompt_of, read_index, read_manifest, read_shards, read_sound_folder, require_enough, shards_fingerprint,
    task_shares, text_examples, token_example, token_sets, with_media, with_prompt, write_shard)
from uti import Grammar, TokenSpace

GRAMMAR = Grammar(SPACE)
PICTURE = [104, 105, 106, 119]
CLIP = [120, 128, 127, 135]

# -----------------------------------------------------------------------------
# captioned media


@pytest.mark.parametrize('line, says', [
    ('{"id": "x", "audio": "a.wav", "text": NaN}', 'text is NaN'), ('{"id": 1.5}', 'id is 1.5'),
    ('{"id": "x", "id": "y", "audio": "a.wav", "text": "t"}', "'id' stands twice"),
    ('\udcff', 'not valid JSON'), ('[1]', 'found a list, wanted an object'),
    ('{"id": "x", "audio": "../a.wav", "text": "t"}', "audio '../a.wav' leaves the audio root"),
    ('{"id": "x", "audio": "link.wav", "text": "t"}', 'is a link out of the audio root'),
    ('{"id": "x", "audio": "a.wav", "image": "a.png", "text": "t"}', 'image and audio, wanted one'),
    ('{"id": "x", "text": "t"}', 'neither image nor audio'),
    ('{"id": "x", "audio": "a.wav", "text": "  "}', 'text is "  "'),
    ('{"id": "x", "audio": "a.wav", "text": "\\ud800"}', 'not Unicode')])
def test_a_bad_line_of_a_manifest_is_left_out_and_its_line_says_why(tmp_path, line, says):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'out.wav').write_bytes(b'')
    (tmp_path / 'in' / 'link.wav').symlink_to(tmp_path / 'out.wav')
    path = tmp_path / 'in' / 'm.jsonl'
    good = '\ufeff{"id": 7, "source": "s", "audio": "a.wav", "text": " ok\u2028ay "}'
    path.write_bytes(f'{good}\n\n{line}\n'.encode(errors='surrogateescape'))
    [found] = read_manifest(path, BadSamples(tmp_path / 'bad.jsonl', 1))
    assert found == CaptionedMedia('7', 'audio', str(tmp_path / 'in' / 'a.wav'), 'ok\u2028ay')
    one_line(json.loads((tmp_path / 'bad.jsonl').read_text())['reason'], f'{path}:3', says)


def test_ids_of_a_manifest_are_made_keys(tmp_path):
    (tmp_path / 'm.jsonl').write_text(
        '{"image": "a.png", "text": "one"}\n' + 2 * '{"id": "x", "image": "a.png", "text": "two"}\n')
    assert [media.id for media in read_manifest(tmp_path / 'm.jsonl', BadSamples(tmp_path / 'bad.jsonl', 0))] == [
        '0', 'x', 'x#2']


def test_a_folder_of_sounds_with_captions_as_clotho_has_them(tmp_path):
    (tmp_path / 'c.csv').write_text('\ufefffile_name,caption_1,caption_2\na b.wav,"one, two",three\n../x.wav,no,\n')
    found = read_sound_folder(tmp_path, tmp_path / 'c.csv', BadSamples(tmp_path / 'bad.jsonl', 2))
    assert [(media.id, media.text) for media in found] == [
        ('a b.wav#caption_1', 'one, two'), ('a b.wav#caption_2', 'three')]
    assert len((tmp_path / 'bad.jsonl').read_text().splitlines()) == 2
    (tmp_path / 'c.csv').write_text('file,text\na.wav,x\n')
    with pytest.raises(SystemExit, match='wanted columns file_name, caption_1, ..., found file, text'):
        read_sound_folder(tmp_path, tmp_path / 'c.csv', None)


HEAD = 'file_name,caption_1\n'


@pytest.mark.parametrize('content, texts, reasons', [
    (HEAD + 'a.wav,a dog, barking\nb.wav,rain\n', ['rain'], ['c.csv:2: 3 cells for 2 columns; a text with commas']),
    (HEAD + 'a.wav,rain\nb.wav\n', ['rain'], ['c.csv:3: 1 cells for 2 columns']),
    (HEAD + 'a.wav,"a dog\nbarks"\n../b.wav,rain\n', ['a dog\nbarks'], ["c.csv:4: audio '../b.wav' leaves"]),
    (HEAD + 'a.wav,rain,,\n\nb.wav,a dog\n', ['rain', 'a dog'], []),                       # commas at the ends of lines
    ('file_name, caption_1,,\r\na.wav,rain\r\n', ['rain'], []),
    (HEAD + 'a.wav,rain\na.wav,a dog\n', ['rain', 'a dog'], [])])
def test_a_row_with_other_cells_than_columns_is_a_bad_sample(tmp_path, content, texts, reasons):
    (tmp_path / 'c.csv').write_text(content, newline='')
    found = read_sound_folder(tmp_path, tmp_path / 'c.csv', BadSamples(tmp_path / 'bad.jsonl', 1))
    assert [media.text for media in found] == texts and len({media.id for media in found}) == len(found)
    bad = tmp_path / 'bad.jsonl'
    listed = read_lines(bad) if bad.exists() else []
    assert len(listed) == len(reasons) and all(reason in line['reason'] for reason, line in zip(reasons, listed))


@pytest.mark.parametrize('content, says', [
    (HEAD.replace(',', '\t') + 'a.wav\train\n', "first line is 'file_name\\\\tcaption_1', wanted .* with commas"),
    (HEAD.replace(',', ';') + 'a.wav;rain\n', 'with commas between them'),
    ('file_name,caption_1,caption_1\na.wav,a,b\n', "column 'caption_1' stands twice"),
    (HEAD + 'a.wav,rain\nb.wav,"a dog\nc.wav,wind\n', 'c.csv:3: not a CSV of columns file_name'),
    (HEAD + 'a.wav,"a "dog""\n', 'c.csv:2: not a CSV of columns file_name'),
    (HEAD, 'no captions in it'),
    ('', 'wanted columns file_name, caption_1, ..., found nothing')])
def test_what_is_no_csv_of_captions_ends_with_one_line(tmp_path, content, says):
    (tmp_path / 'c.csv').write_text(content)
    with pytest.raises(SystemExit, match=says) as e:
        read_sound_folder(tmp_path, tmp_path / 'c.csv', BadSamples(tmp_path / 'bad.jsonl', 9))
    assert '\n' not in e.value.code


# -----------------------------------------------------------------------------
# shards


def make_folder(folder, space=SPACE):
    """Two shards: a picture with two captions and a clip with one to train on, a picture in eval."""
    folder.mkdir(exist_ok=True)
    sides = {
        'train': [write_shard(folder, 'train-00000', space, media=[
            Medium('p1', 'image', PICTURE, {'size': 4}), Medium('c1', 'audio', CLIP, {'n_samples': 8})], captions=[
            Caption('a', 0, [7, 8]), Caption('b', 0, [9]), Caption('c', 1, [1, 2, 3])])],
        'eval': [write_shard(folder, 'eval-00000', space, [Medium('p2', 'image', PICTURE[::-1], {})],
                             [Caption('d', 0, [4])])],
        'golden': [],
    }
    splits = {}
    for split, written in sides.items():
        splits[split] = {'shards': [{'name': side['name'], 'sha256': side['shard_sha256']} for side in written]}
    write_sealed(folder / 'index.json', {'token_space': space.sha256, 'splits': splits})
    space.save(folder / 'token_space.json')
    return folder


def plain(records):
    return [(r.id, r.modality, r.payload.tolist(), r.text.tolist(), r.media_sha256, r.meta) for r in records]


def test_what_was_written_is_read(tmp_path):
    make_folder(tmp_path)
    assert plain(read_shards(tmp_path, 'train', SPACE)) == [
        ('a', 'image', PICTURE, [7, 8], 'p1', {'size': 4}), ('b', 'image', PICTURE, [9], 'p1', {'size': 4}),
        ('c', 'audio', CLIP, [1, 2, 3], 'c1', {'n_samples': 8})]
    assert plain(read_shards(tmp_path, 'eval')) == [('d', 'image', PICTURE[::-1], [4], 'p2', {})]
    assert list(read_shards(tmp_path, 'golden')) == []
    with pytest.raises(SystemExit, match="no split 'test': wanted one of train, eval, golden"):
        read_shards(tmp_path, 'test')


def test_a_shard_is_plain_safetensors_that_names_its_token_space(tmp_path):
    path = make_folder(tmp_path) / 'train-00000.safetensors'
    with safe_open(path, 'np') as f:
        assert f.metadata() == {'token_space': SPACE.sha256}
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    assert {name: (tensor.dtype.name, tensor.tolist()) for name, tensor in tensors.items()} == {
        'ids': ('int32', [*PICTURE, *CLIP, 7, 8, 9, 1, 2, 3]), 'offsets': ('int64', [0, 4, 8, 10, 11, 14]),
        'kinds': ('uint8', [1, 2, 0, 0, 0]), 'items': ('int32', [[0, 2], [0, 3], [1, 4]])}
    side = read_sealed(tmp_path / 'train-00000.json', 'build_b2.py')
    assert side == {'name': 'train-00000', 'shard_sha256': side['shard_sha256'], 'token_space': SPACE.sha256, 'ids': 14,
                    'bytes': path.stat().st_size, 'media': ['p1', 'c1'], 'metas': [{'size': 4}, {'n_samples': 8}],
                    'items': ['a', 'b', 'c']}


def test_the_same_input_gives_the_same_bytes(tmp_path):
    one = make_folder(tmp_path / 'one')
    two = make_folder(tmp_path / 'two')
    names = sorted(path.name for path in one.iterdir())
    assert len(names) == 6
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_an_empty_shard_is_a_shard(tmp_path):
    side = write_shard(tmp_path, 'x', SPACE, [], [])
    assert check_shard(tmp_path, 'x', side['shard_sha256'], space=SPACE) == {'image': 0, 'audio': 0}
    with safe_open(tmp_path / 'x.safetensors', 'np') as f:
        assert [f.get_tensor(name).shape for name in ('ids', 'offsets', 'kinds', 'items')] == [(0,), (1,), (0,), (0, 2)]


@pytest.mark.parametrize('name', ['train-00000.safetensors', 'train-00000.json', 'index.json', 'token_space.json'])
def test_a_flipped_bit_a_cut_file_and_a_missing_one_are_refused_in_one_line(tmp_path, name):
    path = make_folder(tmp_path) / name
    body = path.read_bytes()
    damaged = [body[:-20]]
    for where in 0.02, 0.5, 0.98:
        n = int(where * len(body))
        damaged.append(body[:n] + bytes([body[n] ^ 1]) + body[n + 1:])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(SystemExit) as e:
            read_shards(tmp_path, 'train')
        one_line(e.value, name)
    path.unlink()
    with pytest.raises(SystemExit) as e:
        read_shards(tmp_path, 'train')
    one_line(e.value, name, 'No such file')


def test_a_full_disk_ends_in_one_line_and_leaves_no_half_of_a_shard(tmp_path):
    with no_file_larger_than(1000), pytest.raises(SystemExit) as e:
        write_shard(tmp_path, 'x', SPACE, [Medium('p', 'image', np.zeros(1000, np.int32), {})], [])
    one_line(e.value, f'{tmp_path}/x.safetensors: cannot write here, is the disk full? ([Errno 27] File too large); '
             'fix that and start again, the finished shards are kept')
    assert not list(tmp_path.glob('x.safetensors')) and not list(tmp_path.glob('x.json'))


def test_the_fingerprint_is_of_the_shards_and_not_of_who_wrote_the_index(tmp_path):
    first = shards_fingerprint(make_folder(tmp_path))
    index, _ = read_index(tmp_path)
    write_sealed(tmp_path / 'index.json', {**index, 'provenance': {'commit': 'other'}})
    assert shards_fingerprint(tmp_path) == first
    index['splits']['train']['shards'][0]['sha256'] = 'other'
    write_sealed(tmp_path / 'index.json', index)
    changed = shards_fingerprint(tmp_path)
    assert [name for name in first if changed[name] != first[name]] == ['shard train-00000']


def test_two_shards_that_changed_places_are_refused(tmp_path):
    make_folder(tmp_path)
    for end in 'safetensors', 'json':
        a = tmp_path / f'train-00000.{end}'
        b = tmp_path / f'eval-00000.{end}'
        a.rename(tmp_path / 'x')
        b.rename(a)
        (tmp_path / 'x').rename(b)
    with pytest.raises(SystemExit, match='train-00000.safetensors: sha256 .* damaged or exchanged'):
        read_shards(tmp_path, 'train')


def test_another_token_space_is_refused_by_name(tmp_path):
    other = TokenSpace(BASE, {**IMAGE, 'sha256': 'xx'}, AUDIO)
    with pytest.raises(SystemExit, match="has another token space: image.sha256 is 'cd' there and 'xx' here"):
        read_shards(make_folder(tmp_path), 'train', other)
    other.save(tmp_path / 'token_space.json')          # a file that was put there afterwards
    with pytest.raises(SystemExit, match='index.json and token_space.json are not of one build'):
        read_shards(tmp_path, 'train')
    index, _ = read_index(make_folder(tmp_path))
    shard = index['splits']['train']['shards'][0]
    with pytest.raises(SystemExit, match='train-00000.safetensors: made for token space'):
        check_shard(tmp_path, shard['name'], shard['sha256'], space=other)


# -----------------------------------------------------------------------------
# examples of the tasks


def record(payload=PICTURE, text=(7, 8), modality='image', id='a'):
    return Record(id, modality, np.array(payload, np.int32), np.array(text, np.int32), 'p1', {})


@pytest.mark.parametrize('task, ids, label_positions, ranges', [
    ('i2t', [100, *PICTURE, 101, 7, 8, 99], [6, 7, 8], [0, 0, 0]),
    ('t2i', [7, 8, 100, *PICTURE, 101], [3, 4, 5, 6, 7], [2, 2, 2, 2, 1]),
    ('text', [7, 8, 99], [1, 2], [0, 0])])
def test_examples_by_hand(task, ids, label_positions, ranges):
    example = token_example(record(), task, GRAMMAR, 64)
    assert example.ids.tolist() == ids
    assert (example.label_positions.tolist(), example.label_ranges.tolist()) == (label_positions, ranges)
    assert (example.item.id, len(example.image_starts), example.truncated) == ('a', 0, False)


@pytest.mark.parametrize('task, ids, label_positions', [
    ('i2t', [100, *PICTURE, 101, 7, 8, 9], [6, 7, 8]),             # the description loses its end token
    ('t2i', [7, 8, 100, *PICTURE, 101], [3, 4, 5, 6, 7])])         # the prompt is cut, the picture is whole
def test_what_does_not_fit_is_cut_from_the_text_and_flagged(task, ids, label_positions):
    fits = token_example(record(text=(7, 8)), task, GRAMMAR, 9)
    assert not fits.truncated and len(fits) <= 9
    cut = token_example(record(text=(7, 8, 9)), task, GRAMMAR, 9)
    assert (cut.truncated, cut.ids.tolist(), cut.label_positions.tolist()) == (True, ids, label_positions)
    assert len(cut.label_ranges) == len(label_positions)
    with pytest.raises(SystemExit, match='max_seq_len = 7 leaves no room for text in .*: wanted at least 8'):
        token_example(record(), task, GRAMMAR, 7)


def test_a_record_of_the_other_modality_is_refused():
    with pytest.raises(SystemExit, match='item a has an image: task a2t wants an audio'):
        token_example(record(), 'a2t', GRAMMAR, 64)


@pytest.mark.parametrize('text', [[9, 8, 7], []])
def test_a_writing_example_behind_another_prompt_is_the_document_of_that_prompt(text):
    wanted = GRAMMAR.document('t2i', PICTURE, text)
    got = with_prompt(token_example(record(), 't2i', GRAMMAR, 64), text)
    for name in 'ids', 'label_positions', 'label_ranges':
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))
    assert prompt_of(got).tolist() == text


def test_a_reading_example_about_other_media_keeps_all_but_its_codes():
    example = token_example(record(), 'i2t', GRAMMAR, 64)
    assert with_media(example, PICTURE[::-1]).ids.tolist() == [100, *PICTURE[::-1], 101, 7, 8, 99]
    assert example.ids.tolist() == [100, *PICTURE, 101, 7, 8, 99]


def test_the_sets_of_a_split_are_the_first_items_of_each_task(tmp_path):
    make_folder(tmp_path)
    sets = token_sets(tmp_path, 'train', ['i2t', 't2a'], GRAMMAR, 64)
    assert {task: [e.item.id for e in examples] for task, examples in sets.items()} == {'i2t': ['a', 'b'], 't2a': ['c']}
    assert [len(x) for x in token_sets(tmp_path, 'train', ['i2t', 't2a'], GRAMMAR, 64, n=1).values()] == [1, 1]
    with pytest.raises(SystemExit) as e:
        require_enough(sets, sets, sets, tmp_path)
    one_line(e.value, f'{tmp_path} has 2 items to train and 2 to evaluate i2t on', 'task_weights')


@pytest.mark.parametrize('n_train, n_eval, n_golden, says', [
    (0, 300, 64, '0 items to train and 300 to evaluate t2a on'),
    (9, 75, 64, '75 to evaluate t2a on and 64 golden ones; its gates ask 256 and 64'),
    (9, 300, 63, '300 to evaluate t2a on and 63 golden ones; its gates ask 256 and 64')])
def test_what_the_gates_ask_to_be_held_out_is_asked_before_training(n_train, n_eval, n_golden, says):
    reading = {'a2t': 9 * ['x']}
    with pytest.raises(SystemExit) as e:
        require_enough({**reading, 't2a': n_train * ['x']}, {**reading, 't2a': n_eval * ['x']},
                       {'a2t': [], 't2a': n_golden * ['x']}, 'out/b2', n_eval=256, n_golden=64)
    one_line(e.value, 'out/b2 has', says, 'set n_eval and n_golden of stage B2')
    require_enough(reading, reading, {'a2t': []}, 'out/b2', n_eval=256, n_golden=64)   # to read, 8 are enough

def assert_same_example(lazy, wanted):
    for name in 'ids', 'label_positions', 'label_ranges':
        np.testing.assert_array_equal(getattr(lazy, name), getattr(wanted, name))
    assert (lazy.truncated, len(lazy.image_starts), plain([lazy.item])) == (wanted.truncated, 0, plain([wanted.item]))


@pytest.mark.parametrize('task, modality', [('i2t', 'image'), ('a2t', 'audio'), ('t2i', 'image'), ('t2a', 'audio')])
@pytest.mark.parametrize('n_kept', [1, 64])
def test_examples_made_when_asked_for_are_those_of_all_records_in_memory(tmp_path, monkeypatch, task, modality, n_kept):
    monkeypatch.setattr(Records, 'KNOWN', n_kept)
    wanted = write_at_random(tmp_path, n_shards=5)
    [examples] = token_sets(tmp_path, 'train', [task], GRAMMAR, 12).values()
    wanted = [token_example(record, task, GRAMMAR, 12) for record in wanted if record.modality == modality]
    assert len(examples) == len(wanted) > 10
    for i in np.random.default_rng(1).permutation(len(wanted)).tolist():
        assert_same_example(examples[i], wanted[i])
    for lazy, eager in zip([examples[-1], *examples[3:9]], [wanted[-1], *wanted[3:9]], strict=True):
        assert_same_example(lazy, eager)
    assert ids_of(list(examples)) == ids_of(wanted)
    with pytest.raises(IndexError):
        examples[len(wanted)]
    truncated, n_labels = examples.label_counts()      # from columns alone
    assert truncated.tolist() == [e.truncated for e in wanted] and 0 < truncated.sum() < len(wanted)
    assert n_labels.tolist() == [len(e.label_positions) for e in wanted]
    assert label_counts({task: examples}, {'text': [TEXT_ONLY]}) == (len(wanted) + 1, truncated.sum(), 0)


def write_at_random(folder, n_shards):
    """Shards with several captions for some media and none for others; their Records."""
    rng = np.random.default_rng(0)
    records = []
    entries = []
    for n in range(n_shards):
        media = []
        captions = []
        for k in range(rng.integers(4, 9)):
            modality = ('image', 'audio')[rng.integers(2)]
            codes = rng.integers(*GRAMMAR.bounds(GRAMMAR.payload_ranges[modality])).astype(np.int32)
            media.append(Medium(f'{n} {k}', modality, codes, {'n': k}))
            for c in range(rng.integers(4)):
                text = rng.integers(1, 90, rng.integers(0, 9)).astype(np.int32)
                captions.append(Caption(f'{n}-{k}-{c}', k, text))
        side = write_shard(folder, f'train-{n:05d}', SPACE, media, captions)
        entries.append({'name': side['name'], 'sha256': side['shard_sha256']})
        for id, k, text in captions:
            records.append(Record(id, media[k].modality, media[k].codes, text, media[k].sha256, media[k].meta))
    write_sealed(folder / 'index.json', {'token_space': SPACE.sha256, 'splits': {'train': {'shards': entries}}})
    SPACE.save(folder / 'token_space.json')
    return records


@pytest.fixture
def compared(monkeypatch):
    """The names of the shards that were compared with their sha256, as they are."""
    names = []
    check = shards.check_shard

    def noting(folder, name, sha256, space):
        names.append(name)
        return check(folder, name, sha256, space)
    monkeypatch.setattr(shards, 'check_shard', noting)
    return names


def test_a_shard_is_compared_with_its_sha256_once_and_again_when_it_changes(tmp_path, compared):
    wanted = plain(write_at_random(tmp_path, n_shards=3))
    names = [f'train-{n:05d}' for n in range(3)]
    for _ in range(2):
        assert plain(read_shards(tmp_path, 'train')) == wanted
    assert sorted(compared) == names
    for ending in 'safetensors', 'json':
        path = tmp_path / f'{names[1]}.{ending}'
        body = path.read_bytes()
        path.write_bytes(body[:-2] + b'??')            # as many bytes
        with pytest.raises(SystemExit, match=names[1]):
            read_shards(tmp_path, 'train')
        path.write_bytes(body)
        assert plain(read_shards(tmp_path, 'train')) == wanted
    assert sorted(compared) == sorted(names + 4 * [names[1]])
    read_shards(make_folder(tmp_path), 'eval')         # another split and index: what was compared before is kept
    assert len(read_sealed(tmp_path / 'checked.json', '')['shards']) == 4


def test_what_was_compared_is_forgotten_when_its_file_is_damaged_or_of_another_space(tmp_path, compared, capsys):
    make_folder(tmp_path)
    read_shards(tmp_path, 'train')
    checked = tmp_path / 'checked.json'
    whole = checked.read_text()
    for content in whole.replace('"image": 2', '"image": 1'), whole[:-9], '[]', '':
        checked.write_text(content)
        assert len(read_shards(tmp_path, 'train')) == 3
    write_sealed(checked, {**read_sealed(checked, ''), 'token_space': 'another'})
    read_shards(tmp_path, 'train')
    assert compared == 6 * ['train-00000'] and capsys.readouterr().out == ''
    checked.unlink()
    checked.mkdir()                                    # it cannot be written, as in a folder of somebody else's
    assert len(read_shards(tmp_path, 'train')) == 3
    one_line(capsys.readouterr().out.strip(), 'checked.json: cannot write here', 'next start reads all shards again')


def test_a_shard_that_changes_during_a_run_is_refused(tmp_path):
    write_at_random(tmp_path, n_shards=2)
    records = read_shards(tmp_path, 'train')
    path = tmp_path / 'train-00001.safetensors'
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SystemExit) as e:
        records[-1]
    one_line(e.value, f'{path} has changed since this run began')


def test_ranks_share_the_comparing_and_all_say_what_is_wrong(tmp_path):
    write_at_random(tmp_path, n_shards=4)

    def read(said):
        rank, _, _ = common.init_ranks('cpu')
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, 'check_shard', lambda folder, name, *rest: (
                (tmp_path / f'{name} by {rank}').touch(), check_shard(folder, name, *rest))[1])
            try:
                n = len(read_shards(tmp_path, 'train'))
            except SystemExit as e:
                n = str(e)
        (tmp_path / f'{said} {rank}').write_text(str(n))
        return 0, ''

    assert on_two_ranks(read, 'whole') == [0, 0]
    assert sorted(path.name for path in tmp_path.glob('* by *')) == [
        'train-00000 by 0', 'train-00001 by 1', 'train-00002 by 0', 'train-00003 by 1']
    damage(tmp_path / 'train-00001.safetensors')
    assert on_two_ranks(read, 'damaged') == [0, 0]
    said = [(tmp_path / f'damaged {rank}').read_text() for rank in (0, 1)]
    assert said[0] == said[1] and 'train-00001.safetensors: sha256' in said[0]


def test_shards_of_random_codes_are_made_once_and_measured(tmp_path):
    sizes = ('--pictures=40', '--clips=20', '--picture_side=2', '--clip_frames=1', '--shard_media=16', '--held_out=8',
             '--global_batch_size=8', '--n_steps=3')
    for _ in range(2):
        code, printed = run_here('tools/many_shards.py', f'--out_dir={tmp_path}/many', *sizes)
        assert code == 0 and 'rank 0: 40 of i2t, 20 of a2t, 40 of t2i, 20 of t2a: start ' in printed
        made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'many').iterdir()}
    assert len(made) == 2 * (4 + 1 + 8) + 3 and read_shards(tmp_path / 'many', 'eval')[0].modality == 'image'


def test_texts_are_named_by_their_line_and_one_of_one_id_is_refused(tmp_path):
    path = tmp_path / 'text.jsonl'
    path.write_text('{"text": "red"}\n\n{"text": "blue"}\n{"text": "a"}\n')
    assert [e.item.id for e in text_examples(path, Letters(), 64, n=2)] == [f'{path}:1', f'{path}:3']
    with pytest.raises(SystemExit) as e:
        text_examples(path, Letters(), 64)
    one_line(e.value, f'{path}:4: text is "a", one token', 'remove it')


# -----------------------------------------------------------------------------
# batches


def test_labels_of_a_batch_stand_sorted_by_range_with_their_counts():
    draw = token_example(record(), 't2i', GRAMMAR, 64)
    generate = token_example(record(CLIP, (5,), 'audio', 'b'), 't2a', GRAMMAR, 64)
    describe = token_example(record(text=(9,), id='c'), 'i2t', GRAMMAR, 64)
    batch = collate([draw, generate, describe])
    assert batch.input_ids.tolist() == [7, 8, 100, *PICTURE, 101, 5, 102, *CLIP, 103, 100, *PICTURE, 101, 9, 99]
    assert batch.label_ranges == [(0, 2), (1, 2), (2, 4), (3, 2), (4, 2)]      # text, special, image, audio_0, audio_1
    assert batch.labels.tolist() == [9, 99, 101, 103, *PICTURE, 120, 127, 128, 135]
    assert batch.label_examples.tolist() == [2, 2, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.logit_positions.tolist() == [20, 21, 6, 13, 2, 3, 4, 5, 9, 11, 10, 12]
    assert batch.input_ids[batch.logit_positions + 1].tolist() == batch.labels.tolist()
    assert (batch.n_labels, batch.images, batch.ids) == (12, None, ['a', 'b', 'c'])
    assert batch.to('cpu').label_ranges == batch.label_ranges


def test_plain_text_among_typed_examples_counts_as_text():
    batch = collate([token_example(record(), 't2i', GRAMMAR, 64), TEXT_ONLY])
    assert batch.label_ranges == [(0, 1), (1, 1), (2, 4)] and batch.labels.tolist() == [32, 101, *PICTURE]


# -----------------------------------------------------------------------------
# mixtures of tasks


def test_task_shares_sum_to_one_and_only_tasks_with_codes_are_taken():
    assert task_shares({'i2t': 3.0, 't2i': 1.0, 'a2t': 0}, GRAMMAR) == {'i2t': 0.75, 't2i': 0.25}
    no_audio = Grammar(TokenSpace(BASE, IMAGE))
    for weights in {'a2t': 1}, {'i2t': -1, 't2i': 2}, {'i2t': 0}, {}:
        with pytest.raises(SystemExit) as e:
            task_shares(weights, no_audio)
        one_line(e.value, f'task weights {weights}', 'this token space has codes for, i2t, t2i')


def mixture(shares_at, n_steps, dropout=0.0):
    sets = {}
    for task in 'i2t', 't2i':
        sets[task] = [token_example(record(id=f'{task} {k}'), task, GRAMMAR, 64) for k in range(10)]
    return MixtureSampler(sets, shares_at, n_steps, global_batch_size=8, seed=3, prompt_dropout=dropout)


def fifth_then_all(progress):
    return {'i2t': 0.2, 't2i': 0.8} if progress < 5 / 9 else {'i2t': 1.0}


def ids_of(examples):
    return [example.item.id for example in examples]


def test_a_mixture_has_the_shares_of_each_step_and_every_example_once_an_epoch():
    """Of 8 examples a fifth is 1.6: 1.6, 3.2, 4.8, 6.4 and 8 are owed after five steps, so 2, 1, 2, 1, 2 come."""
    sampler = mixture(fifth_then_all, 9)
    assert sampler.counts[:, 0].tolist() == [2, 1, 2, 1, 2, 8, 8, 8, 8]
    steps = [ids_of(sampler.step(n)) for n in range(9)]
    assert [len(ids) for ids in steps] == [8] * 9
    written = [id for ids in steps for id in ids if id.startswith('t2i')]
    assert len(written) == 32 and {written.count(f't2i {k}') for k in range(10)} == {3, 4}
    again = mixture(fifth_then_all, 9)                 # a step is a function of itself, as after a resume
    assert [ids_of(again.step(n)) for n in reversed(range(9))] == steps[::-1]


def test_two_tasks_over_the_same_media_come_in_orders_of_their_own():
    sampler = mixture(lambda progress: {'i2t': 0.5, 't2i': 0.5}, 5)
    orders = {'i2t': [], 't2i': []}
    for n in range(5):
        for id in ids_of(sampler.step(n)):
            task, k = id.split()
            orders[task].append(k)
    assert len(orders['i2t']) == len(orders['t2i']) == 20 and orders['i2t'] != orders['t2i']


def test_shares_that_change_with_every_step_are_met_over_all_of_them():
    sampler = mixture(lambda progress: {'i2t': 1 - progress, 't2i': progress}, 400)
    assert (sampler.counts.sum(1) == 8).all() and abs(sampler.counts[:, 1].sum() - 0.5 * 3200) < 8


def test_writing_examples_lose_their_prompt_in_its_share_and_others_each_epoch():
    sampler = mixture(lambda progress: {'t2i': 1.0}, 100, dropout=0.25)
    steps = [sampler.step(n) for n in range(100)]      # five steps are four epochs of ten examples
    bare = [[e.item.id for e in examples if not len(prompt_of(e))] for examples in steps]
    assert abs(sum(map(len, bare)) / 800 - 0.25) < 0.05
    assert len({tuple(sorted(sum(bare[n:n + 5], []))) for n in range(0, 100, 5)}) > 5
    assert [e.ids.tolist() for e in sampler.step(7)] == [e.ids.tolist() for e in steps[7]]
    reading = mixture(lambda progress: {'i2t': 1.0}, 100, dropout=1.0)
    assert all(len(e.label_positions) == 3 and len(e) == 9 for e in reading.step(0))
    whole = mixture(lambda progress: {'t2i': 1.0}, 100)
    assert all(len(prompt_of(e)) for e in whole.step(0))


def test_a_mixture_says_how_often_it_goes_through_each_task():
    sampler = mixture(fifth_then_all, 9)               # 8 + 32 of 10 examples, and 32
    assert sampler.passes() == {'i2t': 4.0, 't2i': 3.2}
    assert passes_line(sampler, 2.0) == '10 examples of i2t 2 times, 10 examples of t2i 1.6 times'


def test_the_size_of_a_task_does_not_change_its_share():
    """3,800 clips beside 558,000 pictures are half of the examples when the weights are the same."""
    sets = {'i2t': range(558_000), 'a2t': range(3_800)}
    sampler = MixtureSampler(sets, lambda progress: task_shares({'i2t': 1, 'a2t': 1}, GRAMMAR), 100, 256, seed=1)
    assert sampler.counts.sum(0).tolist() == [12_800, 12_800]
    sampler = MixtureSampler(sets, lambda progress: task_shares({'i2t': 9, 'a2t': 1}, GRAMMAR), 100, 256, seed=1)
    assert sampler.counts.sum(0).tolist() == [23_040, 2_560]


def test_a_mixture_goes_through_the_loader_of_track_a():
    sampler = mixture(fifth_then_all, 9)
    steps = list(Loader().steps(sampler, 0, 9, micro_batch_size=3, rank=0, world_size=1))
    for n, batches in enumerate(steps):
        assert sum((batch.ids for batch in batches), []) == ids_of(sampler.step(n))
        for batch in batches:
            ranges = np.repeat([r for r, _ in batch.label_ranges], [count for _, count in batch.label_ranges])
            first, end = GRAMMAR.bounds(ranges)
            assert ((batch.labels >= torch.tensor(first)) & (batch.labels < torch.tensor(end))).all()
