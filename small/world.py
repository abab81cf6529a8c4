"""
The small world: pictures and sounds of known content, drawn, played, named, asked about, and read back.

A scene has one to three objects, each in its own quarter of the picture, on a plain background. A sound is one to three
tones of one kind in a second. see() and hear() read them back from pixels and samples by arithmetic alone, so that what
a model writes, draws or plays can be judged without another model.

Every function that takes an rng draws from it in a fixed order: the same generator makes the same bytes.
"""
import math
import re
from collections import namedtuple
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image

# World s draws each of its parts from the generator 100 s + this number: world 1 from 101 to 110.
SEED_NUMBERS = {'text': 1, 'llm': 2, 'vision': 3, 'captions': 4, 'instruct': 5, 'image_codec': 6, 'audio_codec': 7,
                'sounds': 8, 'llm_report': 9, 'pairs': 10}


def part_seed(part, seed):
    return 100 * seed + SEED_NUMBERS[part]


def choose(rng, options):
    """One of the options, each as likely as the others."""
    options = sorted(options) if isinstance(options, set) else list(options)   # the order of a set changes between runs
    return options[int(rng.integers(len(options)))]


# -----------------------------------------------------------------------------
# scenes: drawn, and read back from pixels

Thing = namedtuple('Thing', 'size colour shape place')
Scene = namedtuple('Scene', 'things background')       # things in reading order: top left first

SIZES = {'small': 6.5, 'big': 11.5}                    # half the extent, in pixels
SHAPES = ('circle', 'square', 'triangle', 'cross')
COLOURS = {
    'red': (220, 40, 40),
    'green': (40, 170, 60),
    'blue': (45, 75, 225),
    'yellow': (240, 215, 50),
    'purple': (150, 50, 175),
    'cyan': (60, 205, 215),
}
BACKGROUNDS = {
    'black': (15, 15, 15),
    'white': (243, 243, 243),
    'gray': (128, 128, 128),
    'brown': (112, 70, 30),
}
PLACES = {                                             # centre of each quarter, x and y
    'top left': (16, 16),
    'top right': (48, 16),
    'bottom left': (16, 48),
    'bottom right': (48, 48),
}
NUMBERS = ('zero', 'one', 'two', 'three')
PIXELS = 64                                            # height and width of a picture
PATCH = 32                                             # of the tower: 2 x 2 patches, one a quarter, cheap and enough


def as_scene(fields):
    """The Scene that JSON keeps as nested lists, [[[size, colour, shape, place], ..], background]."""
    things, background = fields
    return Scene(tuple(Thing(*thing) for thing in things), background)


def random_scene(rng, n_things=None):
    """A Scene of n_things objects, by default one to three and mostly two or three."""
    n_things = n_things or choose(rng, (1, 2, 2, 2, 3, 3, 3))
    quarters = sorted(rng.permutation(4)[:n_things])
    things = []
    for quarter in quarters:
        size = choose(rng, SIZES)
        colour = choose(rng, COLOURS)
        shape = choose(rng, SHAPES)
        things.append(Thing(size, colour, shape, list(PLACES)[quarter]))
    return Scene(tuple(things), choose(rng, BACKGROUNDS))


def coverage(shape, radius, dx, dy):
    """Share of each pixel that a shape covers, 0 to 1. dx, dy: pixel centres relative to the shape's centre."""
    if shape == 'circle':
        distance = np.hypot(dx, dy) - radius
    elif shape == 'square':
        distance = np.maximum(abs(dx), abs(dy)) - 0.9 * radius
    elif shape == 'triangle':                          # the base is at the bottom, the tip at the top
        distance = np.maximum(dy - radius, (2 * abs(dx) - dy - radius) / math.sqrt(5))
    else:                                              # a cross: the union of two bars, each a third wide
        half_width = 0.34 * radius
        upright = np.maximum(abs(dx) - half_width, abs(dy) - radius)
        lying = np.maximum(abs(dx) - radius, abs(dy) - half_width)
        distance = np.minimum(upright, lying)
    return np.clip(0.5 - distance, 0, 1)               # an edge is one pixel wide


def tinted(rgb, rng):
    return np.clip(np.array(rgb) + rng.integers(-12, 13, 3), 0, 255)


