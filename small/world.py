"""
The small world: what can be in a picture or a sound, how it is drawn or played, named and asked about, and how it is
read back from pixels or samples by arithmetic alone, so that what a model says, draws or sounds can be judged without
another model.

A scene has one to three objects, each in its own quarter of the picture, on a plain background. A sound is one to three
tones of one kind in a second.
"""
import math
import re
from collections import namedtuple
from functools import lru_cache

import numpy as np
from PIL import Image

# -----------------------------------------------------------------------------
# scenes: how they are drawn, and how they are read back from pixels

Thing = namedtuple('Thing', 'size colour shape place')
Scene = namedtuple('Scene', 'things background')       # things in reading order of their places

SIZES = {'small': 6.5, 'big': 11.5}                    # half the extent, in pixels of a 64 x 64 picture
SHAPES = ('circle', 'square', 'triangle', 'cross')
COLOURS = {'red': (220, 40, 40), 'green': (40, 170, 60), 'blue': (45, 75, 225),
           'yellow': (240, 215, 50), 'purple': (150, 50, 175), 'cyan': (60, 205, 215)}
BACKGROUNDS = {'black': (15, 15, 15), 'white': (243, 243, 243), 'gray': (128, 128, 128), 'brown': (112, 70, 30)}
PLACES = {'top left': (16, 16), 'top right': (48, 16), 'bottom left': (16, 48), 'bottom right': (48, 48)}
NUMBERS = ('zero', 'one', 'two', 'three')
PIXELS, PATCH = 64, 32                                 # 2 x 2 patches, a place each: cheap, and shapes are learned


def choose(rng, options):
    options = sorted(options) if isinstance(options, set) else list(options)   # sets have no order that lasts
    return options[int(rng.integers(len(options)))]


def random_scene(rng, n_things=None):
    n_things = n_things or choose(rng, (1, 2, 2, 2, 3, 3, 3))
    places = sorted(rng.permutation(4)[:n_things])
    things = tuple(Thing(choose(rng, SIZES), choose(rng, COLOURS), choose(rng, SHAPES), list(PLACES)[p])
                   for p in places)
    return Scene(things, choose(rng, BACKGROUNDS))


def coverage(shape, radius, dx, dy):
    """How much of each pixel a shape covers, 0 to 1. dx, dy: pixel centres relative to the shape's centre."""
    if shape == 'circle':
        distance = np.hypot(dx, dy) - radius
    elif shape == 'square':
        distance = np.maximum(abs(dx), abs(dy)) - 0.9 * radius
    elif shape == 'triangle':                          # the base is at the bottom, the tip at the top
        distance = np.maximum(dy - radius, (2 * abs(dx) - dy - radius) / math.sqrt(5))
    else:                                              # a cross: the union of two bars, each a third wide
        bar, arm = 0.34 * radius, radius
        distance = np.minimum(np.maximum(abs(dx) - bar, abs(dy) - arm), np.maximum(abs(dx) - arm, abs(dy) - bar))
    return np.clip(0.5 - distance, 0, 1)


def draw(scene, rng, size=PIXELS):
    """Scene -> uint8 array (size, size, 3). rng moves objects by up to a pixel and tints every colour a little."""
    def tinted(rgb):
        return np.clip(np.array(rgb) + rng.integers(-12, 13, 3), 0, 255)

    scale = size / 64
    y, x = np.mgrid[:size, :size] + 0.5
    picture = np.ones((size, size, 3)) * tinted(BACKGROUNDS[scene.background])
    for thing in scene.things:
        cx, cy = (np.array(PLACES[thing.place]) + rng.uniform(-1, 1, 2)) * scale
        alpha = coverage(thing.shape, SIZES[thing.size] * scale * rng.uniform(0.95, 1.05), x - cx, y - cy)[..., None]
        picture = picture * (1 - alpha) + alpha * tinted(COLOURS[thing.colour])
    return picture.round().astype(np.uint8)


