"""
The small world's text: what its language model is made from. Every word of the captions, none of their frames.

A frozen language model can describe and answer only what it can look up in its context, and a small one learns to look
up in steps that build on each other: first any word of a list brings up the others, then the same in lists written as
sentences, then things by what tells them apart, then questions in plain English. So the corpus is read in its order.

A document is (told, rest). What is told at the start of a lookup cannot be predicted, and is no label there: half of
the gradient would be its noise.
"""
import re

from small.world import BACKGROUNDS, COLOURS, PLACES, SAID, SHAPES, SIZES, THING, choose

NAMES = ('Ann', 'Ben', 'Cleo', 'Dan', 'Eva', 'Finn', 'Gus', 'Hana')
COUNTS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight')
# more sizes, nouns and places than the pictures have: with few there is little to win by looking them up
FIELDS = {'size': 2 * tuple(SIZES) + ('tiny', 'large', 'huge', 'thin', 'wide', 'tall'),
          'colour': 2 * tuple(COLOURS) + tuple(BACKGROUNDS),
          'noun': 2 * SHAPES + ('ball', 'box', 'cup', 'hat', 'shape', 'star', 'book', 'thing', 'one'),
          'place': 3 * tuple(PLACES) + tuple(f'{row} {column}' for row in ('top', 'bottom', 'middle', 'upper', 'lower')
                                             for column in ('left', 'right', 'centre'))}
RELATIONS = ('above', 'below', 'left of', 'right of')
WORDS = sorted({*NAMES, *COUNTS, *' '.join(w for words in FIELDS.values() for w in words).split(),
                *(w for words in SAID.values() for w in words), 'tone', 'tones', 'sound', 'pitch'})


def word(field, rng):
    return choose(rng, FIELDS[field])


def things(n, rng, apart=('place',)):
    """n things, {field: word}, that differ from each other in each of the fields `apart`."""
    found = []
    while len(found) < n:
        thing = {field: word(field, rng) for field in FIELDS}
        if all(thing[field] != other[field] for other in found for field in apart):
            found.append(thing)
    return found


def alone(thing, field, among):
    return sum(other[field] == thing[field] for other in among) == 1


# -----------------------------------------------------------------------------
# lookups: what is told, then what brings it up again


def lists(rng):
    """Lists of random words; any word brings up the others of its list, in their order."""
    size = choose(rng, (2, 2, 3, 4))
    n = choose(rng, (3, 4, 5) if size < 4 else (2, 3))
    words = [WORDS[k] for k in rng.permutation(len(WORDS))[:size * n]]
    told = [words[k * size:(k + 1) * size] for k in range(n)]
    keys = [(part, k) for part in told for k in range(size)]
    asked = [keys[k] for k in rng.permutation(len(keys))[:8]]
    return '; '.join(map(' '.join, told)) + '.', ' ' + ' '.join(
        f"{part[k]} {' '.join(part[:k] + part[k + 1:])}." for part, k in asked)


SENTENCES = (('a {} {} {} is at the {}', '; '), ('{} {} {} - {}', '; '), ('{} {} {}: {}', ', '),
             ('the {} {} {}, {}', '. '), ('{} {} {} in the {}', ' and '), ('a {} {} {} at the spot {}', '\n'),
             ('{}, {}, {}, {}', '; '), ('{} {} {} | {}', '\n'))
BARE = ('{key} {rest}',)
ASKED = (*3 * BARE, '{key}: {rest}', '{key}? {rest}', '{key} is {rest}', 'the {key}: {rest}', 'tell of {key}. {rest}',
         'what of the {key}? the {key} is {rest}')


