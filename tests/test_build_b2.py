"""build_b2.py: what it reads, what it refuses, that any way of running it gives the same bytes, that its gates fail."""
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import stub_codecs
import test_codec
import torch
from conftest import REPO, run_script
from PIL import Image
from test_data import one_line
from transformers import AutoTokenizer, Qwen3Config

import common
import gates
from small import make as make_small
import uti
from data import Ledger, read_audio, read_index, read_manifest, read_shards, read_sound_folder
from uti import TokenSpace

REAL_UTI = uti.UTI
SAME = '*.safetensors', '*.json', 'bad_samples.jsonl'  # all but report.json, which holds times


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """48 pictures in LLaVA form, 30 sounds in a manifest with two captions each, a tokenizer, an audit that passed."""
    root, rng = tmp_path_factory.mktemp('b2'), np.random.default_rng(0)
    for folder in 'images', 'sounds', 'audit':
        (root / folder).mkdir()
    texts = [f'a {a} {b} {n}' for n in range(30) for a, b in (('long', 'tone'), ('sound of', 'noise'))]
    tokenizer = make_small.make_tokenizer(texts, n_ids=300)
    tokenizer.save_pretrained(root / 'llm')
    Qwen3Config(vocab_size=320).save_pretrained(root / 'llm')
    pictures = []
    for n in range(48):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / 'images' / f'{n}.png')
        pictures.append({'id': f'p{n}', 'image': f'{n}.png', 'conversations': [
            {'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': f'a picture {n}'}]})
    (root / 'pictures.json').write_text(json.dumps(pictures))
    with open(root / 'sounds.jsonl', 'w') as f:
        for n in range(30):
            soundfile.write(root / 'sounds' / f'{n}.wav', rng.uniform(-1, 1, 5 + n % 4).astype(np.float32), 8)
            for c in range(2):
                f.write(json.dumps({'id': f's{n}-{c}', 'source': 'x', 'audio': f'sounds/{n}.wav',
                                    'text': texts[2 * n + c]}) + '\n')
    TokenSpace(stub_codecs.BASE, stub_codecs.IMAGE, stub_codecs.AUDIO).save(root / 'audit' / 'token_space.json')
    gates.conclude(root / 'audit', [gates.exactly('an audit', 0, 0)])
    (root / 'b2.py').write_text(f'''
manifests = ('{root}/sounds.jsonl',)
data_json = '{root}/pictures.json'
image_root = '{root}/images'
audit_dir = '{root}/audit'
llm = '{root}/llm'
n_golden = 4
eval_share = 0.2
shard_media = 7
max_seq_len = 64
batch_size = 4
n_checked = 8
''')
    return root


@pytest.fixture
def build(world, monkeypatch, capsys):
    """build(out_dir, --key=value ..., script=...) runs the script here; returns (exit status or line, what it said)."""
    monkeypatch.setattr(uti, 'UTI', stub_codecs.StubUTI)   # but for the tests that put the real one back
    locks, lock_run = [], common.lock_run              # let go after each run, as the end of a process would
    monkeypatch.setattr(common, 'lock_run', lambda out: locks.append(lock_run(out)))

    def run(out, *settings, script=REPO / 'build_b2.py', config=world / 'b2.py'):
        monkeypatch.setattr(sys, 'argv', [str(script), str(config), f'--out_dir={out}', *settings])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            runpy.run_path(str(script), run_name='__main__')
        while locks:
            locks.pop().release()
        return e.value.code, capsys.readouterr().out
    return run


@pytest.fixture(scope='module')
def straight(world, tmp_path_factory):
    """The out dir of one uninterrupted run of one process."""
    out = tmp_path_factory.mktemp('straight')
    done = run_script('tests/stub_codecs.py', 'build_b2.py', world / 'b2.py', f'--out_dir={out}')
    assert done.returncode == 0, done.stderr
    return out


def files(out):
    return {p.name: p.read_bytes() for pattern in SAME for p in Path(out).glob(pattern) if p.name != 'report.json'}


def patched(tmp_path, *changes):
    """A copy of the script with each (line, other line) exchanged."""
    source = (REPO / 'build_b2.py').read_text()
    for line, other in changes:
        assert line in source
        source = source.replace(line, other)
    (tmp_path / 'patched_b2.py').write_text(source)
    return tmp_path / 'patched_b2.py'


def failed(out):
    return [g['name'] for g in json.loads((out / 'gates.json').read_text())['gates'] if not g['passed']]


# -----------------------------------------------------------------------------
# what comes out

