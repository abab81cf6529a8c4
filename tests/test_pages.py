"""The pages of docs/ do what they say: their snippets and commands run, their tables are what the code gives."""
import json
import os
import re
import shlex
import socket
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import test_codec
import torch
from conftest import REPO, read_log
from PIL import Image
from test_train_a1 import config, straight  # noqa: F401  a tiny A1 run

import data

OWN = (REPO / 'docs' / 'your_own_data.md').read_text()


def named_blocks(page):
    """{file name: content} of the code blocks that a page names: `name`: and the block below it."""
    return dict(re.findall(r'^`([\w./]+)`:\n\n```python\n(.*?)```$', page, re.DOTALL | re.MULTILINE))


def shown(page):
    """The `$` lines of a page, in order."""
    return re.findall(r'^    \$ (.+)$', page, re.MULTILINE)


# -----------------------------------------------------------------------------
# docs/your_own_data.md

TINY = '--batch_size=8 --rows_per_step=8 --epoch_samples=16 --epochs=1.0 --eval_every=2 --max_new_tokens=4'
TINY_A = f'{TINY} --n_eval=18 --n_golden=6 --n_predictions=4 --max_seq_len=200'
TINY_B = '--image_codec={janus} --image_prefix= --audio_codec={mimi}'
INSTEAD = {                                            # what a real run has and this machine has not
    'train_a1.py': f'--llm={{llm}} --vision={{vision}} {TINY_A} --num_image_tokens=4 --connector_width=32 '
                   '--connector_depth=1 --connector_heads=2 --bucket_edges=(12,24)',
    'train_a2.py': f'{TINY_A} --allow_failed_gates=True --bucket_edges=(12,24)',
    'uti.py': f'--llm={{llm}} {TINY_B} --audio_codebooks=2 --clip_seconds=0.12',
    'build_b2.py': f'--llm={{llm}} {TINY_B} --n_golden=4 --eval_share=0.3 --allow_failed_gates=True',
    'train_b3.py': f'--llm={{llm}} {TINY} {TINY_B} --n_golden=4 --max_seq_len=200 --allow_failed_gates=True',
    'train_b4.py': f'{TINY} {TINY_B} --n_golden=4 --n_predictions=4 --max_seq_len=200 --guidance=(1.5,) '
                   '--allow_failed_gates=True',
    'sample.py': '--max_new_tokens=4'}


@pytest.fixture(scope='module')
def checkout(tiny, tmp_path_factory):
    """A folder with the scripts, the page's files and data/mine: pictures, sounds and texts, each with its captions."""
    root = tmp_path_factory.mktemp('checkout')
    for path in REPO.glob('*.py'):
        (root / path.name).symlink_to(path)
    (root / 'configs').mkdir()
    for name, content in named_blocks(OWN).items():
        (root / name).write_text(content)
    mine, rng = root / 'data' / 'mine', np.random.default_rng(0)
    for folder in 'pictures/more', 'sounds', 'texts':
        (mine / folder).mkdir(parents=True)
    for n in range(60):
        colour, more = ('red', 'blue', 'green')[n % 3], ' and a big one'
        path = mine / 'pictures' / ('cat' if n == 0 else f'more/{n:02d}')
        picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        picture.save(f'{path}.png' if n % 2 == 0 else f'{path}.jpg')
        path.with_suffix('.txt').write_text(f'a {colour} circle{more * (n % 4)}\na {colour} shape\n')
        if n % 3 == 0:
            path.with_suffix('.chat.txt').write_text('What colour is it?\nred\nHow many are there?\none\n')
        path = mine / 'sounds' / ('bell' if n == 0 else f'{n:02d}')
        soundfile.write(f'{path}.wav' if n % 2 == 0 else f'{path}.flac', rng.uniform(-0.5, 0.5, 6_000), 22_050)
        path.with_suffix('.txt').write_text(f'a {("high", "low")[n % 2]} tone\n')
    (mine / 'texts' / 'notes.txt').write_text('\n\n'.join(f'There are {n} red boxes and a ball.' for n in range(40)))
    torch.manual_seed(0)
    test_codec.janus().save_pretrained(root / 'janus')
    test_codec.mimi().save_pretrained(root / 'mimi')
    return root


def run_shown(command, checkout, tiny, *more):
    """A `$` line of a page as it stands, with what is tiny instead after it."""
    words = shlex.split(command)
    assert words[0] == 'python', command
    instead = INSTEAD.get(words[1], '').format(llm=tiny / 'llm', vision=tiny / 'vision', janus='janus', mimi='mimi')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.run([sys.executable, *words[1:], *instead.split(), *more], cwd=checkout, env=env,
                          capture_output=True, text=True)


def test_every_command_of_the_page_on_your_own_data_runs_in_its_order(checkout, tiny):
    """From folders of files to exported models. A gate may fail, as after 2 steps it should; nothing else may."""
    commands = shown(OWN)
    assert len(commands) == 15 and len(named_blocks(OWN)) == 7
    for command in commands:
        done = run_shown(command, checkout, tiny)
        judged = done.returncode == 1 and ('FAILED at' in done.stdout or command == 'python gates.py out')
        assert done.returncode == 0 or judged, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}'
    mine, out = checkout / 'data' / 'mine', checkout / 'out'
    captions, chats = (json.loads((mine / f'{name}.json').read_text()) for name in ('captions', 'chats'))
    assert (len(captions), len(chats)) == (120, 60) and len(data.read_texts(mine / 'replay_text.jsonl')) == 36
    assert sum(len(chat['conversations']) == 4 for chat in chats) == 20
    for name in 'mine_a1/golden/step_000002.png', 'mine_a2_export/adapter_model.safetensors', \
            'mine_drawn/draw_0_0.png', 'mine_drawn/sound_0_0.wav', 'mine_b4_export/model.safetensors':
        assert (out / name).exists(), name
    passed = {g['name'] for stage in ('a1', 'a2', 'b2', 'b3', 'b4')
              for g in json.loads((out / f'mine_{stage}' / 'gates.json').read_text())['gates'] if g['passed']}
    assert passed >= {'frozen weights changed (sha256)', 'media in two splits, or twice in one'}
    done = run_shown('python build_b2.py configs/mine_b2.py', checkout, tiny, '--out_dir=out/two', '--eval_share=0.0')
    assert done.returncode == 1 and FAILS[-1] in done.stderr


