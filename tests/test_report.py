"""tools/report.py: the page of a whole out folder, of half-finished and damaged ones, also in a browser."""
import html
import json
import math
import os
import queue
import re
import runpy
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
from conftest import REPO
from PIL import EpsImagePlugin, Image

import gates
from common import sha256_file
from gates import at_least, at_most, conclude
from tools import report

EVIL = '<script>alert("x")</script>'
STAGES = ['A1', 'A1.1', 'A2', 'B1', 'B2', 'B3', 'B4']
WORTH = dict(zip(gates.WORTH, (0.9531, 0.8125, 0.7344, 0.6211)))
RUN = {'commit': 'abc1234', 'dirty': True, 'python': '3.11', 'torch': '2.13', 'transformers': '5.20',
       'device': 'a machine of 2 cores', 'date': '2026-11-24'}
SPACE = {'base': {'name': 'tiny', 'text_rows': 320, 'tokenizer_sha256': 'ab', 'end_of_text': 299},
         'image': {'class': 'Stub', 'settings': {'a': 1}, 'sha256': 'cd', 'grid': [2, 2], 'codes': 16},
         'audio': None, 'ranges': [['text', 0, 320], ['special', 320, 4], ['image', 324, 16]], 'sha256': 'f' * 64}


# -----------------------------------------------------------------------------
# an out folder, in the formats that the stages write


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_lines(path, records):
    write(path, ''.join(json.dumps(record) + '\n' for record in records))


def write_picture(path, n):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8), (20 * n % 256, 90, 120)).save(path)


def write_sound(path, n):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin((1 + n) * np.arange(4000) / 10), 16000)


def write_log(folder, stage, losses, **settings):
    """log.jsonl and status.json of a finished run of 20 steps that was evaluated at 0, 10 and 20."""
    settings = {'global_batch_size': 8, 'n_eval': 256, 'n_golden': 64, **settings}
    records = [{'kind': 'run', 'stage': stage, 'settings': settings, **RUN, 'world_size': 1, 'n_steps': 20,
                'epoch_samples': 160, 'trainable': 4321, 'held_out': {'eval': 256, 'golden': 64}}]
    for step in 0, 10, 20:
        if step > 0:
            records.append({'kind': 'step', 'step': step, 'window_loss': 4 - step / 10, 'samples_per_s': 2.0,
                            'seconds': 40.0, 'peak_memory_mb': 1234})
        means = {name: loss - step / 100 for name, loss in losses.items()}
        records.append({'kind': 'eval', 'step': step, **means})
    write_lines(folder / 'log.jsonl', records)
    write(folder / 'status.json', {'state': 'finished', 'step': 20, 'n_steps': 20})


def write_track_a(folder, stage, media):
    """An A1 or A2 run with 20 golden examples, five checkpoints of them."""
    write_log(folder, stage, {'correct': 1.0, 'shuffled': 2.0, 'zero': 3.0, 'noise': 3.5, 'win_zero': 1.0, 'short': 1.0,
                              'long': 2.0, 'text': 2.5, 'input_recall_1': 0.75, 'share_removed': 0.5}, secret=EVIL)
    write(folder / 'split.json', {'eval': ['a', 'b'], 'golden': ['c']})
    write(folder / 'truth.json', {'one object': [9, 10], EVIL: [0, 0]})
    images = [[f'{media}/{k}.png' for k in range(3)]] + 19 * [f'{media}/1.png']    # the first chat has three
    for step in 0, 5, 10, 15, 20:
        write_lines(folder / 'golden' / f'step_{step:06d}.jsonl', [{
            'id': f'chat {n}', 'image': images[n], 'turn': 0, 'question': f'What? {EVIL}',
            'truth': 'a red circle', 'prediction': 'a red circle' if step == 20 else EVIL} for n in range(20)])
    conclude(folder, [at_least(f'right {EVIL}', 0.9, 0.5)], worth={'': WORTH}, losses={'correct': 0.8})


