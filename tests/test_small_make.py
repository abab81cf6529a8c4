"""Stage 0: the text keeps the captions' phrasings out, parts are built on demand, bytes repeat, runs are scored."""
import json
import re

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_common import no_file_larger_than

from data import length_buckets
from lists import read_texts
from small import corpus, make, score, world


def read_json(path):
    return json.loads(path.read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(folder):
    """{path in the folder: its bytes}."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


# -----------------------------------------------------------------------------
# the data


def test_captions_fill_all_three_length_buckets(tiny):
    from small.models import make_tokenizer
    tokenizer = make_tokenizer(read_texts(tiny / 'text' / 'train.jsonl'))
    rng = np.random.default_rng(3)
    captions = [world.caption(world.random_scene(rng), rng) for _ in range(500)]
    counts = [1 + len(ids) for ids in tokenizer(captions)['input_ids']]
    shares = {name: which.mean() for name, which in length_buckets(counts, (10, 20)).items()}
    assert set(shares) == {'short', 'medium', 'long'} and min(shares.values()) > 0.02
    assert min(counts) >= 6 and max(counts) <= 50


def test_the_text_holds_every_word_of_the_captions_but_no_caption_and_no_prompt(tiny):
    text = '\n'.join(read_texts(tiny / 'text' / 'train.jsonl'))
    assert not corpus.CAPTION_FRAME.search(text)
    captions = [record['conversations'][1]['value'] for record in read_json(tiny / 'captions' / 'data.json')]
    assert all(corpus.CAPTION_FRAME.search(caption) for caption in captions)   # so the search above would find one
    assert set(re.findall(r'\w+', ' '.join(captions))) <= set(re.findall(r'\w+', text))
    asked = set()
    for record in read_json(tiny / 'instruct' / 'data.json'):
        asked.update(turn['value'].removeprefix('<image>\n') for turn in record['conversations'][::2])
    assert asked and not [question for question in asked if question in text]


def test_a_word_of_a_list_brings_up_the_others_and_the_context_is_marked(tiny):
    rng = np.random.default_rng(5)
    for progress in (0.1, 0.2, 0.3, 0.4):
        for _ in range(50):
            context, answer = corpus.document(rng, progress)
            assert context.endswith('.') and answer.startswith(' ')
            if progress == 0.1:                        # lists only: every answer is one of them, its key first
                lists = [set(words.split()) for words in context[:-1].split('; ')]
                assert all(set(words.split()) in lists for words in answer[1:-1].split('. '))
    lines = read_lines(tiny / 'text' / 'train.jsonl')
    assert all(0 <= line['n_context'] < len(line['text']) for line in lines)
    assert lines[0]['n_context'] and not any(line['n_context'] for line in lines if '<|im_start|>' in line['text'])


def test_an_interviews_answers_are_true_of_its_things():
    rng = np.random.default_rng(6)
    asked_kinds = set()
    for _ in range(600):
        things = corpus.random_things(int(rng.integers(1, 4)), rng)
        kind = corpus.choose(rng, corpus.KINDS)
        pair = corpus.question(kind, things, 'gray', rng)
        if not pair:
            continue
        asked_kinds.add(kind)
        question, answer = pair
        if kind == 'yes or no':
            colour, noun = re.search(r'[aA] (\w+) (\w+)(?:\?|,)', question).groups()
            is_there = any((thing['colour'], thing['noun']) == (colour, noun) for thing in things)
            assert answer.endswith(', yes.' if is_there else ', no.')
        elif kind == 'count':
            assert corpus.COUNTS[len(things)] in answer
        elif kind not in ('all', 'background'):        # all that the answer names belongs to one of the things
            named = {word for word in re.findall(r'\w+', answer) if word in corpus.WORDS} - {'one'}
            assert any(named <= set(' '.join(thing.values()).split()) for thing in things), (things, question, answer)
    assert asked_kinds == set(corpus.KINDS)


def test_no_scene_is_in_two_sets(tmp_path):
    make.make_captions(tmp_path / 'captions', n=60)
    make.make_instruct(tmp_path / 'instruct', n=60)
    make.make_pairs(tmp_path / 'pairs', n=20, n_single=30)
    captions = score.read_truth(tmp_path / 'captions', world.as_scene)
    scenes = [scene for part in ('captions', 'instruct', 'pairs') for scene in make.scenes_of(tmp_path / part)]
    assert len(set(scenes)) == len(scenes) == 60 + 60 + 30 + 2 * 20
    # the same draws once more: none that was used comes again
    used = set(captions.values())
    rng = np.random.default_rng(104)
    assert not {make.new_scene(rng, used) for _ in range(60)} & set(captions.values())


def test_sounds_come_with_two_captions_each_and_their_truth(tmp_path):
    make.make_sounds(tmp_path, n=6)
    records = read_lines(tmp_path / 'manifest.jsonl')
    sounds = score.read_truth(tmp_path, world.as_sound)
    assert len({record['id'] for record in records}) == 12 and len({record['audio'] for record in records}) == 6
    for record in records:
        assert set(record) == {'id', 'source', 'audio', 'text'}
        sound = sounds[record['id']]
        wave, rate = soundfile.read(tmp_path / record['audio'])
        assert rate == 16_000 and world.hear(wave) == sound
        assert score.score_sound_caption(record['text'], sound) == (5, 5)
    for first, second in zip(records[::2], records[1::2]):
        assert first['audio'] == second['audio'] and first['text'] != second['text']


# -----------------------------------------------------------------------------
# the same bytes again


def test_world_1_has_the_seeds_101_to_110_and_no_two_worlds_share_one():
    assert sorted(world.part_seed(part, 1) for part in world.SEED_NUMBERS) == list(range(101, 111))
    assert world.part_seed('text', 2) == 201
    assert set(make.PARTS) < set(world.SEED_NUMBERS)


def test_the_same_seed_makes_the_same_bytes_and_another_one_others(tmp_path):
    def made(name, seed):
        make.make_captions(tmp_path / name / 'captions', n=20, seed=seed)
        make.make_text(tmp_path / name / 'text', n_train=50, n_eval=5, n_replay=5, seed=seed)
        make.make_sounds(tmp_path / name / 'sounds', n=2, seed=seed)
        return files(tmp_path / name)

    first = made('a', 1)
    assert made('b', 1) == first
    other = made('c', 2)
    assert other.keys() == first.keys() and not [path for path in first if other[path] == first[path]]


def test_base_models_are_made_to_the_same_bytes_again(tmp_path):
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from small.models import QWEN_SPECIALS, make_llm, make_vision

    def made(name):
        make.make_text(tmp_path / name / 'text', n_train=96, n_eval=20, n_replay=1)
        make_llm(tmp_path / name / 'llm')
        make_vision(tmp_path / name / 'vision', n_steps=3, n_groups=2)
        return files(tmp_path / name)

    assert made('a') == made('b')
    # like the real ones: tied embeddings, and more rows than the tokenizer has ids
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'a' / 'llm')
    llm = Qwen3ForCausalLM.from_pretrained(tmp_path / 'a' / 'llm')
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    assert len(tokenizer) < llm.config.vocab_size == 768
    assert tokenizer.eos_token == '<|im_end|>' and set(QWEN_SPECIALS) <= set(tokenizer.get_vocab())


def make_codecs(folder):
    from small.codecs import make_audio_codec, make_image_codec
    make_image_codec(folder / 'image_codec', n_pictures=60, n_codes=64, n_plain=8, n_tested=4)
    make_audio_codec(folder / 'audio_codec', n_clips=20, n_codes=64, n_tested=4)


def test_codecs_are_made_to_the_same_bytes_again(tmp_path):
    make_codecs(tmp_path / 'a')
    make_codecs(tmp_path / 'b')
    assert files(tmp_path / 'a') == files(tmp_path / 'b')


# -----------------------------------------------------------------------------
# on demand


def test_ensure_names_the_parts_when_one_is_unknown(tmp_path):
    with pytest.raises(SystemExit, match="no part is called 'vison': wanted some of captions, "):
        make.ensure('vison', root=tmp_path)


def test_ensure_leaves_a_finished_part_alone_and_finishes_what_a_kill_left(tmp_path, monkeypatch):
    made = []

    def fake(folder, seed):
        folder.mkdir()                                 # fails where a killed build's folder is still there
        made.append((folder.name, seed))

    monkeypatch.setattr(make, 'DATA', {'captions': fake, 'instruct': fake})
    (tmp_path / '.instruct.tmp').mkdir()
    (tmp_path / 'instruct.tmp').mkdir()                # somebody's own
    make.ensure('instruct', root=tmp_path)
    make.ensure('instruct', 'captions', root=tmp_path)
    assert made == [('.captions.tmp', 1), ('.instruct.tmp', 1)] and (tmp_path / 'instruct.tmp').is_dir()


def test_a_read_only_checkout_has_its_finished_parts_and_says_what_to_do_about_the_others(tmp_path, monkeypatch):
    (tmp_path / 'captions').mkdir()
    monkeypatch.setattr(make.os, 'access', lambda path, mode: False)
    make.ensure('captions', root=tmp_path)
    with pytest.raises(SystemExit, match='instruct of the small world cannot be made, .* set the paths') as e:
        make.ensure('captions', 'instruct', root=tmp_path)
    assert '\n' not in e.value.code and [path.name for path in tmp_path.iterdir()] == ['captions']


def test_a_folder_keeps_the_seed_that_it_was_made_with(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(make, 'DATA', {'captions': lambda folder, seed: made.append(seed) or folder.mkdir()})
    make.world_seed(tmp_path / 'two', 2)               # what small.make --seed=2 asks first
    make.ensure('captions', root=tmp_path / 'two')     # and a config later
    assert made == [2] and read_json(tmp_path / 'two' / 'seed.json') == {'seed': 2}
    with pytest.raises(SystemExit, match='two was made with seed 2, not 1: set --seed=2, remove it, or use an'):
        make.world_seed(tmp_path / 'two', 1)
    (tmp_path / 'old' / 'llm').mkdir(parents=True)     # made before there was a choice
    with pytest.raises(SystemExit, match='old was made with seed 1, not 2'):
        make.world_seed(tmp_path / 'old', 2)


def test_a_full_disk_ends_a_part_with_one_line_and_the_next_start_makes_it_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(make.DATA, 'captions', lambda folder, seed: make.make_captions(folder, 20, seed))
    with no_file_larger_than(100), pytest.raises(SystemExit) as e:
        make.ensure('captions', root=tmp_path)
    assert e.value.code == f'{tmp_path}/captions: cannot write here, is the disk full? ([Errno 27] File too large)'
    assert not (tmp_path / 'captions').exists()
    make.ensure('captions', root=tmp_path)
    assert len(list((tmp_path / 'captions' / 'images').iterdir())) == 20


def test_a_base_model_that_fails_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(make.sys, 'executable', '/bin/false')
    with pytest.raises(SystemExit, match='a base model could not be made, its own message is above; run again to go o'):
        make.ensure('vision', root=tmp_path)


# -----------------------------------------------------------------------------
# scores, worked out by hand

RED = ['big', 'red', 'circle', 'top left']
BLUE = ['small', 'blue', 'square', 'bottom right']


def write_truth(folder, truth, **files):
    folder.mkdir(parents=True)
    (folder / 'truth.json').write_text(json.dumps(truth))
    for name, content in files.items():
        (folder / f'{name}.json').write_text(json.dumps(content))


def test_captions_are_scored_by_attributes_and_by_the_number_of_objects(tmp_path):
    write_truth(tmp_path / 'captions', {'one': ([RED], 'black'), 'two': ([RED, BLUE], 'white')})
    right = 'big red circle top left, black background'
    tally = score.score_captions([
        {'id': 'one', 'prediction': right},
        {'id': 'one', 'prediction': right.replace('big', 'small')},
        {'id': 'two', 'prediction': right}], tmp_path)             # one missed, another background: 4 of 9
    assert tally == {'one object': (9, 10), 'two objects': (4, 9), 'all': (13, 19)}


def test_answers_are_right_to_the_letter_and_descriptions_by_attributes(tmp_path):
    write_truth(tmp_path / 'instruct', {'one': ([RED], 'black')}, data=[
        {'id': 'one', 'image': '1.png', 'kinds': ['colour', 'describe']},
        {'id': 'two', 'image': ['2.png', '3.png'], 'kinds': ['pair more']}])
    tally = score.score_answers([
        {'id': 'one', 'turn': 0, 'prediction': 'It is red.', 'truth': 'It is red.'},
        {'id': 'one', 'turn': 0, 'prediction': 'It is red', 'truth': 'It is red.'},
        {'id': 'one', 'turn': 1, 'prediction': 'There is a big blue circle at the top left, on black.', 'truth': '-'},
        {'id': 'two', 'turn': 0, 'prediction': 'The first.', 'truth': 'The first.'},
        {'id': 'two', 'turn': 0, 'prediction': 'The second.', 'truth': 'The first.'}], tmp_path)
    assert tally == {'colour': (1, 2), 'describe': (4 / 5, 1), 'pair more': (1, 2), 'all': (2.8, 5),
                     'one picture': (1.8, 3), 'two pictures': (1, 2)}


def test_what_a_b4_run_generates_is_scored_by_what_is_in_it(tmp_path):
    rng = np.random.default_rng(0)
    scene = world.random_scene(rng, 2)
    sound = world.Sound('pure', 'low', 'level', 'even', 'two')
    write_truth(tmp_path / 'captions', {'a': scene})
    write_truth(tmp_path / 'sounds', {'b': sound})
    out = tmp_path / 'out'
    texts = {'i2t': world.caption(scene, rng), 'a2t': 'two low pure tones, level, fading', 't2i': '', 't2a': ''}
    for folder in ('predictions', 'golden/step_000000', 'golden/step_000009'):
        (out / folder).mkdir(parents=True)
        for task, text in texts.items():
            prediction = '' if folder == 'golden/step_000000' else text
            line = {'id': 'a' if task in ('i2t', 't2i') else 'b', 'prediction': prediction}
            (out / folder / f'{task}.jsonl').write_text(json.dumps(line) + '\n')
    (out / 'predictions' / 't2i').mkdir()
    (out / 'predictions' / 't2a').mkdir()
    Image.fromarray(world.draw(scene, rng)).save(out / 'predictions' / 't2i' / '000.png')
    wave = world.play(sound._replace(pitch='high'), rng)
    soundfile.write(out / 'predictions' / 't2a' / '000.wav', wave, world.RATE)
    tally = score.score_tasks(out, tmp_path)
    assert {what: right / asked for what, (right, asked) in tally.items()} == {
        'i2t': 1, 'a2t': 0.8, 't2i': 1, 't2a': 0.8, 'i2t first': 0, 'i2t last': 1, 'a2t first': 0, 'a2t last': 0.8}


def test_what_survives_b1s_codecs_is_scored_on_the_items_that_b1_measured(tiny, tmp_path):
    from uti import UTI
    make_codecs(tmp_path)
    make.make_captions(tmp_path / 'captions', n=12)
    make.make_sounds(tmp_path / 'sounds', n=12)
    sources = {'llm': str(tiny / 'llm'), 'image_codec': str(tmp_path / 'image_codec'),
               'audio_codec': str(tmp_path / 'audio_codec')}
    UTI.build(**sources).space.save(tmp_path / 'out' / 'token_space.json')
    settings = {**sources, 'image_prefix': '', 'audio_prefix': '', 'n_items': 8}
    (tmp_path / 'out' / 'report.json').write_text(json.dumps({'settings': settings}))
    tally = score.score_codecs(tmp_path / 'out', tmp_path)
    assert tally['audio'][1] == 8 * 5                  # eight sounds, not eight captions of four
    assert tally['image'][1] >= sum(1 + 4 * len(things) for things, _ in list(
        read_json(tmp_path / 'captions' / 'truth.json').values())[:8])
    assert min(right / asked for right, asked in tally.values()) > 0.5   # codecs of 64 codes, from 60 pictures


def test_a_run_below_its_bar_ends_with_one_line():
    tally = {'i2t': (17, 20), 't2i': (17, 20), 'empty': (0, 0)}
    score.require_bars('out/b4', tally, {'t2i': 0.85})
    for bars, line in (({'t2i': 0.85, 'i2t': 0.9}, 'out/b4: i2t 85.00% right, wanted 90%'),
                       ({'empty': 0.0}, 'out/b4: empty 0.00% right, wanted 0%'),
                       ({}, 'out/b4: no predictions to score; run the stage to its end first')):
        with pytest.raises(SystemExit) as e:
            score.require_bars('out/b4', tally, bars)
        assert e.value.code == line


def test_a_run_without_predictions_is_named(tmp_path, run_here):
    line, _ = run_here('small/score.py', tmp_path)
    assert line.startswith(f'{tmp_path}/predictions.jsonl: cannot read the predictions (No such file')
    assert run_here('small/score.py') == ('which run? python -m small.score out/a1_small', '')
