"""
The small world's text: what its language model is made from. Every word of the captions, none of their phrasings.

A frozen language model can describe and answer only what it can look up in its context. A small one learns to look up
in steps that build on each other: first any word of a list brings up the others, then the same in lists written as
sentences, then things by what tells them apart, then questions in plain English. So the corpus is read in its order.

A document is (context, answer). The context of a lookup is random and cannot be predicted, so its tokens are no labels:
half of the gradient would be their noise. The comment above a function shows what it makes, context | answer.
"""
import math
import re
from collections import namedtuple
from itertools import chain, product

from small.world import ANY_SHAPE, BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, SOUND_OPTIONS, THING, choose

NAMES = ('Ann', 'Ben', 'Cleo', 'Dan', 'Eva', 'Finn', 'Gus', 'Hana')
COUNTS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')
ROWS = ('top', 'bottom', 'middle', 'upper', 'lower')
COLUMNS = ('left', 'right', 'centre')
# more sizes, nouns and positions than the pictures have: with few there is little to win by looking them up
FIELDS = {
    'size': 2 * tuple(SIZES) + ('tiny', 'large', 'huge', 'thin', 'wide', 'tall'),
    'colour': 2 * tuple(COLOURS) + tuple(BACKGROUNDS),
    'noun': 2 * SHAPES + ('ball', 'box', 'cup', 'hat', 'shape', 'star', 'book', 'thing', 'one'),
    'place': 3 * tuple(PLACES) + tuple(f'{row} {column}' for row, column in product(ROWS, COLUMNS)),
}
RELATIONS = ('above', 'below', 'left of', 'right of')
WORDS = sorted({*NAMES, *COUNTS, *' '.join(chain(*FIELDS.values())).split(), *chain(*SOUND_OPTIONS.values()),
                'tone', 'tones', 'sound', 'pitch'})


def word(field, rng):
    return choose(rng, FIELDS[field])


def in_random_order(options, rng):
    return [options[k] for k in rng.permutation(len(options))]


def random_things(n, rng, apart=('place',)):
    """n things, {field: word}, that differ from each other in each of the fields `apart`."""
    found = []
    while len(found) < n:
        thing = {field: word(field, rng) for field in FIELDS}
        if all(is_alone(thing, field, [thing, *found]) for field in apart):
            found.append(thing)
    return found


def is_alone(thing, field, things):
    """Whether the thing is the only one of the things with its word in this field."""
    return [other[field] for other in things].count(thing[field]) == 1


def random_background(share, rng):
    """A colour in this share of cases, else None: the background is not mentioned."""
    return word('colour', rng) if rng.random() < share else None


# -----------------------------------------------------------------------------
# lookups: a context, then words that bring up parts of it again


# centre shape; lower bright; triangle Gus. | shape centre. lower bright. Gus triangle. ...
def lists(rng):
    """Lists of random words; any word brings up the others of its list, in their order."""
    length = choose(rng, (2, 2, 3, 4))                 # two words are the easiest, and where copying starts
    n = choose(rng, (3, 4, 5) if length < 4 else (2, 3))
    words = in_random_order(WORDS, rng)
    groups = [words[k * length:(k + 1) * length] for k in range(n)]
    answers = []
    for group, k in in_random_order(list(product(groups, range(length))), rng)[:8]:
        others = group[:k] + group[k + 1:]
        answers.append(f"{group[k]} {' '.join(others)}.")
    context = '; '.join(' '.join(group) for group in groups)
    return f'{context}.', f" {' '.join(answers)}"


# a sentence for four words, and what stands between two sentences
SENTENCES = (('a {} {} {} is at the {}', '; '), ('{} {} {} - {}', '; '), ('{} {} {}: {}', ', '),
             ('the {} {} {}, {}', '. '), ('{} {} {} in the {}', ' and '), ('a {} {} {} at the spot {}', '\n'),
             ('{}, {}, {}, {}', '; '), ('{} {} {} | {}', '\n'))
PLAIN_ANSWER = ('{key} {rest}',)
ANSWERS = (*3 * PLAIN_ANSWER, '{key}: {rest}', '{key}? {rest}', '{key} is {rest}', 'the {key}: {rest}',
           'tell of {key}. {rest}', 'what of the {key}? the {key} is {rest}')


