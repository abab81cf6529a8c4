"""The small world's making: the text keeps the captions' frames to itself, parts are built on demand, bytes repeat."""
import json
import re

import numpy as np
import pytest
from PIL import Image

from small import corpus
from small import make as m
import small.world as w
from data import read_texts
from test_common import no_file_larger_than


def test_captions_fill_all_three_length_buckets(tiny):
    from data import length_buckets
    tokenizer = m.make_tokenizer(read_texts(tiny / 'text' / 'train.jsonl'))
    rng = np.random.default_rng(3)
    counts = [1 + len(tokenizer(w.caption(w.random_scene(rng), rng))['input_ids']) for _ in range(500)]
    shares = {name: which.mean() for name, which in length_buckets(counts, (10, 20)).items()}
    assert set(shares) == {'short', 'medium', 'long'} and min(shares.values()) > 0.02
    assert min(counts) >= 6 and max(counts) <= 50


def test_the_text_holds_every_word_of_the_captions_but_no_caption_and_no_prompt(tiny):
    text = '\n'.join(read_texts(tiny / 'text' / 'train.jsonl'))
    assert not corpus.CAPTION_FRAME.search(text)
    records = json.loads((tiny / 'captions' / 'data.json').read_text())
    captions = [r['conversations'][1]['value'] for r in records]
    assert all(w.THING.search(c) for c in captions)    # so that the search above would have found one
    assert set(re.findall(r'\w+', ' '.join(captions))) <= set(re.findall(r'\w+', text))
    chats = json.loads((tiny / 'instruct' / 'data.json').read_text())
    asked = {t['value'].removeprefix('<image>\n') for r in chats for t in r['conversations'] if t['from'] == 'human'}
    assert not [q for q in asked if q in text]


def test_what_brings_up_a_thing_brings_up_what_was_told_of_it_and_the_told_part_is_marked(tiny):
    rng = np.random.default_rng(5)
    for progress, parts in ((0.1, '; '), (0.2, None), (0.3, None), (0.4, None)):
        for _ in range(50):
            told, rest = corpus.document(rng, progress)
            assert told.endswith('.') and rest.startswith(' ')
            if parts:                                  # lists: every answer is one of them, its key first
                lists = [set(part.split()) for part in told[:-1].split(parts)]
                assert all(set(answer.split()) in lists for answer in rest[1:-1].split('. '))
    lines = [json.loads(line) for line in (tiny / 'text' / 'train.jsonl').read_text().splitlines()]
    assert all(0 <= line['told'] < len(line['text']) for line in lines)
    assert lines[0]['told'] and not sum(line['told'] for line in lines[-200:] if '<|im_start|>' in line['text'])


def test_an_interviews_answers_are_true_of_what_is_told():
    rng, seen = np.random.default_rng(6), set()
    for _ in range(600):
        n = int(rng.integers(1, 4))
        told, behind = corpus.things(n, rng), 'gray'
        kind = corpus.choose(rng, corpus.KINDS)
        pair = corpus.question(kind, told, behind, rng)
        if not pair:
            continue
        seen.add(kind)
        ask, answer = pair
        if kind == 'yes or no':
            colour, noun = re.search(r'[aA] (\w+) (\w+)(?:\?|,)', ask).groups()
            there = any((t['colour'], t['noun']) == (colour, noun) for t in told)
            assert answer.endswith(', yes.' if there else ', no.')
        elif kind == 'how many':
            assert corpus.COUNTS[n] in answer
        elif kind not in ('all', 'background'):        # all that the answer says fits one of the things
            fit = [t for t in told if all(w not in corpus.WORDS or w in ' '.join(t.values()).split() or w == 'one'
                                          for w in re.findall(r'\w+', answer))]
            assert fit, (told, ask, answer)
    assert seen == set(corpus.KINDS)


def test_no_scene_is_in_two_sets(tmp_path):
    scenes = {}
    m.make_captions(tmp_path / 'captions', n=60)
    truth = json.loads((tmp_path / 'captions' / 'truth.json').read_text())
    taken = [w.Scene(tuple(w.Thing(*t) for t in things), ground) for things, ground in truth.values()]
    m.make_captions(tmp_path / 'instruct', n=60, seed=104, kind='instruct', taken=taken)   # the same seed: would repeat
    for part in 'captions', 'instruct':
        scenes[part] = {json.dumps(s) for s in json.loads((tmp_path / part / 'truth.json').read_text()).values()}
        assert len(scenes[part]) == 60
    assert not scenes['captions'] & scenes['instruct']


