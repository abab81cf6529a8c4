"""
A run that leaves the repository: a folder that others load, with a card that says what it is and how far it got.

Track B: a stock Qwen3 with the new rows and LoRA merged into it, and a tokenizer that spells every id.
Track A: the connector, the LoRA adapter in PEFT's format, and what model.load_exported puts them together by.
"""
import json
import string
from pathlib import Path

from safetensors.torch import save_file

import gates
import token_model as tokens
from common import sha256_file, whole_folder
from uti import base_name

LICENCE = '''## Licence

That of the base models, and of the data it was trained on, holds for this folder. Nobody has checked it for you: do so
before you share it.
'''

GRAFT_CARD = string.Template('''---
library_name: nanograft
$base_model---
# $name$failed

$what, trained with nanoGraft: a connector of $connector parameters turns what a frozen vision tower sees
into $n image tokens that a frozen language model reads. $steps

| base | what it was |
|---|---|
| language model | `$llm` |
| vision tower | `$vision`, layer $layer |

The base models are not in this folder: `config.json` and PEFT's own say where they were. Their weights have the sha256
`$frozen` (names, shapes and bits in $dtype), which is checked when they are loaded.

## Gates

$gates

## Use

In a checkout of nanoGraft:

```python
from model import load_exported

speaker = load_exported('FOLDER')   # of this card; llm='...', vision='...': where the base models are; device='cuda'
tokens = speaker.see('picture.png')
$say
```

A row is written as `$template`, where {image} is `<|vision_start|>`, $n times
`<|image_pad|>`, `<|vision_end|>`; the image tokens take the places of the pads. Markers typed in a text stay text.

$licence''')

TOKEN_CARD = string.Template('''---
library_name: transformers
$base_model---
# $name$failed

`$base` with ids for $modalities, trained with nanoGraft, $what. $steps
Stock `transformers` loads it: the new rows$merged are part of the weights.

## Gates

$gates

## Token space

sha256 `$sha256`; `token_space.json` has all of it.

| range | first id | ids |
|---|---|---|
$ranges

$layout

## Use

A prompt is ids, and what follows it is said by the grammar:

$tasks

Markers and codes are tokens of the tokenizer, `<|image_0|>` for code 0 of a picture, so a prompt may be written as
text. There is no template around it: no system turn, no roles.

```python
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

folder = '.'                                           # of this card
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype='auto').eval()
space = json.load(open(f'{folder}/token_space.json'))
ranges = {name: (first, first + size) for name, first, size in space['ranges']}


class InRange(LogitsProcessor):
    """The n-th id after the prompt comes from the range names[n]; from the last one when there are no more."""
    def __init__(self, start, names):
        self.start, self.names = start, names

    def __call__(self, ids, scores):
        first, end = ranges[self.names[min(ids.shape[1] - self.start, len(self.names) - 1)]]
        legal = torch.full_like(scores, -torch.inf)
        legal[:, first:end] = scores[:, first:end]
        return legal


def go_on(prompt, names, n, **how):
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                         logits_processor=[InRange(len(prompt), names)], **how)
    return out[0, len(prompt):].tolist()


def read(codes, kind='img', max_new_tokens=64, **how):
    """The text that describes a picture ('img') or a sound ('aud'), from its codes: ids of this token space."""
    prompt = tokenizer.convert_tokens_to_ids([f'<|{kind}_start|>', f'<|{kind}_end|>'])
    return tokenizer.decode(go_on([prompt[0], *codes, prompt[1]], ['text'], max_new_tokens, **how),
                            skip_special_tokens=True).strip()


def write(text, kind='img', **how):
    """The codes of a picture or a sound of what a text says, each from the range of its place."""
    if kind == 'img':
        rows, columns = space['image']['grid']
        names = ['image'] * (rows * columns)
    else:
        names = [f'audio_{k}' for k in range(space['audio']['codebooks'])] * space['audio']['frames']
    prompt = tokenizer(text)['input_ids'] + [tokenizer.convert_tokens_to_ids(f'<|{kind}_start|>')]
    return go_on(prompt, names, len(names), **how)
```

$guidance

## What an engine without nanoGraft does not do

- **The grammar.** $typed Restrict every step to its range, as above. Codes have exact numbers: no end is sampled.
- **The codecs.** Codes are not pixels and not samples. Code = id - first id of its range; `token_space.json` names each
  codec's class, settings and the sha256 of its weights. nanoGraft turns files into ids and back, and refuses another
  codec: `UTI.of_space(TokenSpace.load('token_space.json'), '.', base model, image_codec, audio_codec)`.
- **Guidance** as it is drawn with here: a row without a prompt runs beside each one.

$licence''')


def verdicts(run):
    """What the gates of a run say: in a few words, for the title of the card, and as Markdown."""
    path = Path(run) / 'gates.json'
    if not path.exists():
        return 'NOT JUDGED', 'This run has not finished: nothing is known about how good it is.'
    record = json.loads(path.read_text())
    rows = [gates.Gate(**gate) for gate in record['gates']]
    failed = [gate.name for gate in rows if not gate.passed] or ['no gate was measured'] * (not record['passed'])
    said = f'This model is not what its stage wants. It failed at: {"; ".join(failed)}.' if failed else 'All passed.'
    table = [f'| {"pass" if g.passed else "**FAIL**"} | {g.name} | {g.value:.4g} | {g.bar} |' for g in rows]
    return f'FAILED {len(failed)} of {len(rows)} gates' if failed else f'{len(rows)} gates passed', '\n'.join(
        [f'{said}\n', '| verdict | gate | measured | bar |', '|---|---|---|---|', *table])