# tiny white cross: bottom left, big blue hat: top left. | blue big hat top left. cross tiny white bottom left. ...
def sentences(rng, of_things=True, answers=ANSWERS):
    """The same in sentences: of four random words, or of things, each found by anything but its size."""
    n = choose(rng, (3, 3, 4, 4, 5))
    sentence, between = choose(rng, SENTENCES)
    answer = choose(rng, answers)
    comma = ' ' if answers == PLAIN_ANSWER else choose(rng, (' ', ', '))
    if of_things:
        groups = [list(thing.values()) for thing in random_things(n, rng, ('colour', 'noun', 'place'))]
        keys = range(1, 4)                             # two things may have the same size
    else:
        words = in_random_order(WORDS, rng)
        groups = [words[4 * k:4 * k + 4] for k in range(n)]
        keys = range(4)
    answered = []
    for group, k in in_random_order(list(product(groups, keys)), rng)[:7]:
        others = comma.join(group[:k] + group[k + 1:])
        answered.append(answer.format(key=group[k], rest=others))
    context = between.join(sentence.format(*group) for group in groups)
    return f'{context}.', f" {'. '.join(answered)}."


# a tiny blue shape in the lower right; a small purple book in the bottom right; background green
def describe(things, background, rng):
    """The things one after the other, all in one phrasing, with the background or (None) without it."""
    article = choose(rng, ('a ', 'the ', '', ''))
    link = choose(rng, (' is at the ', ' - ', ': ', ', ', ' at the spot ', ' in the '))
    between = choose(rng, ('; ', '. ', ' and ', '\n', ', and '))
    text = between.join(f"{article}{t['size']} {t['colour']} {t['noun']}{link}{t['place']}" for t in things)
    with_background = choose(rng, (
        '{b} background: {t}', '{t}, all on {b}', 'on {b} {t}', '{t}; background {b}', 'behind all is {b}. {t}',
        '{t}. It is {b} behind'))
    return with_background.format(b=background, t=text) if background else text


# a large black one in the top left. a wide cyan cross in the bottom centre. | cross: wide, cyan, bottom centre. ...
def records(rng):
    """Three to five things, then what tells one apart, with all or some of what is known of it."""
    things = random_things(choose(rng, (3, 4, 5)), rng)
    keys = [(t, field) for t, field in product(things, ('colour', 'noun', 'place')) if is_alone(t, field, things)]
    phrasing = int(rng.integers(3))                    # one for the whole document: it has to be kept up
    answers = []
    for t, key in in_random_order(keys, rng)[:6]:
        others = [field for field in FIELDS if field != key]
        if phrasing == 0:
            answers.append(f'{t[key]}: ' + ', '.join(t[field] for field in others))
        elif phrasing == 1:
            a, b = [field for field in in_random_order(list(FIELDS), rng) if field != key][:2]
            # the word noun itself stays out: a reader says thing
            answers.append(f'{a} and {b} of {t[key]}: {t[a]}, {t[b]}'.replace('noun', 'thing', 1))
        else:
            answers.append(f"{t[key]}? it is {t['size']}, {t['colour']}, a {t['noun']}, at {t['place']}")
    background = random_background(0.3, rng)
    return f'{describe(things, background, rng)}.', f" {'. '.join(answers)}."


# -----------------------------------------------------------------------------
# interviews: questions in plain English about a description. None is a question of the instruct chats

Lookup = namedtuple('Lookup', 'key answer asks')       # key: the field that tells the thing apart
LOOKUPS = {
    'colour of a noun': Lookup('noun', 'The {noun} is {colour}.', (
        'What colour is the {noun}?', 'The {noun}: in what colour?', 'Say the colour of this {noun}.')),
    'colour at a place': Lookup('place', 'In the {place} it is {colour}.', (
        'What colour is at the {place}?', 'Say the colour in the {place}.')),
    'noun of a colour': Lookup('colour', 'The {colour} one is a {noun}.', (
        'What is {colour}?', 'Name the {colour} one.', 'Which thing is {colour}?')),
    'place of a colour': Lookup('colour', 'The {colour} one is in the {place}.', (
        'Where is the {colour} one?', 'The {colour} thing: where?', 'Say where the {colour} one is.')),
    'place of a noun': Lookup('noun', 'The {noun} is in the {place}.', (
        'Where is the {noun}?', 'The {noun}: where?', 'Say where the {noun} is.')),
    'thing at a place': Lookup('place', 'At the {place} there is a {size} {colour} {noun}.', (
        'What is at the {place}?', '{place}: what is there?', 'Tell me about the {place}.')),
    'size of a noun': Lookup('noun', 'The {noun} is {size}.', (
        'How big is the {noun}?', 'Say the size of the {noun}.')),
}
# a kind is drawn as often as it stands here
KINDS = (*LOOKUPS, 'colour of a noun', 'place of a colour', 'colour at a place', *2 * ('thing at a place', 'all'),
         *3 * ('yes or no',), 'count', 'background')