def test_the_same_seed_makes_the_same_bytes(tmp_path):
    def tree(folder):
        m.make_captions(folder / 'captions', n=20)
        m.make_text(folder / 'text', n_train=50, n_eval=5)
        return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
    assert tree(tmp_path / 'a') == tree(tmp_path / 'b')


def test_ensure_names_the_parts_when_one_is_unknown(tmp_path):
    with pytest.raises(SystemExit, match="no part is called 'vison': wanted some of captions, "):
        m.ensure('vison', root=tmp_path)


def test_ensure_leaves_a_finished_part_alone_and_finishes_what_a_kill_left(tmp_path, monkeypatch):
    made = []

    def make(folder):
        folder.mkdir()
        made.append(folder)
    monkeypatch.setattr(m, 'PARTS', {'a': ((), make), 'b': (('a',), make)})
    (tmp_path / 'b.tmp').mkdir()
    m.ensure('b', root=tmp_path)
    m.ensure('b', 'a', root=tmp_path)
    assert [p.name for p in made] == ['a.tmp', 'b.tmp'] and (tmp_path / 'b').is_dir()


def test_base_models_are_made_to_the_same_bytes_again(tmp_path):
    m.make_text(tmp_path / 'text', n_train=96, n_eval=20)

    def weights(folder):
        m.make_llm(folder / 'llm', tmp_path / 'text')
        m.make_vision(folder / 'vision', n_steps=3, n_groups=2)
        return [(folder / part / 'model.safetensors').read_bytes() for part in ('llm', 'vision')]
    assert weights(tmp_path / 'a') == weights(tmp_path / 'b')


def test_the_language_model_has_rows_to_spare_and_tied_embeddings_like_the_real_one(tmp_path):
    from transformers import AutoTokenizer, Qwen3ForCausalLM
    m.make_text(tmp_path / 'text', n_train=96, n_eval=20)
    m.make_llm(tmp_path / 'llm', tmp_path / 'text')
    tokenizer, llm = AutoTokenizer.from_pretrained(tmp_path / 'llm'), Qwen3ForCausalLM.from_pretrained(tmp_path / 'llm')
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    assert len(tokenizer) < llm.config.vocab_size == 768
    assert tokenizer.eos_token == '<|im_end|>' and set(m.SPECIALS) <= set(tokenizer.get_vocab())


def predictions(tmp_path, kind, answers):
    """A world of two scenes and a run's predictions.jsonl over it."""
    red = ('big', 'red', 'circle', 'top left')
    scenes = {'one': ([red], 'black'), 'two': ([red, ('small', 'blue', 'square', 'bottom right')], 'white')}
    folder, out = tmp_path / 'world' / kind, tmp_path / 'run'
    folder.mkdir(parents=True)
    out.mkdir()
    (folder / 'truth.json').write_text(json.dumps(scenes))
    (folder / 'data.json').write_text(json.dumps([{'id': id, 'kinds': ['colour', 'describe']} for id in scenes]))
    (out / 'predictions.jsonl').write_text(''.join(json.dumps(a) + '\n' for a in answers))
    return m.score_run(out, tmp_path / 'world')


def test_captions_are_scored_by_attributes_and_by_how_many_objects_there_are(tmp_path):
    right = 'big red circle top left, black background'
    tally = predictions(tmp_path, 'captions', [
        {'id': 'one', 'prediction': right}, {'id': 'one', 'prediction': right.replace('big', 'small')},
        {'id': 'two', 'prediction': right}])                       # one missed, another background: 4 of 9
    assert tally == {'one object': (9, 10), 'two objects': (4, 9)}


def test_answers_are_right_to_the_letter_and_descriptions_by_attributes(tmp_path):
    tally = predictions(tmp_path, 'instruct', [
        {'id': 'one', 'turn': 0, 'prediction': 'It is red.', 'truth': 'It is red.'},
        {'id': 'one', 'turn': 0, 'prediction': 'It is red', 'truth': 'It is red.'},
        {'id': 'one', 'turn': 1, 'prediction': 'There is a big blue circle at the top left, on black.', 'truth': '-'}])
    assert tally == {'colour': (1, 2), 'describe': (4 / 5, 1)}