def header(llm):
    """The card's line for the hub, where the base model is one that the hub knows."""
    return '' if Path(llm).exists() else f'base_model: {llm}\n'


def steps(meta):
    whole = '' if meta['step'] == meta['n_steps'] else ', which is not the whole run'
    return f'Step {meta["step"]} of {meta["n_steps"]}{whole}.'


def export_graft(vlm, adapter, folder, run, meta, dtype):
    """Write a Track A run: connector.safetensors, config.json, the card, and with an adapter the files of PEFT.

    dtype: of the frozen weights in the run, by its name; meta: of the run's checkpoint. Returns the verdict in a few
    words.
    """
    verdict, judged = verdicts(run)
    stage, model = meta['stage'], meta['model']
    template = '{image}\n{caption}<|im_end|>' if stage == 'a1' else (
        '<|im_start|>user\n{image}\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n')
    with whole_folder(folder) as beside:
        if adapter is not None:
            adapter.save_pretrained(beside, save_embedding_layers=False)
        save_file({n: p.contiguous() for n, p in vlm.connector.state_dict().items()}, beside / 'connector.safetensors')
        files = {path.name: sha256_file(path) for path in sorted(beside.iterdir()) if path.suffix != '.md'}
        (beside / 'config.json').write_text(json.dumps({
            'stage': stage, 'step': meta['step'], 'model': model, 'template': template,
            'max_seq_len': meta['settings']['max_seq_len'], 'frozen_sha256': meta['frozen_sha256'],
            'frozen_dtype': dtype, 'files': files}, indent=1) + '\n')
        said = 'print(speaker.say(tokens))' if stage == 'a1' else (
            "print(speaker.say(tokens, [('Describe this image.', None)]))   # before it: (question, answer), ...")
        (beside / 'README.md').write_text(GRAFT_CARD.substitute(
            base_model=header(model['llm']), name=Path(folder).name, llm=base_name(model['llm']),
            vision=base_name(model['vision']), layer=model['tower_layer'], n=model['shape']['num_image_tokens'],
            what='Captions pictures' if stage == 'a1' else 'Answers questions about a picture', steps=steps(meta),
            connector=f'{sum(p.numel() for p in vlm.connector.parameters()):,}', frozen=meta['frozen_sha256'],
            dtype=dtype, gates=judged, failed=': ' + verdict, say=said, template=template.replace('\n', '\\n'),
            licence=LICENCE))
    return verdict


def export_tokens(lm, adapter, tokenizer, folder, run, meta):
    """Write a Track B run: a Hugging Face folder of a stock Qwen3, everything merged, with the card. `lm` is used up:
    LoRA is merged into it, and its layers get the precision of its embedding. Returns the verdict in a few words."""
    verdict, judged = verdicts(run)
    space, settings = lm.space, meta['settings']
    if adapter is not None:
        adapter.merge_and_unload()                     # in place; W + scale B A rounds once, to the precision of W
    lm.llm.to(lm.llm.get_input_embeddings().weight.dtype)
    kinds = [('image', 'img', 'a picture', 't2i', 'i2t'), ('audio', 'aud', 'a sound', 't2a', 'a2t')]
    kinds = [kind for kind in kinds if getattr(space, kind[0])]
    layout, tasks = [], []
    if space.image:
        (rows, columns), size = space.image['grid'], space.image['size']
        layout.append(f'A picture of {size} x {size} pixels is {rows * columns} codes, row by row.')
    if space.audio:
        rate, frames, books = (space.audio[name] for name in ('sample_rate', 'frames', 'codebooks'))
        layout.append(f'A sound of {space.audio["samples"] / rate:g} s at {rate} Hz is {frames} frames of {books} '
                      'codes, one from each of audio_0, audio_1, ...')
    for _, short, what, write, read in kinds:
        tasks.append(f'- {read}, describe {what}: after `<|{short}_start|>` codes `<|{short}_end|>` come text and '
                     '`<|im_end|>`')
        tasks.append(f'- {write}, make {what}: after text `<|{short}_start|>` come codes, in exact number')
    guide = settings['guidance'] if meta['stage'] == 'b3' else settings['guidance'][0]
    guidance = (f'It draws and sounds here at temperature {settings["temperature"]:g} and guidance {guide:g}; without '
                '`do_sample=True, temperature=...` the above is greedy.')
    typed = ('It was trained with a loss over the legal range alone, so nothing keeps it from other ranges where they '
             'are not shut off.' if lm.typed_head else
             'It was trained over every id and mostly stays in its range by itself, but nothing makes it.')
    with whole_folder(folder) as beside:
        tokens.export(lm, tokenizer, beside)
        (beside / 'README.md').write_text(TOKEN_CARD.substitute(
            base_model=header(meta['model']['llm']), name=Path(folder).name, base=space.base['name'],
            modalities=' and '.join({'image': 'pictures', 'audio': 'sounds'}[kind[0]] for kind in kinds),
            what='stage B3: new rows on a language model that is as it was' if meta['stage'] == 'b3' else
            'stage B4: new rows and ' + ('layers tuned whole' if settings['full_tune'] else 'LoRA on the layers'),
            merged='' if adapter is None else ' and LoRA', steps=steps(meta),
            gates=judged, failed=': ' + verdict, sha256=space.sha256,
            ranges='\n'.join(f'| {r.name} | {r.first:,} | {r.size:,} |' for r in space.ranges),
            layout=' '.join(layout), tasks='\n'.join(tasks), licence=LICENCE, typed=typed,
            guidance=guidance))
    return verdict
