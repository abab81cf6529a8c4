"""
What an A1 or A2 run says of emoji that nobody trained on: of known things by an artist who was held out, and of new
things.

reads   the run's ckpt/, data/emoji/{eval_known,eval_new,captions}.json and their pictures
writes  RUN/emoji/{known,new}.{jsonl,png}: what it says, and a sheet of 64 of them; RUN/emoji/score.json

$ python -m emoji.score out/a1_emoji
$ python -m emoji.score out/a2_emoji

named    the whole name stands in it
noun     its last word is: of a 'red apple', 'apple'. Beside it, what always saying the commonest one would have
kind     the first word of its kind is, where captions say it: of a lion, 'animal'. Of A1 only
image    its picture is found by the loss of its caption among 32; a guess is right in 0.03
"""
import json
import re
import sys
from collections import Counter
from pathlib import Path

import torch

from common import frozen_dtype, load_checkpoint, write_atomic
from data import Loader, image_reader
from emoji.pictures import ROOT, head_noun, read_list, with_article
from grounding import input_ranks, matching_sets, recall
from inference import VisionChat, caption_keys, crossed_losses, load_graft, write_predictions
from lists import Item
from media import BadSamples, contact_sheet

QUESTION = 'What is this?'
N_ON_SHEET = 64


def load_run(run):
    """(stage, VisionChat) of an A1 or A2 run."""
    tensors, meta, _ = load_checkpoint(Path(run) / 'ckpt', 'cpu')
    stage = meta['stage']
    settings = meta['settings']
    if stage not in ('a1', 'a2'):
        raise SystemExit(f'{run} is a run of stage {stage!r}, wanted a1 or a2')
    vlm, _ = load_graft(tensors, meta, frozen_dtype(settings['dtype'], torch.device('cpu')))
    return stage, VisionChat(vlm, meta['model']['llm'], meta['model']['vision'], settings['max_seq_len'],
                             settings.get('think_block', False))


def read_examples(name, stage, template):
    """({id: thing}, [Example]) of a held-out list: a caption each, or the question what it is."""
    records = read_list(f'eval_{name}')
    things = {record['id']: record['thing'] for record in records}
    examples = []
    for record in records:
        images = (str(ROOT / record['image']),)
        if stage == 'a1':
            turns = (('', record['conversations'][1]['value']),)
            examples.append(template.caption(Item(record['id'], images, turns)))
        else:
            answer = with_article(record['thing']['name'])
            turns = ((QUESTION, f'{answer[0].upper()}{answer[1:]}.'),)
            examples.append(template.chat(Item(record['id'], images, turns)))
    return things, examples


def says(text, words):
    """Whether a text has these words, one after the other."""
    return re.search(rf'\b{re.escape(words)}\b', text.lower()) is not None


def score(things, texts, stage):
    """{what: share right}. texts: {id: the model's}."""
    right = Counter()
    nouns = Counter(head_noun(thing['name']) for thing in things.values())
    for id, text in texts.items():
        thing = things[id]
        right['named'] += says(text, thing['name'])
        right['noun'] += says(text, head_noun(thing['name']))
        right['kind'] += says(text, thing['kind'].split(',')[0])
    shares = {what: round(n / len(texts), 3) for what, n in right.items() if what != 'kind' or stage == 'a1'}
    [(noun, n)] = nouns.most_common(1)
    return {**shares, 'commonest noun': f'{noun}, {n / len(things):.3f}', 'pictures': len(texts)}


def score_run(run):
    """{'known' and 'new': {what: share right}} of a run; writes its texts and sheets."""
    run = Path(run)
    stage, chat = load_run(run)
    template = chat.template
    loader = Loader(image_reader(chat.read, None), template.image_length, BadSamples(run / 'emoji' / 'bad.jsonl', 0), 1)
    scores = {}
    for name in 'known', 'new':
        things, examples = read_examples(name, stage, template)
        path = run / 'emoji' / f'{name}.jsonl'
        predictions, _ = write_predictions(path, chat.vlm, loader, template, examples, batch_size=32, max_new_tokens=24)
        texts = {example.item.id: prediction.text for example, prediction in zip(examples, predictions)}
        sets = matching_sets(caption_keys(examples), 128, seed=1)
        crossed = crossed_losses(chat.vlm, loader, examples, sets, batch_size=32)
        scores[name] = {**score(things, texts, stage), 'image': round(recall(input_ranks(crossed)).value, 3)}
        shown = examples[::max(1, len(examples) // N_ON_SHEET)][:N_ON_SHEET]
        contact_sheet(run / 'emoji' / f'{name}.png', [example.item.images for example in shown],
                      [f'{things[example.item.id]["name"]}: {texts[example.item.id]}' for example in shown])
        print(f'{name}: {scores[name]}', flush=True)
    write_atomic(run / 'emoji' / 'score.json', json.dumps(scores, indent=1))
    return scores


if __name__ == '__main__':
    if len(sys.argv) != 2:
        raise SystemExit(__doc__.strip())
    score_run(sys.argv[1])