def question(kind, things, background, rng):
    """(question, answer) of a kind about the things; None where there is no one answer."""
    thing = choose(rng, things)
    if kind in LOOKUPS:
        lookup = LOOKUPS[kind]
        if not is_alone(thing, lookup.key, things):
            return None
        return choose(rng, lookup.asks).format(**thing), lookup.answer.format(**thing)
    if kind == 'yes or no':
        return yes_or_no(thing, things, rng)
    if kind == 'count':
        ask = choose(rng, ('How many things are there?', 'Count them.'))
        verb, plural = ('are', 's') if len(things) > 1 else ('is', '')
        return ask, f'There {verb} {COUNTS[len(things)]} thing{plural}.'
    if kind == 'all':
        ask = choose(rng, ('Say it all again.', 'Tell everything.'))
        names = [f"a {t['size']} {t['colour']} {t['noun']} in the {t['place']}" for t in things]
        return ask, f"{', '.join(names)}."
    if background is None:
        return None
    return choose(rng, ('What is behind?', 'Which background?')), f'The background is {background}.'


def yes_or_no(thing, things, rng):
    """Whether there is a noun of a colour. The answer repeats the question, looks it up, then gives the verdict."""
    noun = thing['noun'] if rng.random() < 0.75 else word('noun', rng)
    colours = [other['colour'] for other in things if other['noun'] == noun]
    if len(colours) > 1:
        return None
    if colours and rng.random() < 0.6:
        asked = colours[0]
    else:                                              # a random colour, or that of another thing, which is harder
        asked = choose(rng, [word('colour', rng), choose(rng, things)['colour']])
    ask = choose(rng, ('Is there a {} {}?', 'Can you find a {} {}?', 'A {} {}, yes or no?'))
    reason = f'that {noun} is {colours[0]}' if colours else f'no {noun} is there'
    verdict = 'yes' if asked in colours else 'no'
    return ask.format(asked, noun), f'A {asked} {noun}: {reason}, {verdict}.'


# a wide red star - top left. a tiny white cross - bottom left. | Which thing is red? The red one is a star. ...
def interview(rng, n_things, n_turns, kinds=KINDS):
    """(description, [(question, answer)]): up to n_turns questions about n_things things, none twice."""
    things = random_things(n_things, rng)
    background = random_background(0.6, rng)
    turns = []
    for _ in range(4 * n_turns):                       # many a question has no one answer, or was asked before
        pair = question(choose(rng, kinds), things, background, rng)
        if pair and len(turns) < n_turns and pair[0] not in dict(turns):
            turns.append(pair)
    return describe(things, background, rng), turns


def as_chat(description, turns):
    """An interview as a chat, the description at the head of its first turn."""
    messages = []
    for n, (ask, answer) in enumerate(turns):
        user = f'{description}\n{ask}' if n == 0 else ask
        messages.append(f'<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>')
    return '\n'.join(messages)


# -----------------------------------------------------------------------------
# varied text: forms, stories, sounds. It has no context: all of its tokens are labels


# on blue the large star at the spot top left so blue background: large star, top left
def retold(rng):
    """The same things again, in other forms."""
    things = random_things(choose(rng, (1, 2, 3, 3)), rng)
    background = random_background(0.6, rng)
    n = max(2, 4 - len(things))                        # more versions of less, so that lengths stay alike
    versions = [describe(things, background, rng) for _ in range(n)]
    if rng.random() < 0.5:
        written = write(things, random_form(rng), rng)
        versions[int(rng.integers(len(versions)))] = written
    return choose(rng, (' -> ', '\n', ' = ', ' so ')).join(versions)


MARKS = (' ', ', ', ' ; ', '; ', ' / ', ' | ', ' - ', '. ', ' and ', '\n', ' with ', ': ', ', and ', ' also ', ' on ',
         ' of ')
LEADS = ('', '', 'list: ', 'here: ', 'I see ', 'there is ', 'words: ', 'note: ', 'we have ', 'look, ', 'a list of ',
         'with ', 'they say ')