def sentences(rng, of_things=True, ways=ASKED):
    """The same, told in sentences: lists of four random words, or things, which size does not tell apart."""
    n, (sentence, join), ask = choose(rng, (3, 3, 4, 4, 5)), choose(rng, SENTENCES), choose(rng, ways)
    comma = ' ' if ways == BARE else choose(rng, (' ', ', '))
    if of_things:
        told = [list(thing.values()) for thing in things(n, rng, ('colour', 'noun', 'place'))]
    else:
        words = [WORDS[k] for k in rng.permutation(len(WORDS))[:4 * n]]
        told = [words[4 * k:4 * k + 4] for k in range(n)]
    keys = [(part, k) for part in told for k in range(int(of_things), 4)]
    asked = [keys[k] for k in rng.permutation(len(keys))[:7]]
    return join.join(sentence.format(*part) for part in told) + '.', ' ' + '. '.join(
        ask.format(key=part[k], rest=comma.join(part[:k] + part[k + 1:])) for part, k in asked) + '.'


def facts(told, ground, rng):
    """Things in the order of English, all in one form, with or without what is behind them."""
    article, link = choose(rng, ('a ', 'the ', '', '')), choose(rng, (' is at the ', ' - ', ': ', ', ', ' at the spot ',
                                                                      ' in the '))
    text = choose(rng, ('; ', '. ', ' and ', '\n', ', and ')).join(
        f"{article}{t['size']} {t['colour']} {t['noun']}{link}{t['place']}" for t in told)
    behind = choose(rng, ('{g} background: {t}', '{t}, all on {g}', 'on {g} {t}', '{t}; background {g}',
                          'behind all is {g}. {t}', '{t}. It is {g} behind'))
    return behind.format(g=ground, t=text) if ground else text


def ground(share, rng):
    return word('colour', rng) if rng.random() < share else None


def records(rng):
    """Facts of three to five things, then what tells one apart and all or some of what is told of it."""
    told = things(choose(rng, (3, 4, 5)), rng)
    keys = [(t, key) for t in told for key in ('colour', 'noun', 'place') if alone(t, key, told)]
    way, said = int(rng.integers(3)), []
    for t, key in [keys[k] for k in rng.permutation(len(keys))[:6]]:
        if way == 0:
            said.append(f'{t[key]}: ' + ', '.join(t[field] for field in FIELDS if field != key))
        elif way == 1:
            a, b = [field for field in rng.permutation(list(FIELDS)) if field != key][:2]
            said.append(f'{a} and {b} of {t[key]}: {t[a]}, {t[b]}'.replace('noun', 'thing', 1))
        else:
            said.append(f"{t[key]}? it is {t['size']}, {t['colour']}, a {t['noun']}, at {t['place']}")
    return facts(told, ground(0.3, rng), rng) + '.', ' ' + '. '.join(said) + '.'


QUESTIONS = {                                          # kind: (ways to ask, the answer, what tells the thing apart)
    'colour of a noun': (('What colour is the {noun}?', 'The {noun}: in what colour?',
                          'Say the colour of this {noun}.'), 'The {noun} is {colour}.', 'noun'),
    'colour at a place': (('What colour is at the {place}?', 'Say the colour in the {place}.'),
                          'In the {place} it is {colour}.', 'place'),
    'noun of a colour': (('What is {colour}?', 'Name the {colour} one.', 'Which thing is {colour}?'),
                         'The {colour} one is a {noun}.', 'colour'),
    'place of a colour': (('Where is the {colour} one?', 'The {colour} thing: where?',
                           'Say where the {colour} one is.'), 'The {colour} one is in the {place}.', 'colour'),
    'place of a noun': (('Where is the {noun}?', 'The {noun}: where?', 'Say where the {noun} is.'),
                        'The {noun} is in the {place}.', 'noun'),
    'thing at a place': (('What is at the {place}?', '{place}: what is there?', 'Tell me about the {place}.'),
                         'At the {place} there is a {size} {colour} {noun}.', 'place'),
    'size of a noun': (('How big is the {noun}?', 'Say the size of the {noun}.'), 'The {noun} is {size}.', 'noun')}
