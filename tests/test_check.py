"""tools/check.py: what would end a chain of stages late is found before it begins."""
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import REPO, TINY, run_here, write_config

import tools.check
from tools.check import check

STAGES = ('a1', 'a2', 'b1', 'b2', 'b3', 'b4')


@pytest.fixture(scope='session')
def sounds(tmp_path_factory):
    """60 clips and their manifest.jsonl."""
    folder = tmp_path_factory.mktemp('sounds')
    rng = np.random.default_rng(0)
    lines = []
    for n in range(60):
        soundfile.write(folder / f'{n}.wav', rng.uniform(-0.5, 0.5, 800), 8000)
        lines.append(json.dumps({'audio': f'{n}.wav', 'text': f'tone {n}'}))
    (folder / 'manifest.jsonl').write_text('\n'.join(lines))
    return folder


@pytest.fixture
def make_chain(tiny, sounds, tmp_path, monkeypatch):
    """make_chain(b2={'n_golden': 9}, ...) -> {stage: config} of a whole tiny chain, with these settings instead."""
    monkeypatch.chdir(tmp_path)
    pictures = {'data_json': tiny / 'captions' / 'data.json', 'image_root': tiny / 'captions' / 'images'}
    codecs = {'image_codec': 'deepseek-community/Janus-Pro-1B', 'audio_codec': 'kyutai/mimi'}
    training = {**TINY, 'global_batch_size': 8, 'micro_batch_size': 8, 'epoch_samples': 80, 'eval_every': 5}
    text = tiny / 'text' / 'eval.jsonl'
    settings = {
        'a1': {**training, **pictures, 'llm': tiny / 'llm', 'vision': tiny / 'vision', 'num_image_tokens': 4,
               'connector_width': 32, 'connector_heads': 2, 'max_seq_len': 128, 'n_eval': 64, 'n_golden': 9},
        'a2': {**training, 'data_json': tiny / 'instruct' / 'data.json', 'image_root': tiny / 'instruct' / 'images',
               'align_dir': 'out/a1', 'text_jsonl': text, 'n_text': 50, 'max_seq_len': 320, 'n_eval': 64, 'n_golden': 9,
               'feature_cache': 'out/features'},
        'b1': {**pictures, **codecs, 'llm': tiny / 'llm', 'manifest_jsonl': sounds / 'manifest.jsonl', 'n_items': 40,
               'audio_codebooks': 2, 'clip_seconds': 1.0},
        'b2': {**pictures, **codecs, 'llm': tiny / 'llm', 'manifests': (str(sounds / 'manifest.jsonl'),),
               'audit_dir': 'out/b1', 'n_golden': 8, 'n_eval': 10, 'eval_share': 0.5, 'max_seq_len': 700},
        'b3': {**training, **codecs, 'llm': tiny / 'llm', 'shards_dir': 'out/b2', 'text_jsonl': text, 'n_eval': 10,
               'n_golden': 8, 'max_seq_len': 700},
        'b4': {**training, **codecs, 'shards_dir': 'out/b2', 'new_rows_dir': 'out/b3', 'text_jsonl': text,
               'replay_jsonl': tiny / 'text' / 'replay.jsonl', 'n_eval': 10, 'n_golden': 8, 'gate_items': 10,
               'max_seq_len': 700}}

    def make_configs(**changes):
        configs = {}
        for stage in STAGES:
            instead = {'out_dir': f'out/{stage}', **settings[stage], **changes.get(stage, {})}
            configs[stage] = str(write_config(tmp_path / f'{stage}_tiny.py', **instead))
        return configs
    return make_configs


def wrong_lines(printed):
    return [line for line in printed.splitlines() if line.startswith('WRONG')]


def test_a_whole_tiny_chain_is_ok_and_says_what_it_will_do(make_chain, capsys, tmp_path):
    n_wrong = check([*make_chain().values()], card_gib=80, ranks=1)
    printed = capsys.readouterr().out
    assert n_wrong == 0 and wrong_lines(printed) == []
    assert 'a1_tiny.py: 200 image files: of 200 none is missing, of 8 all decode' in printed
    assert 'a1_tiny.py: 10 steps of 8; 0.63 passes over 127 samples' in printed
    assert 'a2_tiny.py: align_dir: out/a1 is made by' in printed
    assert 'b2_tiny.py: about 96 of 200 image files will be held out, and 8 golden' in printed
    assert 'b4_tiny.py: memory: ' in printed
    assert not (tmp_path / 'out').exists()             # it only looks


