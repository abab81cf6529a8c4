"""The small world's truth: see() reads what was drawn, captions and answers say it, scores are counted by hand."""
import numpy as np
import pytest
from PIL import Image

from small import corpus, pairs, score
from small import world as w

RED = w.Thing('big', 'red', 'circle', 'top left')
BLUE = w.Thing('small', 'blue', 'square', 'bottom right')


def test_see_reads_what_was_drawn():
    rng = np.random.default_rng(0)
    scenes = [w.random_scene(rng) for _ in range(800)]
    assert np.mean([w.see(w.draw(scene, rng)) == scene for scene in scenes]) >= 0.995


def test_see_reads_a_picture_of_half_the_size():
    rng = np.random.default_rng(1)
    scenes = [w.random_scene(rng) for _ in range(300)]
    halves = [Image.fromarray(w.draw(scene, rng)).resize((32, 32), Image.BOX) for scene in scenes]
    assert np.mean([w.see(half) == scene for half, scene in zip(halves, scenes)]) >= 0.97


def test_see_finds_nothing_on_an_empty_background():
    assert w.see(np.full((64, 64, 3), 128, np.uint8)) == w.Scene((), 'gray')


def test_a_true_caption_has_every_attribute_right_in_every_frame():
    rng = np.random.default_rng(2)
    for _ in range(300):
        scene = w.random_scene(rng)
        right, asked = score.score_caption(w.caption(scene, rng), scene)
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
    assert score.score_caption(text, w.Scene((RED, BLUE), 'black')) == (right, asked)


@pytest.mark.parametrize('a, b, found', [
    ('top left', 'top right', 'left of'), ('bottom right', 'bottom left', 'right of'),
    ('top left', 'bottom right', 'above'), ('bottom left', 'top left', 'below')])
def test_relations(a, b, found):
    assert w.relation(a, b) == found


def test_every_question_has_one_answer_and_it_is_true():
    rng = np.random.default_rng(4)
    scene = w.Scene((RED, BLUE), 'black')
    answers = {q: a for _ in range(300) for _, q, a in w.chat(scene, rng)}
    assert answers['Which colour does the circle have?'] == 'The circle is red.'
    assert answers['Where do you find the blue shape?'] == 'The blue one is in the bottom right part.'
    assert answers['Count the shapes, please.'] == 'I can see two shapes.'
    assert answers['What is in the top left part?'] == 'In the top left part is a big red circle.'
    assert answers['Does the picture show a red circle?'] == 'A red circle? The circle is red, so yes.'
    assert answers['Does the picture show a blue circle?'] == 'A blue circle? The circle is red, so no.'
    assert answers['Does the picture show a red cross?'] == 'A red cross? There is no cross, so no.'
    assert score.score_caption(answers['Describe everything you see.'], scene) == (9, 9)


PAIR_ANSWERS = {
    'Is the circle of one colour in both pictures?': 'The first circle is red. The second circle is green, so no.',
    'The square: do the two pictures agree on its colour?':
        'The first square is blue. The second square is blue, so yes.',
    'Which picture has more shapes?': 'The first has two shapes. The second has three shapes, so the second has more.',
    'Do both have the same number of shapes?': 'The first has two shapes. The second has three shapes, so no.',
    'Does the number of shapes differ?': 'The first has two shapes. The second has three shapes, so yes.',
    'Which colour does the cross of the second picture have?': 'The second cross is red.',
    'Tell me the colour of the circle in the first one.': 'The first circle is red.',
    'How many shapes has the first picture?': 'The first has two shapes.',
    'Count the shapes of the second one, please.': 'The second has three shapes.'}
NEVER_ASKED = ('Is the cross of one colour in both pictures?', 'Which colour does the cross of the first picture have?')


def test_every_question_about_two_scenes_has_one_answer_and_it_is_true():
    first = w.Scene((RED, BLUE), 'black')
    second = w.Scene((RED._replace(colour='green', place='top right'),
                      w.Thing('big', 'red', 'cross', 'bottom left'), BLUE), 'white')
    rng = np.random.default_rng(4)
    answers = {}
    for _ in range(2000):
        turns = pairs.pair_chat(first, second, rng)
        asks = [ask for _, ask, _ in turns]
        assert ''.join(asks).count('<image>') == 2 and len({ask for ask in asks}) == len(asks)
        answers |= {ask.split('\n')[-1]: answer for kind, ask, answer in turns}
    assert {ask: answers.get(ask) for ask in PAIR_ANSWERS} == PAIR_ANSWERS
    assert not answers.keys() & set(NEVER_ASKED)
    assert answers['Count the shapes, please.'] == 'I can see two shapes.'   # where the second one is yet to come