KINDS = (*QUESTIONS, 'colour of a noun', 'place of a colour', 'colour at a place', *2 * ('thing at a place', 'all'),
         *3 * ('yes or no',), 'how many', 'background')


def question(kind, told, behind, rng):
    """(question, answer) of a kind about what is told; None where that has no one answer."""
    t = choose(rng, told)
    if kind in QUESTIONS:
        ways, answer, key = QUESTIONS[kind]
        return (choose(rng, ways).format(**t), answer.format(**t)) if alone(t, key, told) else None
    if kind == 'yes or no':                            # what is asked, what is looked up, then the verdict
        nouns = [other['noun'] for other in told]
        noun = t['noun'] if rng.random() < 0.75 else word('noun', rng)
        if nouns.count(noun) > 1:
            return None
        is_there = [other['colour'] for other in told if other['noun'] == noun]
        colour = is_there[0] if is_there and rng.random() < 0.6 else choose(rng, [word('colour', rng), choose(
            rng, told)['colour']])
        ask = choose(rng, ('Is there a {} {}?', 'Can you find a {} {}?', 'A {} {}, yes or no?')).format(colour, noun)
        reason = f'that {noun} is {is_there[0]}' if is_there else f'no {noun} is there'
        return ask, f"A {colour} {noun}: {reason}, {'yes' if [colour] == is_there else 'no'}."
    if kind == 'how many':
        return choose(rng, ('How many things are there?', 'Count them.')), (
            f"There {'are' if len(told) > 1 else 'is'} {COUNTS[len(told)]} thing{'s' * (len(told) > 1)}.")
    if kind == 'all':
        return choose(rng, ('Say it all again.', 'Tell everything.')), ', '.join(
            f"a {o['size']} {o['colour']} {o['noun']} in the {o['place']}" for o in told) + '.'
    return (choose(rng, ('What is behind?', 'Which background?')), f'The background is {behind}.') if behind else None


def interview(rng, n_things, n_turns, kinds=KINDS):
    """(facts, [(kind, question, answer)]): up to n_turns questions about n_things things, none twice."""
    told, behind, turns = things(n_things, rng), ground(0.6, rng), []
    for _ in range(4 * n_turns):
        kind = choose(rng, kinds)
        pair = question(kind, told, behind, rng)
        if len(turns) < n_turns and pair and pair[0] not in [q for _, q, _ in turns]:
            turns.append((kind, *pair))
    return facts(told, behind, rng), turns


def chatml(told, turns):
    """An interview as a chat, what is told at the head of its first turn."""
    asked = [f'{told}\n{turns[0][1]}', *(q for _, q, _ in turns[1:])]
    return '\n'.join(f'<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{turn[2]}<|im_end|>'
                     for q, turn in zip(asked, turns))


# -----------------------------------------------------------------------------
# what is varied: forms, stories, sounds


def retold(rng):
    """The same things again, in other forms."""
    told, behind = things(choose(rng, (1, 2, 3, 3)), rng), ground(0.6, rng)
    ways = [facts(told, behind, rng) for _ in range(max(2, 4 - len(told)))]
    if rng.random() < 0.5:
        ways[int(rng.integers(len(ways)))] = write(told, random_form(rng), rng)
    return choose(rng, (' -> ', '\n', ' = ', ' so ')).join(ways)


MARKS = (' ', ', ', ' ; ', '; ', ' / ', ' | ', ' - ', '. ', ' and ', '\n', ' with ', ': ', ', and ', ' also ', ' on ',
         ' of ')
LEADS = ('', '', 'list: ', 'here: ', 'I see ', 'there is ', 'words: ', 'note: ', 'we have ', 'look, ', 'a list of ',
         'with ', 'they say ')
TAILS = ('', '', '.', ' .', ' there', ', please', ' again', ' here', ' and more', ' in all', '!', ' behind it')
BEFORE = {'place': ('', '', 'at the ', 'in the ', 'on the ', 'to the '),
          'noun': ('', '', 'a ', 'the ', 'one ', 'this '),
          'colour': ('', '', '', 'it is ', 'in ', 'on '), 'size': ('', '', '', 'very ', 'a '), 'rel': ('', '', 'is ')}