def test_everything_that_went_in_is_read_back(world, straight):
    splits = {split: read_shards(straight, split) for split in ('train', 'eval', 'golden')}
    media = [{r.media for r in records} for records in splits.values()]
    assert len(set.union(*media)) == sum(map(len, media)) == 48 + 30
    assert Counter(r.modality for r in splits['golden']) == {'image': 4, 'audio': 4}
    held = splits['eval'] + splits['golden']
    assert len(held) == len({r.media for r in held})   # held out once
    captions = Counter(r.media for r in splits['train'] if r.modality == 'audio')
    assert set(captions.values()) == {2}               # each stored once, captioned twice
    tokenizer = AutoTokenizer.from_pretrained(world / 'llm')
    said = {r.id: tokenizer.decode(r.text) for records in splits.values() for r in records}
    assert all(said[id] == f'a picture {id[1:]}' for id in said if id[0] == 'p')
    pixels = np.asarray(Image.open(world / 'images' / '3.png').convert('RGB').resize((4, 4), 3)).astype(float)
    codes = [int(pixels[y:y + 2, x:x + 2].mean() // 16) + 324 for y in (0, 2) for x in (0, 2)]   # 320 rows, 4 specials
    assert next(r.payload.tolist() for records in splits.values() for r in records if r.id == 'p3') == codes


def test_the_index_and_the_report_say_what_is_there(straight):
    index, space = read_index(straight)
    assert index['token_space'] == space.sha256 and index['codecs']['image'] == {'class': 'StubImage', 'sha256': 'cd'}
    names = [s['name'] for split in index['splits'].values() for s in split['shards']]
    assert sorted(names) == sorted(p.stem for p in straight.glob('*.safetensors')) and len(names) > 10
    report = json.loads((straight / 'report.json').read_text())
    assert set(report['lengths']) == {'i2t', 'a2t', 't2i', 't2a', 'text'} and report['skipped'] == []
    assert report['lengths']['i2t']['items'] == 48 and report['this_start']['shards'] == len(names)
    assert report['lengths']['i2t']['p50'] == report['lengths']['t2i']['p50'] + 1
    assert sum(report['bytes'].values()) == sum(p.stat().st_size for p in straight.glob('*.safetensors'))
    assert json.loads((straight / 'gates.json').read_text())['passed']


# -----------------------------------------------------------------------------
# any way of running it gives the same bytes

def test_batched_is_one_at_a_time_and_a_finished_folder_stays_as_it_is(build, straight, tmp_path):
    assert build(tmp_path, '--batch_size=1', '--workers=1')[0] == 0
    assert files(tmp_path) == files(straight)
    status, said = build(tmp_path)
    assert status == 0 and '0 items of 0 media files' in said and files(tmp_path) == files(straight)


def test_real_codecs_give_the_ids_of_one_at_a_time(build, world, tmp_path, monkeypatch):
    torch.manual_seed(0)
    for name, model in ('janus', test_codec.janus()), ('encodec', test_codec.encodec()):
        model.save_pretrained(tmp_path / name)
    real = REAL_UTI.build(world / 'llm', tmp_path / 'janus', tmp_path / 'encodec', 0.12)
    real.space.save(tmp_path / 'audit' / 'token_space.json')
    gates.conclude(tmp_path / 'audit', [gates.exactly('an audit', 0, 0)])
    monkeypatch.setattr(uti, 'UTI', REAL_UTI)
    settings = [f'--audit_dir={tmp_path}/audit', f'--image_codec={tmp_path}/janus', f'--audio_codec={tmp_path}/encodec']
    for size in 1, 16:
        assert build(tmp_path / f'by {size}', *settings, f'--batch_size={size}')[0] == 0
    assert files(tmp_path / 'by 1') == files(tmp_path / 'by 16')
    records = read_shards(tmp_path / 'by 16', 'train', real.space)
    assert len({tuple(r.payload) for r in records if r.modality == 'image'}) > 20   # not one code for everything
    sound = next(r for r in records if r.modality == 'audio')
    wave = read_audio(world / 'sounds' / f"{sound.id[1:].split('-')[0]}.wav", 16_000, real.space.audio['samples'])
    assert np.array_equal(real.encode_audio([wave])[0][0], sound.payload)
    assert sound.meta == {'n_samples': real.space.audio['samples'], 'sample_rate': 16_000}


def test_a_killed_run_goes_on_to_the_same_bytes(build, world, straight, tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'STUB_SECONDS': '0.1', 'CUDA_VISIBLE_DEVICES': ''}
    process = subprocess.Popen([sys.executable, 'tests/stub_codecs.py', 'build_b2.py', world / 'b2.py',
                                f'--out_dir={tmp_path}'], cwd=REPO, env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob('train-*.json'))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = {name: body for name, body in files(tmp_path).items() if name.endswith('.safetensors')}
    assert 3 <= len(there) < len(list(straight.glob('*.safetensors'))) and not (tmp_path / 'index.json').exists()
    status, said = build(tmp_path)
    assert status == 0 and files(tmp_path) == files(straight) and not list(tmp_path.glob('*.tmp'))
    made = json.loads((tmp_path / 'report.json').read_text())['this_start']['shards']
    assert made <= len(list(straight.glob('*.safetensors'))) - 3


def test_two_ranks_give_the_bytes_of_one(world, straight, tmp_path):
    done = run_script('tests/stub_codecs.py', 'build_b2.py', world / 'b2.py', f'--out_dir={tmp_path}', ranks=2)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == files(straight)


def test_a_damaged_or_missing_shard_is_made_again(build, straight, tmp_path):
    shutil.copytree(straight, tmp_path / 'run')
    path = tmp_path / 'run' / 'train-00001.safetensors'
    path.write_bytes(path.read_bytes()[:-1] + b'?')
    (tmp_path / 'run' / 'eval-00000.json').unlink()
    with pytest.raises(SystemExit, match='train-00001.safetensors: sha256 .* damaged'):
        read_shards(tmp_path / 'run', 'train')
    status, _ = build(tmp_path / 'run')
    assert status == 0 and files(tmp_path / 'run') == files(straight)
    assert json.loads((tmp_path / 'run' / 'report.json').read_text())['this_start']['shards'] == 2


@pytest.mark.parametrize('change, found', [
    ('--shard_media=9', 'holds shards with shard_media = 7, this run has 9'),
    ('--data_json=', 'holds shards with n_media = 78, this run has 30')])
def test_a_folder_of_another_plan_is_refused(build, straight, tmp_path, change, found):
    shutil.copytree(straight, tmp_path / 'run')
    line, _ = build(tmp_path / 'run', change)
    one_line(line, found, 'set another out_dir')
    assert files(tmp_path / 'run') == files(straight)


def test_another_token_space_is_refused(build, world, straight, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path / 'run')
    monkeypatch.setattr(stub_codecs, 'IMAGE', {**stub_codecs.IMAGE, 'sha256': 'other'})
    line, _ = build(tmp_path / 'run')                  # the audit was of another codec
    one_line(line, 'audit has another token space', "image.sha256 is 'cd' there and 'other' here")
    TokenSpace(stub_codecs.BASE, stub_codecs.IMAGE, stub_codecs.AUDIO).save(tmp_path / 'token_space.json')
    shutil.copy(world / 'audit' / 'gates.json', tmp_path)
    line, _ = build(tmp_path / 'run', f'--audit_dir={tmp_path}')               # the shards are
    one_line(line, 'run has another token space', "image.sha256 is 'cd' there and 'other' here")
    assert files(tmp_path / 'run') == files(straight)


# -----------------------------------------------------------------------------
# what it refuses

@pytest.mark.parametrize('line, says', [
    ('{"id": "x", "audio": "a.wav", "text": NaN}', 'NaN is not JSON'),
    ('{"id": "x", "id": "y", "audio": "a.wav", "text": "t"}', "'id' stands twice"),
    ('{"id": "x", "audio": "a.wav"', 'not valid JSON'), ('\udcff', 'not valid JSON'), ('[1]', 'no "id"'),
    ('{"audio": "a.wav", "text": "t"}', 'no "id"'),
    ('{"id": "x", "audio": "../a.wav", "text": "t"}', "audio '../a.wav' leaves the audio root"),
    ('{"id": "x", "audio": "/etc/a.wav", "text": "t"}', 'leaves the audio root'),
    ('{"id": "x", "image": "http://a/b.png", "text": "t"}', 'leaves the image root'),
    ('{"id": "x", "audio": "a.wav", "image": "a.png", "text": "t"}', 'image and audio, wanted one'),
    ('{"id": "x", "text": "t"}', 'neither image nor audio'),
    ('{"id": "x", "audio": 3, "text": "t"}', 'audio is 3'),
    ('{"id": "x", "audio": "a.wav", "text": "  "}', "text is '  '"),
    ('{"id": "x", "audio": "a.wav"}', 'text is None'),
    ('{"id": "x", "audio": "a.wav", "text": "\\ud800"}', 'not Unicode')])
def test_a_bad_line_of_a_manifest_goes_to_the_ledger(tmp_path, line, says):
    path, good = tmp_path / 'm.jsonl', '{"id": 7, "source": "s", "audio": "a.wav", "text": " ok "}'
    path.write_bytes(f'{good}\n\n{line}\n'.encode(errors='surrogateescape'))
    ledger = Ledger(tmp_path / 'bad.jsonl', 1)
    assert [(p.id, p.modality, p.path, p.text) for p in read_manifest(path, ledger)] == [
        ('7', 'audio', str(tmp_path / 'a.wav'), 'ok')]
    one_line(json.loads((tmp_path / 'bad.jsonl').read_text())['reason'], f'{path}:3', says)
    with pytest.raises(SystemExit, match='set max_bad_samples above 0'):
        read_manifest(path, Ledger(tmp_path / 'bad.jsonl', 0))


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'out.wav').write_bytes(b'')
    (tmp_path / 'in' / 'a.wav').symlink_to(tmp_path / 'out.wav')
    (tmp_path / 'in' / 'm.jsonl').write_text('{"id": "x", "audio": "a.wav", "text": "t"}')
    with pytest.raises(SystemExit, match='is a link out of the audio root'):
        read_manifest(tmp_path / 'in' / 'm.jsonl', Ledger(tmp_path / 'bad.jsonl', 0))


def test_a_folder_of_sounds_with_captions_as_clotho_has_them(tmp_path):
    (tmp_path / 'c.csv').write_text('file_name,caption_1,caption_2\na b.wav,"one, two",three\n../x.wav,no,\n')
    pairs = read_sound_folder(tmp_path, tmp_path / 'c.csv', Ledger(tmp_path / 'bad.jsonl', 2))
    assert [(p.id, p.text) for p in pairs] == [('a b.wav#caption_1', 'one, two'), ('a b.wav#caption_2', 'three')]
    assert len((tmp_path / 'bad.jsonl').read_text().splitlines()) == 2
    (tmp_path / 'c.csv').write_text('file,text\na.wav,x\n')
    with pytest.raises(SystemExit, match='wanted columns file_name, caption_1, ..., found file, text'):
        read_sound_folder(tmp_path, tmp_path / 'c.csv', None)


def test_bad_media_are_skipped_with_a_reason_and_capped(build, world, tmp_path):
    (tmp_path / 'cut.png').write_bytes((world / 'images' / '1.png').read_bytes()[:60])
    lines = [json.dumps({'id': id, **what}) + '\n' for id, what in {
        'gone': {'audio': 'none.wav', 'text': 't'}, 'cut': {'image': 'cut.png', 'text': 't'},
        's3-0': {'audio': 'sounds/3.wav', 'text': 'twice'}, 'long': {'audio': 'sounds/4.wav', 'text': 'word ' * 60},
    }.items()]
    shutil.copytree(world / 'sounds', tmp_path / 'sounds')
    (tmp_path / 'sounds.jsonl').write_text((world / 'sounds.jsonl').read_text() + ''.join(lines))
    sounds = f"--manifests=('{tmp_path}/sounds.jsonl',)"
    status, _ = build(tmp_path / 'run', sounds, '--max_bad_samples=4')
    assert status == 0
    reasons = {r['id']: r['reason'] for r in json.loads((tmp_path / 'run' / 'report.json').read_text())['skipped']}
    assert reasons.keys() == {'gone', 'cut', 's3-0', 'long'}
    for id, says in {'gone': 'none.wav: cannot read this file', 'cut': 'cut.png: not a whole image',
                     's3-0': 'id s3-0 stands twice', 'long': 'wanted at most max_seq_len = 64'}.items():
        one_line(reasons[id], says)
    ledger = (tmp_path / 'run' / 'bad_samples.jsonl').read_text()
    assert build(tmp_path / 'run', sounds, '--max_bad_samples=4')[0] == 0       # started again: not noted twice
    assert (tmp_path / 'run' / 'bad_samples.jsonl').read_text() == ledger
    ids = {r.id for split in ('train', 'eval', 'golden') for r in read_shards(tmp_path / 'run', split)}
    assert not ids & {'gone', 'cut', 'long'}
    line, _ = build(tmp_path / 'capped', sounds, '--max_bad_samples=3')
    one_line(line, 'set max_bad_samples above 3')


@pytest.mark.parametrize('change, found', [
    ('--n_golden=40', 'of 40 golden; add data or change eval_share and n_golden'),
    ('--manifests=("none.jsonl",)', 'none.jsonl: cannot read this manifest'),
    ('--audit_dir=none', 'none: no such folder; run the stage')])
def test_bad_input_gets_one_line(build, tmp_path, change, found):
    line, _ = build(tmp_path, change)
    one_line(line, found)


def test_codecs_that_failed_their_audit_are_refused_unless_allowed(build, world, tmp_path, monkeypatch):
    shutil.copytree(world / 'audit', tmp_path / 'audit')
    gates.conclude(tmp_path / 'audit', [gates.at_least('PSNR of images', 3, 20)])
    line, _ = build(tmp_path / 'out', f'--audit_dir={tmp_path}/audit')
    one_line(line, 'failed its gate "PSNR of images"', 'allow_failed_gates')
    assert build(tmp_path / 'out', f'--audit_dir={tmp_path}/audit', '--allow_failed_gates=True')[0] == 0


# -----------------------------------------------------------------------------
# every gate can fail

def test_a_split_by_caption_leaks_media_and_fails(build, tmp_path):
    by_media = "draw('eval', key[0]) {} eval_share]"
    by_caption = "any(draw('eval', pair.id) {} eval_share for pair in media[key])]"
    script = patched(tmp_path, *((by_media.format(side), by_caption.format(side)) for side in ('<', '>=')))
    status, _ = build(tmp_path / 'out', script=script)
    assert status == 1 and 'media in two splits, or twice in one' in failed(tmp_path / 'out')


def test_a_shard_damaged_on_its_way_to_disk_fails(build, tmp_path, monkeypatch):
    import data
    write = data.write_atomic

    def flip(path, content):
        if Path(path).name == 'train-00002.safetensors':
            content = content[:-1] + bytes([content[-1] ^ 1])
        write(path, content)
    monkeypatch.setattr(data, 'write_atomic', flip)
    status, said = build(tmp_path)
    assert status == 1 and 'share of shards with the right sha256 and token space' in failed(tmp_path)
    assert 'train-00002' in json.loads((tmp_path / 'report.json').read_text())['wrong_shards'][0]


def test_a_codec_that_changes_its_mind_fails(build, tmp_path, monkeypatch):
    whole, seen = stub_codecs.StubUTI.encode_image, Counter()

    def drifting(self, images):
        ids, metas = whole(self, images)
        for n, image in enumerate(images):
            seen[image.tobytes()] += 1
            ids[n, 0] = self.space['image'].first + seen[image.tobytes()]
        return ids, metas
    monkeypatch.setattr(stub_codecs.StubUTI, 'encode_image', drifting)
    assert build(tmp_path)[0] == 1 and failed(tmp_path) == ['checked media that give other ids when encoded again']


@pytest.mark.parametrize('wrong', [lambda wave: wave[:-1], lambda wave: wave * np.nan])
def test_sounds_that_decode_short_or_not_finite_fail(build, tmp_path, monkeypatch, wrong):
    whole = stub_codecs.StubUTI.decode_audio
    monkeypatch.setattr(stub_codecs.StubUTI, 'decode_audio', lambda *a: [wrong(w) for w in whole(*a)])
    assert build(tmp_path)[0] == 1
    assert failed(tmp_path) == ['share of checked media that decode to the right size, finite']


def test_rows_that_are_cut_or_have_no_label_fail(build, tmp_path):
    cut = patched(tmp_path, ('token_row(r, task, grammar, max_seq_len)', 'token_row(r, task, grammar, 14)'))
    assert build(tmp_path / 'cut', script=cut)[0] == 1 and failed(tmp_path / 'cut') == ['truncated rows']
    unlabelled = patched(tmp_path, ('for r in records[rank', 'for r in [*map(emptied, records)][rank'),
                         ('# measure,', 'def emptied(r):\n    from dataclasses import replace\n'
                                        '    return replace(r, text=r.text[:0])\n\n\n# measure,'))
    assert build(tmp_path / 'empty', script=unlabelled)[0] == 1
    assert failed(tmp_path / 'empty') == ['rows without a label']


def test_what_was_not_looked_at_has_not_passed():
    ids, media = {'train': ['a'], 'eval': ['b']}, {'train': ['x'], 'eval': ['y']}
    right = dict(shards=2, wrong_shards=0, ids=ids, media=media, checked=2, wrong_decodes=0, mismatches=0, rows=4,
                 unlabelled=0, truncated=0)
    assert all(g.passed for g in gates.tokenized(**right))
    one = [{name: 1} for name in ('wrong_shards', 'wrong_decodes', 'mismatches', 'unlabelled', 'truncated')]
    one += [{'shards': 0}, {'ids': {}}, {'media': {}}, {'ids': {'train': ['a', 'a']}}]
    for n_failed, wrong in [(1, wrong) for wrong in one] + [(2, {'checked': 0}), (2, {'rows': 0})]:
        assert sum(not g.passed for g in gates.tokenized(**{**right, **wrong})) == n_failed, wrong
