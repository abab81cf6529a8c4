"""
The small world's questions about two pictures. As about one, an answer looks up what it needs before its verdict.

The first question of a chat has the two pictures before it, or in it, or one of them waits for the second question.
"""
from small.world import COLOURS, NUMBERS, PLACES, SHAPES, Scene, choose, question, random_scene

QUESTIONS = {
    'pair colour': ('Is the {} of one colour in both pictures?', 'The {}: do the two pictures agree on its colour?'),
    'pair more': ('Which picture has more shapes?', 'Are there more shapes in the first or in the second?'),
    'pair number': ('Do both have the same number of shapes?', 'Does the number of shapes differ?'),
    'pair place': ('What differs at the {}?', 'Compare the {} part of the two.'),
    'pair which': ('Which of the two has a {} {}?', 'Find the picture with a {} {}.'),
}
KINDS = (*QUESTIONS, 'pair colour', 'pair which')      # of which many a draw finds none
PLACINGS = (                                           # of the two pictures in a first question
    '<image>\n<image>\n{}', '<image>\n<image>\n{}', 'First <image> and second <image>\n{}', '{}\n<image>\n<image>')


def second_scene(first, rng):
    """A scene to compare with the first one: another, in half of the cases with some of the first one's things."""
    scene = random_scene(rng)
    if rng.random() < 0.5:
        return scene
    things = {thing.place: thing for thing in scene.things}
    for thing in first.things:
        if rng.random() < 0.6:
            things[thing.place] = thing
    things = sorted(things.values(), key=lambda thing: list(PLACES).index(thing.place))
    return Scene(tuple(things[:3]), scene.background)


def of_shape(scene, shape):
    """The colours of a shape in a scene."""
    return [thing.colour for thing in scene.things if thing.shape == shape]


def colours(first, second, rng):
    """Whether a shape that each has once is of one colour in both."""
    shapes = [shape for shape in SHAPES if len(of_shape(first, shape)) == len(of_shape(second, shape)) == 1]
    if not shapes:
        return None
    same = [shape for shape in shapes if of_shape(first, shape) == of_shape(second, shape)]
    shape = choose(rng, same if same and rng.random() < 0.7 else shapes)
    [a], [b] = of_shape(first, shape), of_shape(second, shape)
    return (shape,), f'The first {shape} is {a}, the second is {b}, so {"yes" if a == b else "no"}.'


def numbers(first, second):
    """'The first has two shapes, the second has one': how many each has."""
    found = []
    for scene in first, second:
        n = len(scene.things)
        found.append(f'has {NUMBERS[n]} shape{"s" if n > 1 else ""}')
    return f'The first {found[0]}, the second {found[1]}'


def more(first, second):
    a, b = len(first.things), len(second.things)
    return f'{numbers(first, second)}, so {"the first" if a > b else "the second" if b > a else "neither"} has more.'


def place(first, second, rng):
    """What each has at a place where one of them has something."""
    asked = choose(rng, sorted({thing.place for thing in (*first.things, *second.things)}))
    names = []
    for scene in first, second:
        there = [f'a {t.size} {t.colour} {t.shape}' for t in scene.things if t.place == asked]
        names.append(there[0] if there else 'nothing')
    verdict = 'nothing differs' if names[0] == names[1] else 'they differ'
    return (asked,), f'At the {asked} the first has {names[0]}, the second has {names[1]}, so {verdict}.'


def which(first, second, rng):
    """Which one has a shape of a colour, the shape being in each at most once."""
    scene = choose(rng, (first, second))
    colour, shape = (choose(rng, COLOURS), choose(rng, SHAPES))
    if rng.random() < 0.85:
        thing = choose(rng, scene.things)
        colour, shape = thing.colour, thing.shape
    reasons = []
    has = []
    for name, scene in ('first', first), ('second', second):
        found = of_shape(scene, shape)
        if len(found) > 1:
            return None
        reasons.append(f'the {shape} of the {name} is {found[0]}' if found else f'the {name} has no {shape}')
        has += [name] if colour in found else []
    verdict = {0: 'neither', 1: f'the {"".join(has)}', 2: 'both'}[len(has)]
    reason = ', '.join(reasons)
    return (colour, shape), f'{reason[0].upper()}{reason[1:]}, so {verdict}.'


def pair_question(kind, first, second, rng):
    """(question, answer) of a kind about two scenes; None where they allow no unambiguous one."""
    n = int(rng.integers(len(QUESTIONS[kind])))
    ask = QUESTIONS[kind][n]
    if kind == 'pair more':
        return ask, more(first, second)
    if kind == 'pair number':
        differ = len(first.things) != len(second.things)
        return ask, f'{numbers(first, second)}, so {"yes" if differ == bool(n) else "no"}.'
    make = {'pair colour': colours, 'pair place': place, 'pair which': which}[kind]
    found = make(first, second, rng)
    return found and (ask.format(*found[0]), found[1])


def pair_chat(first, second, rng):
    """A chat of one to four turns about two scenes: [(kind, question, answer)], the <image> marks in the questions, no
    question twice."""
    turns = []
    n_turns = int(rng.integers(1, 5))
    while len(turns) < n_turns:
        kind = choose(rng, KINDS)
        pair = pair_question(kind, first, second, rng)
        if pair and pair[0] not in [ask for _, ask, _ in turns]:
            turns.append((kind, *pair))
    asks = [ask for _, ask, _ in turns]
    if rng.random() < 0.25:                            # the second one comes with the second question
        one = None
        while one is None:
            kind = choose(rng, ('what', 'count'))
            one = question(kind, first, rng)
        turns.insert(0, (kind, *one))
        asks = [f'<image>\n{one[0]}', f'<image>\n{asks[0]}', *asks[1:]]
    else:
        asks[0] = choose(rng, PLACINGS).format(asks[0])
    return [(kind, ask, answer) for (kind, _, answer), ask in zip(turns, asks)]