@lru_cache
def outlines():
    """([(size, shape)], (outlines, 1024)): every shape in a quarter, at sizes and places as draw() varies them."""
    y, x = np.mgrid[:32, :32] - 15.5
    steps = (-1, -0.5, 0, 0.5, 1)
    kinds = [(size, shape, scale, dx, dy) for size in SIZES for shape in SHAPES for scale in (0.95, 1, 1.05)
             for dx in steps for dy in steps]
    drawn = [coverage(shape, SIZES[size] * scale, x - dx, y - dy) for size, shape, scale, dx, dy in kinds]
    return [k[:2] for k in kinds], np.stack(drawn).reshape(len(kinds), -1)


def see(image):
    """Picture (PIL image or uint8 array, any size) -> the Scene that it shows, by arithmetic on pixels alone.

    The border's median gives the background. In each quarter, what differs from it is an object if it covers enough;
    its median colour and the outline that is nearest to it say which. Right on >= 99.5 % of untouched pictures.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, dtype=np.uint8))
    if image.size != (64, 64):
        image = image.resize((64, 64), Image.BICUBIC)
    pixels = np.asarray(image.convert('RGB')).astype(float)

    def nearest(rgb, palette):
        return min(palette, key=lambda name: np.sum((np.array(palette[name]) - rgb) ** 2))

    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    kinds, drawn = outlines()
    things = []
    for place, (cx, cy) in PLACES.items():
        quarter = pixels[cy - 16:cy + 16, cx - 16:cx + 16]
        off = np.sqrt(((quarter - ground) ** 2).sum(-1))
        if (off > 60).sum() < 30:                      # a small cross covers about 90 pixels
            continue
        rgb = np.median(quarter[off > 0.7 * np.percentile(off[off > 60], 80)], axis=0)
        alpha = np.clip((quarter - ground) @ (rgb - ground) / ((rgb - ground) ** 2).sum(), 0, 1).ravel()
        size, shape = kinds[np.argmin(((drawn - 2 * alpha) * drawn).sum(1))]   # least squares, without alpha's own
        things.append(Thing(size, nearest(rgb, COLOURS), shape, place))
    return Scene(tuple(things), nearest(ground, BACKGROUNDS))


# -----------------------------------------------------------------------------
# captions: one sentence that names everything in the scene, and how one is judged

THING = re.compile(rf"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?: at the)? "
                   rf"({'|'.join(PLACES)})")
GROUND = re.compile(rf"({'|'.join(BACKGROUNDS)}) background|on ({'|'.join(BACKGROUNDS)})")
RELATION = re.compile(rf'{THING.pattern} is (above|below|left of|right of) an? {THING.pattern}')


def relation(a, b):
    """Where the place a is as seen from the place b. Places in one row are left or right, all others above or below."""
    (ax, ay), (bx, by) = PLACES[a], PLACES[b]
    if ay == by:
        return 'left of' if ax < bx else 'right of'
    return 'above' if ay < by else 'below'


def caption(scene, rng):
    def name(thing, link=''):
        return f'{thing.size} {thing.colour} {thing.shape}{link} {thing.place}'

    things, ground = scene.things, scene.background
    frame = choose(rng, 'abcd' if len(things) > 1 else 'abc')
    if frame == 'a':
        return ', '.join(map(name, things)) + f', {ground} background'
    if frame == 'b':
        return 'a picture of ' + ' and '.join(f"a {name(t, ' at the')}" for t in things) + f' on {ground}'
    if frame == 'c':
        return f'{ground} background with ' + '; '.join(map(name, things))
    first, second = (things[0], things[1]) if rng.random() < 0.5 else (things[1], things[0])
    rest = ''.join(f" and there is a {name(t, ' at the')}" for t in things[2:])
    return f'here a {name(first)} is {relation(first.place, second.place)} a {name(second)}{rest}, on {ground}'


def score_caption(text, scene):
    """(right, asked): the attributes that the text gets right, out of those of the scene and of whatever it adds.

    An object counts four (size, colour, shape, place) and is matched by its place; the background and a stated relation
    count one each. Missed objects and invented ones have all four wrong.
    """
    said = {m[3]: m for m in THING.findall(text)}
    truth = {t.place: t for t in scene.things}
    right, asked = 0, 1 + 4 * len(truth.keys() | said.keys())
    for place in truth.keys() & said.keys():
        right += 1 + sum(a == b for a, b in zip(said[place][:3], truth[place][:3]))
    ground = GROUND.search(text)
    right += bool(ground) and (ground[1] or ground[2]) == scene.background
    for m in RELATION.findall(text):
        asked += 1
        right += m[4] == relation(m[3], m[8]) and {m[:4], m[5:]} <= {tuple(t) for t in scene.things}
    return right, asked


# -----------------------------------------------------------------------------
# instruct: questions and answers about one picture

def question(kind, scene, rng):
    """One question of a kind about a scene, with its answer; None where the scene allows no unambiguous one.

    An answer says again what was asked for before it says what is new, as people do to be clear.
    """
    things = scene.things
    target = choose(rng, things)

    def alone(key):
        return sum(getattr(t, key) == getattr(target, key) for t in things) == 1

    if kind == 'what':
        ask = choose(rng, ('What is in the {} part?', 'Which thing do you see at the {}?'))
        size, colour, shape, place = target
        return ask.format(place), f'In the {place} part is a {size} {colour} {shape}.'
    if kind == 'colour' and alone('shape'):
        ask = choose(rng, ('Which colour does the {} have?', 'Tell me the colour of the {}.'))
        return ask.format(target.shape), f'The {target.shape} is {target.colour}.'
    if kind == 'count':
        ask = choose(rng, ('How many shapes can you see?', 'Count the shapes, please.'))
        return ask, f"I can see {NUMBERS[len(things)]} shape{'s' if len(things) > 1 else ''}."
    if kind == 'where' and alone('colour'):
        ask = choose(rng, ('Where do you find the {} shape?', 'In which part is the {} one?'))
        return ask.format(target.colour), f'The {target.colour} one is in the {target.place} part.'
    if kind == 'yesno':                                # what is asked, the reason, then the verdict
        shape = target.shape if rng.random() < 0.75 else choose(rng, SHAPES)
        with_it = [t for t in things if t.shape == shape]
        if len(with_it) > 1:
            return None
        colour = with_it[0].colour if with_it and rng.random() < 0.6 else choose(rng, COLOURS)
        reason = f'The {shape} is {with_it[0].colour}' if with_it else f'There is no {shape}'
        verdict = 'yes' if colour in [t.colour for t in with_it] else 'no'
        return f'Does the picture show a {colour} {shape}?', f'A {colour} {shape}? {reason}, so {verdict}.'
    if kind == 'describe':
        listed = ', '.join(f'a {t.size} {t.colour} {t.shape} at the {t.place}' for t in things)
        ask = choose(rng, ('Describe everything you see.', 'What does this picture show in full?'))
        return ask, f'There is {listed}, on {scene.background}.'
    return None


def chat(scene, rng):
    """A chat of one to six turns about a scene: [(kind, question, answer)], no question twice."""
    turns, asked = [], set()
    n_turns = int(rng.integers(1, 7))
    while len(turns) < n_turns:
        kind = choose(rng, 2 * ('what', 'colour', 'where', 'yesno') + ('count', 'describe'))
        pair = question(kind, scene, rng)
        if pair and pair[0] not in asked:
            asked.add(pair[0])
            turns.append((kind, *pair))
        elif turns and rng.random() < 0.05:            # a scene with one object runs out of questions
            break
    return turns


# -----------------------------------------------------------------------------
# sounds: one to three tones of one kind in a second, how they are played, and how they are heard by arithmetic

Sound = namedtuple('Sound', 'timbre pitch contour loudness count')

RATE = 16_000                                          # samples a second; a clip is one second
TIMBRES = {'pure': (1.0,), 'hollow': (1.0, 0.0, 1.0, 0.0, 0.5), 'bright': (1.0, 1.0, 0.7, 0.4),
           'rough': (1.0,)}                            # amplitudes of the harmonics; rough is a pure tone that trembles
PITCHES = {'low': 140, 'middle': 230, 'high': 345}     # Hz in the middle of a tone
CONTOURS = {'level': 0.0, 'rising': 0.4, 'falling': -0.4}   # natural log of the pitch at the end over that at the start
LOUDNESSES = {'even': 0.0, 'fading': -1.7, 'swelling': 1.7}   # the same for the amplitude, over the whole clip
SOUND_COUNTS = ('one', 'two', 'three')
TONE_FIRST, TONE_LENGTH = 0.1, 0.74                    # of each tone's share of the second
TREMBLE = 40                                           # Hz, of a rough tone's amplitude


def random_sound(rng):
    return Sound(*(choose(rng, options) for options in (TIMBRES, PITCHES, CONTOURS, LOUDNESSES, SOUND_COUNTS)))


def play(sound, rng):
    """Sound -> float32 (16000,) in [-1, 1]. rng moves the tones by up to 0.3 % in pitch, and all in volume: more would
    be spent on phases, which no caption tells."""
    n, t = SOUND_COUNTS.index(sound.count) + 1, np.arange(RATE) / RATE
    pitch, glide = PITCHES[sound.pitch] * rng.uniform(0.997, 1.003), CONTOURS[sound.contour]
    wave = np.zeros(RATE)
    for k in range(n):
        first, length = (k + TONE_FIRST) / n, TONE_LENGTH / n
        x = np.clip((t - first) / length, 0, 1)        # 0 to 1 within the tone
        # the phase is the integral of pitch * exp(glide * (x - 1/2)) over time
        cycles = x if glide == 0 else (np.exp(glide * (x - 0.5)) - np.exp(-0.5 * glide)) / glide
        phase = 2 * np.pi * pitch * length * cycles
        tone = sum(a * np.sin(h * phase) for h, a in enumerate(TIMBRES[sound.timbre], 1))
        if sound.timbre == 'rough':
            tone = tone * (1 - np.cos(2 * np.pi * TREMBLE * (t - first)))
        edge = np.clip(np.minimum(x, 1 - x) * length / 0.01, 0, 1)   # 10 ms in and out: no clicks
        wave += tone / np.sqrt(np.mean(tone[edge > 0] ** 2)) * edge
    wave *= np.exp(LOUDNESSES[sound.loudness] * (t - 0.5))
    return (rng.uniform(0.45, 0.55) * wave / np.abs(wave).max()).astype(np.float32)


def envelope(wave):
    """Volume of a wave (..., 16000) in 50 windows of 50 ms: two trembles of a rough tone, so that they even out."""
    power = np.cumsum(np.pad(wave.astype(np.float64) ** 2, [(0, 0)] * (wave.ndim - 1) + [(401, 400)]), axis=-1)
    return np.sqrt(np.maximum(power[..., 800::320] - power[..., :-800:320], 0)[..., :50])


@lru_cache
def envelopes():
    """[(count, loudness, their mean envelope of length 1)]: what hear() compares with."""
    found = []
    for count in SOUND_COUNTS:
        for loudness in LOUDNESSES:
            rng = np.random.default_rng(0)
            mean = sum(envelope(play(Sound('pure', 'high', 'level', loudness, count), rng)) for _ in range(8))
            found.append((count, loudness, mean / np.linalg.norm(mean)))
    return found


def hear(wave):
    """float (16000,) -> the Sound in it, by arithmetic on samples alone; all None when it is silent.

    The volume over time says how many tones there are and which way their loudness goes. Within the tones, the spectra
    of frames of 50 ms say the pitch and its way and how strong the second and third harmonics are; a volume that moves
    at 40 Hz, that the tone is rough. Right on >= 99.5 % of untouched clips.
    """
    wave = np.asarray(wave, dtype=np.float64)
    volume = envelope(wave)
    if not np.linalg.norm(volume) > 1e-3:              # NaN too
        return Sound(None, None, None, None, None)
    count, loudness, _ = max(envelopes(), key=lambda e: e[2] @ volume)
    n = SOUND_COUNTS.index(count) + 1

    # frames inside the tones, and where in its tone each is, 0 to 1
    starts = np.arange(0, RATE - 800, 160)
    place = ((starts + 400) / RATE * n % 1 - TONE_FIRST) / TONE_LENGTH
    within = 0.4 * n * 0.05 / TONE_LENGTH              # most of the frame
    starts, place = (v[(place > within) & (place < 1 - within)] for v in (starts, place))
    frames = wave[starts[:, None] + np.arange(800)] * np.hanning(800)
    spectrum = abs(np.fft.rfft(frames, 8192))          # bins of 1.95 Hz
    weight = np.linalg.norm(frames, axis=1) + 1e-9

    def strength(frequencies):
        """(frames, frequencies) amplitude, interpolated between bins."""
        at = np.minimum(frequencies * 8192 / RATE, 4000)
        low, part = at.astype(int), at % 1
        rows = np.arange(len(spectrum))[:, None]
        return (1 - part) * spectrum[rows, low] + part * spectrum[rows, low + 1]

    tried = np.exp(np.arange(np.log(100), np.log(460), 0.01))[None]
    pitch = tried[0, np.argmax(strength(tried) + 0.5 * strength(2 * tried) + 0.25 * strength(3 * tried), axis=1)]
    # a line through log(pitch), twice: the second time without what is far from the first
    log_pitch, kept = np.log(pitch), weight > 0
    for _ in range(2):
        middle = np.sort(log_pitch[kept])[kept.sum() // 2]
        kept = abs(log_pitch - middle) < 0.35
    slope, level = np.polyfit(place[kept] - 0.5, log_pitch[kept], 1, w=weight[kept])
    contour = min(CONTOURS, key=lambda c: abs(CONTOURS[c] - slope))
    name = min(PITCHES, key=lambda p: abs(np.log(PITCHES[p]) - level))

    f = np.exp(level + slope * (place - 0.5))[:, None]
    first, second, third = (strength(h * f * np.linspace(0.97, 1.03, 7)).max(1).sum() for h in (1, 2, 3))
    trembling = 0
    for k in range(n):                                 # the volume at 40 Hz against the mean volume, tone by tone
        a, b = (int((k + TONE_FIRST + TONE_LENGTH * x) / n * RATE) for x in (0.1, 0.9))
        power = wave[a:a + (b - a) // 400 * 400] ** 2   # whole trembles
        trembling += abs(power @ np.exp(-2j * np.pi * TREMBLE / RATE * np.arange(len(power)))) / (power.sum() + 1e-12)
    if second > 0.4 * first:
        timbre = 'bright'
    elif third > 0.28 * first:
        timbre = 'hollow'
    else:
        timbre = 'rough' if trembling / n > 0.3 else 'pure'
    return Sound(timbre, name, contour, loudness, count)


# -----------------------------------------------------------------------------
# captions of sounds: one phrase that names everything in the clip, and how one is judged

SAID = {'timbre': TIMBRES, 'pitch': PITCHES, 'contour': CONTOURS, 'loudness': LOUDNESSES, 'count': SOUND_COUNTS}


def sound_caption(sound, rng):
    timbre, pitch, contour, loudness, count = sound
    tone = 'tone' if count == 'one' else 'tones'
    return choose(rng, (f'{count} {pitch} {timbre} {tone}, {contour}, {loudness}',
                        f'a {timbre} sound: {count} {contour} {tone}, {pitch} and {loudness}',
                        f'{loudness} and {contour}, {count} {timbre} {tone} with a {pitch} pitch',
                        f'the sound of {count} {pitch} {tone}, {loudness}, {contour} and {timbre}'))


def score_sound_caption(text, sound):
    """(right, asked): the attributes of a sound that the text gets right, of five. One that is named twice, in two
    different ways, is wrong."""
    words = set(re.findall('[a-z]+', text.lower()))
    return sum(words & set(options) == {getattr(sound, key)} for key, options in SAID.items()), len(SAID)


def agreement(found, truth):
    """(right, asked) of the attributes that two Sounds share, or two Scenes (objects are matched by their place)."""
    if isinstance(truth, Sound):
        return sum(a == b for a, b in zip(found, truth)), len(truth)
    found_at, true_at = ({t.place: t for t in scene.things} for scene in (found, truth))
    right = int(found.background == truth.background)
    for place in found_at.keys() & true_at.keys():
        right += sum(a == b for a, b in zip(found_at[place], true_at[place]))
    return right, 1 + 4 * len(found_at.keys() | true_at.keys())