def test_neither_has_more_and_a_colour_of_twins_is_not_asked():
    first = w.Scene((RED, RED._replace(place='top right')), 'black')
    second = w.Scene((RED, BLUE), 'white')
    rng = np.random.default_rng(4)
    found = {kind: pairs.pair_question(kind, (first, second), rng) for kind in pairs.QUESTIONS for _ in range(20)}
    assert found['pair more'][1] == 'The first has two shapes. The second has two shapes, so neither has more.'
    assert found['pair colour'] is None


def test_no_question_about_two_pictures_is_in_the_text():
    rng = np.random.default_rng(6)
    frames = [ask.split('{}')[0].strip() for asks in pairs.QUESTIONS.values() for ask in asks]
    texts = ' '.join(''.join(corpus.document(rng)) for _ in range(300))
    assert not [frame for frame in frames if len(frame.split()) > 2 and frame in texts]


def test_an_ambiguous_question_is_not_asked():
    twins = w.Scene((RED, RED._replace(place='top right')), 'white')
    rng = np.random.default_rng(5)
    assert w.question('colour', twins, rng) is None and w.question('where', twins, rng) is None
    found = [w.question('yesno', twins, rng) for _ in range(50)]
    assert None in found and not [pair for pair in found if pair and 'circle' in pair[1]]


# -----------------------------------------------------------------------------
# sounds

SOUND = w.Sound('hollow', 'low', 'rising', 'fading', 'two')


def test_hear_hears_what_was_played():
    rng = np.random.default_rng(10)
    sounds = [w.random_sound(rng) for _ in range(400)]
    assert np.mean([w.hear(w.play(sound, rng)) == sound for sound in sounds]) >= 0.995


def test_hear_hears_through_noise_at_8_db_and_at_any_volume():
    rng = np.random.default_rng(11)
    for _ in range(60):
        sound = w.random_sound(rng)
        wave = w.play(sound, rng)
        noisy = wave + rng.normal(size=16_000) * wave.std() * 10 ** (-8 / 20)
        assert w.hear(noisy * rng.uniform(0.1, 2)) == sound


@pytest.mark.parametrize('wave', [np.zeros(16_000), np.full(16_000, np.nan), np.full(16_000, 1e-9)])
def test_hear_hears_nothing_in_silence(wave):
    assert w.hear(wave) == w.Sound(None, None, None, None, None)


def test_noise_agrees_with_no_sound_more_than_by_chance():
    rng = np.random.default_rng(12)
    sounds = [w.random_sound(rng) for _ in range(100)]
    found = [w.hear(rng.normal(size=16_000)) for _ in sounds]
    right, asked = map(sum, zip(*(w.agreement(f, s) for f, s in zip(found, sounds))))
    assert asked == 500 and right / asked < 0.45       # a third of most, a quarter of the timbres


def test_a_clip_is_a_second_of_mono_within_full_scale_and_none_is_like_another():
    rng = np.random.default_rng(13)
    first, second = w.play(SOUND, rng), w.play(SOUND, rng)
    assert first.shape == (16_000,) and first.dtype == np.float32 and 0.4 < abs(first).max() <= 0.56
    assert not np.array_equal(first, second) and np.array_equal(first, w.play(SOUND, np.random.default_rng(13)))


def test_a_true_sound_caption_has_every_attribute_right_in_every_frame():
    rng = np.random.default_rng(14)
    for _ in range(200):
        sound = w.random_sound(rng)
        assert score.score_sound_caption(w.sound_caption(sound, rng), sound) == (5, 5)


@pytest.mark.parametrize('text, right', [
    ('two low hollow tones, rising, fading', 5), ('Two low hollow tones, rising', 4), ('one low pure tone', 1),
    ('two low or high hollow tones, rising, fading', 4),                     # both pitches: neither
    ('a followed lower tone', 0), ('', 0)])
def test_the_score_of_a_sound_caption_worked_out_by_hand(text, right):
    assert score.score_sound_caption(text, SOUND) == (right, 5)


def test_agreement_worked_out_by_hand():
    assert w.agreement(SOUND._replace(pitch='high', count='one'), SOUND) == (3, 5)
    truth = w.Scene((RED, BLUE), 'black')
    assert w.agreement(truth, truth) == (9, 9)
    assert w.agreement(w.Scene((RED._replace(colour='green'),), 'white'), truth) == (3, 9)   # size, shape, place
    assert w.agreement(w.Scene((RED, BLUE._replace(place='top right')), 'black'), truth) == (5, 13)
