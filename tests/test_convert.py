"""tools/convert.py: what is in parquet, tars and AudioCaps arrives whole, once, and what is bad is named."""
import csv
import gc
import io
import json
import tarfile

import numpy as np
import pytest
from conftest import read_json, read_lines, run_here
from PIL import Image

from lists import read_llava
from media import BadSamples
from shards import read_manifest


def picture(n, format='JPEG'):
    """The bytes of a picture file."""
    content = io.BytesIO()
    pixels = np.random.default_rng(n).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(pixels).save(content, format)
    return content.getvalue()


def turns(question='What?', answer='a cat'):
    return [{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}]


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def make_tar(path, samples):
    """samples: [(key, {ending: content})]."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for key, files in samples:
            for ending, content in files.items():
                add(tar, f'{key}.{ending}', content)


def make_parquet(path, rows):
    pytest.importorskip('datasets', reason='parquet needs pyarrow and datasets')
    pa = pytest.importorskip('pyarrow', reason='parquet needs pyarrow and datasets')
    parquet = pytest.importorskip('pyarrow.parquet', reason='parquet needs pyarrow and datasets')
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def convert(source, out, *more):
    result = run_here('tools/convert.py', f'--source={source}', f'--out_dir={out}', *more)
    gc.collect()                                       # the lock of out_dir goes with the script's globals
    return result


def read_back(out):
    """The items as a stage reads them: {id: (bytes of the picture, turns)}."""
    items = read_llava(out / 'data.json', out / 'images', BadSamples(out / 'none.jsonl', 0))
    found = {}
    for item in items:
        content = open(item.images[0], 'rb').read() if item.images else None
        found[item.id] = (content, item.turns)
    return found


# -----------------------------------------------------------------------------
# webdataset


def test_tars_of_pictures_with_captions_and_with_chats_become_a_list(tmp_path):
    chat = {'id': 'chat 7', 'image': 'elsewhere/7.jpg', 'conversations': turns('<image>\nWhat?')}
    make_tar(tmp_path / 'tars' / '00000.tar', [
        ('000000', {'jpg': picture(0), 'txt': b'a caption '}),
        ('000001', {'png': picture(1, 'PNG'), 'json': json.dumps({'caption': 'another one'}).encode()}),
        ('000002', {'jpg': picture(2, 'PNG'), 'txt': 'héllo'.encode()}),      # an ending that is not true
        ('000003', {'jpg': picture(3), 'json': json.dumps(chat).encode()})])
    make_tar(tmp_path / 'tars' / '00001.tar', [('./x/a', {'jpg': picture(4), 'txt': b'the last'})])
    code, printed = convert(tmp_path / 'tars', tmp_path / 'out')
    assert code == 0 and 'out: 5 records' in printed
    found = read_back(tmp_path / 'out')
    assert {id: content for id, (content, _) in found.items()} == {
        '000000': picture(0), '000001': picture(1, 'PNG'), '000002': picture(2, 'PNG'), 'chat 7': picture(3),
        'x/a': picture(4)}
    assert found['000002'][1][0][1] == 'héllo' and found['chat 7'][1] == (('What?', 'a cat'),)
    assert sorted(path.name for path in (tmp_path / 'out' / 'images' / '00000').iterdir()) == [
        '000000.jpg', '000001.png', '000002.png', '000003.jpg']


BAD = {
    'not a whole image': {'jpg': picture(0)[:300], 'txt': b'x'},
    'no text': {'jpg': picture(0), 'cls': b'3'},
    'wanted some': {'jpg': picture(0), 'txt': b' '},
    'not Unicode': {'jpg': picture(0), 'txt': b'\xff\xfe'},
    'not valid JSON': {'jpg': picture(0), 'json': b'{'},
    'wanted an object': {'jpg': picture(0), 'json': b'[1]'},
    'in pairs': {'jpg': picture(0), 'json': json.dumps({'conversations': turns()[:1]}).encode()},
    'marks for 0 images': {'json': json.dumps({'conversations': turns('<image>')}).encode()}}


@pytest.mark.parametrize('reason', BAD)
def test_a_bad_row_ends_the_run_in_a_line_or_is_listed(reason, tmp_path):
    make_tar(tmp_path / 'tars' / '0.tar', [('0', {'jpg': picture(9), 'txt': b'good'}), ('1', BAD[reason])])
    code, _ = convert(tmp_path / 'tars', tmp_path / 'out')
    assert reason in code and '0.tar, row 1' in code and '\n' not in code
    for _ in range(2):                                 # the second finds everything made, and lists the same
        assert convert(tmp_path / 'tars', tmp_path / 'out', '--max_bad_samples=1')[0] == 0
        [bad] = read_lines(tmp_path / 'out' / 'bad_samples.jsonl')
        assert bad['id'] == '0/000001' and reason in bad['reason']
    assert list(read_back(tmp_path / 'out')) == ['0']
    assert len(list((tmp_path / 'out' / 'images').rglob('*.*'))) == 1


@pytest.mark.parametrize('n_bytes, what', [
    (4 * 512 - 300, 'unexpected end of data'),         # two headers and two contents are 4 * 512
    (4 * 512, 'its end is missing'),
    (90, '')])
def test_a_tar_that_is_cut_ends_the_run(n_bytes, what, tmp_path):
    make_tar(tmp_path / 'tars' / '0.tar', [('0', {'jpg': b'x' * 500}), ('1', {'jpg': b'y' * 500})])
    path = tmp_path / 'tars' / '0.tar'
    path.write_bytes(path.read_bytes()[:n_bytes])
    code, _ = convert(tmp_path / 'tars', tmp_path / 'out', '--max_bad_samples=9')
    assert '0.tar: cannot read this tar' in code and what in code and 'get it again' in code


def test_a_second_start_makes_only_what_is_missing_and_the_same_list(tmp_path):
    for k in range(3):
        make_tar(tmp_path / 'tars' / f'{k}.tar', [(f'{k}{n}', {'jpg': picture(n), 'txt': b'x'}) for n in range(3)])
    assert convert(tmp_path / 'tars', tmp_path / 'out')[0] == 0
    before = (tmp_path / 'out' / 'data.json').read_bytes()
    (tmp_path / 'out' / 'parts' / '1.json').unlink()   # as a kill in that shard leaves it
    (tmp_path / 'out' / 'images' / '1' / '000001.jpg').write_bytes(b'half')
    kept = (tmp_path / 'out' / 'images' / '0' / '000000.jpg').stat().st_mtime_ns
    assert convert(tmp_path / 'tars', tmp_path / 'out')[0] == 0
    assert (tmp_path / 'out' / 'data.json').read_bytes() == before
    assert (tmp_path / 'out' / 'images' / '1' / '000001.jpg').read_bytes() == picture(1)
    assert (tmp_path / 'out' / 'images' / '0' / '000000.jpg').stat().st_mtime_ns == kept
    make_tar(tmp_path / 'tars' / '2.tar', [('new', {'jpg': picture(7), 'txt': b'x' * 9000})])     # another one
    assert convert(tmp_path / 'tars', tmp_path / 'out')[0] == 0
    assert 'new' in read_back(tmp_path / 'out') and '20' not in read_back(tmp_path / 'out')


def test_a_folder_with_nothing_in_it_and_one_that_is_not_there_are_a_line(tmp_path):
    (tmp_path / 'empty').mkdir()
    assert 'no *.parquet and no *.tar in it' in convert(tmp_path / 'empty', tmp_path / 'out')[0]
    assert 'not there' in convert(tmp_path / 'none', tmp_path / 'out')[0]


# -----------------------------------------------------------------------------
# parquet


@pytest.mark.parametrize('rows, ids', [
    ([{'id': 'a', 'image': {'bytes': picture(0), 'path': 'a.jpg'}, 'conversations': turns('<image>\nWhat?')},
      {'id': 'b', 'image': {'bytes': picture(1, 'PNG'), 'path': None}, 'conversations': turns()},   # without a mark
      {'id': 'c', 'image': None, 'conversations': turns()}], ['a', 'b', 'c']),
    ([{'image': {'bytes': picture(0), 'path': ''}, 'caption': 'one'},
      {'image': {'bytes': picture(1, 'PNG'), 'path': ''}, 'caption': 'two'}], ['0/000000', '0/000001']),
    ([{'image': picture(0), 'text': 'one'}, {'image': picture(1, 'PNG'), 'text': 'two'}], ['0/000000', '0/000001']),
    ([{'images': [{'bytes': picture(0), 'path': ''}], 'texts': [{'user': 'What?', 'assistant': 'one'}]},
      {'images': [{'bytes': picture(1, 'PNG'), 'path': ''}], 'texts': [{'user': 'Who?', 'assistant': 'two'}]}],
     ['0/000000', '0/000001']),
    ([{'id': 5, 'image': {'bytes': picture(0), 'path': ''}, 'captions': ['one', 'two']},
      {'id': 6, 'image': {'bytes': picture(1, 'PNG'), 'path': ''}, 'captions': ['three']}], ['5', '5#2', '6'])])
def test_parquet_of_several_makes_becomes_a_list(rows, ids, tmp_path):
    make_parquet(tmp_path / 'shards' / '0.parquet', rows)
    assert convert(tmp_path / 'shards', tmp_path / 'out')[0] == 0
    found = read_back(tmp_path / 'out')
    assert list(found) == ids
    assert found[ids[0]][0] == picture(0)
    assert found[ids[1]][0] in (picture(1, 'PNG'), picture(0))
    assert {path.suffix for path in (tmp_path / 'out' / 'images' / '0').iterdir()} == {'.jpg', '.png'}


def test_parquet_whose_pictures_hugging_face_would_decode_keeps_their_bytes(tmp_path):
    pytest.importorskip('datasets', reason='parquet needs pyarrow and datasets')
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture
    (tmp_path / 'shards').mkdir()
    rows = {'image': [{'bytes': picture(n), 'path': None} for n in range(3)], 'caption': ['one', 'two', 'three']}
    Dataset.from_dict(rows, Features({'image': Picture(), 'caption': Value('string')})).to_parquet(
        str(tmp_path / 'shards' / 'train-0.parquet'))
    assert convert(tmp_path / 'shards', tmp_path / 'out')[0] == 0
    assert [content for content, _ in read_back(tmp_path / 'out').values()] == [picture(n) for n in range(3)]


@pytest.mark.parametrize('texts, places', [
    ({'texts': [{'user': 'What differs?', 'assistant': 'the colour'}]}, ((0, 0), (0, 0))),
    ({'conversations': turns('<image>\nWhat?') + turns('And <image>?')}, ((0, 0), (1, 4)))])
def test_several_pictures_of_a_row_are_files_in_the_order_of_their_marks(texts, places, tmp_path):
    images = [{'bytes': picture(n), 'path': f'{n}.png'} for n in range(2)]
    make_parquet(tmp_path / 'shards' / '0.parquet', [{'images': images, **texts}])
    out = tmp_path / 'out'
    assert convert(tmp_path / 'shards', out)[0] == 0
    [item] = read_llava(out / 'data.json', out / 'images', BadSamples(out / 'none.jsonl', 0), max_images=2)
    assert [open(path, 'rb').read() for path in item.images] == [picture(0), picture(1)]
    assert item.image_places == places and not any('<image>' in question for question, _ in item.turns)


@pytest.mark.parametrize('row, reason', [
    ({'image': {'bytes': None, 'path': 'a.jpg'}, 'caption': 'x'}, "image 'a.jpg' is named and not inside"),
    ({'images': [{'bytes': picture(0)}, None], 'caption': 'x'}, '1 of 2 images are empty'),
    ({'images': [{'bytes': picture(0)}] * 2, 'conversations': turns('<image>\nWhat?')}, '1 <image> marks for 2 images'),
    ({'image': {'bytes': picture(0)[:200]}, 'caption': 'x'}, 'not a whole image'),
    ({'image': {'bytes': picture(0)}, 'label': 3}, 'no text: its columns are image, label')])
def test_bad_rows_of_parquet_are_named(row, reason, tmp_path):
    make_parquet(tmp_path / 'shards' / '0.parquet', [row])
    assert reason in convert(tmp_path / 'shards', tmp_path / 'out')[0]


def test_a_damaged_parquet_file_is_a_line(tmp_path):
    make_parquet(tmp_path / 'shards' / '0.parquet', [{'image': {'bytes': picture(0)}, 'caption': 'x'}] * 50)
    path = tmp_path / 'shards' / '0.parquet'
    path.write_bytes(path.read_bytes()[:1000])
    code, _ = convert(tmp_path / 'shards', tmp_path / 'out')
    assert '0.parquet: cannot read this parquet file' in code and '\n' not in code


def test_without_the_package_parquet_says_what_to_install(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'datasets', None)
    (tmp_path / 'shards').mkdir()
    (tmp_path / 'shards' / '0.parquet').write_bytes(b'')
    assert "pip install '.[datasets]'" in convert(tmp_path / 'shards', tmp_path / 'out')[0]


# -----------------------------------------------------------------------------
# AudioCaps


def make_captions(path, rows):
    with open(path, 'w', newline='') as f:
        writer = csv.writer(f)
        writer.writerow(['audiocap_id', 'youtube_id', 'start_time', 'caption'])
        writer.writerows(rows)


def test_audiocaps_becomes_a_manifest_of_the_clips_that_are_there(tmp_path):
    (tmp_path / 'clips' / 'train').mkdir(parents=True)
    for name in '-abc.wav', 'train/Ydef.flac', 'ghi_30.ogg', 'notes.txt':
        (tmp_path / 'clips' / name).write_bytes(b'x')
    make_captions(tmp_path / 'train.csv', [(91, '-abc', 0, 'A bell, twice'), (92, 'def', 10, 'Rain'),
                                           (93, 'ghi', 30, 'A dog'), (94, 'gone', 0, 'Wind')])
    command = (tmp_path / 'train.csv', tmp_path, f'--clips={tmp_path}/clips')
    code, _ = convert(*command)
    assert 'train.csv:5: no clip gone in' in code
    assert convert(*command, '--max_bad_samples=1')[0] == 0
    captioned = list(read_manifest(tmp_path / 'manifest.jsonl', BadSamples(tmp_path / 'none.jsonl', 0)))
    assert [(c.id, c.path.removeprefix(f'{tmp_path}/'), c.text) for c in captioned] == [
        ('91', 'clips/-abc.wav', 'A bell, twice'), ('92', 'clips/train/Ydef.flac', 'Rain'),
        ('93', 'clips/ghi_30.ogg', 'A dog')]
    assert read_json(tmp_path / 'bad_samples.jsonl')['id'] == '94'


def test_audiocaps_wants_its_columns_and_clips_inside_out_dir(tmp_path):
    make_captions(tmp_path / 'train.csv', [])
    (tmp_path / 'out').mkdir()
    assert 'wanted a folder inside' in convert(tmp_path / 'train.csv', tmp_path / 'out', f'--clips={tmp_path}')[0]
    (tmp_path / 'train.csv').write_text('youtube_id,caption\nabc,A bell, twice\n')
    code, _ = convert(tmp_path / 'train.csv', tmp_path, f'--clips={tmp_path}')
    assert 'train.csv:2: 3 cells for 2 columns' in code
    (tmp_path / 'train.csv').write_text('file_name,caption_1\na.wav,x\n')
    code, _ = convert(tmp_path / 'train.csv', tmp_path, f'--clips={tmp_path}')
    assert 'wanted columns youtube_id and caption, found file_name' in code
