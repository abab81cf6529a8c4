"""build_b2.py: what it reads, what it refuses, that any way of running it gives the same bytes, that its gates fail."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import stub_codecs
import test_codec
import torch
from conftest import REPO, damage, on_two_ranks, run_here, run_script
from PIL import Image
from transformers import AutoTokenizer, Qwen3Config

import common
import gates
import media
import plan
import shards
import uti
from media import read_audio
from shards import read_index, read_shards, token_example
from small.models import make_tokenizer
from uti import TokenSpace

REAL_UTI = uti.UTI
SAME = '*.safetensors', '*.json', 'bad_samples.jsonl'  # all but report.json, which holds times


def run_inline(script, *args):
    """run_here, after which the out dir's lock is given up as at the end of a process."""
    locks = []
    lock_run = common.lock_run

    def lock_and_note(out):
        locks.append(lock_run(out))
        return locks[-1]                               # training.py, first imported here, keeps this function

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, 'lock_run', lock_and_note)
        result = run_here(script, *args)
    for lock in locks:
        lock.release()
    return result


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """48 pictures in LLaVA form, 30 sounds in a manifest with two captions each, a tokenizer, an audit that passed."""
    root = tmp_path_factory.mktemp('b2')
    rng = np.random.default_rng(0)
    for folder in 'images', 'sounds', 'audit':
        (root / folder).mkdir()
    texts = []
    for n in range(30):
        texts += [f'a long tone {n}', f'a sound of noise {n}']
    make_tokenizer(texts, n_ids=300).save_pretrained(root / 'llm')
    Qwen3Config(vocab_size=320).save_pretrained(root / 'llm')
    pictures = []
    for n in range(48):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / 'images' / f'{n}.png')
        pictures.append({'id': f'p{n}', 'image': f'{n}.png', 'conversations': [
            {'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': f'a picture {n}'}]})
    (root / 'pictures.json').write_text(json.dumps(pictures))
    with open(root / 'sounds.jsonl', 'w') as f:
        for n, text in enumerate(texts):
            f.write(json.dumps({'id': f's{n // 2}-{n % 2}', 'audio': f'sounds/{n // 2}.wav', 'text': text}) + '\n')
    for n in range(30):
        soundfile.write(root / 'sounds' / f'{n}.wav', rng.uniform(-1, 1, 5 + n % 4).astype(np.float32), 8)
    TokenSpace(stub_codecs.BASE, stub_codecs.IMAGE, stub_codecs.AUDIO).save(root / 'audit' / 'token_space.json')
    gates.conclude(root / 'audit', [gates.exactly('an audit', 0, 0)])
    (root / 'b2.py').write_text(f'''
manifests = ('{root}/sounds.jsonl',)
data_json = '{root}/pictures.json'
image_root = '{root}/images'
audit_dir = '{root}/audit'
llm = '{root}/llm'
n_golden = 4
n_eval = 2
eval_share = 0.2
shard_media = 7
max_seq_len = 64
batch_size = 4
n_checked = 8
''')
    return root


@pytest.fixture
def build(world, monkeypatch):
    """build(out_dir, --key=value ..., script=...) -> (exit status or message, what it printed)."""
    monkeypatch.setattr(uti, 'UTI', stub_codecs.StubUTI)   # but for the test that puts the real one back

    def run(out, *settings, script='build_b2.py'):
        return run_inline(script, world / 'b2.py', f'--out_dir={out}', *settings)
    return run


@pytest.fixture(scope='module')
def straight(world, tmp_path_factory):
    """The out dir of one uninterrupted run of one process."""
    out = tmp_path_factory.mktemp('straight')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uti, 'UTI', stub_codecs.StubUTI)
        code, printed = run_inline('build_b2.py', world / 'b2.py', f'--out_dir={out}')
    assert code == 0, printed
    return out


def files(out):
    """{name: bytes} of everything that must be the same."""
    found = {}
    for pattern in SAME:
        for path in Path(out).glob(pattern):
            found[path.name] = path.read_bytes()
    for name in 'report.json', 'checked.json':         # times, of a run and of files
        found.pop(name, None)
    return found


def made_shards(out):
    return json.loads((out / 'report.json').read_text())['this_start']['shards']