def write_sweep(folder):
    runs = []
    for n, (rate, ln) in enumerate([(1e-3, False), (1e-3, True), (2e-3, False), (2e-3, True)]):
        point = folder / f'learning_rate={rate},vision_ln={ln}'
        write_log(point, 'a1', {'correct': 1.0, 'shuffled': 2.0})
        conclude(point, [at_most('loss', n, 2)])
        runs.append({'learning_rate': rate, 'vision_ln': ln, 'share_removed': 0.3, 'input_found': 0.6,
                     'output_found': 0.5, 'different': 0.9, 'looked': n < 3, 'score': 0.5 + n, 'loss': 1.0,
                     'd_shuffle': 0.25, 'd_zero': 2.0, 'gates_passed': n < 3, 'folder': f'out/a11_small/{point.name}'})
    grid = {'learning_rate': [1e-3, 2e-3], 'vision_ln': [False, True]}
    write(folder / 'sweep.json', {'settings': {'grid': grid}, 'runs': runs, 'best': runs[0]})


def write_audit(folder):
    for n in range(4):
        write_sound(folder / 'sounds' / f'{n:02d}_original.wav', n)
        write_sound(folder / 'sounds' / f'{n:02d}_decoded.wav', n)
    soundfile.write(folder / 'sounds' / '00_original.wav', np.zeros(48000), 8000)   # longer than what the page plays
    (folder / 'pictures').mkdir()
    Image.new('RGB', (256, 3 * 128)).save(folder / 'pictures' / 'original_decoded.png')
    write(folder / 'token_space.json', SPACE)
    write(folder / 'report.json', {'psnr': 29.5, 'si_snr': 6.5, 'settings': {'n_items': 512}, **RUN})
    write(folder / 'baseline.json', {'psnr': 29.0})
    write(folder / 'truth.json', {'pictures, once decoded': [480, 500]})
    conclude(folder, [at_least('psnr', 29.5, 28)])


def write_shards(folder, media):
    turns = [{'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': 'a red circle'}]
    write(media / 'data.json', [{'id': f'captions-{n:06d}', 'image': f'{n}.png', 'conversations': turns}
                                for n in range(4)])
    write_lines(media / 'manifest.jsonl', [{'id': f's{n}', 'audio': f'{n}.wav', 'text': 'a tone'} for n in range(4)])
    settings = {'data_json': f'{media}/data.json', 'image_root': f'{media}', 'manifests': [f'{media}/manifest.jsonl']}
    split = {'media': 4, 'items': 6, 'shards': [{'ids': 1234, 'bytes': 999}]}
    write(folder / 'index.json', {'splits': {'train': split, 'eval': split},
                                  'provenance': {'commit': 'abc1234', 'settings': settings}})
    start = {'shards': 2, 'items': 12, 'seconds': 3.25, 'device': 'cpu', 'world_size': 1}
    lengths = {'i2t': {'items': 4, 'mean': 18.5, 'p0': 17, 'p100': 20}}
    write(folder / 'report.json', {'lengths': lengths, 'skipped': [['x', '']], 'wrong_shards': [], 'this_start': start})
    write(folder / 'token_space.json', SPACE)
    conclude(folder, [at_least('share of shards', 1, 1)])