SPOILED = {
    'a typo': ('a1', {'learning_rat': 1.0}, "no setting is called 'learning_rat', did you mean 'learning_rate'?"),
    'a value out of range': ('b4', {'replay_share': 1.0}, 'replay_share = 1.0'),
    'a task that is none': ('b3', {'task_weights': {'i2x': 1.0}}, 'task_weights names i2x'),
    'too few pictures to hold out': ('a2', {'n_eval': 141}, '150 pictures for n_eval + n_golden = 150'),
    'too few sounds held out for B4': ('b4', {'gate_items': 20}, 'only 15 audio files, the gates here ask 20'),
    'too few golden ones for B4': ('b4', {'n_golden': 9}, 'has 8 golden audio files, n_golden here is 9'),
    'too few items for B1': ('b1', {'n_items': 31}, "31 image files to measure: B1's first gate wants 32"),
    'another folder': ('a2', {'align_dir': 'out/a0'}, 'align_dir: out/a0: no such folder'),
    'a folder twice': ('b3', {'out_dir': 'out/a1'}, "out_dir = 'out/a1' is also that of"),
    'another codec': ('b2', {'audio_codec': 'facebook/encodec_24khz'}, "audio_codec = 'facebook/encodec_24khz', but"),
    'no room for codes': ('b3', {'max_seq_len': 576}, 'max_seq_len = 576 leaves 0 tokens for text'),
    'captions that are cut': ('a1', {'max_seq_len': 24}, 'of the samples are cut at max_seq_len = 24'),
    'a card that is too small': ('a1', {'micro_batch_size': 2 ** 22}, 'lower micro_batch_size'),
    'no file': ('a1', {'data_json': 'data/none.json'}, 'data_json: no data/none.json; is the path right?'),
    'real data that is not there': ('b2', {'sound_dir': 'data/Clotho/development'}, 'get zenodo.org/records/4783391'),
    'a text that is none': ('a2', {'text_jsonl': 'a2_tiny.py'}, 'a2_tiny.py:1: not valid JSON'),
    'a list that is none': ('b2', {'manifests': ('b2_tiny.py',)}, 'samples that cannot be used'),
    'a codec for a base model': ('a1', {'vision': 'llm'}, "llm: model_type is 'qwen3', wanted"),
    'no base model': ('a1', {'llm': 'out/models/llm'}, 'llm: no folder out/models/llm')}


@pytest.mark.parametrize('what', SPOILED)
def test_a_spoiled_config_is_found_at_once(what, make_chain, tiny, capsys):
    stage, changes, line = SPOILED[what]
    Path('llm').symlink_to(tiny / 'llm')
    assert check([*make_chain(**{stage: changes}).values()], card_gib=80, ranks=1) > 0
    assert any(line in wrong for wrong in wrong_lines(capsys.readouterr().out))


@pytest.mark.parametrize('changes, ranks, wanted', [
    ({}, 2, (False, False)), ({'gradient_checkpointing': True}, 1, (True, False)),
    ({'shard': True}, 8, (False, True)), ({'shard': True}, 1, (False, False))])   # alone there is nobody to share with
def test_the_memory_is_that_of_layers_computed_again_and_in_shards(changes, ranks, wanted, make_chain, monkeypatch):
    steps = []
    monkeypatch.setattr(tools.check, 'memory_needed', lambda *args: steps.append(args[3]) or {'peak': 0})
    check([*make_chain(**{stage: changes for stage in ('a1', 'a2', 'b3', 'b4')}).values()], card_gib=80, ranks=ranks)
    assert [(step.checkpointing, step.shard) for step in steps] == 4 * [wanted]


def spoil(tmp_path, tiny, n, change):
    """A list of the captions and copies of their pictures, the first n of which are changed."""
    records = json.loads((tiny / 'captions' / 'data.json').read_text())
    (tmp_path / 'images').mkdir()
    for k, record in enumerate(records):
        content = (tiny / 'captions' / 'images' / record['image']).read_bytes()
        (tmp_path / 'images' / record['image']).write_bytes(content)
        if k < n:
            change(record, tmp_path / 'images' / record['image'])
    (tmp_path / 'data.json').write_text(json.dumps(records))
    return {'data_json': tmp_path / 'data.json', 'image_root': tmp_path / 'images'}