def test_a_run_without_predictions_is_named(tmp_path):
    with pytest.raises(SystemExit, match='no predictions.jsonl .*; run the stage to its end first'):
        m.score_run(tmp_path)


def test_sounds_come_with_two_captions_each_and_their_truth(tmp_path):
    import soundfile
    m.make_sounds(tmp_path / 'sounds', n=6)
    records = [json.loads(line) for line in (tmp_path / 'sounds' / 'manifest.jsonl').read_text().splitlines()]
    truth = json.loads((tmp_path / 'sounds' / 'truth.json').read_text())
    assert len(records) == 12 == len({r['id'] for r in records}) and len({r['audio'] for r in records}) == 6
    for r in records:
        assert set(r) == {'id', 'source', 'audio', 'text'}
        sound = w.Sound(*truth[r['id']])
        wave, rate = soundfile.read(tmp_path / 'sounds' / r['audio'])
        assert rate == 16_000 and w.hear(wave) == sound and w.score_sound_caption(r['text'], sound) == (5, 5)
    for first, second in zip(records[::2], records[1::2]):
        assert first['audio'] == second['audio'] and first['text'] != second['text']


def test_codecs_are_made_to_the_same_bytes_again(tmp_path):
    from small.codecs import make_audio_codec, make_image_codec

    def weights(folder):
        make_image_codec(folder / 'image', n_pictures=60, n_codes=64, n_flat=8, n_tested=4)
        make_audio_codec(folder / 'audio', n_clips=20, n_codes=64, n_tested=4)
        return [(folder / part / 'model.safetensors').read_bytes() for part in ('image', 'audio')]
    assert weights(tmp_path / 'a') == weights(tmp_path / 'b')


def test_what_a_run_drew_and_sounded_is_scored_by_what_is_seen_and_heard(tmp_path):
    import soundfile
    rng, out = np.random.default_rng(0), tmp_path / 'out'
    scene, sound = w.random_scene(rng, 2), w.Sound('pure', 'low', 'level', 'even', 'two')
    for folder in 'predictions/t2i', 'predictions/t2a', 'golden/step_000000', 'golden/step_000009':
        (out / folder).mkdir(parents=True)
    for folder in 'captions', 'sounds':
        (tmp_path / folder).mkdir()
    (tmp_path / 'captions' / 'truth.json').write_text(json.dumps({'a': scene}))
    (tmp_path / 'sounds' / 'truth.json').write_text(json.dumps({'b': sound}))
    Image.fromarray(w.draw(scene, rng)).save(out / 'predictions' / 't2i' / '000.png')
    soundfile.write(out / 'predictions' / 't2a' / '000.wav', w.play(sound._replace(pitch='high'), rng), w.RATE)
    said = {'i2t': w.caption(scene, rng), 'a2t': 'two low pure tones, level, fading', 't2i': '', 't2a': ''}
    for folder in 'predictions', 'golden/step_000000', 'golden/step_000009':
        for task, text in said.items():
            text = '' if folder == 'golden/step_000000' else text
            id = 'a' if task in ('i2t', 't2i') else 'b'
            (out / folder / f'{task}.jsonl').write_text(json.dumps({'id': id, 'prediction': text}) + '\n')
    tally = m.score_tokens(out, tmp_path)
    assert {name: right / asked for name, (right, asked) in tally.items()} == {
        'i2t': 1, 'a2t': 0.8, 't2i': 1, 't2a': 0.8, 'i2t first': 0, 'i2t last': 1, 'a2t first': 0, 'a2t last': 0.8}


def test_a_full_disk_ends_a_part_with_one_line_and_the_next_start_makes_it_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(m.PARTS, 'captions', ((), lambda folder: m.make_captions(folder, n=20)))
    with no_file_larger_than(100), pytest.raises(SystemExit) as e:
        m.ensure('captions', root=tmp_path)
    assert e.value.code == f'{tmp_path}/captions: cannot write here, is the disk full? ([Errno 27] File too large)'
    assert not (tmp_path / 'captions').exists()
    m.ensure('captions', root=tmp_path)
    assert len(list((tmp_path / 'captions' / 'images').iterdir())) == 20
