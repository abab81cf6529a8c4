"""
Use a checkpoint: caption pictures with an A1 run, ask about them or chat with an A2 run; with a B3 or B4 run describe
pictures and sounds, draw, and make sounds. Or let it leave: a folder that others load, with a card, by --export.

reads   a run's out dir (its ckpt/ names the base models and codecs), pictures and sounds
writes  what it draws and sounds, in the folder --to; one line for each answer, or one JSON object a line with --json;
        with --export that folder alone, whole or not at all
done    when everything has its answer; exits 1 at the first file that cannot be read

$ python sample.py out/a1_small --image data/small/captions/images/000000.png
$ python sample.py out/a2_small --image data/small/instruct/images/000000.png --prompt "How many shapes can you see?"
$ python sample.py out/a2_small --image data/small/instruct/images/000000.png      # on a terminal: a chat
$ python sample.py out/b4_small --draw "a red circle above a blue square" --n 4
$ python sample.py out/b4_small --sound "two high bright tones, rising, fading"
$ python sample.py out/b4_small --image data/small/captions/images/000000.png --audio data/small/sounds/audio/000000.wav
$ python sample.py out/b4_small --export out/b4_small_qwen3        # a stock Qwen3: transformers alone loads it
$ python sample.py out/a2_small --export out/a2_small_graft        # adapter and connector: model.load_exported
"""
import argparse
import json
import sys
from pathlib import Path

import soundfile
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from PIL import Image

from common import frozen_dtype, init_ranks, load_checkpoint, require_vacant, writing
from data import read_audio, read_image
from tools.export import export_graft, export_tokens
from model import Speaker, load_tokenizer, load_vlm, require_frozen
from token_model import load_token_lm, read_text, write_codes
from uti import UTI, Grammar, TokenSpace, tokenizer_sha256

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('run', help='out dir of train_a1.py, train_a2.py, train_b3.py or train_b4.py')
parser.add_argument('--image', nargs='+', default=[], metavar='FILE', help='one or more pictures')
parser.add_argument('--audio', nargs='+', default=[], metavar='FILE', help='one or more sounds to describe (B3, B4)')
parser.add_argument('--draw', nargs='+', default=[], metavar='TEXT', help='pictures of what each text says (B3, B4)')
parser.add_argument('--sound', nargs='+', default=[], metavar='TEXT', help='sounds of what each text says (B3, B4)')
parser.add_argument('--n', type=int, default=1, help='of each picture or sound, seeds --seed, --seed + 1, ... (B3, B4)')
parser.add_argument('--guidance', type=float, help='above 1 a text to draw or to sound counts more (B3, B4)')
parser.add_argument('--to', default='out/samples', metavar='FOLDER', help='where pictures and sounds go')
parser.add_argument('--prompt', help='what to ask (A2); without it: a chat on a terminal, else a description')
parser.add_argument('--export', metavar='FOLDER', help='write the run as a model that others load, and nothing else')
parser.add_argument('--json', action='store_true', help='one JSON object a line')
parser.add_argument('--max_new_tokens', type=int, default=128)
parser.add_argument('--temperature', type=float, help='0 is greedy, as texts are without it; what is drawn and '
                    'sounded has the temperature of its run')
parser.add_argument('--top_p', type=float, default=1.0)
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--device', default='auto')
parser.add_argument('--llm', help='where the language model is now, if not where the checkpoint says')
parser.add_argument('--vision', help='the same for the vision tower')
parser.add_argument('--image_codec', help='the same for the codec of pictures')
parser.add_argument('--audio_codec', help='the same for the codec of sounds')
args = parser.parse_args()
if args.max_new_tokens < 1 or (args.temperature or 0) < 0 or not 0 < args.top_p <= 1 or args.n < 1:
    parser.error('wanted --max_new_tokens and --n of at least 1, --temperature of at least 0, --top_p above 0 and up '
                 'to 1')
if bool(args.image or args.audio or args.draw or args.sound) == bool(args.export):
    parser.error('wanted --image, --audio, --draw or --sound, or --export alone')

if args.export:
    require_vacant(args.export)
if args.draw or args.sound:
    with writing(args.to):
        Path(args.to).mkdir(parents=True, exist_ok=True)

# the model, as its checkpoint describes it
_, _, device = init_ranks('cpu' if args.export else args.device)
dtype = 'auto' if args.export else frozen_dtype('auto', device)   # what leaves has the precision of its base
tensors, meta, _ = load_checkpoint(Path(args.run) / 'ckpt', device)
stage, settings = meta.get('stage'), meta['settings']
if stage not in ('a1', 'a2', 'b3', 'b4'):
    raise SystemExit(f'{args.run} is a run of stage {stage!r}, wanted a1, a2, b3 or b4')


def adapted(llm):
    """The LoRA of the run's settings, put into a language model in its place."""
    return get_peft_model(llm, LoraConfig(r=settings['lora_r'], lora_alpha=settings['lora_alpha'],
                                          target_modules=settings['lora_targets'], task_type='CAUSAL_LM'))