def write_track_b(folder, stage, media):
    """A B3 or B4 run: four golden examples a task, generated at three checkpoints."""
    losses = {'text': 3.0}
    for task in 'i2t', 'a2t', 't2i', 't2a':
        losses.update({f'{task}_correct': 2.0, f'{task}_shuffled': 3.0, f'{task}_win_shuffled': 0.9})
    write_log(folder, stage, losses, shards_dir=str(folder.parent / 'b2_small'))
    write(folder / 'token_space.json', SPACE)
    for step in 0, 10, 20:
        golden = folder / 'golden' / f'step_{step:06d}'
        for task in 'i2t', 'a2t', 't2i', 't2a':
            records = []
            for n in range(4):
                id, file = (f'captions-{n:06d}', f'{n}.png') if 'i' in task else (f's{n}', f'{n}.wav')
                record = {'id': id, 'media_sha256': sha256_file(media / file), 'truth': f' {task} {n} {EVIL}'}
                output = {'codes': [330, 331]} if task[0] == 't' else {'prediction': f' answer at {step}'}
                records.append({**record, **output})
            write_lines(golden / f'{task}.jsonl', records)
        for n in range(4):
            write_picture(golden / 't2i' / f'{n:03d}.png', step + n)
            write_sound(golden / 't2a' / f'{n:03d}.wav', step + n)
    conclude(folder, [at_least('text loss', 1, 0), at_least('share drawn', 0.5, 0.85)], ablations={'t2i': {'d': 0.1}})


