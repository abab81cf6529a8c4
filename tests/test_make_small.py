"""The small world: see() reads what was drawn, captions say the truth, and the text keeps their frames to itself."""
import json
import re

import numpy as np
import pytest
from PIL import Image

import make_small as m
from data import read_texts

RED = m.Thing('big', 'red', 'circle', 'top left')
BLUE = m.Thing('small', 'blue', 'square', 'bottom right')


def test_see_reads_what_was_drawn():
    rng = np.random.default_rng(0)
    scenes = [m.random_scene(rng) for _ in range(800)]
    assert np.mean([m.see(m.draw(scene, rng)) == scene for scene in scenes]) >= 0.995


def test_see_reads_a_picture_of_half_the_size():
    rng = np.random.default_rng(1)
    scenes = [m.random_scene(rng) for _ in range(300)]
    halves = [Image.fromarray(m.draw(scene, rng)).resize((32, 32), Image.BOX) for scene in scenes]
    assert np.mean([m.see(half) == scene for half, scene in zip(halves, scenes)]) >= 0.97


def test_see_finds_nothing_on_an_empty_background():
    assert m.see(np.full((64, 64, 3), 128, np.uint8)) == m.Scene((), 'gray')


def test_a_true_caption_has_every_attribute_right_in_every_frame():
    rng = np.random.default_rng(2)
    for _ in range(300):
        scene = m.random_scene(rng)
        right, asked = m.score_caption(m.caption(scene, rng), scene)
        assert right == asked >= 5


@pytest.mark.parametrize('text, right, asked', [
    ('big red circle top left, small blue square bottom right, black background', 9, 9),
    ('big green circle top left, small blue square bottom right, black background', 8, 9),   # one colour
    ('big red circle top left, black background', 5, 9),                                     # an object missed: 4
    ('big red circle top left, small blue square bottom left, black background', 5, 13),     # misplaced: 4 less, 4 more
    ('big red circle top left, small blue square bottom right, white background', 8, 9),
    ('here a big red circle top left is above a small blue square bottom right, on black', 10, 10),
    ('here a big red circle top left is below a small blue square bottom right, on black', 9, 10),
    ('', 0, 9),
])
def test_the_score_of_a_caption_worked_out_by_hand(text, right, asked):
    assert m.score_caption(text, m.Scene((RED, BLUE), 'black')) == (right, asked)


@pytest.mark.parametrize('a, b, said', [
    ('top left', 'top right', 'left of'), ('bottom right', 'bottom left', 'right of'),
    ('top left', 'bottom right', 'above'), ('bottom left', 'top left', 'below')])
def test_relations(a, b, said):
    assert m.relation(a, b) == said


def test_captions_fill_all_three_length_buckets(tiny):
    from transformers import AutoTokenizer

    from data import length_buckets
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    rng = np.random.default_rng(3)
    counts = [1 + len(tokenizer(m.caption(m.random_scene(rng), rng))['input_ids']) for _ in range(500)]
    shares = {name: which.mean() for name, which in length_buckets(counts, (10, 20)).items()}
    assert set(shares) == {'short', 'medium', 'long'} and min(shares.values()) > 0.02
    assert min(counts) >= 6 and max(counts) <= 50


def test_the_text_holds_every_word_of_the_captions_but_no_caption_and_no_prompt(tiny):
    text = '\n'.join(read_texts(tiny / 'text' / 'train.jsonl'))
    assert not m.CAPTION_FRAME.search(text)
    records = json.loads((tiny / 'captions' / 'data.json').read_text())
    captions = [r['conversations'][1]['value'] for r in records]
    assert all(m.THING.search(c) for c in captions)    # so that the search above would have found one
    assert set(re.findall(r'\w+', ' '.join(captions))) <= set(re.findall(r'\w+', text))
    chats = json.loads((tiny / 'instruct' / 'data.json').read_text())
    asked = {t['value'].removeprefix('<image>\n') for r in chats for t in r['conversations'] if t['from'] == 'human'}
    assert not [q for q in asked if q in text]


def test_no_scene_is_in_two_sets(tmp_path):
    scenes = {}
    m.make_captions(tmp_path / 'captions', n=60)
    truth = json.loads((tmp_path / 'captions' / 'truth.json').read_text())
    taken = [m.Scene(tuple(m.Thing(*t) for t in things), ground) for things, ground in truth.values()]
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


def test_every_question_has_one_answer_and_it_is_true():
    rng = np.random.default_rng(4)
    scene = m.Scene((RED, BLUE), 'black')
    answers = {q: a for _ in range(60) for _, q, a in m.chat(scene, rng)}
    assert answers['Which colour does the circle have?'] == 'The circle is red.'
    assert answers['Where do you find the blue shape?'] == 'It is in the bottom right part.'
    assert answers['Count the shapes, please.'] == 'I can see two shapes.'
    assert answers['What is in the top left part?'] == 'It is a big red circle.'
    assert answers['Does the picture show a red circle?'] == 'Yes, there is a red circle.'
    assert m.score_caption(answers['Describe everything you see.'], scene) == (9, 9)


def test_an_ambiguous_question_is_not_asked():
    twins = m.Scene((RED, RED._replace(place='top right')), 'white')
    rng = np.random.default_rng(5)
    assert m.question('colour', twins, rng) is None and m.question('where', twins, rng) is None


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
    m.make_text(tmp_path / 'text', n_train=320, n_eval=20)

    def weights(folder):
        m.make_llm(folder / 'llm', tmp_path / 'text', batch=64)
        m.make_vision(folder / 'vision', tmp_path / 'text', n_steps=3, n_groups=2)
        return [(folder / part / 'model.safetensors').read_bytes() for part in ('llm', 'vision')]
    assert weights(tmp_path / 'a') == weights(tmp_path / 'b')


def test_the_language_model_has_rows_to_spare_and_tied_embeddings_like_the_real_one(tmp_path):
    from transformers import AutoTokenizer, Qwen3ForCausalLM
    m.make_text(tmp_path / 'text', n_train=320, n_eval=20)
    m.make_llm(tmp_path / 'llm', tmp_path / 'text', batch=64)
    tokenizer, llm = AutoTokenizer.from_pretrained(tmp_path / 'llm'), Qwen3ForCausalLM.from_pretrained(tmp_path / 'llm')
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    assert len(tokenizer) < llm.config.vocab_size == 768
    assert tokenizer.eos_token == '<|im_end|>' and set(m.SPECIALS) <= set(tokenizer.get_vocab())