TAILS = ('', '', '.', ' .', ' there', ', please', ' again', ' here', ' and more', ' in all', '!', ' behind it')
BEFORE = {                                             # what may stand before the word of a field
    'place': ('', '', 'at the ', 'in the ', 'on the ', 'to the '),
    'noun': ('', '', 'a ', 'the ', 'one ', 'this '),
    'colour': ('', '', '', 'it is ', 'in ', 'on '),
    'size': ('', '', '', 'very ', 'a '),
    'relation': ('', '', 'is '),
}
Form = namedtuple('Form', 'fields before after between lead tail')


def random_form(rng):
    """A form to write things in: their fields in some order, and what stands before and after each of them."""
    fields = []
    for field in in_random_order(list(BEFORE), rng):
        if rng.random() < (0.15 if field == 'relation' else 0.75):
            fields.append(field)
    fields = fields or ['noun']
    before = [choose(rng, BEFORE[field]) for field in fields]
    after = [choose(rng, (' ', ' ', ' ', choose(rng, MARKS))) for _ in fields]
    return Form(fields, before, after, choose(rng, MARKS), choose(rng, LEADS), choose(rng, TAILS))


# list: to the top left small on blue this circle. to the top right wide on white this box in all
def write(things, form, rng):
    """The things in a form. Their relations lead nowhere: they are words to get used to."""
    written = []
    for thing in things:
        words = {**thing, 'relation': choose(rng, RELATIONS)}
        text = ''
        for field, before, after in zip(form.fields, form.before, form.after):
            text += before + words[field] + after
        written.append(text.removesuffix(form.after[-1]))   # between two things stands form.between
    return form.lead + form.between.join(written) + form.tail


LINKS = (' is at the ', ' is in the ', ' sits at the ', ' lies in the ', ', ', ' - ', ': ', ' (now) at the ',
         ' goes to the ')
OPENINGS = ('', '', '', 'here ', 'there is ', 'I see that ', 'they say ', 'a story of ', 'look: ', '{} background: ',
            'on {} ', 'with {} behind, ', 'this is a picture: ')
CLOSINGS = ('', '.', ', on {}', ' on {}', ', with a {} background', '; {} background', ', all {} behind',
            ' in the picture', '.')


# I see that a small blue circle, top left; a wide white box, top right; red background
def english(rng):
    """Things tied to their positions, or to each other, by a verb or a mark."""
    things = random_things(choose(rng, (1, 2, 3)), rng)
    link = choose(rng, LINKS)
    article = choose(rng, ('a ', 'a ', 'the ', ''))
    background = word('colour', rng)
    named = [field for field in ('size', 'colour') if rng.random() < 0.8] + ['noun']   # the fields, for all things
    place_first = rng.random() < 0.25

    def name(thing):
        return article + ' '.join(thing[field] for field in named)

    parts = []
    for thing in things:
        if place_first:
            parts.append(thing['place'] + choose(rng, (': ', ' is ', ' has ')) + name(thing))
        else:
            parts.append(name(thing) + link + thing['place'])
    if rng.random() < 0.3:
        related = choose(rng, RELATIONS)
        parts[0] = f'{name(things[0])} is {related} {name(random_things(1, rng)[0])}'
    text = choose(rng, (' and ', ', ', '; ', '. ', ', and ')).join(parts)
    opening = choose(rng, OPENINGS).format(background)
    return opening + text + choose(rng, CLOSINGS).format(background)


HEARD = ('The pitch is {pitch} and {contour}.', 'Its sound was {timbre}.', '{who} hears {count} of them.',
         'All of it is {loudness}.', 'There was a {timbre} tone, {loudness}.', '{who} sings {count} tones.',
         'It was {contour} and {timbre}.', '{count} times {who} says that it is {pitch}.')


# even / one / rough / level / low -> The pitch is low and level. There was a rough tone, even. ...
def heard(rng):
    """A sound as a list and in sentences, none of which names it all as the sounds' captions do."""
    sound = {key: choose(rng, options) for key, options in SOUND_OPTIONS.items()}
    who = choose(rng, NAMES)
    comma = choose(rng, (' ', ', ', ' / '))
    listed = comma.join(in_random_order(list(sound.values()), rng))
    some = in_random_order(HEARD, rng)[:5]
    return listed + choose(rng, (' -> ', '\n', '. ')) + ' '.join(some).format(who=who, **sound)


def copied(rng):
    """One line twice or more."""
    words = [choose(rng, WORDS) for _ in range(int(rng.integers(3, 10)))]
    lead = choose(rng, ('copy: ', 'say: ', 'again: ', ''))
    between = choose(rng, (' -> ', ' = ', ' | ', '\n'))
    return lead + between.join(int(rng.integers(2, 5)) * [' '.join(words)])