@pytest.fixture
def out(tmp_path):
    """out/ of a whole run, and media/ beside it, which it names."""
    return write_out(tmp_path)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Its page."""
    return page_of(write_out(tmp_path_factory.mktemp('report')))


def write_out(root):
    folder = root / 'out'
    media = root / 'media'
    for n in range(4):
        write_picture(media / f'{n}.png', n)
        write_sound(media / f'{n}.wav', n)
    write_track_a(folder / 'a1_small', 'a1', media)
    write_sweep(folder / 'a11_small')
    write_track_a(folder / 'a2_small', 'a2', media)
    write_audit(folder / 'b1_small')
    write_shards(folder / 'b2_small', media)
    write_track_b(folder / 'b3_small', 'b3', media)
    write_track_b(folder / 'b4_small', 'b4', media)
    return folder


# -----------------------------------------------------------------------------
# the page


def page_of(folder):
    """The page that write_report writes, '' for none, without the white space between its elements."""
    report.write_report(folder)
    path = folder / 'report.html'
    return re.sub(r'\s+', ' ', path.read_text()).replace('> <', '><') if path.is_file() else ''


def headings(page):
    return re.findall('<h2>(.*?)</h2>', page)


def section(page, stage):
    return next(part for part in page.split('<section')[1:] if f'<h2>{stage} ' in part)


def notes(page):
    return [html.unescape(line) for line in re.findall('<p class="note">(.*?)</p>', page)]


def test_a_whole_run_shows_every_stage_with_its_verdict_and_needs_nothing_but_itself(whole):
    assert [heading.split(' ')[0] for heading in headings(whole)] == STAGES
    assert notes(whole) == []
    assert '<strong>6 of 8 gates passed</strong>; 7 of 7 stages judged' in whole
    contents = re.findall('<li><a href="#(.*?)">(.*?)</a><span class="verdict (.*?)">', whole)
    assert [(title, verdict) for _, title, verdict in contents] == [
        ('A1 a1_small', 'passed'), ('A1.1 a11_small', 'passed'), ('A2 a2_small', 'passed'), ('B1 b1_small', 'passed'),
        ('B2 b2_small', 'passed'), ('B3 b3_small', 'failed'), ('B4 b4_small', 'failed')]
    assert [id for id, _, _ in contents] == re.findall('<section id="(.*?)"', whole)
    assert ('<span class="failed">FAIL</span></td><td>share drawn</td><td>0.5</td><td>&gt;= 0.85</td>'
            in section(whole, 'B3'))
    targets = re.findall(r'\b(?:src|href|data|action|poster|srcset)="([^"]*)"', whole)
    assert len(targets) > 50 and all(target.startswith(('data:', '#')) for target in targets)
    assert not re.search(r'https?://|<script|<link|<iframe|url\(|@import|javascript:', whole)


def test_a_stage_shows_commit_hardware_time_settings_and_sizes(whole):
    a2, b1, b2 = (section(whole, stage) for stage in ('A2', 'B1', 'B2'))
    for name, value in {'commit': 'abc1234, dirty', 'hardware': 'a machine of 2 cores', 'steps': '20',
                        'parameters trained': '4,321', 'peak memory': '1,234 MB',
                        'time of the training steps': '1 min 20 s, without evaluations'}.items():
        assert f'<dt>{name}</dt><dd>{value}</dd>' in a2
    assert '<td>global_batch_size</td><td>8</td>' in a2 and '<td>losses.correct</td><td>0.8</td>' in a2
    assert '<td>one object</td><td>90.0%</td><td>9</td><td>10</td>' in a2
    assert '<td>eval</td><td>2</td>' in a2 and '<td>left out as unusable</td><td>0</td>' in a2
    assert '<td>n_items</td><td>512</td>' in b1 and '<td>psnr</td><td>29.5</td><td>29</td>' in b1
    assert '<td>pictures, once decoded</td><td>96.0%</td>' in b1
    assert '2 shards, 12 items in 3.2 s' in b2 and '1 items skipped' in b2
    assert '<td>train</td><td>1</td><td>4</td><td>6</td><td>1,234</td><td>999</td>' in b2
    assert '<td>i2t</td><td>4</td><td>18.5</td><td>17</td><td>20</td>' in b2
    for part in b1, b2, section(whole, 'B4'):
        assert '<td>image</td><td>324</td><td>340</td><td>16</td>' in part
        assert '<td>image.grid</td><td>[2, 2]</td>' in part and '<td>audio</td><td>none</td>' in part


def test_a_stage_begins_with_what_it_is_worth(whole):
    a2 = section(whole, 'A2')
    cells = '<td>0.9531</td><td>0.8125</td><td>0.7344</td><td>0.6211</td>'
    assert f'<td>all</td>{cells}' in a2 and a2.index(cells) < a2.index('<dt>commit</dt>')
    assert 'what it is worth by step: input_recall_1 from 0.75 to 0.55; share_removed from 0.5 to 0.3' in a2


def test_a_held_out_set_that_came_out_smaller_is_a_line(out):
    log = out / 'a2_small' / 'log.jsonl'
    log.write_text(log.read_text().replace('{"eval": 256,', '{"eval": 85,'))
    assert notes(page_of(out)) == ['held out: 85 of the 256 that were asked for (eval).']


def test_charts_have_their_first_and_last_values_in_words(whole):
    a2, b3 = section(whole, 'A2'), section(whole, 'B3')
    assert 'held-out loss by what the model sees by step: correct from 1 to 0.8; shuffled from 2 to 1.8; zero' in a2
    assert 'loss by step: training from 3 to 2; held out from 1 to 0.8' in a2
    assert '"i2t: pictures described by step: correct from 2 to 1.8; shuffled from 3 to 2.8"' in b3


def test_a_sweep_shows_its_grid_and_the_gates_of_the_best_run(whole):
    a11 = section(whole, 'A1.1')
    assert 'by learning_rate: vision_ln False from 0.5 to 2.5; vision_ln True from 1.5 to 3.5' in a11
    assert ('<td>best</td><td>0.001</td><td>False</td><td>0.3</td><td>0.6</td><td>0.5</td><td>0.9</td><td>yes</td>'
            '<td>0.5</td><td>1</td><td>0.25</td><td>2</td>'
            '<td><span class="passed">pass</span></td><td>1 min 20 s</td>' in a11)
    assert 'The best is learning_rate=0.001,vision_ln=False' in a11 and a11.count('&lt;= 2') == 1
    assert '<dd>5 min 20 s, without evaluations</dd>' in a11


def test_golden_examples_stand_beside_their_truth_at_three_checkpoints(whole):
    a2, b1, b4 = (section(whole, stage) for stage in ('A2', 'B1', 'B4'))
    assert 'Checkpoints 0, 10, 20 of the 5 that were saved; 12 of 20 examples' in a2
    assert a2.count('alt="chat 0: ') == 3 and a2.count('alt="chat 19: ') == 1  # every picture of an item
    assert a2.count('<figure class="card') == a2.count('<span class="same">a red circle</span>') == 12
    assert '3 of 3 that were kept' in b1 and '4 of 4 that were kept' in b1
    assert (b1.count('<img'), b1.count('<audio'), b1.count('</audio><small>first 4 s</small>')) == (3, 8, 1)
    i2t, a2t, t2i, t2a = re.split('<h4>', b4)[1:]
    assert (i2t.count('<img'), a2t.count('<audio'), t2i.count('<img'), t2a.count('<audio')) == (4, 4, 16, 16)
    assert 'alt="captions-000002: i2t 2 ' in i2t and i2t.count('answer at 10') == 4
    assert '<small>step 20</small>' in t2i and 'alt="step 10, asked for: t2i 3 ' in t2i


def test_an_original_of_other_bytes_is_not_shown_for_the_one_that_was_tokenized(out):
    write_picture(out.parent / 'media' / '1.png', 77)
    (out.parent / 'media' / '2.wav').unlink()
    i2t, a2t, *_ = re.split('<h4>', page_of(out / 'b3_small'))[1:]
    assert (i2t.count('<img'), a2t.count('<audio')) == (3, 3)


def test_text_of_the_data_stays_text(out):
    (out / 'a1_small').rename(out / 'a1_"><img src=x onerror=alert(1)>')
    page = page_of(out)
    assert EVIL not in page and '<script' not in page and '<img src=x' not in page
    a2 = section(page, 'A2')
    escaped = html.escape(EVIL).replace('&quot;', '&#34;')
    for element in 'td>right {}<', 'td>secret</td><td>{}<', 'td>{}</td><td>0.0%<', '<p class="question">What? {}<':
        assert element.format(escaped) in a2           # a gate, a setting, a key of truth.json, a question
    assert escaped in section(page, 'B4')              # a truth


def test_a_log_without_seconds_leaves_the_training_time_out(out):
    log = out / 'a2_small' / 'log.jsonl'
    log.write_text(log.read_text().replace('"seconds": 40.0, ', '', 1))
    assert 'time of the training steps' not in page_of(out / 'a2_small')


def test_a_run_that_has_just_begun_has_a_page_too(out, tmp_path):
    begun = tmp_path / 'begun'
    write_lines(begun / 'a1' / 'log.jsonl', [{'kind': 'run', 'stage': 'a1', 'settings': {}, **RUN}])
    write(begun / 'a1' / 'status.json', {'state': 'running', 'step': 0, 'n_steps': 600})
    shutil.copytree(out / 'a11_small', begun / 'sweep', ignore=shutil.ignore_patterns('sweep.json'))
    page = page_of(begun)
    assert [heading.split(' ')[0] for heading in headings(page)] == STAGES
    assert '0 of 0 gates passed' in page and 'running, saved at step 0 of 600' in section(page, 'A1')
    assert 'no step and no evaluation yet' in page and '4 runs finished, not ranked yet' in section(page, 'A1.1')
    assert page.count('Not run yet') == 5 and 'split.json is missing.' in notes(page)


def test_only_what_a_stage_has_written_gets_a_page(tmp_path):
    (tmp_path / 'a1').mkdir()
    assert page_of(tmp_path) == ''
    write(tmp_path / 'b4_exported' / 'token_space.json', {})
    assert [run.stage for run in report.runs_of(tmp_path)] == ['b4']
    write(tmp_path / 'b4_exported' / 'config.json', {})            # an exported model
    assert report.runs_of(tmp_path) == []


def test_what_is_damaged_or_missing_is_a_line_of_the_page(out):
    log = out / 'a2_small' / 'log.jsonl'
    log.write_text(log.read_text()[:-20])
    write(out / 'a1_small' / 'gates.json', '{"passed": true, "gates": [{"na')
    write(out / 'b2_small' / 'report.json', '[]')
    (out / 'b1_small' / 'report.json').unlink()
    (out / 'b3_small' / 'golden' / 'step_000010' / 't2i' / '001.png').write_bytes(b'\x89PNG\r\n')
    (out / 'b3_small' / 'golden' / 'step_000010' / 't2a' / '001.wav').write_bytes(b'RIFF')
    (out / 'b4_small' / 'golden' / 'step_000010' / 't2a' / '001.wav').unlink()
    (out.parent / 'media' / '1.png').unlink()
    page = page_of(out)
    assert notes(page) == [
        'gates.json is damaged: no JSON object.', 'log.jsonl: 1 of 6 lines are damaged.', 'report.json is missing.',
        'report.json is damaged: no JSON object.']
    assert '<td>gates.json is whole</td><td>nan</td>' in section(page, 'A1')
    assert '1.png: cannot be shown' in section(page, 'A2')
    assert '001.png: cannot be shown' in section(page, 'B3') and '001.wav: cannot be shown' in section(page, 'B3')
    assert section(page, 'B4').count('not decoded') == 1


def with_leaves(value, other):
    """JSON of the same shape in which every number, text and truth value is another."""
    if isinstance(value, dict):
        return {key: part if key in ('kind', 'stage') else with_leaves(part, other) for key, part in value.items()}
    return [with_leaves(part, other) for part in value] if isinstance(value, list) else other


@pytest.mark.parametrize('damage', ['half', 'list', EVIL, -1, math.nan, {'x': []}], ids=repr)
def test_no_content_of_the_files_keeps_the_page_from_being_made(out, damage):
    for path in [path for path in out.rglob('*') if path.is_file()]:
        content = path.read_bytes()
        if damage == 'half':
            path.write_bytes(content[:len(content) // 2])
        elif damage == 'list':
            path.write_bytes(b'[[]]')
        elif path.suffix in ('.json', '.jsonl'):
            lines = [content] if path.suffix == '.json' else content.splitlines()
            path.write_text('\n'.join(json.dumps(with_leaves(json.loads(line), damage)) for line in lines))
    page = page_of(out)
    assert [heading.split(' ')[0] for heading in headings(page)] == STAGES
    assert len(notes(page)) > 5 and EVIL not in page


@pytest.mark.parametrize('kind', ['PostScript', 'a pipe', 'no file'])
def test_what_is_no_picture_is_neither_run_nor_waited_for(out, kind, monkeypatch):
    """Its name ends in .png and a prediction names it."""
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *_: pytest.fail('a program was started'))
    picture = out.parent / 'media' / '1.png'
    if kind == 'PostScript':
        picture.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n')
    else:
        picture.unlink()
    if kind == 'a pipe':
        os.mkfifo(picture)
    assert '1.png: cannot be shown' in section(page_of(out), 'A2')


def test_names_of_a_sweep_stay_text_and_are_no_formulas(out):
    made = json.loads((out / 'a11_small' / 'sweep.json').read_text())
    name = '$x_{<script>}$'
    made['settings']['grid'][name] = made['settings']['grid'].pop('vision_ln')
    for row in made['runs']:
        row[name] = f'${row.pop("vision_ln")}$ | <b>'
        row['score'] = math.nan if row['score'] > 3 else row['score']
    write(out / 'a11_small' / 'sweep.json', made)
    page = page_of(out / 'a11_small')
    assert '<script' not in page and '<b>' not in page and notes(page) == []
    assert '<th>$x_{&lt;script&gt;}$</th>' in page and '<td>$True$ | &lt;b&gt;</td>' in page and '<td>nan</td>' in page


# -----------------------------------------------------------------------------
# as a program


def test_the_module_writes_the_page_whatever_backend_a_notebook_has_set(out):
    env = {**os.environ, 'MPLBACKEND': 'module://not_here', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-m', 'tools.report', out / 'b3_small'], cwd=REPO, env=env,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, f'{out}/b3_small/report.html\n')
    page = (out / 'b3_small' / 'report.html').read_text()
    assert headings(page) == ['B3 · new rows'] and 'Not in this folder: A1, A1.1, A2, B1, B2, B4.' in page
    assert 'one stage</p>' in page and page.count('image/svg') == 6


def test_the_exit_status_of_gates_py_is_that_of_the_gates_with_a_page_and_without(out, monkeypatch, capsys):
    def gates_py(folder):
        monkeypatch.setattr(sys, 'argv', ['gates.py', str(folder)])
        monkeypatch.delitem(sys.modules, 'tools.report', raising=False)   # gates.py runs it as a module of its own
        with pytest.raises(SystemExit) as e:
            runpy.run_path(str(REPO / 'gates.py'), run_name='__main__')
        return e.value.code
    assert gates_py(out) == 1
    assert capsys.readouterr().err == f'{out}/report.html\n'
    (out / 'a2_small' / 'report.html').mkdir()
    assert gates_py(out / 'a2_small') == 0
    assert 'report.html: cannot write here' in capsys.readouterr().err


# -----------------------------------------------------------------------------
# in a browser

CHROMIUM = shutil.which('chromium')
FRAME = """<!doctype html>
<iframe id="frame" style="width: %dpx; height: 900px; border: 0" src="page.html"></iframe>
<script>
frame.onload = async () => {
  const page = frame.contentDocument;
  const sounds = page.querySelectorAll('audio');
  const broken = [...page.images].filter(image => !(image.naturalWidth > 0)).map(image => 'image ' + image.alt);
  for (const sound of sounds) {
    await new Promise(done => { sound.onloadedmetadata = sound.onerror = done; sound.load(); });
    if (!(sound.duration > 0)) broken.push('sound ' + sound.ariaLabel);
  }
  for (const folded of page.querySelectorAll('details')) folded.open = true;
  fetch('found', {method: 'POST', body: JSON.stringify({
    broken, images: page.images.length, sounds: sounds.length, width: page.documentElement.scrollWidth})});
};
</script>"""


def in_browser(page, width, folder):
    """What FRAME finds in a page that is shown `width` wide, and the lines of the browser's console."""
    found = queue.Queue()

    class Server(SimpleHTTPRequestHandler):
        def do_POST(self):
            found.put(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    (folder / 'page.html').write_text(page)
    (folder / 'index.html').write_text(FRAME % width)
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Server, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with open(folder / 'console', 'w') as console:
        browser = subprocess.Popen(
            [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr',
             '--remote-debugging-port=0', f'--user-data-dir={folder}/profile',
             f'http://127.0.0.1:{server.server_port}/'], stdout=console, stderr=console)
    try:
        result = found.get(timeout=120)
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
    return result, [line for line in (folder / 'console').read_text().splitlines() if ':CONSOLE:' in line]


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason='needs a `chromium` on the path, as the Debian package of that name puts it')
class TestInABrowser:
    @pytest.mark.parametrize('width', [1280, 400])
    def test_everything_loads_and_fits(self, whole, tmp_path, width):
        found, console = in_browser(whole, width, tmp_path)
        assert found['broken'] == console == [] and found['width'] <= width
        assert found['images'] == whole.count('<img ') > 60 and found['sounds'] == whole.count('<audio ') == 48

    def test_this_check_notices_what_does_not_load_and_what_is_too_wide(self, out, tmp_path):
        more = ('<p style="width: 900px">x</p><img src="elsewhere.png" alt="y">'
                '<audio src="data:audio/wav;base64,AAAA" aria-label="z"></audio>')
        found, console = in_browser(page_of(out / 'a11_small').replace('<header>', '<header>' + more), 400, tmp_path)
        assert found['broken'] == ['image y', 'sound z'] and found['width'] > 900
        assert 'Content Security Policy' in console[0]