def lose_answer(record, path):
    record['conversations'].pop()


@pytest.mark.parametrize('change, n, line', [
    (lambda record, path: path.unlink(), 20, '20 of 200 image files looked for are not there'),
    (lambda record, path: path.write_bytes(path.read_bytes()[:99]), 60, 'image files do not decode'),
    (lose_answer, 20, '20 samples that cannot be used')])
def test_bad_data_is_wrong_where_it_is_more_than_may_be_left_out(change, n, line, make_chain, tiny, tmp_path, capsys):
    data = spoil(tmp_path, tiny, n, change)
    assert check([make_chain(a1=data)['a1']], card_gib=80, ranks=1) == 1
    assert line in wrong_lines(capsys.readouterr().out)[0]
    assert check([make_chain(a1={**data, 'max_bad_samples': 100})['a1']], card_gib=80, ranks=1) == 0
    assert line in capsys.readouterr().out


def test_ids_that_stand_twice_are_counted(make_chain, tiny, tmp_path, capsys):
    data = spoil(tmp_path, tiny, 7, lambda record, path: record.update(id='same'))
    assert check([make_chain(a1=data)['a1']], card_gib=80, ranks=1) == 0
    assert '200 samples, 6 with the id of another' in capsys.readouterr().out


def test_a_folder_whose_gates_failed_and_a_checkpoint_in_the_way_are_wrong(make_chain, tmp_path, capsys):
    config = make_chain()['a2']
    for folder, passed in ('out/a1', False), ('out/a2/ckpt', True):
        (tmp_path / folder).mkdir(parents=True)
        verdict = {'passed': passed, 'gates': [{'name': 'looks', 'value': 0.0, 'bar': '>= 1', 'passed': passed}]}
        (tmp_path / folder / 'gates.json').write_text(json.dumps(verdict))
    assert check([config], card_gib=80, ranks=1) >= 2
    wrong = '\n'.join(wrong_lines(capsys.readouterr().out))
    assert 'out/a1 failed its gate "looks"' in wrong and 'out/a2 holds a checkpoint' in wrong


def test_shards_that_are_there_are_counted(make_chain, colours, capsys):
    configs = make_chain(b3={'shards_dir': colours / 'shards', 'n_golden': 6}, b4={'shards_dir': colours / 'shards',
                             'n_golden': 6, 'gate_items': 25})
    check([configs['b3'], configs['b4']], card_gib=80, ranks=1)
    printed = capsys.readouterr().out
    assert 'has 60 image files to train on, 24 held out' in printed
    assert 'may hold out only 24 audio files, the gates here ask 25' in printed
    assert '80 steps' not in printed and '10 steps of 8; 0.33 passes over 60 of i2t' in printed


def test_a_config_of_another_name_is_that_of_the_only_script_that_takes_it(make_chain, tmp_path, capsys):
    (tmp_path / 'mine.py').write_text((tmp_path / make_chain()['a2']).read_text())
    check([str(tmp_path / 'mine.py')], card_gib=80, ranks=1)
    assert 'mine.py: train_a2.py takes its settings' in capsys.readouterr().out
    (tmp_path / 'mine.py').write_text('seed = 2\n')
    assert check([str(tmp_path / 'mine.py')], card_gib=80, ranks=1) == 1
    assert 'name it like a1_mine.py' in capsys.readouterr().out


@pytest.mark.parametrize('size', ['qwen3_8b', 'qwen3_0.6b', 'small'])
def test_every_shipped_config_is_looked_at_and_missing_data_comes_with_how_to_get_it(size, monkeypatch):
    """A machine without data/: real configs are wrong by that alone, each file with its line of the README's table."""
    from small import make
    monkeypatch.setattr(make, 'build', lambda *args: pytest.fail('the check builds nothing'))
    configs = [f'configs/{stage}_{size}.py' for stage in ('a1', 'a11', *STAGES[1:])]
    code, printed = run_here('tools/check.py', *configs)
    for config in configs:
        assert f'{config}: ' in printed and 'takes its settings' in printed
    wrong = wrong_lines(printed)
    if size == 'small':                                # its data is made by the stages themselves
        assert wrong == [] or all('data/small' not in line for line in wrong)
        assert code == bool(wrong)
    elif not (REPO / 'data' / 'LLaVA-Pretrain').exists():
        assert code == 1 and len(wrong) >= 10
        assert all('; get ' in line for line in wrong), wrong
