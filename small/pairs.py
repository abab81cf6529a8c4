"""
The small world's questions about two pictures. As about one, an answer looks up what it needs before its verdict.

The pictures stand in the questions, each after a word that names it in most chats, since that is what an answer looks
them up by. A chat's first question has both, or one of them waits for the second question.
"""
from small.world import NUMBERS, PLACES, SHAPES, Scene, choose, question, random_scene

ORDINALS = ('first', 'second')
QUESTIONS = {
    'pair colour': ('Is the {} of one colour in both pictures?', 'The {}: do the two pictures agree on its colour?'),
    'pair more': ('Which picture has more shapes?', 'Are there more shapes in the first or in the second?'),
    'pair number': ('Do both have the same number of shapes?', 'Does the number of shapes differ?'),
    # about one of the two: what the others are put together from
    'colour of one': (
        'Which colour does the {} of the {} picture have?', 'Tell me the colour of the {} in the {} one.'),
    'count of one': ('How many shapes has the {} picture?', 'Count the shapes of the {} one, please.'),
}
# as often as they stand here, but that many a draw finds no shape for the first
KINDS = (*4 * ('pair colour',), *2 * ('pair more', 'pair number'), 'colour of one', 'count of one')
PLACINGS = (                                           # of the two pictures in a first question
    'First picture: <image>\nSecond picture: <image>\n{}', 'First <image> and second <image>\n{}',
    '<image>\n<image>\n{}')


def second_scene(first, rng):
    """A scene to compare with the first one: another, in most cases with some of the first one's things."""
    scene = random_scene(rng)
    if rng.random() < 0.2:
        return scene
    things = {thing.place: thing for thing in scene.things}
    for thing in first.things:
        if rng.random() < 0.6:
            things[thing.place] = thing
    things = sorted(things.values(), key=lambda thing: list(PLACES).index(thing.place))
    return Scene(tuple(things[:3]), scene.background)


def colours_of(scene):
    """{shape: its colour} of the shapes that a scene has once."""
    shapes = [thing.shape for thing in scene.things]
    return {thing.shape: thing.colour for thing in scene.things if shapes.count(thing.shape) == 1}


def shared_shape(scenes, rng, alike):
    """A shape that each scene has once, of one colour or (alike = False) of two; None where there is none."""
    first, second = map(colours_of, scenes)
    found = [shape for shape in SHAPES if shape in first and shape in second
             and (first[shape] == second[shape]) == alike]
    return choose(rng, found) if found else None


def named_number(n, scenes):
    """'first has two shapes': how many the first (n = 0) or the second has."""
    number = len(scenes[n].things)
    return f'{ORDINALS[n]} has {NUMBERS[number]} shape{"s" if number > 1 else ""}'


def more(scenes):
    first, second = [len(scene.things) for scene in scenes]
    return 'the first has' if first > second else 'the second has' if second > first else 'neither has'


def pair_question(kind, scenes, rng):
    """(question, answer) of a kind about two scenes; None where they allow no unambiguous one."""
    phrasing = int(rng.integers(2))
    ask = QUESTIONS[kind][phrasing]
    n = int(rng.integers(2))
    if kind == 'count of one':
        return ask.format(ORDINALS[n]), f'The {named_number(n, scenes)}.'
    if kind == 'colour of one':
        colours = colours_of(scenes[n])
        if not colours:
            return None
        shape = choose(rng, colours)
        return ask.format(shape, ORDINALS[n]), f'The {ORDINALS[n]} {shape} is {colours[shape]}.'
    if kind in ('pair more', 'pair number'):
        verdict = f'{more(scenes)} more'
        if kind == 'pair number':
            differ = len(scenes[0].things) != len(scenes[1].things)
            verdict = 'yes' if differ == bool(phrasing) else 'no'
        return ask, f'The {named_number(0, scenes)}. The {named_number(1, scenes)}, so {verdict}.'
    alike = bool(rng.integers(2))                      # half of the verdicts are yes
    shape = shared_shape(scenes, rng, alike)
    if shape is None:
        return None
    first, second = [colours_of(scene)[shape] for scene in scenes]
    verdict = 'yes' if alike else 'no'
    return ask.format(shape), f'The first {shape} is {first}. The second {shape} is {second}, so {verdict}.'


def pair_chat(first, second, rng):
    """A chat of three to five turns about two scenes: [(kind, question, answer)], the <image> marks in the questions,
    no question twice."""
    turns = []
    n_turns = int(rng.integers(3, 6))
    waits = rng.random() < 0.25                        # the second picture comes with the second question
    if waits:
        turns.append(('count', *question('count', first, rng)))
    while len(turns) < n_turns:
        kind = choose(rng, KINDS)
        pair = pair_question(kind, (first, second), rng)
        if pair and pair[0] not in [ask for _, ask, _ in turns]:
            turns.append((kind, *pair))
    asks = [ask for _, ask, _ in turns]
    if waits:
        asks[:2] = [f'First picture: <image>\n{asks[0]}', f'Second picture: <image>\n{asks[1]}']
    else:
        asks[0] = choose(rng, PLACINGS).format(asks[0])
    return [(kind, ask, answer) for (kind, _, answer), ask in zip(turns, asks)]