def random_form(rng):
    """A way of writing things: which fields in which order, what stands before each, between fields and things."""
    fields = [k for k in rng.permutation(list(BEFORE)) if rng.random() < (0.15 if k == 'rel' else 0.75)] or ['noun']
    return {'fields': fields, 'before': [choose(rng, BEFORE[k]) for k in fields],
            'between': [choose(rng, (' ', ' ', ' ', choose(rng, MARKS))) for _ in fields], 'join': choose(rng, MARKS),
            'lead': choose(rng, LEADS), 'tail': choose(rng, TAILS)}


def write(told, form, rng):
    def one(thing):
        thing = {**thing, 'rel': choose(rng, RELATIONS)}
        parts = [b + thing[k] for k, b in zip(form['fields'], form['before'])]
        return ''.join(p + s for p, s in zip(parts, form['between'][:-1] + ['']))
    return form['lead'] + form['join'].join(map(one, told)) + form['tail']


LINKS = (' is at the ', ' is in the ', ' sits at the ', ' lies in the ', ', ', ' - ', ': ', ' (now) at the ',
         ' goes to the ')
OPENS = ('', '', '', 'here ', 'there is ', 'I see that ', 'they say ', 'a story of ', 'look: ', '{} background: ',
         'on {} ', 'with {} behind, ', 'this is a picture: ')
CLOSES = ('', '.', ', on {}', ' on {}', ', with a {} background', '; {} background', ', all {} behind',
          ' in the picture', '.')


def english(rng):
    """Things tied to their places, or to each other, by a verb or a mark."""
    told, link = things(choose(rng, (1, 2, 3)), rng), choose(rng, LINKS)
    article, tint = choose(rng, ('a ', 'a ', 'the ', '')), word('colour', rng)
    keep, place_first = [rng.random() < 0.8 for _ in range(2)], rng.random() < 0.25

    def name(t):
        return article + ' '.join([t[k] for k, kept in zip(('size', 'colour'), keep) if kept] + [t['noun']])
    parts = [t['place'] + choose(rng, (': ', ' is ', ' has ')) + name(t) if place_first else name(t) + link + t['place']
             for t in told]
    if rng.random() < 0.3:
        parts[0] = f'{name(told[0])} is {choose(rng, RELATIONS)} {name(things(1, rng)[0])}'
    join = choose(rng, (' and ', ', ', '; ', '. ', ', and '))
    return choose(rng, OPENS).format(tint) + join.join(parts) + choose(rng, CLOSES).format(tint)


def heard(rng):
    """What somebody heard, as a list and told in sentences, none of which names it all as the sounds' captions do."""
    said = {key: choose(rng, options) for key, options in SAID.items()}
    who, told = choose(rng, NAMES), (
        'The pitch is {pitch} and {contour}.', 'Its sound was {timbre}.', '{who} hears {count} of them.',
        'All of it is {loudness}.', 'There was a {timbre} tone, {loudness}.', '{who} sings {count} tones.',
        'It was {contour} and {timbre}.', '{count} times {who} says that it is {pitch}.')
    listed = choose(rng, (' ', ', ', ' / ')).join(said[key] for key in rng.permutation(list(SAID)))
    some = [told[k] for k in rng.permutation(len(told))[:5]]
    return listed + choose(rng, (' -> ', '\n', '. ')) + ' '.join(some).format(who=who, **said)