def draw(scene, rng):
    """Scene -> uint8 (64, 64, 3). rng moves objects by up to a pixel and tints every colour a little."""
    y, x = np.mgrid[:PIXELS, :PIXELS] + 0.5            # the middle of each pixel
    picture = np.ones((PIXELS, PIXELS, 3)) * tinted(BACKGROUNDS[scene.background], rng)
    for thing in scene.things:
        centre_x, centre_y = np.array(PLACES[thing.place]) + rng.uniform(-1, 1, 2)
        radius = SIZES[thing.size] * rng.uniform(0.95, 1.05)
        alpha = coverage(thing.shape, radius, x - centre_x, y - centre_y)[..., None]   # (64, 64, 1)
        picture = picture * (1 - alpha) + alpha * tinted(COLOURS[thing.colour], rng)
    return picture.round().astype(np.uint8)


@lru_cache
def outlines():
    """Every shape in a quarter, at sizes and positions as draw() varies them: [(size, shape)], (outlines, 1024)."""
    y, x = np.mgrid[:32, :32] - 15.5
    offsets = (-1, -0.5, 0, 0.5, 1)
    kinds = []
    drawn = []
    for size, shape, scale, dx, dy in product(SIZES, SHAPES, (0.95, 1, 1.05), offsets, offsets):
        kinds.append((size, shape))
        drawn.append(coverage(shape, SIZES[size] * scale, x - dx, y - dy).ravel())
    return kinds, np.stack(drawn)


def nearest_colour(rgb, palette):
    return min(palette, key=lambda name: np.sum((np.array(palette[name]) - rgb) ** 2))