def wrong_chat(**change):
    """A list of one chat, or two, with something wrong in it, as read_llava says it."""
    def provoke(folder):
        turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'red'}]
        records = [{'id': '1', 'image': 'a.png', 'conversations': turns, **change}]
        records *= 2 if change.get('id') else 1
        (folder / 'chats.json').write_text(json.dumps(records))
        data.read_llava(folder / 'chats.json', folder, data.Ledger(folder / 'bad.jsonl', 0))
    return provoke


def wrong_line(**change):
    def provoke(folder):
        (folder / 'sounds.jsonl').write_text(json.dumps({'id': '1', 'source': 'mine', 'text': 'a bell', **change}))
        data.read_manifest(folder / 'sounds.jsonl', data.Ledger(folder / 'bad.jsonl', 0))
    return provoke


def wrong_sound(write):
    def provoke(folder):
        write(folder / 'a.wav')
        data.read_audio(folder / 'a.wav', 16_000, 16_000)
    return provoke


def linked(folder):
    (folder / 'elsewhere').mkdir()
    (folder / 'root').mkdir()
    (folder / 'root' / 'a.png').symlink_to(folder / 'elsewhere')
    data.inside(folder / 'root', 'a.png', 'sample 0')


def cut_picture(folder):
    Image.new('RGB', (64, 64), 'red').save(folder / 'a.png')
    (folder / 'a.png').write_bytes((folder / 'a.png').read_bytes()[:100])
    data.read_image(folder / 'a.png', 8)


def too_few(folder):
    wrong = [data.Row(data.Item('1', None, ()), np.arange(4), np.arange(2), -1, False)]
    data.split_rows(wrong, 8, 8, (10, 20), folder / 'split.json', None, None)


def cut_sound(path):
    soundfile.write(path, np.full(8000, 0.5), 16_000)
    path.write_bytes(path.read_bytes()[:5000])


PROVOKE = {
    'cannot read this image': lambda folder: data.media_key(data.Item('1', str(folder / 'none.png'), ())),
    'not a whole image': cut_picture,
    'leaves the image root': wrong_chat(image='../a.png'),
    'is a link out of the image root': linked,
    'this id stands twice': wrong_chat(id='same'),
    'is not a list of human and gpt turns in pairs': wrong_chat(
        conversations=[{'from': 'human', 'value': '<image>\nDescribe this picture.'}]),
    'an empty answer': wrong_chat(
        conversations=[{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': ' '}]),
    'wanted one each': wrong_chat(
        conversations=[{'from': 'human', 'value': 'What?'}, {'from': 'gpt', 'value': 'red'}]),
    'to evaluate on: add data or lower n_eval and n_golden': too_few,
    'silent in its first': wrong_sound(lambda path: soundfile.write(path, np.zeros(8000), 16_000)),
    'truncated': wrong_sound(cut_sound),
    'not a whole sound': wrong_sound(lambda path: path.write_text('no sound')),
    'neither image nor audio': wrong_line(),
    'wanted some': wrong_line(audio='a.wav', text='')}
FAILS = re.findall(r'^\| `(.+?)` \|', OWN[OWN.index('## What fails'):], re.MULTILINE)


def test_the_page_names_every_failure_that_is_provoked_here():
    assert FAILS == [*PROVOKE, 'add data or change eval_share and n_golden']   # the last: at the end of the run above


@pytest.mark.parametrize('said', PROVOKE)
def test_what_fails_says_what_the_page_says(said, tmp_path):
    with pytest.raises(SystemExit) as e:
        PROVOKE[said](tmp_path)
    assert said in str(e.value) and '\n' not in str(e.value)


# -----------------------------------------------------------------------------
# docs/bigger.md


def test_several_machines_are_one_run_by_the_command_of_the_page(config, straight, tmp_path):  # noqa: F811
    """Two torchruns that meet on this machine, one process each: the losses of the run in one process."""
    page = (REPO / 'docs' / 'bigger.md').read_text()
    command = next(line for line in shown(page) if '--nnodes' in line)
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    for had, now in (('--nnodes=4', '--nnodes=2'), ('--nproc_per_node=8', '--nproc_per_node=1'),
                     ('node0:29500', f'localhost:{port}'), ('configs/a1_qwen3_8b.py', str(config))):
        assert had in command
        command = command.replace(had, now)
    words = [sys.executable, '-m', 'torch.distributed.run', *shlex.split(command)[1:], '--batch_size=4',
             f'--out_dir={tmp_path}/out']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    nodes = [subprocess.Popen(words, cwd=REPO, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
             for _ in range(2)]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert (tmp_path / 'out' / 'gates.json').exists(), said
    assert read_log(tmp_path / 'out', 'run')[0]['world_size'] == 2
    for key in 'loss', 'grad_norm':
        np.testing.assert_allclose([r[key] for r in read_log(tmp_path / 'out')],
                                   [r[key] for r in read_log(straight[0])], rtol=1e-4)
