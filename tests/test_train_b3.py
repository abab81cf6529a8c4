"""train_b3.py: it learns, gates can fail, a run is stopped, resumed, split; on shards made by hand."""
import json
import re
import shutil
import signal

import pytest
import soundfile
import token_model
from conftest import (
    REPO, assert_close_run, assert_same, assert_same_run, back_at_checkpoint, failed_gates, in_children, on_ranks,
    on_two_ranks, read_checkpoint, read_gates, read_json, read_lines, read_log, run_until, run_with_stubs)
from PIL import Image
from stub_codecs import IMAGE
from tiny_worlds import make_shards
from torch import equal, load
from transformers import AutoModelForCausalLM

from common import read_sealed, sha256_file, write_sealed
from uti import Grammar, TokenSpace

pytestmark = pytest.mark.stage

ANOTHER = {f"{task}: another item's media cost more than the right ones" for task in ('i2t', 'a2t')}


def test_it_learns_passes_its_gates_and_writes_what_it_promises(b3_run):
    out = b3_run.out
    evals = read_log(out, 'eval')
    assert [record['step'] for record in evals] == [0, 70, 80]
    for task in 'i2t', 'a2t', 't2i', 't2a':
        assert evals[-1][f'{task}_correct'] < evals[0][f'{task}_correct'] - 0.3
    assert b3_run.code == 0 and len(read_gates(out)) == 26 and ANOTHER < set(read_gates(out))
    state = load(out / 'trainable_rows.pt', weights_only=True)
    meta = read_json(out / 'trainable_rows.json')
    space = TokenSpace.load(out / 'token_space.json')
    assert_same(state, read_checkpoint(out, 'new_rows'))
    assert set(state) == {'new_in', 'new_out'} and meta['token_space'] == space.sha256
    assert meta['rows_with_gradient'] == {'new_in': 36, 'new_out': 36}
    stock = AutoModelForCausalLM.from_pretrained(out / 'export')
    assert equal(stock.lm_head.weight[512:], state['new_out'])
    golden = out / 'golden' / 'step_000080'
    for line in read_lines(golden / 'i2t.jsonl'):
        assert line['prediction'] == line['truth'].strip()
    for task, modality in ('t2i', 'image'), ('t2a', 'audio'):
        assert len(read_lines(golden / f'{task}.jsonl')) == 4
        for line in read_lines(golden / f'{task}.jsonl'):
            Grammar(space).check_payload(modality, line['codes'])
    with Image.open(golden / 't2i' / '003.png') as image:
        assert image.size == (4, 4) and (golden / 't2i.png').exists()
    assert soundfile.info(golden / 't2a' / '003.wav').frames == 8
    n_bytes = read_json(out / 'gates.json')['bytes']
    assert n_bytes['full_gradient'] * 2 == n_bytes['gradient'] * 548 / 36          # the base is tied
    assert (out / 'curves.png').exists() and read_json(out / 'status.json')['state'] == 'finished'


def test_shuffled_captions_fail_the_ablations_and_a_touched_base_fails_its_sha256(b3_config, tiny, tmp_path):
    make_shards(tmp_path / 'shards', tiny, shuffled=True)
    source = (REPO / 'train_b3.py').read_text()
    assert source.count('\n# gates\ntext = ') == 1
    touched = source.replace('\n# gates\ntext = ', '\nmodel.llm.model.norm.weight.data[0] += 1e-6\ntext = ')
    (tmp_path / 'touched_b3.py').write_text(touched)
    code, _ = run_with_stubs(tmp_path / 'touched_b3.py', b3_config, f'--out_dir={tmp_path}/out',
                             f'--shards_dir={tmp_path}/shards')
    assert code == 1 and ANOTHER | {'frozen weights changed (sha256)'} <= failed_gates(tmp_path / 'out')


def test_a_disk_that_the_export_fills_costs_no_verdict(b3_config, tmp_path, monkeypatch):
    """What was measured is in gates.json; the gate on the export has failed."""
    def fill(model, tokenizer, folder):
        raise SystemExit(f'{folder}: cannot write here, is the disk full?')

    monkeypatch.setattr(token_model, 'export_stock', fill)
    code, _ = run_with_stubs('train_b3.py', b3_config, f'--out_dir={tmp_path}', '--epoch_samples=16')
    assert 'is the disk full?' in code and len(read_gates(tmp_path)) == 26
    assert 'exported logits, largest difference in a stock load' in failed_gates(tmp_path)


def test_a_softmax_over_everything_moves_text_and_fails_its_gate(b3_config, tmp_path):
    code, _ = run_with_stubs('train_b3.py', b3_config, f'--out_dir={tmp_path}', '--typed_head=False',
                             '--epoch_samples=160')
    assert code == 1 and 'text log probabilities, largest difference from the base' in failed_gates(tmp_path)


