"""
Use a checkpoint: caption pictures with an A1 run, ask about them or chat with an A2 run.

reads   a run's out dir (its ckpt/ names the base models) and pictures
writes  nothing: one line a picture, or one JSON object a line with --json
done    when every picture has its text; exits 1 at the first one that cannot be read

$ python sample.py out/a1_small --image data/small/captions/images/000000.png
$ python sample.py out/a2_small --image data/small/instruct/images/000000.png --prompt "How many shapes can you see?"
$ python sample.py out/a2_small --image data/small/instruct/images/000000.png      # on a terminal: a chat
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from common import frozen_dtype, init_ranks, load_checkpoint
from data import Item, Template, read_image
from model import generate, image_settings, load_tokenizer, load_vlm

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('run', help='out dir of train_a1.py or train_a2.py')
parser.add_argument('--image', nargs='+', required=True, metavar='FILE', help='one or more pictures')
parser.add_argument('--prompt', help='what to ask (A2); without it: a chat on a terminal, else a description')
parser.add_argument('--json', action='store_true', help='one JSON object a line')
parser.add_argument('--max_new_tokens', type=int, default=128)
parser.add_argument('--temperature', type=float, default=0.0, help='0 is greedy')
parser.add_argument('--top_p', type=float, default=1.0)
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--device', default='auto')
parser.add_argument('--llm', help='where the language model is now, if not where the checkpoint says')
parser.add_argument('--vision', help='the same for the vision tower')
args = parser.parse_args()
if args.max_new_tokens < 1 or args.temperature < 0 or not 0 < args.top_p <= 1:
    parser.error('wanted --max_new_tokens of at least 1, --temperature of at least 0, --top_p above 0 and up to 1')

# the model, as its checkpoint describes it
_, _, device = init_ranks(args.device)
tensors, meta, _ = load_checkpoint(Path(args.run) / 'ckpt', device)
if meta.get('stage') not in ('a1', 'a2'):
    raise SystemExit(f'{args.run} is a run of stage {meta.get("stage")!r}, wanted a1 or a2')
chats, model = meta['stage'] == 'a2', meta['model']
if args.prompt and not chats:
    raise SystemExit(f'{args.run} is an A1 run, which captions and takes no --prompt; use an A2 run to ask')
model.update({k: v for k, v in (('llm', args.llm), ('vision', args.vision)) if v})
vlm = load_vlm(**model, dtype=frozen_dtype('auto', device), device=device)
vlm.connector.load_state_dict(tensors['connector'])
if chats:
    settings = meta['settings']
    adapter = get_peft_model(vlm.llm, LoraConfig(r=settings['lora_r'], lora_alpha=settings['lora_alpha'],
                                                 target_modules=settings['lora_targets'], task_type='CAUSAL_LM'))
    set_peft_model_state_dict(adapter, tensors['lora'])
vlm.eval()
tokenizer = load_tokenizer(model['llm'])
template = Template(tokenizer, model['shape']['num_image_tokens'], meta['settings']['max_seq_len'])
prepare = image_settings(model['vision'])
read = partial(read_image, size=prepare['size'], resample=prepare['resample'])


@torch.no_grad()
def see(image):
    """Picture file -> image tokens (1, N, D)."""
    return vlm.image_tokens(torch.from_numpy(read(image))[None].to(device))


@torch.no_grad()
def reply(turns, tokens):
    """The model's text after `turns`, [(question, answer), ..., (question, None)]; turns = None captions."""
    item = Item('sample', 'image', tuple(turns or (('', ''),)))
    row = template.chat(item) if turns else template.caption(item)
    if row.truncated:
        raise SystemExit(f'the chat is longer than max_seq_len = {template.max_seq_len}: start a new one')
    ids = torch.as_tensor(row.ids if turns else row.ids[:row.labelled[0]], dtype=torch.long, device=device)
    places = row.image_at + torch.arange(template.n, device=device)
    with vlm.precision():
        out = generate(vlm.llm, [vlm.embed(ids, places, tokens)], args.max_new_tokens, [template.end],
                       args.temperature, args.top_p, [args.seed])
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()


if chats and args.prompt is None and sys.stdin.isatty() and not args.json:
    if len(args.image) > 1:
        raise SystemExit(f'a chat is about one picture, found {len(args.image)}; give one, or a --prompt')
    tokens, turns = see(args.image[0]), []
    print(f'{args.image[0]}: ask about it; an empty line ends the chat')
    try:
        while question := input('> ').strip():
            turns.append((question, None))
            turns[-1] = (question, reply(turns, tokens))
            print(turns[-1][1])
    except (EOFError, KeyboardInterrupt):
        print()
else:
    prompt = (args.prompt or 'Describe this image.') if chats else None
    for image in args.image:
        text = reply([(prompt, None)] if chats else None, see(image))
        print(json.dumps({'image': image, 'prompt': prompt, 'text': text}) if args.json else f'{image}: {text}')