# Track B: describe, draw, sound
if stage in ('b3', 'b4'):
    if args.prompt:
        raise SystemExit(f'{args.run} is a {stage.upper()} run, which describes and takes no --prompt; use an A2 run '
                         'to ask, or --draw or --sound')
    model, space = meta['model'], TokenSpace(*(meta['token_space'][name] for name in ('base', 'image', 'audio')))
    model['llm'] = args.llm or model['llm']
    grammar = Grammar(space)
    if not args.export:
        named = {f'{kind}_codec': getattr(args, f'{kind}_codec') or settings[f'{kind}_codec']
                 for kind in ('image', 'audio') if getattr(space, kind)}
        for name, where in named.items():
            if not where:
                raise SystemExit(f'{args.run} was trained without its codecs: say with --{name} where this one is')
        prefixes = {f'{kind}_prefix': settings.get(f'{kind}_prefix', '') for kind in ('image', 'audio')}
        codecs = UTI.of_space(space, args.run, model['llm'], **named, **prefixes)
    lm = load_token_lm(**model, space=space, dtype=dtype, device=device)
    lm.load_rows(tensors['rows'], args.run)
    frozen, adapter = [(name, p) for name, p in lm.named_parameters() if not p.requires_grad], None
    if stage == 'b4' and not settings['full_tune']:
        adapter = adapted(lm.llm)
        set_peft_model_state_dict(adapter, tensors['tuned'])
    elif stage == 'b4':
        frozen = [(name, p) for name, p in frozen if name not in tensors['tuned']]
        lm.llm.model.layers.float(), lm.llm.model.norm.float()
        missing = lm.load_state_dict(tensors['tuned'], strict=False).missing_keys
        assert not {name for name in missing if name.startswith('llm.model.layers.')}
    lm.eval()
    if args.export:
        tokenizer = load_tokenizer(model['llm'])
        if tokenizer_sha256(tokenizer) != space.base['tokenizer_sha256']:
            raise SystemExit(f'{model["llm"]} has another tokenizer than {args.run} was made with: restore it')
        require_frozen(frozen, meta['frozen_sha256'], args.run)
        verdict = export_tokens(lm, adapter, tokenizer, args.export, args.run, meta)
        print(f'{args.export}: {verdict}; see README.md in it')
        sys.exit(0)
    seeds = list(range(args.seed, args.seed + args.n))

    def answer(where, said, **more):
        print(json.dumps({**where, **more, 'text': said}) if args.json else f'{" ".join(where.values())}: {said}')

    for kind, task, files in (('image', 'i2t', args.image), ('audio', 'a2t', args.audio)):
        for file in files:
            grammar.length(kind)                       # one line when this token space has none of it
            if kind == 'image':
                codes, _ = codecs.encode_image([read_image(file, space.image['size'])])
            else:
                codes, _ = codecs.encode_audio([read_audio(file, space.audio['sample_rate'], space.audio['samples'])])
            for seed, ids in zip(seeds, read_text(lm, grammar, task, [codes[0]] * args.n, args.max_new_tokens,
                                                  args.temperature or 0.0, args.top_p, seeds)):
                answer({kind: file}, codecs.tokenizer.decode(ids, skip_special_tokens=True).strip(), seed=seed)
    guidance = args.guidance or (settings['guidance'][0] if stage == 'b4' else settings['guidance'])
    temperature = settings['temperature'] if args.temperature is None else args.temperature
    for kind, task, texts in (('image', 't2i', args.draw), ('audio', 't2a', args.sound)):
        for k, text in enumerate(texts):
            room = settings['max_seq_len'] - grammar.length(kind) - 3
            ids = codecs.encode_text(text)[:room]      # as training cuts a prompt
            codes = write_codes(lm, grammar, task, [ids] * args.n, temperature, 0, args.top_p, guidance, seeds)
            for seed, one in zip(seeds, codes):
                file = Path(args.to) / (f'draw_{k}_{seed}.png' if kind == 'image' else f'sound_{k}_{seed}.wav')
                if kind == 'image':
                    made = codecs.decode_image(one[None], [{'size': space.image['size']}])[0]
                    with writing(file):
                        Image.fromarray(made.transpose(1, 2, 0)).save(file)
                else:
                    whole = {'n_samples': space.audio['samples'], 'sample_rate': space.audio['sample_rate']}
                    made = codecs.decode_audio(one[None], [whole])[0]
                    with writing(file):
                        soundfile.write(file, made, space.audio['sample_rate'])
                answer({kind: str(file)}, text, seed=seed)
    sys.exit(0)

# Track A: caption, ask, chat
if args.audio or args.draw or args.sound:
    raise SystemExit(f'{args.run} is an {stage.upper()} run, which sees pictures only; use a B3 or B4 run for sounds '
                     'and to draw')
args.temperature = args.temperature or 0.0
chats, model = stage == 'a2', meta['model']
if args.prompt and not chats:
    raise SystemExit(f'{args.run} is an A1 run, which captions and takes no --prompt; use an A2 run to ask')
model.update({k: v for k, v in (('llm', args.llm), ('vision', args.vision)) if v})
vlm, adapter = load_vlm(**model, dtype=dtype, device=device), None
frozen = [(name, p) for name, p in vlm.named_parameters() if not p.requires_grad]
vlm.connector.load_state_dict(tensors['connector'])
if chats:
    adapter = adapted(vlm.llm)
    set_peft_model_state_dict(adapter, tensors['lora'])
if args.export:
    frozen_as = require_frozen(frozen, meta['frozen_sha256'], args.run)
    verdict = export_graft(vlm, adapter, args.export, args.run, meta, frozen_as)
    print(f'{args.export}: {verdict}; see README.md in it')
    sys.exit(0)
speaker = Speaker(vlm, model['llm'], model['vision'], settings['max_seq_len'])


def reply(turns, tokens):
    """The model's text after `turns`, [(question, answer), ..., (question, None)]; turns = None captions."""
    return speaker.say(tokens, turns, args.max_new_tokens, args.temperature, args.top_p, args.seed)


if chats and args.prompt is None and sys.stdin.isatty() and not args.json:
    if len(args.image) > 1:
        raise SystemExit(f'a chat is about one picture, found {len(args.image)}; give one, or a --prompt')
    tokens, turns = speaker.see(args.image[0]), []
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
        text = reply([(prompt, None)] if chats else None, speaker.see(image))
        print(json.dumps({'image': image, 'prompt': prompt, 'text': text}) if args.json else f'{image}: {text}')