def varied(rng):
    kind = choose(rng, ('form', 'same form', 'copy', 'sentence', 'story', 'count', 'english', 'english'))
    t, who, other = things(1, rng)[0], choose(rng, NAMES), choose(rng, NAMES)
    if kind == 'form':
        return write(things(choose(rng, (1, 2, 3)), rng), random_form(rng), rng)
    if kind == 'same form':                            # what the first lines show, the next lines keep up
        form = random_form(rng)
        return '\n'.join(write(things(choose(rng, (1, 2, 3)), rng), form, rng) for _ in range(3))
    if kind == 'copy':                                 # said twice or more
        line = ' '.join(choose(rng, WORDS) for _ in range(int(rng.integers(3, 10))))
        return choose(rng, ('copy: ', 'say: ', 'again: ', '')) + choose(rng, (' -> ', ' = ', ' | ', '\n')).join(
            [line] * int(rng.integers(2, 5)))
    if kind == 'sentence':                             # a bag of words, then the sentence made of them
        sentence = f"the {t['noun']} of {who} is {t['size']} and {t['colour']}, {t['place']}"
        return f"{' '.join(rng.permutation(sentence.replace(',', '').split()))}: {sentence}."
    if kind == 'story':
        lines = [f"{who} has a {t['colour']} {t['noun']}.", f"It is {t['size']}.",
                 f"{other} puts it in the {t['place']} corner.", f'{who} and {other} look at the picture.',
                 f"Now the {t['noun']} is in the {t['place']} corner.", f"The {t['noun']} of {who} is {t['colour']}.",
                 f"Behind it, in the background, all is {word('colour', rng)}.",
                 f'{other} has {choose(rng, COUNTS[2:])} of them, and can not see any more.']
        return ' '.join(line for line in lines if rng.random() < 0.7) or lines[0]
    if kind == 'count':
        n, m = int(rng.integers(1, 5)), int(rng.integers(1, 5))
        return choose(rng, (', '.join(COUNTS[n:n + m + 1]) + '.', f'{COUNTS[n]} and {COUNTS[m]} make {COUNTS[n + m]}.',
                            f"{', '.join([t['noun']] * n)}: that is {COUNTS[n]}."))
    return english(rng)


# -----------------------------------------------------------------------------
# the corpus, in its order

LISTS, BARELY, ASKING = 0.16, 0.24, 0.32               # where a part ends, as a share of the corpus; the next ...
PLAIN = 0.55                                           # ... ends here, and all that follows is as varied as its end
CAPTION_FRAME = re.compile(THING.pattern.replace('|'.join(SHAPES), '|'.join(FIELDS['noun'])))


def any_document(rng, progress):
    dice = rng.random()
    if dice < (1.0 if progress < LISTS else 0.25 if progress < ASKING else 0.1 if progress < PLAIN else 0.04):
        return lists(rng)
    if progress < BARELY:
        return sentences(rng, rng.random() < 0.3, BARE)
    if progress < ASKING:
        return sentences(rng, rng.random() < 0.7)
    if progress < PLAIN:
        kind = choose(rng, ('sentences', 'records', 'plain'))
    else:
        kind = choose(rng, 7 * ['chat'] + 4 * ['retold', 'sentences'] + 2 * ['records', 'varied'] + ['heard'])
    if kind in ('plain', 'chat'):
        told, turns = interview(rng, choose(rng, (1, 2, 3, 3, 4) if kind == 'plain' else (1, 2, 2, 3, 3, 3)),
                                int(rng.integers(3, 8)))
        if kind == 'chat':
            return '', chatml(told, turns)
        return told + '.', ''.join(f' {q} {answer}' for _, q, answer in turns)
    if kind in ('records', 'sentences'):
        return records(rng) if kind == 'records' else sentences(rng, rng.random() < 0.75)
    return '', {'retold': retold, 'varied': varied, 'heard': heard}[kind](rng)


def document(rng, progress=1.0):
    """(told, rest): a document of the corpus at progress 0 to 1. One that holds the captions' frame, a thing and its
    place, is thrown away."""
    told, rest = any_document(rng, progress)
    while CAPTION_FRAME.search(told + rest):
        told, rest = any_document(rng, progress)
    return told, rest