def test_a_killed_run_goes_on_as_the_same_run_to_the_last_bit(b3_config, b3_run, tmp_path):
    out = back_at_checkpoint(b3_run.out, tmp_path / 'out')
    command = run_with_stubs, 'train_b3.py', b3_config, f'--out_dir={out}', '--resume=True'
    status = in_children(run_until, 5, signal.SIGKILL, *command)
    assert status == [-signal.SIGKILL] and read_log(out)[-1]['step'] == 74
    code, _ = run_with_stubs(*command[1:])
    assert code == b3_run.code
    assert_same_run(out, b3_run.out, tensors=['new_rows', 'touched'])
    for task in 't2i', 'i2t':                          # sampling is seeded
        name = f'golden/step_000080/{task}.jsonl'
        assert read_lines(out / name) == read_lines(b3_run.out / name)


def test_micro_batch_size_is_only_memory_and_two_ranks_are_one_run(b3_config, b3_run, tmp_path):
    out = back_at_checkpoint(b3_run.out, tmp_path / 'out')
    status = on_two_ranks(run_with_stubs, 'train_b3.py', b3_config, f'--out_dir={out}', '--resume=True',
                          '--micro_batch_size=5')
    assert status == [0, 0] and read_log(out)[-1]['step'] == 80
    assert_close_run(out, b3_run.out, ['loss', 'grad_norm', 'grad_norm_new_in', 'grad_norm_new_out'])


def test_three_ranks_that_share_the_layers_are_one_run(b3_config, b3_run, tmp_path):
    """With unlike many micro-batches of a step, and items of an evaluation, on each."""
    out = back_at_checkpoint(b3_run.out, tmp_path / 'out')
    status = on_ranks(3, run_with_stubs, 'train_b3.py', b3_config, f'--out_dir={out}', '--resume=True',
                      '--micro_batch_size=5', '--shard=True')
    assert status == [b3_run.code] * 3 and read_log(out)[-1]['step'] == 80
    assert_close_run(out, b3_run.out, ['loss', 'grad_norm', 'grad_norm_new_in', 'grad_norm_new_out'])


def test_shards_of_another_token_space_are_refused(b3_config, b3_run, colours, tiny, tmp_path):
    """The folder is named as before, what is in it was built anew."""
    shutil.copytree(b3_run.out, tmp_path / 'out')
    make_shards(tmp_path / 'shards', tiny, image={**IMAGE, 'sha256': 'zz'})
    meta = tmp_path / 'out' / 'ckpt' / 'meta.json'
    meta.write_text(meta.read_text().replace(str(colours / 'shards'), str(tmp_path / 'shards')))
    manifest = meta.with_name('manifest.json')
    manifest.write_text(json.dumps({**read_json(manifest), 'meta.json': sha256_file(meta)}))
    code, _ = run_with_stubs('train_b3.py', b3_config, f'--out_dir={tmp_path}/out', '--resume=True',
                             f'--shards_dir={tmp_path}/shards', '--image_codec=', '--audio_codec=')
    assert "has another token space: image.sha256 is 'cd' there" in code


@pytest.mark.parametrize('flag, found', [
    ("--task_weights={'i2t': 1.0, 'i2x': 1.0}", 'wanted shares of the tasks that this token space has codes for'),
    ('--max_seq_len=6', 'max_seq_len = 6 leaves no room for text')])
def test_bad_input_gets_one_line(b3_config, tmp_path, flag, found):
    code, _ = run_with_stubs('train_b3.py', b3_config, f'--out_dir={tmp_path}', flag)
    assert found in code and len(code.splitlines()) == 1


def test_an_epoch_of_minutes_says_how_often_it_goes_through_each_task(b3_config, tmp_path):
    code, printed = run_with_stubs('train_b3.py', b3_config, f'--out_dir={tmp_path}/out', '--epoch_samples=0',
                                   '--epoch_minutes=0.001', '--n_eval=8', '--n_golden=2')
    assert code == 1                                   # one step learns nothing
    [n_steps, epoch_samples] = re.search(r'(\d+) steps of 16; .*--epoch_samples=(\d+)', printed).groups()
    assert int(n_steps) * 16 == int(epoch_samples)
    [passes] = re.findall(r'an epoch goes through 60 examples of i2t ([\d.]+) times', printed)
    assert float(passes) == pytest.approx(int(epoch_samples) * 2 / 4.1 / 60, abs=1 / 60)


def test_too_few_held_out_items_end_the_run_before_it_trains(b3_config, colours, tmp_path):
    shutil.copytree(colours / 'shards', tmp_path / 'shards')
    index = read_sealed(tmp_path / 'shards' / 'index.json', '')
    index['splits']['eval']['shards'] = []
    write_sealed(tmp_path / 'shards' / 'index.json', index)
    code, _ = run_with_stubs('train_b3.py', b3_config, f'--shards_dir={tmp_path}/shards', f'--out_dir={tmp_path}/out')
    assert '0 to evaluate i2t on' in code and 'its gates ask 8' in code and '\n' not in code
    assert not (tmp_path / 'out' / 'log.jsonl').exists()