def failed(out):
    return [g['name'] for g in json.loads((out / 'gates.json').read_text())['gates'] if not g['passed']]


def one_line(error, *parts):
    """The message is one line and holds all of these."""
    assert '\n' not in str(error)
    for part in parts:
        assert part in str(error)


# -----------------------------------------------------------------------------
# what comes out


def test_everything_that_went_in_is_read_back(world, straight):
    splits = {split: list(read_shards(straight, split)) for split in shards.SPLITS}
    media = [{record.media_sha256 for record in records} for records in splits.values()]
    assert len(set.union(*media)) == sum(map(len, media)) == 48 + 30
    assert Counter(record.modality for record in splits['golden']) == {'image': 4, 'audio': 4}
    held_out = splits['eval'] + splits['golden']
    assert len(held_out) == len({record.media_sha256 for record in held_out})      # held out once
    captions = Counter(record.media_sha256 for record in splits['train'] if record.modality == 'audio')
    assert set(captions.values()) == {2}               # each stored once, captioned twice
    tokenizer = AutoTokenizer.from_pretrained(world / 'llm')
    records = {record.id: record for record in splits['train'] + held_out}
    for id, record in records.items():
        if record.modality == 'image':
            assert tokenizer.decode(record.text) == f'a picture {id[1:]}'
    pixels = np.asarray(Image.open(world / 'images' / '3.png').convert('RGB').resize((4, 4), 3)).astype(float)
    codes = []
    for y, x in (0, 0), (0, 2), (2, 0), (2, 2):
        codes.append(int(pixels[y:y + 2, x:x + 2].mean() // 16) + 324)             # 320 rows, 4 specials
    assert records['p3'].payload.tolist() == codes


def test_the_index_and_the_report_are_of_what_is_there(straight):
    index, space = read_index(straight)
    assert index['token_space'] == space.sha256 and index['codecs']['image'] == {'class': 'StubImage', 'sha256': 'cd'}
    names = []
    for split in index['splits'].values():
        names += [shard['name'] for shard in split['shards']]
    assert sorted(names) == sorted(path.stem for path in straight.glob('*.safetensors')) and len(names) > 10
    report = json.loads((straight / 'report.json').read_text())
    assert set(report['lengths']) == {'i2t', 'a2t', 't2i', 't2a', 'text'} and report['skipped'] == []
    assert report['lengths']['i2t']['items'] == 48 and made_shards(straight) == len(names)
    assert report['lengths']['i2t']['p50'] == report['lengths']['t2i']['p50'] + 1
    assert sum(report['bytes'].values()) == sum(path.stat().st_size for path in straight.glob('*.safetensors'))
    assert json.loads((straight / 'gates.json').read_text())['passed']


# -----------------------------------------------------------------------------
# any way of running it gives the same bytes


def test_batched_is_one_at_a_time_and_a_finished_folder_stays_as_it_is(build, straight, tmp_path):
    assert build(tmp_path, '--batch_size=1', '--workers=1')[0] == 0
    assert files(tmp_path) == files(straight)
    status, printed = build(tmp_path)
    assert status == 0 and '0 items of 0 media files' in printed and files(tmp_path) == files(straight)


def test_real_codecs_give_the_ids_of_one_at_a_time(build, world, tmp_path, monkeypatch):
    torch.manual_seed(0)
    test_codec.janus().save_pretrained(tmp_path / 'janus')
    test_codec.encodec().save_pretrained(tmp_path / 'encodec')
    real = REAL_UTI.build(world / 'llm', tmp_path / 'janus', tmp_path / 'encodec', clip_seconds=0.12)
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
    file = sound.id[1:].split('-')[0] + '.wav'
    wave = read_audio(world / 'sounds' / file, 16_000, real.space.audio['samples'])
    ids, metas = real.encode_audio([wave])
    assert np.array_equal(ids[0], sound.payload) and metas[0] == sound.meta


def test_a_killed_run_goes_on_to_the_same_bytes(build, world, straight, tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'STUB_SECONDS': '0.1', 'CUDA_VISIBLE_DEVICES': ''}
    process = subprocess.Popen([sys.executable, 'tests/stub_codecs.py', 'build_b2.py', world / 'b2.py',
                                f'--out_dir={tmp_path}'], cwd=REPO, env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob('train-*.json'))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    n_shards = len(list(straight.glob('*.safetensors')))
    assert 3 <= len(list(tmp_path.glob('*.safetensors'))) < n_shards and not (tmp_path / 'index.json').exists()
    assert build(tmp_path)[0] == 0
    assert files(tmp_path) == files(straight) and not list(tmp_path.glob('*.tmp'))
    assert made_shards(tmp_path) <= n_shards - 3


def test_two_ranks_give_the_bytes_of_one(world, straight, tmp_path):
    done = run_script('tests/stub_codecs.py', 'build_b2.py', world / 'b2.py', f'--out_dir={tmp_path}', ranks=2)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path) == files(straight)
    both, one = (json.loads((out / 'report.json').read_text()) for out in (tmp_path, straight))
    assert both['lengths'] == one['lengths']


@pytest.fixture
def hashed(monkeypatch):
    """The names of the media files whose bytes are read for their hash, as they are."""
    names = []
    sha256 = plan.media_sha256

    def noting(path):
        names.append(Path(path).name)
        return sha256(path)
    monkeypatch.setattr(plan, 'media_sha256', noting)
    return names


def test_a_start_hashes_what_it_has_not_hashed_or_what_has_changed(build, world, straight, tmp_path, hashed):
    shutil.copytree(world / 'sounds', tmp_path / 'sounds')
    shutil.copy(world / 'sounds.jsonl', tmp_path)
    settings = f"--manifests=('{tmp_path}/sounds.jsonl',)", '--max_bad_samples=2'
    out = tmp_path / 'run'
    assert build(out, *settings)[0] == 0
    assert sorted(hashed) == sorted(path.name for path in [*world.glob('images/*'), *world.glob('sounds/*')])
    hashed.clear()
    assert build(out, *settings)[0] == 0 and hashed == []
    os.utime(tmp_path / 'sounds' / '7.wav')            # written again, the same bytes
    assert build(out, *settings)[0] == 0 and hashed == ['7.wav']
    assert files(out) == {**files(straight), 'index.json': files(out)['index.json']}       # of another manifest
    hashed.clear()
    body = (tmp_path / 'sounds' / '8.wav').read_bytes()
    (tmp_path / 'sounds' / '8.wav').write_bytes(body[:-1] + bytes([body[-1] ^ 1]))         # as long
    message, _ = build(out, *settings)
    one_line(message, 'holds shards with samples_sha256')
    assert hashed == ['8.wav']
    (tmp_path / 'sounds' / '8.wav').unlink()
    message, _ = build(out, *settings)
    one_line(message, 'holds shards with n_media = 78, this run has 77')
    for name in 'media.safetensors', 'media.json':
        hashed.clear()
        damage(out / 'plan' / name)
        build(out, *settings)
        assert len(hashed) == 77


def test_each_shard_is_taken_once_whatever_the_pace_of_the_ranks(tmp_path):
    names = [f'train-{n:05d}' for n in range(9)]
    fast = plan.take_shards(tmp_path, names)
    slow = plan.take_shards(tmp_path, names)
    taken = [next(fast), next(slow), next(fast), next(fast), next(slow), *fast]
    assert taken == names and list(slow) == []


def test_the_next_shard_is_read_while_this_one_is_written(build, tmp_path, monkeypatch):
    """Every shard but the last of the 13 waits for a file of the next one to be read."""
    n_read = []
    n_written = [0]
    waited = []
    read = {'read_image': media.read_image, 'read_audio': media.read_audio}
    write_shard = shards.write_shard

    def noting(name):
        return lambda *args: (n_read.append(args[0]), read[name](*args))[1]

    def waiting(folder, name, space, of_shard, captions, **more):
        n_written[0] += len(of_shard)
        until = time.time() + 2
        while len(n_read) - n_held_out <= n_written[0] and time.time() < until and n_written[0] < 78:
            time.sleep(0.001)
        waited.append(time.time() < until)
        return write_shard(folder, name, space, of_shard, captions, **more)

    n_held_out = 12                                    # read beforehand: 4 golden ones and 2 to evaluate, twice
    for name in read:
        monkeypatch.setattr(media, name, noting(name))
    monkeypatch.setattr(shards, 'write_shard', waiting)
    assert build(tmp_path, '--n_checked=2')[0] == 0
    assert len(waited) > 10 and all(waited)


def test_a_damaged_or_missing_shard_is_made_again(build, straight, tmp_path):
    shutil.copytree(straight, tmp_path / 'run')
    path = tmp_path / 'run' / 'train-00001.safetensors'
    path.write_bytes(path.read_bytes()[:-1] + b'?')
    (tmp_path / 'run' / 'eval-00000.json').unlink()
    with pytest.raises(SystemExit, match='train-00001.safetensors: sha256 .* damaged'):
        read_shards(tmp_path / 'run', 'train')
    assert build(tmp_path / 'run')[0] == 0
    assert files(tmp_path / 'run') == files(straight) and made_shards(tmp_path / 'run') == 2


def test_a_folder_of_another_plan_or_token_space_is_refused(build, world, straight, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path / 'run')
    message, _ = build(tmp_path / 'run', '--shard_media=9')
    one_line(message, 'holds shards with shard_media = 7, this run has 9', 'set another out_dir')
    message, _ = build(tmp_path / 'run', '--data_json=')
    one_line(message, 'holds shards with n_media = 78, this run has 30')
    monkeypatch.setattr(stub_codecs, 'IMAGE', {**stub_codecs.IMAGE, 'sha256': 'other'})
    message, _ = build(tmp_path / 'run')                  # the audit was of another codec
    one_line(message, 'audit has another token space', "image.sha256 is 'cd' there and 'other' here")
    TokenSpace(stub_codecs.BASE, stub_codecs.IMAGE, stub_codecs.AUDIO).save(tmp_path / 'token_space.json')
    shutil.copy(world / 'audit' / 'gates.json', tmp_path)
    message, _ = build(tmp_path / 'run', f'--audit_dir={tmp_path}')               # the shards are
    one_line(message, 'run has another token space', "image.sha256 is 'cd' there and 'other' here")
    assert files(tmp_path / 'run') == files(straight)


# -----------------------------------------------------------------------------
# what it refuses


def test_bad_media_are_skipped_with_a_reason_and_capped(build, world, tmp_path):
    shutil.copytree(world / 'sounds', tmp_path / 'sounds')
    (tmp_path / 'cut.png').write_bytes((world / 'images' / '1.png').read_bytes()[:60])
    os.mkfifo(tmp_path / 'pipe.png')
    with open(tmp_path / 'sounds.jsonl', 'w') as f:
        f.write((world / 'sounds.jsonl').read_text())
        for record in [{'id': 'gone', 'audio': 'none.wav', 'text': 't'},
                       {'id': 'cut', 'image': 'cut.png', 'text': 't'},
                       {'id': 'pipe', 'image': 'pipe.png', 'text': 't'},
                       {'id': 'long', 'audio': 'sounds/4.wav', 'text': 'word ' * 60}]:
            f.write(json.dumps(record) + '\n')
    sounds = f"--manifests=('{tmp_path}/sounds.jsonl',)"
    assert build(tmp_path / 'run', sounds, '--max_bad_samples=4')[0] == 0
    skipped = json.loads((tmp_path / 'run' / 'report.json').read_text())['skipped']
    reasons = {record['id']: record['reason'] for record in skipped}
    wanted = {'gone': 'none.wav: cannot read this file', 'cut': 'cut.png: not a whole image',
              'pipe': 'pipe.png: cannot read this file (it is no file)', 'long': 'wanted at most max_seq_len = 64'}
    assert reasons.keys() == wanted.keys()
    for id, reason in wanted.items():
        one_line(reasons[id], reason)
    before = files(tmp_path / 'run')
    assert build(tmp_path / 'run', sounds, '--max_bad_samples=4')[0] == 0       # started again: not noted twice
    assert files(tmp_path / 'run') == before
    ids = set()
    for split in shards.SPLITS:
        ids |= {record.id for record in read_shards(tmp_path / 'run', split)}
    assert not ids & {'gone', 'cut', 'long', 'pipe'}
    message, _ = build(tmp_path / 'capped', sounds, '--max_bad_samples=3')
    one_line(message, 'set max_bad_samples above 3')


def test_forty_cut_pictures_are_the_same_list_on_two_ranks_and_one_limit(build, world, tmp_path, capfd):
    shutil.copytree(world / 'sounds', tmp_path / 'sounds')
    whole = (world / 'images' / '1.png').read_bytes()
    lines = (world / 'sounds.jsonl').read_text().splitlines()
    for n in range(40):
        (tmp_path / f'{n}.png').write_bytes(whole[:60 + n])
        lines.append(json.dumps({'id': f'cut {n}', 'image': f'{n}.png', 'text': 't'}))
    (tmp_path / 'sounds.jsonl').write_text('\n'.join(lines))
    settings = f"--manifests=('{tmp_path}/sounds.jsonl',)", '--max_bad_samples=40'
    assert build(tmp_path / 'one', *settings)[0] == 0
    assert on_two_ranks(build, tmp_path / 'two', *settings) == [0, 0]
    assert files(tmp_path / 'two') == files(tmp_path / 'one')
    listed = [json.loads(line)['id'] for line in files(tmp_path / 'two')['bad_samples.jsonl'].splitlines()]
    assert sorted(listed) == sorted(f'cut {n}' for n in range(40))
    status = on_two_ranks(build, tmp_path / 'two', settings[0], '--max_bad_samples=39')
    assert status[0] == 1 and 'set max_bad_samples above 39' in capfd.readouterr().err


def test_ids_that_stand_in_several_lists_are_made_keys(build, world, tmp_path):
    pictures = json.loads((world / 'pictures.json').read_text())
    for record in pictures:
        record['id'] = 's1-0'
    (tmp_path / 'pictures.json').write_text(json.dumps(pictures))
    assert build(tmp_path / 'run', f'--data_json={tmp_path}/pictures.json')[0] == 0
    ids = [record.id for split in shards.SPLITS for record in read_shards(tmp_path / 'run', split)]
    assert len(ids) == len(set(ids)) and {f's1-0#{n}' for n in range(2, 49)} <= set(ids)


@pytest.mark.parametrize('change, found', [
    ('--n_golden=40', 'of 40 golden; add data or change n_eval and n_golden'),
    ('--n_eval=27', '30 media files of audio: 0 to train on, 26 of 27 to evaluate on and 4 of 4 golden; add data'),
    ('--batch_size=0', 'batch_size = 0: wanted at least 1'), ('--manifests=(3,)', '3 is no path of a file'),
    ('--eval_share=2', 'wanted a share'),
    ('--manifests=("none.jsonl",)', 'none.jsonl: cannot read this manifest'),
    ('--audit_dir=none', 'none: no such folder; run the stage')])
def test_bad_input_gets_one_line(build, tmp_path, change, found):
    message, _ = build(tmp_path, change)
    one_line(message, found)


def test_codecs_that_failed_their_audit_are_refused_unless_allowed(build, world, tmp_path):
    shutil.copytree(world / 'audit', tmp_path / 'audit')
    gates.conclude(tmp_path / 'audit', [gates.at_least('PSNR of images', 3, 20)])
    message, _ = build(tmp_path / 'out', f'--audit_dir={tmp_path}/audit')
    one_line(message, 'failed its gate "PSNR of images"', 'allow_failed_gates')
    assert build(tmp_path / 'out', f'--audit_dir={tmp_path}/audit', '--allow_failed_gates=True')[0] == 0


def test_as_many_of_each_modality_are_held_out_as_was_asked_and_the_share_adds_to_them(build, straight, tmp_path):
    """Those with the lowest numbers of the seed, so that a higher n_eval only adds to them."""
    held_out = [{record.media_sha256 for record in read_shards(straight, 'eval')}]
    for n in 12, 15:
        assert build(tmp_path / str(n), f'--n_eval={n}', '--eval_share=0.0')[0] == 0
        found = read_shards(tmp_path / str(n), 'eval')
        assert Counter(record.modality for record in found) == {'image': n, 'audio': n}
        held_out.append({record.media_sha256 for record in found})
    assert held_out[1] < held_out[2] and len(held_out[0] ^ held_out[1]) < 14
    shared = {record.media_sha256 for record in read_shards(tmp_path / '15', 'train')} & held_out[2]
    assert not shared


def test_held_out_files_that_cannot_be_used_do_not_count(build, world, tmp_path):
    shutil.copytree(world / 'sounds', tmp_path / 'sounds')
    shutil.copy(world / 'sounds.jsonl', tmp_path)
    for n in range(12):                                # as much text as in no other
        (tmp_path / 'sounds' / f'{n}.wav').write_bytes(b'no sound %d' % n)
    settings = f"--manifests=('{tmp_path}/sounds.jsonl',)", '--eval_share=0.0', '--max_bad_samples=24'
    assert build(tmp_path / 'out', *settings, '--n_eval=10')[0] == 0
    assert Counter(record.modality for record in read_shards(tmp_path / 'out', 'eval')) == {'image': 10, 'audio': 10}
    message, _ = build(tmp_path / 'few', *settings, '--n_eval=15')
    one_line(message, '14 of 15 to evaluate on')


# -----------------------------------------------------------------------------
# every gate can fail


def test_media_in_two_splits_fail(build, tmp_path):
    source = (REPO / 'build_b2.py').read_text()
    line = "'eval': held_out,"
    assert source.count(line) == 1
    (tmp_path / 'leaking_b2.py').write_text(source.replace(line, "'eval': [*held_out, train[0]],"))
    assert build(tmp_path / 'out', script=tmp_path / 'leaking_b2.py')[0] == 1
    assert failed(tmp_path / 'out') == ['ids in two splits, or twice in one', 'media in two splits, or twice in one']


def test_a_shard_damaged_on_its_way_to_disk_fails(build, tmp_path, monkeypatch):
    write = shards.write_atomic

    def flip(path, content):
        if Path(path).name == 'train-00002.safetensors':
            content = content[:-1] + bytes([content[-1] ^ 1])
        write(path, content)
    monkeypatch.setattr(shards, 'write_atomic', flip)
    assert build(tmp_path)[0] == 1
    assert 'share of shards with the right sha256 and token space' in failed(tmp_path)
    assert 'train-00002' in json.loads((tmp_path / 'report.json').read_text())['wrong_shards'][0]
    share = json.loads((tmp_path / 'gates.json').read_text())['gates'][0]['value']
    assert 0.9 < share < 1


def test_a_codec_that_changes_its_mind_fails(build, tmp_path, monkeypatch):
    encode = stub_codecs.StubUTI.encode_image
    times = Counter()                                  # that a picture has been encoded

    def drifting(self, images):
        ids, metas = encode(self, images)
        for n, image in enumerate(images):
            times[image.tobytes()] += 1
            ids[n, 0] = self.space['image'].first + times[image.tobytes()]
        return ids, metas
    monkeypatch.setattr(stub_codecs.StubUTI, 'encode_image', drifting)
    assert build(tmp_path)[0] == 1 and failed(tmp_path) == ['checked media that give other ids when encoded again']


@pytest.mark.parametrize('wrong', [lambda wave: wave[:-1], lambda wave: wave * np.nan])
def test_sounds_that_decode_short_or_not_finite_fail(build, tmp_path, monkeypatch, wrong):
    decode = stub_codecs.StubUTI.decode_audio
    monkeypatch.setattr(stub_codecs.StubUTI, 'decode_audio', lambda *args: [wrong(wave) for wave in decode(*args)])
    assert build(tmp_path)[0] == 1
    assert failed(tmp_path) == ['share of checked media that decode to the right size, finite']


def cut(record, task, grammar, max_seq_len):
    return token_example(record, task, grammar, 14)


def unlabelled(*args):
    example = token_example(*args)
    return replace(example, label_positions=example.label_positions[:0], label_ranges=example.label_ranges[:0])


@pytest.mark.parametrize('make_example, gate', [(cut, 'truncated examples'), (unlabelled, 'examples without a label')])
def test_examples_that_are_cut_or_have_no_label_fail(build, tmp_path, monkeypatch, make_example, gate):
    monkeypatch.setattr(shards, 'token_example', make_example)
    assert build(tmp_path)[0] == 1 and failed(tmp_path) == [gate]