def story(thing, who, other, rng):
    noun = thing['noun']
    colour = thing['colour']
    place = thing['place']
    lines = (
        f'{who} has a {colour} {noun}.', f"It is {thing['size']}.", f'{other} puts it in the {place} corner.',
        f'{who} and {other} look at the picture.', f'Now the {noun} is in the {place} corner.',
        f'The {noun} of {who} is {colour}.', f"Behind it, in the background, all is {word('colour', rng)}.",
        f'{other} has {choose(rng, COUNTS[2:])} of them, and can not see any more.')
    return ' '.join(line for line in lines if rng.random() < 0.7) or lines[0]   # never an empty story


def counting(thing, rng):
    n = int(rng.integers(1, 5))
    m = int(rng.integers(1, 5))
    return choose(rng, (
        f"{', '.join(COUNTS[n:n + m + 1])}.",
        f'{COUNTS[n]} and {COUNTS[m]} make {COUNTS[n + m]}.',
        f"{', '.join(n * [thing['noun']])}: that is {COUNTS[n]}."))


def varied(rng):
    kind = choose(rng, ('form', 'same form', 'copy', 'sentence', 'story', 'count', 'english', 'english'))
    thing = random_things(1, rng)[0]
    who = choose(rng, NAMES)
    other = choose(rng, NAMES)
    if kind == 'form':
        return write(random_things(choose(rng, (1, 2, 3)), rng), random_form(rng), rng)
    if kind == 'same form':                            # the next lines keep to what the first one shows
        form = random_form(rng)
        return '\n'.join(write(random_things(choose(rng, (1, 2, 3)), rng), form, rng) for _ in range(3))
    if kind == 'copy':
        return copied(rng)
    if kind == 'sentence':                             # its words in any order, then the sentence made of them
        sentence = f"the {thing['noun']} of {who} is {thing['size']} and {thing['colour']}, {thing['place']}"
        words = in_random_order(sentence.replace(',', '').split(), rng)
        return f"{' '.join(words)}: {sentence}."
    if kind == 'story':
        return story(thing, who, other, rng)
    if kind == 'count':
        return counting(thing, rng)
    return english(rng)


# -----------------------------------------------------------------------------
# the corpus, in its order: lookups first, what is varied last, and lists to the end, so that they are not forgotten

Stage = namedtuple('Stage', 'until lists kinds')       # until: share of the corpus; lists: share of lists in the stage
STAGES = (
    Stage(0.16, 1.0, ()),                              # any word brings up the others ...
    Stage(0.24, 0.25, ('plain sentences',)),           # ... also in sentences, mostly of random words ...
    Stage(0.32, 0.25, ('early sentences',)),           # ... mostly of things, and asked for in other words
    Stage(0.55, 0.1, ('sentences', 'records', 'interview')),
    Stage(math.inf, 0.04, 7 * ('chat',) + 4 * ('retold', 'sentences') + 2 * ('records', 'varied') + ('heard',)),
)
# what no text may hold: a size, a colour and a noun, then a place, as the captions have it
CAPTION_FRAME = re.compile(THING.pattern.replace(ANY_SHAPE, '|'.join(FIELDS['noun'])))


def any_document(rng, progress):
    stage = next(stage for stage in STAGES if progress < stage.until)
    if rng.random() < stage.lists:
        return lists(rng)
    kind = choose(rng, stage.kinds)
    if kind == 'plain sentences':
        return sentences(rng, rng.random() < 0.3, PLAIN_ANSWER)
    if kind == 'early sentences':
        return sentences(rng, rng.random() < 0.7)
    if kind == 'sentences':
        return sentences(rng, rng.random() < 0.75)
    if kind == 'records':
        return records(rng)
    if kind in ('interview', 'chat'):
        n_things = choose(rng, (1, 2, 3, 3, 4) if kind == 'interview' else (1, 2, 2, 3, 3, 3))
        description, turns = interview(rng, n_things, n_turns=int(rng.integers(3, 8)))
        if kind == 'chat':
            return '', as_chat(description, turns)     # no context: all of its tokens are labels
        return f'{description}.', ''.join(f' {ask} {answer}' for ask, answer in turns)
    make = {'retold': retold, 'varied': varied, 'heard': heard}[kind]
    return '', make(rng)


def document(rng, progress=1.0):
    """(context, answer): a document of the corpus at progress 0 to 1. One that holds the captions' frame is dropped."""
    while True:
        context, answer = any_document(rng, progress)
        if not CAPTION_FRAME.search(context + answer):
            return context, answer