def see(image):
    """Picture (PIL image or uint8 array, any size) -> the Scene that it shows, by arithmetic on pixels alone.

    Right on at least 99.5 % of untouched pictures.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image, dtype=np.uint8))
    if image.size != (PIXELS, PIXELS):                 # a codec may draw smaller ones
        image = image.resize((PIXELS, PIXELS), Image.BICUBIC)
    pixels = np.asarray(image.convert('RGB')).astype(float)                        # (64, 64, 3)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)             # no object reaches the border
    things = []
    for place, (x, y) in PLACES.items():
        found = see_thing(pixels[y - 16:y + 16, x - 16:x + 16], background)
        if found:
            things.append(Thing(*found, place))
    return Scene(tuple(things), nearest_colour(background, BACKGROUNDS))


def see_thing(quarter, background):
    """(size, colour, shape) of the object in a quarter (32, 32, 3) of a picture, or None."""
    contrast = np.sqrt(((quarter - background) ** 2).sum(-1))                      # (32, 32)
    if (contrast > 60).sum() < 30:                     # a small cross covers about 90 pixels
        return None
    inside = contrast > 0.7 * np.percentile(contrast[contrast > 60], 80)           # without the blended edge
    rgb = np.median(quarter[inside], axis=0)
    # each pixel lies between background and object: where on that line is its coverage
    line = rgb - background
    alpha = np.clip((quarter - background) @ line / (line ** 2).sum(), 0, 1).ravel()   # (1024,)
    kinds, drawn = outlines()
    squares = ((drawn - 2 * alpha) * drawn).sum(1)     # |drawn - alpha|^2 without alpha^2, the same for all
    size, shape = kinds[np.argmin(squares)]
    return size, nearest_colour(rgb, COLOURS), shape

# -----------------------------------------------------------------------------
# captions: one sentence that names everything in the scene

ANY_SIZE = '|'.join(SIZES)
ANY_COLOUR = '|'.join(COLOURS)
ANY_SHAPE = '|'.join(SHAPES)
ANY_PLACE = '|'.join(PLACES)
ANY_BACKGROUND = '|'.join(BACKGROUNDS)
# what a caption is recognised by: an object, the background, where one object is from another
THING = re.compile(rf'({ANY_SIZE}) ({ANY_COLOUR}) ({ANY_SHAPE})(?: at the)? ({ANY_PLACE})')
BACKGROUND = re.compile(rf'({ANY_BACKGROUND}) background|on ({ANY_BACKGROUND})')
RELATION = re.compile(rf'{THING.pattern} is (above|below|left of|right of) an? {THING.pattern}')

def relation(a, b):
    """Where place a is from place b: left or right in one row of the picture, above or below otherwise."""
    ax, ay = PLACES[a]
    bx, by = PLACES[b]
    if ay == by:
        return 'left of' if ax < bx else 'right of'
    return 'above' if ay < by else 'below'


def full_name(thing, link=''):
    return f'{thing.size} {thing.colour} {thing.shape}{link} {thing.place}'


def caption(scene, rng):
    """One of four phrasings; the last needs two objects to relate."""
    things = scene.things
    background = scene.background
    phrasing = choose(rng, 'abcd' if len(things) > 1 else 'abc')
    names = [full_name(thing) for thing in things]
    names_at = [f"a {full_name(thing, ' at the')}" for thing in things]
    if phrasing == 'a':
        return f"{', '.join(names)}, {background} background"
    if phrasing == 'b':
        return f"a picture of {' and '.join(names_at)} on {background}"
    if phrasing == 'c':
        return f"{background} background with {'; '.join(names)}"
    first, second = (0, 1) if rng.random() < 0.5 else (1, 0)
    related = relation(things[first].place, things[second].place)
    others = ''.join(f' and there is {name}' for name in names_at[2:])
    return f'here a {names[first]} is {related} a {names[second]}{others}, on {background}'


# -----------------------------------------------------------------------------
# instruct: questions and answers about one picture. An answer repeats what was asked for before it says what is new, as
# people do to be clear

QUESTIONS = {
    'what': ('What is in the {} part?', 'Which thing do you see at the {}?'),
    'colour': ('Which colour does the {} have?', 'Tell me the colour of the {}.'),
    'count': ('How many shapes can you see?', 'Count the shapes, please.'),
    'where': ('Where do you find the {} shape?', 'In which part is the {} one?'),
    'describe': ('Describe everything you see.', 'What does this picture show in full?'),
}


def question(kind, scene, rng):
    """(question, answer) of a kind about a scene; None where the scene allows no unambiguous one."""
    things = scene.things
    target = choose(rng, things)
    if kind == 'yesno':
        return yes_or_no(scene, target, rng)
    # a colour is asked for by the shape, a place by the colour: either must be the only one
    if kind == 'colour' and [t.shape for t in things].count(target.shape) > 1:
        return None
    if kind == 'where' and [t.colour for t in things].count(target.colour) > 1:
        return None
    ask = choose(rng, QUESTIONS[kind])
    size, colour, shape, place = target
    if kind == 'what':
        return ask.format(place), f'In the {place} part is a {size} {colour} {shape}.'
    if kind == 'colour':
        return ask.format(shape), f'The {shape} is {colour}.'
    if kind == 'where':
        return ask.format(colour), f'The {colour} one is in the {place} part.'
    if kind == 'count':
        plural = 's' if len(things) > 1 else ''
        return ask, f'I can see {NUMBERS[len(things)]} shape{plural}.'
    listed = ', '.join(f'a {t.size} {t.colour} {t.shape} at the {t.place}' for t in things)
    return ask, f'There is {listed}, on {scene.background}.'


def yes_or_no(scene, target, rng):
    """Whether there is a shape of a colour. The answer repeats the question, looks it up, then gives the verdict."""
    shape = target.shape if rng.random() < 0.75 else choose(rng, SHAPES)
    colours = [t.colour for t in scene.things if t.shape == shape]
    if len(colours) > 1:
        return None
    asked = colours[0] if colours and rng.random() < 0.6 else choose(rng, COLOURS)
    reason = f'The {shape} is {colours[0]}' if colours else f'There is no {shape}'
    verdict = 'yes' if asked in colours else 'no'
    return f'Does the picture show a {asked} {shape}?', f'A {asked} {shape}? {reason}, so {verdict}.'


def chat(scene, rng):
    """A chat of one to six turns about a scene: [(kind, question, answer)], no question twice."""
    turns = []
    asked = set()
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
# sounds: one to three tones of one kind in a second

Sound = namedtuple('Sound', 'timbre pitch contour loudness count')

RATE = 16_000                                          # samples per second; a clip is one second
TIMBRES = {                                            # amplitudes of the harmonics
    'pure': (1.0,),
    'hollow': (1.0, 0.0, 1.0, 0.0, 0.5),
    'bright': (1.0, 1.0, 0.7, 0.4),
    'rough': (1.0,),                                   # a pure tone that trembles
}
PITCHES = {'low': 140, 'middle': 230, 'high': 345}     # Hz in the middle of a tone
CONTOURS = {'level': 0.0, 'rising': 0.4, 'falling': -0.4}   # natural log of the pitch at the end over that at the start
LOUDNESSES = {'even': 0.0, 'fading': -1.7, 'swelling': 1.7}   # the same for the amplitude, over the whole clip
SOUND_COUNTS = ('one', 'two', 'three')
SOUND_OPTIONS = {'timbre': TIMBRES, 'pitch': PITCHES, 'contour': CONTOURS, 'loudness': LOUDNESSES,
                 'count': SOUND_COUNTS}
TONE_FIRST = 0.1                                       # a tone starts here in its share of the second ...
TONE_LENGTH = 0.74                                     # ... and takes so much of it
TREMBLE = 40                                           # Hz, of a rough tone's amplitude


def as_sound(fields):
    return Sound(*fields)


def random_sound(rng):
    return Sound(*(choose(rng, options) for options in SOUND_OPTIONS.values()))


def play(sound, rng):
    """Sound -> float32 (16000,) in [-1, 1].

    rng moves the tones by up to 0.3 % in pitch, and the whole in volume, but not their phases: a codec would spend its
    codes on them, and no caption names them.
    """
    n_tones = SOUND_COUNTS.index(sound.count) + 1
    t = np.arange(RATE) / RATE                         # seconds
    pitch = PITCHES[sound.pitch] * rng.uniform(0.997, 1.003)
    wave = np.zeros(RATE)
    for k in range(n_tones):
        wave += play_tone(sound, pitch, t - (k + TONE_FIRST) / n_tones, TONE_LENGTH / n_tones)
    wave *= np.exp(LOUDNESSES[sound.loudness] * (t - 0.5))
    return (rng.uniform(0.45, 0.55) * wave / np.abs(wave).max()).astype(np.float32)


def play_tone(sound, pitch, t, length):
    """One tone of unit power, silent outside of it. t: (16000,) seconds since its start; length: seconds."""
    glide = CONTOURS[sound.contour]
    x = np.clip(t / length, 0, 1)                      # 0 to 1 within the tone
    # the phase is the integral of pitch * exp(glide * (x - 1/2)) over time
    cycles = x
    if glide:
        cycles = (np.exp(glide * (x - 0.5)) - np.exp(-0.5 * glide)) / glide
    phase = 2 * np.pi * pitch * length * cycles
    tone = sum(amplitude * np.sin(h * phase) for h, amplitude in enumerate(TIMBRES[sound.timbre], 1))
    if sound.timbre == 'rough':
        tone = tone * (1 - np.cos(2 * np.pi * TREMBLE * t))
    edge = np.clip(np.minimum(x, 1 - x) * length / 0.01, 0, 1)   # 10 ms in and out: no clicks
    return tone / np.sqrt(np.mean(tone[edge > 0] ** 2)) * edge


def sound_caption(sound, rng):
    """One phrase that names everything in the clip."""
    timbre, pitch, contour, loudness, count = sound
    tone = 'tone' if count == 'one' else 'tones'
    return choose(rng, (
        f'{count} {pitch} {timbre} {tone}, {contour}, {loudness}',
        f'a {timbre} sound: {count} {contour} {tone}, {pitch} and {loudness}',
        f'{loudness} and {contour}, {count} {timbre} {tone} with a {pitch} pitch',
        f'the sound of {count} {pitch} {tone}, {loudness}, {contour} and {timbre}'))


# -----------------------------------------------------------------------------
# sounds read back from samples. Letters: F frames of 50 ms, every 10 ms


def envelope(wave):
    """Volume (50,) of a wave (16000,) in windows of 50 ms: two trembles of a rough tone, so that they even out."""
    energy = np.cumsum(np.pad(wave.astype(np.float64) ** 2, (401, 400)))
    return np.sqrt(np.maximum(energy[800::320] - energy[:-800:320], 0)[:50])


@lru_cache
def envelopes():
    """[(count, loudness, their mean envelope of length 1)]: what hear() compares with."""
    found = []
    for count, loudness in product(SOUND_COUNTS, LOUDNESSES):
        rng = np.random.default_rng(0)
        sound = Sound('pure', 'high', 'level', loudness, count)
        mean = sum(envelope(play(sound, rng)) for _ in range(8))
        found.append((count, loudness, mean / np.linalg.norm(mean)))
    return found


def hear(wave):
    """float (16000,) -> the Sound in it, by arithmetic on samples alone; all None when it is silent.

    Right on at least 99.5 % of untouched clips.
    """
    wave = np.asarray(wave, dtype=np.float64)
    volume = envelope(wave)
    if not np.linalg.norm(volume) > 1e-3:              # not `<=`: a wave of NaN is silent too
        return Sound(None, None, None, None, None)
    # the volume over time gives the number of tones and whether they fade or swell
    count, loudness, _ = max(envelopes(), key=lambda e: e[2] @ volume)
    n_tones = SOUND_COUNTS.index(count) + 1
    frames, x = frames_in_tones(wave, n_tones)
    spectrum = abs(np.fft.rfft(frames, 8192))          # (F, 4097), bins of 1.95 Hz
    level, slope = pitch_line(spectrum, x, np.linalg.norm(frames, axis=1) + 1e-9)
    pitch = min(PITCHES, key=lambda name: abs(np.log(PITCHES[name]) - level))
    contour = min(CONTOURS, key=lambda name: abs(CONTOURS[name] - slope))
    timbre = hear_timbre(wave, n_tones, spectrum, np.exp(level + slope * (x - 0.5)))
    return Sound(timbre, pitch, contour, loudness, count)


def frames_in_tones(wave, n_tones):
    """The frames that lie in a tone, (F, 800) under a Hann window, and where in it: (F,) 0 to 1."""
    starts = np.arange(0, RATE - 800, 160)
    x = ((starts + 400) / RATE * n_tones % 1 - TONE_FIRST) / TONE_LENGTH
    margin = 0.4 * n_tones * 0.05 / TONE_LENGTH        # most of the frame has to lie in it
    inside = (x > margin) & (x < 1 - margin)
    frames = wave[starts[inside][:, None] + np.arange(800)]
    return frames * np.hanning(800), x[inside]


def strength(spectrum, frequencies):
    """(F, n) amplitude of each frame at frequencies (F or 1, n) in Hz, interpolated between bins."""
    position = np.minimum(frequencies * 8192 / RATE, 4000)
    low = position.astype(int)
    part = position % 1
    frame = np.arange(len(spectrum))[:, None]
    return (1 - part) * spectrum[frame, low] + part * spectrum[frame, low + 1]


def pitch_line(spectrum, x, weight):
    """(level, slope) of log pitch over x: each frame's best pitch, then a line through them."""
    tried = np.exp(np.arange(np.log(100), np.log(460), 0.01))[None]
    # with its overtones: a hollow tone's third harmonic alone is as strong as its first
    total = strength(spectrum, tried) + 0.5 * strength(spectrum, 2 * tried) + 0.25 * strength(spectrum, 3 * tried)
    log_pitch = np.log(tried[0, np.argmax(total, axis=1)])
    kept = weight > 0
    for _ in range(2):                                 # without what is far from the median of what was kept
        median = np.sort(log_pitch[kept])[kept.sum() // 2]
        kept = abs(log_pitch - median) < 0.35
    slope, level = np.polyfit(x[kept] - 0.5, log_pitch[kept], 1, w=weight[kept])
    return level, slope


def hear_timbre(wave, n_tones, spectrum, pitch):
    """The timbre, by the strength of the second and third harmonic of pitch (F,), or else by its tremble."""
    around = pitch[:, None] * np.linspace(0.97, 1.03, 7)                           # (F, 7)
    first, second, third = (strength(spectrum, h * around).max(1).sum() for h in (1, 2, 3))
    if second > 0.4 * first:
        return 'bright'
    if third > 0.28 * first:
        return 'hollow'
    trembling = 0                                      # the power at 40 Hz against the mean power, tone by tone
    for k in range(n_tones):
        start, end = (int((k + TONE_FIRST + TONE_LENGTH * x) / n_tones * RATE) for x in (0.1, 0.9))
        end -= (end - start) % (RATE // TREMBLE)       # whole trembles
        power = wave[start:end] ** 2
        turning = np.exp(-2j * np.pi * TREMBLE / RATE * np.arange(len(power)))
        trembling += abs(power @ turning) / (power.sum() + 1e-12)
    return 'rough' if trembling / n_tones > 0.3 else 'pure'


# -----------------------------------------------------------------------------


def agreement(found, truth):
    """(right, asked) of the attributes that two Sounds share, or two Scenes (objects are matched by their place)."""
    if isinstance(truth, Sound):
        return sum(a == b for a, b in zip(found, truth)), len(truth)
    found_at = {thing.place: thing for thing in found.things}
    true_at = {thing.place: thing for thing in truth.things}
    right = int(found.background == truth.background)
    for place in found_at.keys() & true_at.keys():
        right += sum(a == b for a, b in zip(found_at[place], true_at[place]))
    return right, 1 + 4 * len(found_at.keys() | true_at.keys())
